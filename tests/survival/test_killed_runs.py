"""Killed, and signals to the command itself. `pytest tests/survival/test_killed_runs.py`"""

import os
import random
import signal
import subprocess
import time

import pytest

from rlhf_args.methods import EVERY
from tests.conftest import ROOT, read_rows
from tests.survival.conftest import assert_same_run, copied, log_of, same_weights, start, words
from utils.survival import checkpoints

STARTED_AGAIN = [(name, mode, 1 + (number % 3 < 2)) for number, (name, mode) in enumerate(
    (name, mode) for name in ("DPO", "KTO", "Reward", "RLOO", "PPO", "GKD") for mode in ("lora", "full")
)]  # fmt: skip


assert sum(kills for *_, kills in STARTED_AGAIN) == 20


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def kill(process, out, moments, in_a_save):
    """Kills a run at a moment behind its first log line, or within a save that comes then; whether it was running."""
    before = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else b""
    wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes() != before, process)
    if in_a_save:
        time.sleep(moments.random() / 4)
        wait_for((out / checkpoints.ASIDE).exists, process)
        time.sleep(moments.random() / 50)  # a save takes about so long
    else:
        time.sleep(moments.random() / 2)
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "kills"), STARTED_AGAIN)
def test_a_run_that_was_killed_at_any_moment_ends_as_one_that_was_not(name, mode, kills, warm, models, tmp_path):
    flags = {"logging_steps": 1, "num_train_epochs": 4}
    flags |= {"max_steps": 12} if EVERY[name].sample_reward else {}
    assert start(warm, models, tmp_path / "whole", name, mode, **flags).wait() == 0
    moments, hit, out = random.Random(f"{name} {mode}"), 0, tmp_path / "out"
    for number in range(kills):
        hit += kill(start(warm, models, out, name, mode, **flags), out, moments, number % 2 == 0)
        time.sleep(0.2)  # until the last of it is gone
    assert hit == kills and not (out / "run_card.json").exists()
    assert start(warm, models, out, name, mode, **flags).wait() == 0, (tmp_path / "out.log").read_text()
    assert_same_run(tmp_path / "whole", out)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, 13))
    assert not list(out.glob("checkpoint-being-written*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_by_a_signal_with_its_status_and_goes_on(number, warm, models, whole, tmp_path):
    out, flags = tmp_path / "out", {"logging_steps": 1, "max_steps": 4000, "save_steps": 9999}
    process = start(warm, models, out, **flags)
    wait_for((out / "metrics.jsonl").exists, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    (checkpoint,) = checkpoints.list_checkpoints(out)
    assert checkpoints.problems_of(checkpoint) == [] and (out / "report.png").exists()
    last = checkpoints.step_of(checkpoint)
    flags["max_steps"] = last + 2
    assert start(warm, models, out, **flags).wait() == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, last + 3))


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["cpu", "zero3"])
def test_a_signal_to_two_processes_saves_and_they_go_on(launched, warm, models, tmp_path):
    out = tmp_path / "out"
    env = {**os.environ, "LAUNCH": launched, "NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}

    def launch(steps, constant="constant"):
        flags = {"logging_steps": 1, "max_steps": steps, "save_steps": 9999, "lr_scheduler_type": constant}
        job = [warm, "-m", "utils.launch", "train_rlhf.py", *words(models, out, **flags)]
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(job, cwd=ROOT, env=env, stdout=log, stderr=log)

    process = launch(4000)
    try:
        wait_for((out / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    finally:
        process.kill()
    (checkpoint,) = checkpoints.list_checkpoints(out)
    assert checkpoints.problems_of(checkpoint) == []
    last = checkpoints.step_of(checkpoint)
    assert launch(last + 2).wait(timeout=170) == 0, (tmp_path / "log").read_text()
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, last + 3))
    resumed = tmp_path / "resumed"
    os.replace(out, resumed)
    assert launch(last + 2).wait(timeout=170) == 0  # undisturbed
    assert same_weights(out, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("launched", "mode"), [("cpu", "qlora"), ("zero2", "full"), ("zero3", "full")])
def test_a_resumed_critic_and_the_scale_of_its_values_are_those_that_were_saved(
    launched, mode, warm, models, tmp_path
):
    env = {**os.environ, "LAUNCH": launched, "NUM_PROCESSES": "1", "OMP_NUM_THREADS": "1"}

    def launch(out):
        flags = {"logging_steps": 1, "max_steps": 4, "eval_strategy": "no", "eval_steps": None}
        job = [warm, "-m", "utils.launch", "train_rlhf.py", *words(models, out, "PPO", mode, **flags)]
        done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        return log_of(out, "metrics.jsonl")

    whole = launch(tmp_path / "whole")
    assert whole[2]["value"] != 0  # a scale that was lost would begin anew
    assert launch(copied(tmp_path / "whole", tmp_path / "out", last=2)) == whole
