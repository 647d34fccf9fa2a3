"""Rollouts. `pytest tests/rewards/test_score_reward_model.py`"""

import json
import re

import pytest
import torch

from tests.conftest import read_rows
from tests.rewards.conftest import ASKED, REWARDED, TEXTS, TWO, by_hand, change, pair, zero_head

# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


ODD = [
    "--num_generations 3",
    "--num_generations 9",
    "--num_generations 3 --gradient_accumulation_steps 2",
    "--num_generations 5 --steps_per_generation 3",
    "--num_generations 5 --generation_batch_size 12",
    "--num_generations 3 --num_mini_batches 2",
    "--num_generations 2 --per_device_train_batch_size 1",
    "--num_generations 2 --per_device_train_batch_size 3",
    "--num_generations 1",
]


@pytest.mark.parametrize("flags", ODD)
def test_answers_that_are_no_whole_number_of_prompts_are_refused_with_what_works(flags, refused, run):
    found = refused(f"{REWARDED} {flags} --check", rows=TEXTS * 4)
    assert found.startswith(f"--num_generations {re.search('num_generations (.)', flags)[1]}: ")
    ways = re.findall(r"--\w+ \d+", found.partition("Type ")[2])
    assert ways
    for way in ways:  # a flag given twice is what it is last
        status, _, lines = run(f"{REWARDED} {flags} {way} --check", rows=TEXTS * 4)
        assert (status, lines) == (0, []), way


# flags: what is said
NUMBERS = {
    "--total_episodes 0": "--total_episodes 0: must be ",
    "--num_iterations 0": "--num_iterations 0: must be ",
    "--num_mini_batches 0": "--num_mini_batches 0: must be ",
    "--steps_per_generation 0": "--steps_per_generation 0: must be ",
    "--generation_batch_size 0": "--generation_batch_size 0: must be ",
    "--num_generations_eval 0": "--num_generations_eval 0: must be ",
    "--per_device_train_batch_size 0 --total_episodes 8": "--per_device_train_batch_size 0: must be ",
    "--per_device_train_batch_size -1": "--per_device_train_batch_size -1: must be ",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0: must be ",
    "--beta -1": "--beta -1: must be ",
    "--temperature nan": "--temperature nan: must be ",
    "--reward_weights nan": "--reward_weights nan: must be ",
    "--max_completion_length 0": "--max_completion_length 0: must be ",
    "--max_prompt_length 0": "--max_prompt_length 0: must be ",
    "--missing_eos_penalty -1": "--missing_eos_penalty -1: must be ",
}


@pytest.mark.parametrize("flags", NUMBERS)
@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_a_number_of_which_no_rollout_can_be_made_is_refused(method, flags, refused):
    assert refused(f"{REWARDED} {flags} --check", method).startswith(NUMBERS[flags])


def test_episodes_asked_for_are_said_in_steps(run):
    # 4 answers a rollout: 10 are 3 rollouts, and each is learned from 4 times in 2 mini-batches of half the rows
    flags = f"{REWARDED} --total_episodes 10 --num_iterations 4 --num_mini_batches 2 --per_device_train_batch_size 2"
    status, out, _ = run(f"{flags} --check", "PPO")
    assert (
        status == 0
        and "--total_episodes 10 is --max_steps 24 here: steps of 2 answers, each answer used 4 times" in out
    )


def test_what_works_works_for_as_many_processes_as_are_asked_for(refused, run, monkeypatch):
    monkeypatch.setenv("LAUNCH_PROCESSES", "3")
    found = refused(f"{REWARDED} --num_generations 5 --check", rows=TEXTS * 4)
    assert "a rollout has 12 answers" in found  # 4 a device x 3
    ways = re.findall(r"--\w+ \d+", found.partition("Type ")[2])
    assert len(ways) == 2
    for way in ways:
        assert run(f"{REWARDED} --num_generations 5 {way} --check", rows=TEXTS * 4)[0] == 0, way


def test_prompts_that_leave_the_model_no_room_are_counted(run, write, tmp_path):
    # the tiny model holds 2048 tokens, a byte each; 8 are for the answer
    fits, long = {"prompt": "x" * 2040}, {"prompt": "x" * 2041}
    status, out, lines = run(f"{REWARDED} --check", rows=[*TEXTS, fits])
    assert (status, lines) == (0, []) and "9 rows to train on, none held out" in out and "refused: none" in out
    status, out, lines = run(f"--reward_funcs {write(TWO)}:length --max_drop_fraction 0.5", rows=[*TEXTS, fits, long])
    assert status == 0 and "9 rows to train on" in out and "refused: 1 prompt longer than max_prompt_length" in out
    card = json.loads((tmp_path / "out" / "run_card.json").read_text(encoding="utf-8"))
    assert (card["dropped_rows"], card["train_rows"]) == ({"prompt longer than max_prompt_length": 1}, 9)
    dropped = read_rows(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) == 1 and f"{tmp_path}/rows.jsonl:10" in json.dumps(dropped)


def test_a_limit_on_prompts_is_kept(run):
    # "Q: " + asked + "\nA:" is asked + 6 bytes: only "Why?" and "Sing!" have 11 or less
    status, out, _ = run(f"{REWARDED} --max_prompt_length 11 --max_drop_fraction 0.9 --check", rows=TEXTS)
    assert status == 0 and "2 rows to train on" in out and "6 prompt longer than max_prompt_length" in out


def test_fewer_prompts_than_a_rollout_are_refused(refused, run):
    flags = f"{REWARDED} --per_device_train_batch_size 8 --num_generations 2 --check"
    assert refused(flags, rows=TEXTS[:3]) == (
        "3 prompts, and a rollout takes 4 (8 answers, 2 each). Give more prompts, or type "
        "--per_device_train_batch_size, --gradient_accumulation_steps or NUM_PROCESSES smaller"
    )
    assert run(flags, rows=TEXTS[:4])[0] == 0


def test_an_answer_longer_than_the_model_is_refused(refused):
    assert refused(f"{REWARDED} --max_completion_length 2048 --check") == (
        "--max_completion_length 2048: the model holds 2048 tokens. Type --max_completion_length 1024"
    )


def test_vllm_that_is_not_there_is_refused(refused, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    assert refused(f"{REWARDED} --use_vllm --check") == (
        "--use_vllm: vLLM is not installed. Type pip install -r requirements-vllm.txt, or remove the flag"
    )


# ── python -m utils.score_reward_model ───────────────────────────────────────────────────────────────────────────────


def test_held_out_pairs_measure_a_judge(score, judge, tmp_path):
    pairs = [pair(asked, "x" * (3 + number), "yes" * 3) for number, asked in enumerate(ASKED)]  # 3 to 10 against 9
    pairs.append(pair("Dropped?", "same", "same"))
    status, out, _, found = score(judge, pairs)
    assert status == 0 and "1 chosen equals rejected" in out and (tmp_path / "score" / "reward_model.png").exists()
    margins, scores, lengths = [], [], []
    for row in pairs[:8]:
        sides = [by_hand(judge, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        margins.append(sides[0] - sides[1])
        scores += sides
        lengths += [len(row[side][0]["content"]) for side in ("chosen", "rejected")]  # a byte is a token
    assert found["pairs"] == 8 and found["dropped_rows"] == {"chosen equals rejected": 1}
    assert found["accuracy"] == sum(margin > 0 for margin in margins) / 8
    assert found["mean_margin"] == pytest.approx(sum(margins) / 8, rel=1e-4)
    assert found["longer_wins_accuracy"] == (1 + 0.5) / 8  # 10 against 9 is right, 9 against 9 a tie
    pearson = torch.corrcoef(torch.tensor([scores, lengths]))[0, 1]
    assert found["score_length_correlation"] == pytest.approx(float(pearson), rel=1e-3)


def test_what_cannot_be_measured_is_refused_and_nothing_is_written(score, tiny_model, judge, tmp_path):
    pairs = [pair("Hi?", "Hi", "No")] * 2
    status, out, err, _ = score(tiny_model, [*pairs, {"prompt": "p"}])
    assert (status, out) == (2, "") and [line.partition(":")[0] for line in err.splitlines()] == ["refused"] * 2
    assert f"MODEL {tiny_model}: a language model" in err and 'pairs.jsonl:3: no "chosen"' in err
    zero = change(judge, tmp_path / "zero", zero_head)
    status, out, err, _ = score(str(zero), pairs)
    assert (status, out, err) == (2, "", f"refused: MODEL {zero}: the same score 0 for all 4 answers\n")
    status, _, err, _ = score(judge, [])
    assert status == 2 and len(err.splitlines()) == 1
    assert not (tmp_path / "score").exists()
    (tmp_path / "score").write_text("")
    status, _, err, _ = score(judge, pairs)
    assert status == 2 and err.startswith(f"refused: --output_dir {tmp_path}/score: ")
