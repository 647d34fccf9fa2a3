"""The jsonl files of a run, a line a logged step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.runtime.paths import write_whole

if TYPE_CHECKING:
    from transformers import TrainerState


def evaluated_at(state: TrainerState) -> set[int]:
    """The steps after which the trainer has evaluated, as its own log has them."""
    return {line["step"] for line in state.log_history if "eval_loss" in line}


def append_line(path: Path, values: dict) -> None:
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a file, without a last one that a kill cut short."""
    lines = open(path, encoding="utf-8").readlines() if os.path.exists(path) else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep(path: Path, wanted: Callable[[int], bool]) -> None:
    """Leaves the lines of the steps that are wanted: a run that goes on logs the others again."""
    if path.exists():
        kept = [line for line in read_lines(path) if wanted(line["step"])]
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
