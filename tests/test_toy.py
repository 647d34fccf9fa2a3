"""RLOO, GRPO and PPO learn what can be checked: `pytest -m slow tests/test_toy.py`, about a minute each."""

import pytest

from bench.toy import make_toy, run_ours
from rlhf_args.methods import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.sample_reward])
def test_the_reward_of_held_out_prompts_rises_to_near_the_best(method, tmp_path):
    run = run_ours(method, make_toy(tmp_path / "toy"), tmp_path / "out", rollouts=50, seed=0)
    before, after = run["held_out"]
    assert before < 0.1  # the share of one of 26 letters in a random answer is 0.04
    assert after > 0.8  # the best is 1; docs/ppo_toy.png has three seeds
