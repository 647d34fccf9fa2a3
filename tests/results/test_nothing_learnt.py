"""Only a run from which nothing could be learnt says so: `pytest tests/results/test_nothing_learnt.py`."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_rlhf
from tests.conftest import read_rows, write_rows

ROWS = [{"prompt": f"Count to {number}."} for number in range(8)]
FAST = "--max_completion_length 6 --num_generations 2 --per_device_train_batch_size 4 --max_steps 3 --dtype float32 "
FAST += "--logging_steps 1 --learning_rate 1e-2 --save_strategy no"
EQUAL = "def judge(completions, **columns):\n    return [0.5] * len(completions)\n"
ONCE = "calls = []\n\ndef judge(completions, **columns):\n    calls.append(1)\n"
ONCE += "    return [float(number * (len(calls) == 3)) for number in range(len(completions))]\n"


@pytest.fixture
def run(tiny_model, tmp_path, capsys):
    def run(text, *further, method="GRPO", mode="lora"):
        (tmp_path / "own.py").write_text(text, encoding="utf-8")
        words = f"--rlhf_type {method} --train_mode {mode} --model_name_or_path {tiny_model} {FAST} --output_dir "
        words += f"{tmp_path}/out --train_data_path {write_rows(tmp_path / 'rows.jsonl', ROWS)} --reward_funcs "
        status = train_rlhf.main([*words.split(), f"{tmp_path}/own.py:judge", *further])
        return status, capsys.readouterr().err.replace("\r", "\n").splitlines()

    return run


@pytest.mark.parametrize("method, mode", [("GRPO", "full"), ("RLOO", "lora")])
def test_equal_rewards_end_the_run_as_what_they_are(method, mode, run, tiny_model, tmp_path):
    status, lines = run(EQUAL, method=method, mode=mode)
    out, (failed,) = tmp_path / "out", [line for line in lines if line.startswith("failed: ")]
    assert status == 1 and failed.startswith("failed: nothing could be learnt: ") and "sound save" not in failed
    assert " 3 steps" in failed and "(mean 0.5)" in failed and str(out) in failed
    assert "--temperature" in failed and "--num_generations" in failed and "completions.jsonl" in failed
    card = json.loads((out / "run_card.json").read_text(encoding="utf-8"))
    assert {"step": 3, "text": failed.removeprefix("failed: ")} in card["warnings"]
    assert len(read_rows(out / "completions.jsonl")) == 12 and (out / "report.png").exists()
    if mode == "full":  # as the line says
        start, end = load_file(f"{tiny_model}/model.safetensors"), load_file(out / "model.safetensors")
        assert all(torch.equal(start[name], end[name]) for name in end)
    status, lines = run(EQUAL, method=method, mode=mode)
    assert status == 2 and "contains a finished run" in lines[-1] and "--overwrite_output_dir" in lines[-1]


@pytest.mark.parametrize("flags", ["--num_iterations 2", "--logging_steps 10"])
def test_rollouts_of_several_steps_and_steps_without_a_line_count_too(flags, run):
    status, lines = run(EQUAL, *flags.split())
    assert status == 1 and lines[-1].startswith("failed: nothing could be learnt: ") and " 3 steps" in lines[-1]


def test_one_rollout_that_differs_is_a_training(run):
    status, lines = run(ONCE)
    assert status == 0 and not [line for line in lines if line.startswith("failed")]


STILL = {
    "GRPO": "--learning_rate 1e-60",
    "PPO": "--num_generations 1 --max_steps -1 --num_train_epochs 1 --critic_warmup_steps 9",  # more than the run has
}


@pytest.mark.parametrize("method", STILL)
def test_a_policy_that_did_not_move_is_no_matter_of_the_rewards(method, run, tmp_path):
    differ = "def judge(completions, **columns):\n    return [float(number) for number in range(len(completions))]\n"
    status, lines = run(differ, *STILL[method].split(), method=method, mode="full")
    assert status == 1 and lines[-1].endswith(" is not a sound save: no weight differs from the start")
    assert not (tmp_path / "out" / "run_card.json").exists()
