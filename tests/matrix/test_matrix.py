"""Every method in every train mode under every launch: `pytest -m matrix`, which writes docs/matrix.md.

A sixth of it is part of `pytest -m slow`: each method under every second launch, in one of the modes in turn.

A method that joins the table of methods joins this one by itself.
"""

from importlib.metadata import version

import pytest

from tests.conftest import ROOT
from tests.matrix.cells import CELLS, JOBS, LAUNCHES, MODES, Outcome, expected, judge
from tests.matrix.page import write_page


def in_turn(name, mode, launch):
    """True if the cell is part of the slow tests. Over the table each mode meets each launch."""
    turn, other = divmod((list(JOBS).index(name) + list(LAUNCHES).index(launch)) % (2 * len(MODES)), 2)
    return not other and turn == MODES.index(mode)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "mode", "launch"), [pytest.param(*cell, marks=[pytest.mark.slow] * in_turn(*cell)) for cell in CELLS]
)
def test_cell(name, mode, launch, warm, model_for, tmp_path, record_property):
    outcome = judge(warm, model_for(mode, launch), tmp_path / "out", name, mode, launch)
    record_property("cell", [name, mode, launch, outcome.state, outcome.reason])  # for tests/conftest.py
    assert outcome.state == expected(name, mode), outcome


def test_the_page_tells_every_state_and_reason():
    found = dict.fromkeys(CELLS, Outcome("works"))
    found[CELLS[0]] = Outcome("fails", "ValueError: no")
    page = write_page(found)
    assert f"{len(CELLS) - 1} works, 0 refused, 1 fails" in page
    assert f"- {' '.join(CELLS[0])}: ValueError: no" in page
    assert page.count("| fails |") == 1


def test_a_row_that_was_not_run_again_stays_with_its_date():
    name, mode, _ = CELLS[0]
    page = write_page(dict.fromkeys(CELLS, Outcome("works"))).replace("| 20", "| 19")
    again = write_page({cell: Outcome("refused", "why") for cell in CELLS if cell[:2] == (name, mode)}, page)
    first, second = [line for line in again.splitlines() if line.startswith(f"| {name} |")][:2]
    assert first.count("refused") == len(LAUNCHES) and "| 20" in first
    assert second.count("works") == len(LAUNCHES) and "| 19" in second


def test_the_page_in_docs_is_of_today():
    page = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [name for name in JOBS for _ in MODES]
    assert ", 0 fails." in page
    for name in ("torch", "transformers", "trl", "deepspeed"):
        assert f"{name} {version(name).split('+')[0]}" in page
