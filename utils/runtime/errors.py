"""How a run ends early: refused (status 2), failed (1), stopped by a signal (128 + N), or started again."""

import contextlib
import difflib
import signal
import sys
from collections.abc import Iterable, Iterator

from utils.runtime import secrets


class Refused(ValueError):
    """The run cannot work as asked. problems: one line each: the given value, the accepted values, what to type."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def say(self) -> None:
        print("\n".join(f"refused: {secrets.hide(problem)}" for problem in self.problems), file=sys.stderr)


class Failed(RuntimeError):
    """The run failed. message: one line; details: the full text, for error.log."""

    def __init__(self, message: str, details: str | None = None) -> None:
        super().__init__(message)
        self.details = details or message


class Stopped(Exception):
    """Signal `number` ended the run after `step` steps; after at least one step, a checkpoint is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.number, self.step = number, step

    def __str__(self) -> str:
        saved = f"after step {self.step}, saved as checkpoint-{self.step}" if self.step else "before the first step"
        return f"stopped by {signal.Signals(self.number).name} {saved}"


class Again(Exception):
    """Start again from the newest checkpoint, with `words` added to the command line; message: the reason."""

    def __init__(self, words: list[str], message: str) -> None:
        super().__init__(message)
        self.words, self.details = words, message


def guess_name(given: str, known: Iterable[str]) -> str:
    """ ". Did you mean GRPO?" if a known name is similar to `given`, in any letter case, otherwise ""."""
    spelt = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), spelt, 1)
    return f". Did you mean {spelt[near[0]]}?" if near else ""


def refuse_if(problems: list[str] | None) -> None:
    if problems:
        raise Refused(problems)


@contextlib.contextmanager
def collecting(problems: list[str] | None) -> Iterator[None]:
    """Collect refusals in `problems` instead of raising (None: raise)."""
    try:
        yield
    except Refused as refusal:
        if problems is None:
            raise
        problems += [problem for problem in refusal.problems if problem not in problems]
