"""The parts that all benchmarks share: run a command, call a function in a new process, print results.

A benchmark prints a line for each measurement. The last line of its stdout is one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "models/SmolLM2-135M-Instruct"  # python -m utils.demo_model
CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT = dict(os.environ)  # before an imported library changes it


def make_parser(doc: str) -> argparse.ArgumentParser:
    """doc: the script's docstring, shown by --help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(command: Sequence[Any], **env: str) -> str:
    """stdout of a command started in the repository root.

    Raises:
        RuntimeError: the exit status is not 0; the message has the end of stderr.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(words)[:500]}\n{done.stderr[-2000:]}")
    return done.stdout


def last_json(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


def call(function: Callable, *args: Any, **env: str) -> Any:
    """Result of a benchmark's function, called in a new process. Arguments and result are converted to JSON."""
    module = Path(function.__code__.co_filename).stem
    code = "import json, sys\nfrom utils.runtime import environment\nenvironment.calm_libraries()\n"
    code += f"from bench import {module}\n"
    code += f"print(json.dumps({module}.{function.__name__}(*json.loads(sys.argv[1]))))"
    return last_json(run([sys.executable, "-c", code, json.dumps(args)], **env))


def as_flags(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def order_of(sides: Sequence[str], number: int) -> Sequence[str]:
    """The sides in the order of round `number`: reversed in odd rounds, so that no side always runs first."""
    return sides[::-1] if number % 2 else sides


def seconds_of(function: Callable, *args: Any, **kwargs: Any) -> float:
    begun = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - begun


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (None for a single value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def finish(bench: str, /, **result: Any) -> None:
    """Print the last line."""
    print(json.dumps({"bench": bench, **result}))
