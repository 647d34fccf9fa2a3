"""The same data and seed give the same training however it is spread: `pytest -m matrix -k invariance`.

Four rows a step, as one batch, as two batches of two in turn, and as two processes with two each under every engine.
In float32 these differ in the order of summation alone, which moves a sum by some 1e-7 of its size and a gradient here
by less than 1e-8. Adam divides a gradient by its size, and so noise by the size of noise: with its epsilon raised to
1e-4 a step is off by a ten-thousandth of the learning rate at most. Hence the tolerances: losses to 2e-6 of their
size, weights to a thousandth of the learning rate, over three steps. The spread ones also recompute activations
(gradient checkpointing), which must change nothing.
"""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_args.methods import METHODS
from tests.conftest import read_rows
from tests.matrix.cells import JOBS, run_cell

RATE, STEPS = 1e-3, 3
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, RATE / 1000
# launch, rows a batch and process, batches a step
WHOLE = ("one process", 4, 1)
IN_TURN = ("one process", 2, 2)
SPREAD = [("ddp", 2, 1), ("zero2", 2, 1), ("zero3", 2, 1), ("fsdp2", 2, 1)]
SPREAD_IN_TURN = ("zero2", 1, 2)

# Two kinds of loss are not the same number when a batch is split, by definition and on one GPU too:
# a likelihood that is the mean over the tokens of a batch: the same where all answers are of one length, as here;
TOKEN_MEAN = ("CPO", "CPOSimPO", "ORPO")
# and KTO's KL term, estimated from a batch: its loss without that term is tested in all layouts, the loss with it in
# those that have two rows a batch and process, over which TRL averages the estimate.
WITHOUT_KL = {"KTO": ["--loss_type", "apo_zero_unpaired"]}


@pytest.fixture
def train(warm, model_for, tmp_path):
    """Trains in one layout: (the losses, the tensors that were saved)."""

    def run(name, mode, layout, *flags):
        launch, batch, accumulation = layout
        out = tmp_path / f"{launch}-{batch}-{accumulation}"
        sizes = {"BATCH_SIZE": batch, "ACCUMULATION": accumulation, "LEARNING_RATE": RATE, "EVAL_FRACTION": 0}
        sizes["FIXED_ANSWERS"] = 1
        more = ("--lora_dropout", 0, "--adam_epsilon", 1e-4, "--gradient_checkpointing", layout in SPREAD, *flags)
        done = run_cell(
            warm,
            model_for(mode, "zero3"),
            out,
            name,
            mode,
            launch,
            *more,
            steps=STEPS,
            one_length=name in TOKEN_MEAN,
            **sizes,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses = torch.tensor([line["loss"] for line in read_rows(out / "metrics.jsonl")])
        assert len(losses) == STEPS
        return losses, load_file(out / ("model.safetensors" if mode == "full" else "adapter_model.safetensors"))

    return run


def assert_same(found, wanted, layout):
    (losses, tensors), (wanted_losses, wanted_tensors) = found, wanted
    torch.testing.assert_close(
        losses, wanted_losses, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE, msg=f"{layout}: {losses}"
    )
    assert tensors.keys() == wanted_tensors.keys()
    apart = {name: (tensors[name] - wanted_tensors[name]).abs().max().item() for name in tensors}
    worst = max(apart, key=apart.get)
    assert apart[worst] < WEIGHT_TOLERANCE, f"{layout}: {worst} is {apart[worst]:g} apart"


CELLS = [(name, mode) for name in (*METHODS, "KD") for mode in ("full", "lora")]
SLOW = [(name, "lora") for name in METHODS] + [(name, "full") for name in ("DPO", "Reward", "PPO", "KD")]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "mode"), [pytest.param(*cell, marks=[pytest.mark.slow] * (cell in SLOW)) for cell in CELLS]
)
def test_the_layout_does_not_change_the_training(name, mode, train):
    flags = WITHOUT_KL.get(name, [])
    wanted = train(name, mode, WHOLE, *flags)
    singly = [SPREAD_IN_TURN] if JOBS[name].min_batch_size == 1 else []
    for layout in [IN_TURN, *SPREAD, *singly]:
        assert_same(train(name, mode, layout, *flags), wanted, layout)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", WITHOUT_KL)
def test_the_engine_does_not_change_a_loss_with_a_batch_estimate(name, mode, train):
    first, *others = SPREAD
    wanted = train(name, mode, first)
    for layout in others:
        assert_same(train(name, mode, layout), wanted, layout)
