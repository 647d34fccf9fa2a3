"""One training run: its flags, its rows, and the prepared text."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common_args import CommonArgs
from rlhf_args.methods import EVERY, Method
from utils.data.prepare import Prepared
from utils.data.rows import Rows
from utils.runtime.errors import collecting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


@dataclass
class Run:
    """The state that all stages of a training share. Filled by chapters.from_words and chapters.prepare_text."""

    argv: list[str]  # the command line
    name: str  # the method's name
    common: CommonArgs  # the flags that all methods share
    config: TrainingArguments  # the method's own flags and TRL's
    rows: Rows  # the data, checked row by row
    problems: list[str] | None = None  # refusals, printed together at the end of the checks; None: raise the first
    tokenizer: PreTrainedTokenizerBase = None  # set by prepare_text; None if the text is refused
    train: Prepared = field(default_factory=Prepared)
    held_out: Prepared = field(default_factory=Prepared)

    @property
    def method(self) -> Method:
        """The method's row of the table in rlhf_args/methods.py."""
        return EVERY[self.name]

    def collecting(self) -> AbstractContextManager:
        """A stage of the checks: its refusals join `problems`, and the next stage is still checked."""
        return collecting(self.problems)
