"""PPO with each critic under each launch, two steps: `pytest -m matrix tests/matrix/test_critics.py`.

The matrix (test_matrix.py) has the default critics; these are the others, and those that read a reward model. Four
of the cells are slow tests too.
"""

import pytest

from tests.conftest import make_model, read_rows
from tests.matrix.cells import run_cell, width

LAUNCHES = ("one process", "ddp", "zero2", "zero3", "fsdp2")
CRITICS = [("full", "head"), ("full", "mlp")] + [(m, c) for m in ("lora", "qlora") for c in ("head", "mlp", "model")]
CELLS = [(mode, critic, launch) for launch in LAUNCHES for mode, critic in CRITICS]
SLOW = [("full", "mlp", "ddp"), ("lora", "mlp", "zero3"), ("lora", "model", "fsdp2"), ("qlora", "model", "zero2")]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("mode", "critic", "launch"), [pytest.param(*cell, marks=[pytest.mark.slow] * (cell in SLOW)) for cell in CELLS]
)
def test_each_critic_trains_under_each_launch(mode, critic, launch, warm, model_for, tmp_path):
    flags = ["--bf16", "--gradient_checkpointing", "--critic", critic, "--learning_rate", "1e-3"]
    if critic == "mlp":
        flags += ["--critic_layer", "0"]
    if critic == "model":
        wide = width(mode, launch)
        flags += ["--value_model_path", make_model(tmp_path / "value", seed=3, width=wide, layers=1 + (wide == 64))]
    done = run_cell(warm, model_for(mode, launch), tmp_path / "out", "PPO", mode, launch, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"--critic {critic}: " in done.stdout
    assert "of a fresh process equal those in memory" in done.stdout
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert len(lines) == 2 and all(line["critic_grad_norm"] > 0 for line in lines)
