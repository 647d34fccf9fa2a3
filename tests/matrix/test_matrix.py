"""Every method in every train mode under every launch: `pytest -m matrix`. The whole of it writes docs/matrix.md.

A method that joins the table of methods joins this one by itself.
"""

import datetime
import platform
from importlib.metadata import version

import pytest

from rlhf_args.methods import METHODS
from tests.conftest import ROOT
from tests.matrix.cells import CELLS, LAUNCHES, MODES, Outcome, expected, judge

HEAD = """# What works

Every method in every train mode under every launch, run by `pytest -m matrix` and written by it: {count}.

{date}, Python {python}, {versions}.

Each cell was trained for two optimizer steps on a tiny Qwen2, in bfloat16 with gradient checkpointing, through
`bash rlhf_run.sh`; `one process` is one, the others are two that talk over gloo on a CPU (`LAUNCH=zero3
NUM_PROCESSES=2`; ddp is `LAUNCH=cpu`). Its result was then opened in a new process by transformers and PEFT alone:
whole, tokenizer there, weights moved, and it answers or scores. **works** is that, **refused** is refused with a
reason before a model is loaded, **fails** is everything else. On a GPU nothing of this table has been run yet.
"""


@pytest.fixture(scope="session")
def outcomes():
    """(method, mode, launch) -> Outcome of each cell that was run; a whole matrix is written to docs/matrix.md."""
    found = {}
    yield found
    if len(found) == len(CELLS):
        (ROOT / "docs" / "matrix.md").write_text(write_page(found), encoding="utf-8")


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "mode", "launch"), CELLS)
def test_cell(name, mode, launch, warm, tiny_model, tmp_path, outcomes):
    outcome = outcomes[name, mode, launch] = judge(warm, tiny_model, tmp_path / "out", name, mode, launch)
    assert outcome.state == expected(name, mode), outcome


def write_page(found):
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    states = [outcome.state for outcome in found.values()]
    head = HEAD.format(
        count=", ".join(f"{states.count(state)} {state}" for state in ("works", "refused", "fails")),
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        versions=", ".join(f"{name} {version(name)}" for name in libraries),
    )
    lines = [head, f"| method | mode | {' | '.join(LAUNCHES)} |", "|---|---|" + "---|" * len(LAUNCHES)]
    for name in METHODS:
        for mode in MODES:
            cells = [found[name, mode, launch].state for launch in LAUNCHES]
            lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
    reasons = {cell: outcome.reason for cell, outcome in found.items() if outcome.reason}
    lines += [""] + [f"- {' '.join(cell)}: {reason}" for cell, reason in reasons.items()] if reasons else []
    return "\n".join(lines) + "\n"


def test_the_page_tells_every_state_and_reason():
    found = dict.fromkeys(CELLS, Outcome("works"))
    found[CELLS[0]] = Outcome("fails", "ValueError: no")
    page = write_page(found)
    assert f"{len(CELLS) - 1} works, 0 refused, 1 fails" in page
    assert f"- {' '.join(CELLS[0])}: ValueError: no" in page
    assert page.count("| fails |") == 1


def test_the_page_in_docs_is_of_today():
    page = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [name for name in METHODS for _ in MODES]
    for name in ("torch", "transformers", "trl", "deepspeed"):
        assert f"{name} {version(name).split('+')[0]}" in page
