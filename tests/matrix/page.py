"""docs/matrix.md, written by a run of the whole matrix."""

import datetime
import platform
from importlib.metadata import version

from rlhf_args.methods import METHODS
from tests.matrix.cells import LAUNCHES, MODES

HEAD = """# What works

Every method in every train mode under every launch, run by `pytest -m matrix` and written by it: {count}.

{date}, Python {python}, {versions}.

Each cell was trained for two optimizer steps on a small Qwen2, in bfloat16 with gradient checkpointing, through
`bash rlhf_run.sh`; `one process` is one, the others are two that talk over gloo on a CPU (`LAUNCH=zero3
NUM_PROCESSES=2`; ddp is `LAUNCH=cpu`). Its result was then opened in a new process by transformers and PEFT alone:
whole, tokenizer there, weights moved, and it answers or scores. **works** is that, **refused** is refused with a
reason before a model is loaded, **fails** is everything else. On a GPU nothing of this table has been run yet.
"""


def write_page(found):
    """docs/matrix.md, from (method, mode, launch) -> Outcome of every cell."""
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
