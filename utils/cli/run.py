"""One training run: the flags that were typed, the rows that they name, and the text made of these."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common_args import CommonArgs
from rlhf_args.methods import EVERY, Method
from utils.data.rows import Rows
from utils.runtime.errors import collecting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from utils.data.prepare import Prepared


@dataclass
class Run:
    """What every stage of a training reads. utils/training/chapters.py fills it: from_words, then prepare_text."""

    argv: list[str]  # the words of the command line
    name: str  # of the method
    common: CommonArgs  # the flags that every method shares
    config: TrainingArguments  # the method's own flags, with all of TRL's
    rows: Rows  # every row of the data, checked
    problems: list[str] | None = None  # refusals so far, to be said at once; None: each is raised where it is found
    tokenizer: PreTrainedTokenizerBase | None = None  # None: the text could not be prepared
    train: Prepared | None = None
    held_out: Prepared | None = None

    @property
    def method(self) -> Method:
        """The method's row of the table."""
        return EVERY[self.name]

    def collecting(self) -> AbstractContextManager:
        """A stage whose refusal joins `problems`, so that the stages behind it are still checked."""
        return collecting(self.problems)
