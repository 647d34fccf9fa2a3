"""Printed lines: once for all processes, one fact per line."""

import sys

from utils.runtime.environment import is_main


def first_line(error: object) -> str:
    return str(error).strip().splitlines()[0]


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def say(line: str) -> None:
    if is_main():
        print(line, flush=True)


def warn(line: str) -> None:
    if is_main():
        print(f"warning   {line}", file=sys.stderr)
