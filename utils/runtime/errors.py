"""How a run ends early: refused (status 2), failed (1), stopped by a signal (128 + N), or started again."""

import contextlib
import signal
import sys

from utils.runtime import secrets


class Refused(ValueError):
    """The run cannot work as asked. `problems`: one line each, what was given, what is accepted, what to type."""

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = problems

    def say(self):
        print("\n".join(f"refused: {secrets.hide(problem)}" for problem in self.problems), file=sys.stderr)


class Failed(RuntimeError):
    """The run ended for a reason that one line says; `details` is the whole of it, for error.log."""

    def __init__(self, message, details=None):
        super().__init__(message)
        self.details = details or message


class Stopped(Exception):
    """Signal `number` ended the run after `step` steps; a checkpoint of the last one is saved, if there was one."""

    def __init__(self, number, step):
        super().__init__(number, step)
        self.number, self.step = number, step

    def __str__(self):
        saved = f"after step {self.step}, saved as checkpoint-{self.step}" if self.step else "before the first step"
        return f"stopped by {signal.Signals(self.number).name} {saved}"


class Again(Exception):
    """Start again from the newest checkpoint, with `words` added to the command line; `message` says why."""

    def __init__(self, words, message):
        super().__init__(message)
        self.words, self.details = words, message


def refuse_if(problems):
    if problems:
        raise Refused(problems)


@contextlib.contextmanager
def collecting(problems):
    """Collect refusals in `problems`, each line once, instead of raising (None: raise)."""
    try:
        yield
    except Refused as refusal:
        if problems is None:
            raise
        problems += [problem for problem in refusal.problems if problem not in problems]
