"""Choose good and bad answers from the scored answers, and write the files that train_rlhf.py reads."""

import collections
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rlhf_args.methods import METHODS, PAIR, PROMPT, RANKED, UNPAIRED
from rlhf_args.rejection_config import RejectionConfig
from utils.data.columns import check_text
from utils.rejection.folder import Group, Line
from utils.rejection.scoring import as_completion

# {columns: the first method that trains on them}; the file has the method's name
FILES = {method.columns: name for name, method in reversed(METHODS.items()) if method.columns != PROMPT}
TINY = 1e-12  # least difference between the scores of a pair


def file_for(method: str) -> str | None:
    """The file that a method of train_rlhf.py trains on; None if the method samples its own answers."""
    return FILES.get(METHODS[method].columns)


def candidates(completions: Iterable[Group], scores: Iterable[Group]) -> Iterator[Group]:
    """Completions merged with their scores, by prompt. An answer without a score line has "failed"."""
    scored = iter(scores)
    ahead = next(scored, None)
    for number, group in completions:
        found = {}
        while ahead is not None and ahead[0] <= number:
            found = {line["sample"]: line for line in ahead[1]} if ahead[0] == number else {}
            ahead = next(scored, None)
        yield number, [{**line, **found.get(line["sample"], {"failed": "not scored"})} for line in group]


def choose_answers(
    answers: list[Line], config: RejectionConfig
) -> tuple[list[Line], list[Line], str | None, collections.Counter[str]]:
    """(good, bad, reason if none was chosen, number of excluded answers by reason) of one prompt.

    good and bad are sorted, best first. In a pair the best good answer is chosen over the worst bad one, and so on. An
    answer that was cut at max_new_tokens can be bad, and good only with keep_cut.
    """
    gone: collections.Counter[str] = collections.Counter()
    ranked: list[Line] = []
    seen: set[str] = set()
    for answer in sorted(
        answers, key=lambda answer: not answer.get("ended")
    ):  # of two equal texts keep the one that ended
        reason = unusable(answer, seen)
        if reason:
            gone[reason] += 1
        else:
            seen.add(answer["completion"])
            ranked.append(answer)
    ranked.sort(key=lambda answer: (-answer["score"], answer["sample"]))
    ended = [answer for answer in ranked if answer["ended"] or config.keep_cut]
    if not ended:
        return [], [], "no answer that ended", gone
    if config.select == "threshold":
        good = [answer for answer in ended if answer["score"] >= config.threshold]
        bad = [answer for answer in ranked if answer["score"] < config.threshold]
        return good, bad, None if good else "none reaches the threshold", gone
    best, worst = ranked[0]["score"], ranked[-1]["score"]
    if best == worst and (len(ranked) > 1 or gone["duplicate"]):
        return [], [], "all answers equal", gone
    if config.select == "pairs" and (len(ranked) < 2 or ended[0]["score"] - worst < max(config.min_margin, TINY)):
        return [], [], "no pair of that margin", gone
    take = config.select_k if config.select == "top_k" else 1
    good = ended[:take]
    worse = [answer for answer in ranked if answer["score"] < good[-1]["score"]]
    return good, worse[-take:], None, gone


def unusable(answer: Line, seen: set[str]) -> str | None:
    """The reason that an answer can be neither chosen nor rejected, or None."""
    if "failed" in answer:
        return "failed"
    written = answer["completion"]
    if check_text(written, "completion"):
        return "unreadable"  # a list of messages turned into text, which train_rlhf.py would refuse
    return "empty" if not written else "duplicate" if written in seen else None


def rows_of(
    name: str, prompt: Any, good: list[Line], bad: list[Line], config: RejectionConfig
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The rows of one prompt for the file `name`, each with its `traced` answers."""
    pairs = [
        (chosen, rejected)
        for chosen, rejected in zip(good, reversed(bad), strict=False)
        if chosen["score"] - rejected["score"] >= max(config.min_margin, TINY)
    ]
    columns = METHODS[name].columns
    if columns in (PAIR, RANKED):
        for chosen, rejected in pairs:
            sides = {"chosen": chosen, "rejected": rejected}
            texts = {side: as_completion(prompt, answer["completion"]) for side, answer in sides.items()}
            yield {"prompt": prompt, **texts}, {side: traced(answer) for side, answer in sides.items()}
    elif columns == UNPAIRED:
        for label, answers in ((True, good), (False, bad)):
            for answer in answers:
                completion = as_completion(prompt, answer["completion"])
                yield {"prompt": prompt, "completion": completion, "label": label}, traced(answer)
    else:
        for answer in good:
            completion = as_completion(prompt, answer["completion"])
            chat = isinstance(prompt, list)
            row = {"messages": prompt + completion} if chat else {"prompt": prompt, "completion": completion}
            yield row, traced(answer)


def traced(answer: Line) -> dict[str, Any]:
    """Identity and score of an answer, for the provenance of a row."""
    return {name: answer[name] for name in ("sample", "score", "scores")}


class Files:
    """Writes rows by file name, and moves the files into `folder` when all are written."""

    def __init__(self, folder: Path, names: list[str], chunk_size: int | None) -> None:
        self.folder, self.chunk_size = Path(folder), chunk_size
        self.counts = dict.fromkeys(names, 0)
        self.handles: dict[str, TextIO] = {}
        self.made = Path(folder) / "selected.part"

    def __enter__(self) -> "Files":
        shutil.rmtree(self.made, ignore_errors=True)
        self.made.mkdir()
        self.stack = contextlib.ExitStack()
        for name in self.counts:
            self.open(name)
        return self

    def open(self, name: str) -> None:
        file = self.made / path_of("", name, self.chunk_size)
        if self.chunk_size:
            file.mkdir(exist_ok=True)
            file /= f"{self.counts[name] // self.chunk_size:05d}.jsonl"
        if name in self.handles:
            self.handles[name].close()
        self.handles[name] = self.stack.enter_context(open(file, "w", encoding="utf-8"))

    def add(self, name: str, row: Line) -> None:
        if self.chunk_size and self.counts[name] and self.counts[name] % self.chunk_size == 0:
            self.open(name)
        self.handles[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[name] += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stack.close()
        if kind is None:
            for name, chunked in itertools.product(FILES.values(), (None, 1)):  # of an earlier selection
                old = Path(path_of(self.folder, name, chunked))
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            for made in sorted(self.made.iterdir()):
                os.replace(made, self.folder / made.name)
        shutil.rmtree(self.made)


def path_of(folder: Path | str, name: str, chunk_size: int | None) -> str:
    """The path of the rows of `name`: a file, or a folder of files with chunk_size rows."""
    return str(Path(folder) / (name.lower() if chunk_size else f"{name.lower()}.jsonl"))
