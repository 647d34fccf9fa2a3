"""What is printed: once for all processes, one line a fact."""

import sys

from utils.runtime.environment import is_main


def first_line(error):
    return str(error).strip().splitlines()[0]


def one_line(message):
    return " ".join(str(message).split())


def say(line):
    if is_main():
        print(line, flush=True)


def warn(line):
    if is_main():
        print(f"warning   {line}", file=sys.stderr)
