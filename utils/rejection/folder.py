"""The folder of a rejection sampling: prompts, and lines by prompt and sample. A kill at any moment loses one batch.

prompts.jsonl is written once, as a whole. completions.jsonl and scores.jsonl are in order of prompt and sample. New
lines are appended to files in NAME.parts/, a batch in one write, and merged into NAME.jsonl at the end of a stage. The
lines are not held in memory: two numbers per sample say where its line is.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import filelock
import numpy

from utils.data import columns, files, template
from utils.data.rows import Pass, conclude, count_held, text_key, walk
from utils.rewards.server import Prompt
from utils.runtime import environment
from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
Line = dict[str, Any]  # a line of a .jsonl file
Group = tuple[int, list[Line]]  # prompt number, its lines
LOCK_SECONDS = 20  # a run that is being killed may take so long to end


class Prompts:
    """Lines of prompts.jsonl by number: {"where", "tokens", "prompt", "further"}. numbers: the prompts of this run."""

    def __init__(self, file: Path, eval_fraction: float, held_out: bool, seed: int) -> None:
        lengths, tokens = [], []
        with open(file, "rb") as handle:
            for line in handle:
                lengths.append(len(line))
                tokens.append(json.loads(line)["tokens"])
        self.handle = open(file, "rb")
        self.offsets = numpy.cumsum([0, *lengths[:-1]], dtype=numpy.int64)
        self.tokens = numpy.array(tokens, dtype=numpy.int32)
        held = set(random.Random(seed).sample(range(len(tokens)), count_held(len(tokens), eval_fraction)))
        self.numbers = numpy.array([n for n in range(len(tokens)) if (n in held) == held_out], dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> Line:
        self.handle.seek(self.offsets[number])
        return json.loads(self.handle.readline())


def write_prompts(
    file: Path | None,
    rows: files.FileRows,
    notes: list[str],
    tokenizer: Tokenizer = None,
    system: str | None = None,
    longest: int | None = None,
    reference: str | None = None,
) -> tuple[int, Pass, int]:
    """Write each prompt of `rows` once (file None: only check). Returns prompts, the Pass, duplicates. Raises Refused.

    longest: maximum tokens of a prompt. reference: column whose values are answers.
    """
    from rlhf_args.methods import PROMPT

    found, seen, count, duplicates = Pass(), set(), 0, 0
    part = Path(f"{file}.part") if file else Path(os.devnull)
    with open(part, "w", encoding="utf-8") as handle:
        for where, values in walk(rows, PROMPT, notes, found):
            prompt = values["prompt"]
            if system and isinstance(prompt, str):
                found.problems.append(f"{where}: plain text, and --system_prompt is for chats. Leave it out")
                continue
            if system and prompt[0]["role"] not in ("system", "developer"):
                prompt = [{"role": "system", "content": system}, *prompt]
            problem = check_reference(prompt, values["further"].get(reference), reference)
            if problem:
                found.problems.append(f"{where}: {problem}")
                continue
            key = text_key(prompt, values["further"])
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
            if tokenizer and len(seen) == 1:
                notes += template.fit_tokenizer(tokenizer, chat=isinstance(prompt, list))
            try:
                tokens = len(template.prompt_ids(tokenizer, prompt)) if tokenizer else len(columns.text_of(prompt))
            except Exception as error:  # noqa: BLE001  templates raise what they like
                found.problems.append(f"{where}: the chat template refuses it ({template.say_error(error)})")
                continue
            if longest is not None and tokens > longest:
                found.dropped.append((where, "prompt leaves no room for an answer", values))
                continue
            line = {"where": where, "tokens": tokens, "prompt": prompt, "further": values["further"]}
            handle.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            count += 1
    found.problems += rows.problems
    try:
        conclude(found, PROMPT, notes)
    except Refused:
        if file:
            part.unlink()
        raise
    if file:
        os.replace(part, file)
    return count, found, duplicates


def check_reference(prompt: Prompt, answer: Any, name: str | None) -> str | None:
    """The problem of an answer in the data, or None. The answer may be missing."""
    if answer in (None, "", []):
        return None
    if isinstance(answer, list) and isinstance(prompt, str):
        return f'"{name}" is a list, and the prompt is plain text'
    return columns.check_text(answer, name or "")


class Lines:
    """The lines of one stage, {"prompt": number, "sample": number, ...}. A line with "failed" is tried again."""

    def __init__(self, folder: Path, name: str, prompts: int, samples: int) -> None:
        self.file, self.parts = Path(folder) / f"{name}.jsonl", Path(folder) / f"{name}.parts"
        self.shape = prompts, samples
        self.handle: io.FileIO | None = None

    def files(self) -> list[Path]:
        return [*([self.file] if self.file.exists() else []), *sorted(self.parts.glob("*.jsonl"))]

    def find(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(places, done), both (prompts, samples): file and offset of a line, -1 for none; True if it did not fail.

        The last such line of a sample counts. A line that a kill cut short is ignored.
        """
        places: numpy.ndarray = numpy.full(self.shape, -1, dtype=numpy.int64)
        done: numpy.ndarray = numpy.zeros(self.shape, dtype=bool)
        for number, file in enumerate(self.files()):
            offset = 0
            with open(file, "rb") as handle:
                for line in handle:
                    if line.endswith(b"\n"):
                        values = json.loads(line)
                        key, sound = (values["prompt"], values["sample"]), "failed" not in values
                        if sound or not done[key]:
                            places[key], done[key] = number << 44 | offset, sound
                    offset += len(line)
        return places, done

    def append(self, lines: list[Line]) -> None:
        """Write a batch. A kill during the write keeps none or its first lines."""
        if self.handle is None:
            self.parts.mkdir(parents=True, exist_ok=True)
            rank = os.environ.get("RANK", 0)
            self.handle = open(self.parts / f"{time.time_ns()}-{rank}-{os.getpid()}.jsonl", "ab", buffering=0)
        self.handle.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        os.fsync(self.handle.fileno())

    def merge(self) -> None:
        """Write all lines in order to one file, and move it into place."""
        if self.handle:
            self.handle.close()
            self.handle = None
        if self.parts.exists():
            places, part = self.find()[0], Path(f"{self.file}.part")
            with contextlib.ExitStack() as stack:
                sources = [stack.enter_context(open(file, "rb")) for file in self.files()]
                whole = stack.enter_context(open(part, "wb"))
                for place in places[places >= 0].tolist():  # row by row: in order of prompt and sample
                    source = sources[place >> 44]
                    source.seek(place & (1 << 44) - 1)
                    whole.write(source.readline())
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(part, self.file)
            shutil.rmtree(self.parts)
        elif not self.file.exists():
            self.file.touch()

    def groups(self) -> Iterator[Group]:
        """The merged lines by prompt, in order."""
        with open(self.file, encoding="utf-8") as handle:
            yield from (
                (number, list(lines))
                for number, lines in itertools.groupby(map(json.loads, handle), key=lambda line: line["prompt"])
            )


# ── lock and settings ────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this run; the main process holds the lock. Raises Refused if another run has it."""
    if not environment.is_main():
        yield
        return
    file = folder / ".lock"
    try:
        held = filelock.FileLock(file, LOCK_SECONDS, poll_interval=0.5, fallback_to_soft=False).acquire()
    except filelock.Timeout:
        raise Refused(
            [f"--output_dir {folder}: process {file.read_text()} is at work in it. Wait, or end it"]
        ) from None
    with held:
        file.write_text(str(os.getpid()))
        yield


def read_settings(folder: Path | str) -> dict[str, Any]:
    file = Path(folder) / "settings.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def compare_settings(folder: Path, stage: str, wanted: dict[str, Any], way_out: str) -> Iterator[str]:
    """A problem for each setting that differs from the settings of the stage's lines in `folder`."""
    kept = read_settings(folder).get(stage)
    if kept is None:
        return
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            yield (
                f"--output_dir {folder}: holds a run with {name} {json.dumps(kept.get(name), ensure_ascii=False)}, "
                f"this run has {json.dumps(wanted.get(name), ensure_ascii=False)}. {way_out}"
            )


def keep_settings(folder: Path, stage: str, wanted: dict[str, Any]) -> None:
    settings = read_settings(folder) | {stage: wanted}
    part = Path(folder) / "settings.json.part"
    part.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, Path(folder) / "settings.json")
