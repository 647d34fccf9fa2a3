"""docs/matrix.md, written by a run of the matrix: the rows whose cells were all run; the others stay as they are."""

import datetime
import platform
from importlib.metadata import version

from tests.matrix.cells import JOBS, LAUNCHES, MODES

HEAD = """# What works

Written by `pytest -m matrix`, which runs every method in every train mode under every launch: {count}.

Python {python}, {versions}.

Each cell is a training of two optimizer steps on a small Qwen2, in bfloat16 with gradient checkpointing, with
`bash rlhf_run.sh` (KD, SeqKD, GKD: `bash gkd_run.sh`). `one process` is one process; the other launches have two
processes that communicate over gloo on a CPU (`LAUNCH=zero3 NUM_PROCESSES=2`; ddp is `LAUNCH=cpu`). A new process then
opens the result with transformers and PEFT alone. **works**: the result is complete, has its tokenizer, its weights
changed, and it answers or scores. **refused**: refused with a reason before a model is loaded. **fails**: everything
else. No cell has been run on a GPU.
"""


def write_page(found, before=""):
    """docs/matrix.md, from (method, mode, launch) -> Outcome of the cells run, and the page as it was `before`."""
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    today = datetime.date.today().isoformat()
    rows = dict(read_rows(before))
    for name in JOBS:
        for mode in MODES:
            cells = [found.get((name, mode, launch)) for launch in LAUNCHES]
            if all(cells):
                rows[name, mode] = [cell.state for cell in cells] + [today]
    states = [state for row in rows.values() for state in row[:-1]]
    head = HEAD.format(
        count=", ".join(f"{states.count(state)} {state}" for state in ("works", "refused", "fails")),
        python=platform.python_version(),
        versions=", ".join(f"{name} {version(name)}" for name in libraries),
    )
    lines = [head, f"| method | mode | {' | '.join(LAUNCHES)} | run on |", "|---|---|" + "---|" * (len(LAUNCHES) + 1)]
    ordered = [(name, mode) for name in JOBS for mode in MODES if (name, mode) in rows]
    lines += [f"| {name} | {mode} | {' | '.join(rows[name, mode])} |" for name, mode in ordered]
    reasons = {cell: outcome.reason for cell, outcome in found.items() if outcome.reason}
    lines += [""] + [f"- {' '.join(cell)}: {reason}" for cell, reason in reasons.items()] if reasons else []
    return "\n".join(lines) + "\n"


def read_rows(page):
    """((method, mode), [state a launch, ..., date]) of each row of a page with these launches."""
    lines = page.splitlines()
    if any(line.startswith(f"| method | mode | {' | '.join(LAUNCHES)} | run on |") for line in lines):
        for line in lines:
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if cells[0] in JOBS:
                yield (cells[0], cells[1]), cells[2:]
