"""The commands of the README as a user types them, on SmolLM2-135M: `pytest -m slow tests/test_shipped.py`.

Minutes each. The model is made once, from the PyPI wheel, into models/.
"""

import json
import os
import subprocess
import sys

import pytest

from rlhf_args.methods import METHODS
from tests.conftest import ROOT, command, read_rows

pytestmark = pytest.mark.slow


def run_script(out, *flags, script="rlhf_run.sh", **variables):
    return subprocess.run(
        ["bash", script, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "OUTPUT_DIR": str(out), **variables},
        text=True,
        capture_output=True,
        timeout=1800,  # two of them run side by side
    )


def said(done, start):
    return next(line for line in done.stdout.splitlines() if line.startswith(start))


def test_the_shipped_job_learns_and_its_next_commands_work(tmp_path):
    out = tmp_path / "out"
    done = run_script(out)
    assert done.returncode == 0, done.stderr[-2000:]
    card = json.loads((out / "run_card.json").read_text())
    before, after = card["held_out"]["before"], card["held_out"]["after"]
    assert after["accuracy"] > before["accuracy"] and after["loss"] < before["loss"] and after["margin"] > 0
    assert said(done, "reference") == "reference the same model with the adapter off (no second copy)"
    assert said(done, "data") == "data      260 rows to train on, 20 held out; refused: none"
    assert len([line for line in done.stdout.splitlines() if line.startswith("  after")]) == 2
    assert len(read_rows(out / "metrics.jsonl")) == card["throughput"]["steps"]

    merged = command(*said(done, "merge").split()[2:])
    assert merged.returncode == 0 and "reopened, and keeps" in merged.stdout, merged.stderr
    for result in (out, f"{out}-merged"):
        talk = subprocess.run(
            [sys.executable, "-m", "utils.chat", str(result)],
            cwd=ROOT,
            input="What is the capital of France?\n",
            text=True,
            capture_output=True,
        )
        assert "Paris" in talk.stdout, talk.stderr

    again = run_script(out)
    assert again.returncode == 2 and "contains a finished run" in again.stderr
    onward = run_script(tmp_path / "onward", MODEL=str(out), MAX_STEPS="1", EVAL_FRACTION="0")
    assert onward.returncode == 0, onward.stderr[-2000:]
    assert said(onward, "reference").startswith(f"reference the adapter {out} as it was")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_the_shipped_data(name, warm, tmp_path):
    # cut at 16 tokens no answer has the 25 words that brevity gives 0: some rewards differ, so that one step moves it
    flags = ("--max_completion_length", "16") if METHODS[name].sample_reward else ()
    done = run_script(tmp_path / "out", *flags, RLHF_TYPE=name, MAX_STEPS="1", EVAL_FRACTION="0", PYTHON=warm)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said(done, "method").startswith(f"method    {name}:")
    assert "of a fresh process equal those in memory" in said(done, "verified")  # logits, of a reward model scores


def test_the_shipped_distillation_brings_the_student_nearer_to_its_teacher(tmp_path):
    out = tmp_path / "out"
    done = run_script(out, script="gkd_run.sh", MAX_STEPS="6")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (json.loads((out / "run_card.json").read_text())["held_out"][when] for when in ("before", "after"))
    assert all(after[name] < before[name] for name in ("forward KL", "reverse KL", "student loss"))
    assert after["agreement"] > before["agreement"] and after["teacher loss"] == before["teacher loss"]
    assert len([line for line in done.stdout.splitlines() if line.startswith("  after")]) == 2


def test_the_shipped_rejection_sampling_then_dpo_makes_a_better_model(tmp_path):
    """With fewer prompts and answers than as shipped, and more passes over the pairs."""
    out = tmp_path / "out"
    flags = ("--then", "DPO", "--max_samples", "24", "--num_completions", "4", "--learning_rate", "2e-4")
    done = run_script(out, *flags, script="rejection_run.sh", EVAL_FRACTION="0.34", EPOCHS="3")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = json.loads((out / "rounds.json").read_text())
    assert after["held_out_reward"] > before["held_out_reward"]
    assert after["best_reward"] > after["sampled_reward"] and after["rows"] > 4
    curve = json.loads((out / "round-1" / "report.json").read_text())["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 3, 4]
    assert said(done, "best of") and said(done, "result    " + str(out / "round-1" / "trained"))


@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_the_other_train_modes_run_on_the_real_model(mode, tmp_path):
    done = run_script(tmp_path / "out", TRAIN_MODE=mode, MAX_STEPS="1", EVAL_FRACTION="0.02")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "run_card.json").read_text())["arguments"]["train_mode"] == mode
