"""What judges an answer judges it right, and what cannot judge is refused: `pytest tests/rewards/test_rewards.py`.

The judge here is a Llama of another tokenizer and template than the Qwen that answers, as reward models are.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import read_rows
from tests.rewards.conftest import CHATS, TEXTS, by_hand, make_judge, recorded, says
from utils.models import load
from utils.rewards import models

# ── the judge ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session", params=[None, "<|pad|>"], ids=["pad ends turns", "a pad of its own"])
def padded_judge(request, tmp_path_factory):
    return make_judge(tmp_path_factory.mktemp("judge"), request.param)


def load_judge(folder, rows=CHATS, batch_size=8):
    tried = [(f"row:{number}", {**row, "further": {}}) for number, row in enumerate(rows)]
    return models.load_reward_model(folder, tried, "float32", "cpu", batch_size)


ANSWERS = [
    "Hi!",
    "Four, of course; what else could it be?",
    "",
    "天气很好。",
    "Because\n",
    "c",
    "La <s> la",
    "me " * 40,
]


def test_a_judge_of_another_family_scores_the_policys_text_in_its_own_template(padded_judge, tiny_model):
    policy, judges = (load.load_tokenizer(folder) for folder in (tiny_model, padded_judge))
    assert policy("hi")["input_ids"] != judges("hi", add_special_tokens=False)["input_ids"]
    prompts, completions = [row["prompt"] for row in CHATS], [says(answer) for answer in ANSWERS]
    further = {"completion_ids": [[0]] * 8, "trainer_state": 0}
    found = load_judge(padded_judge)(prompts=prompts, completions=completions, **further)
    hand = [by_hand(padded_judge, *pair) for pair in zip(prompts, completions, strict=True)]
    assert found == pytest.approx(hand, rel=1e-5, abs=1e-5)  # float32, summed over a padded batch
    assert len({round(score, 3) for score in hand}) == 8  # rows that were mixed up would be seen


def test_plain_text_is_judged_without_a_template(judge):
    prompts = [row["prompt"] for row in TEXTS]
    found = load_judge(judge, TEXTS)(prompts=prompts, completions=ANSWERS)
    hand = [by_hand(judge, *pair) for pair in zip(prompts, ANSWERS, strict=True)]
    assert found == pytest.approx(hand, rel=1e-5, abs=1e-5)


def test_a_rows_score_alone_is_its_score_in_a_batch_of_any_size(padded_judge):
    reward = load_judge(padded_judge)
    rows = [reward.tokens(row["prompt"], says(answer)) for row, answer in zip(CHATS, ANSWERS, strict=True)]
    assert len({len(row["input_ids"]) for row in rows}) > 4  # some are padded
    alone = [reward.score([row])[0] for row in rows]
    assert reward.score(rows) == pytest.approx(alone, rel=1e-5, abs=1e-5)
    reward.batch_size = 3
    assert reward.score(rows[::-1]) == pytest.approx(alone[::-1], rel=1e-5, abs=1e-5)


def test_a_text_longer_than_the_judge_holds_keeps_its_bos_and_its_end(tmp_path):
    folder = make_judge(tmp_path / "judge", holds=32)
    reward = load_judge(folder)
    prompt, answer = [{"role": "user", "content": "so long " * 20}], says("The end.")
    ids = reward.tokens(prompt, answer)["input_ids"]
    assert reward.tokenizer.decode(ids) == "<s> so long <|eot|>[assistant] The end.<|eot|>"
    assert len(ids) == 32  # 1 + 9 + 1 + 20 + 1
    assert reward([prompt], [answer])[0] == pytest.approx(by_hand(folder, prompt, answer), rel=1e-5)
    other_begin, other_end = [{"role": "user", "content": "xy" + "so long " * 20}], says("The eng.")
    assert reward([other_begin], [answer]) == reward([prompt], [answer]) != reward([prompt], [other_end])


# ── running it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_policy_learns_from_is_what_the_judge_says_of_its_answers(run, judge, tmp_path):
    assert run(f"--reward_model_path {judge}", rows=CHATS)[0] == 0
    lines = recorded(tmp_path)
    hand = [by_hand(judge, line["prompt"], line["completion"]) for line in lines]
    assert [line["rewards"][Path(judge).name] for line in lines] == pytest.approx(hand, rel=1e-4, abs=1e-4)
    assert len(set(hand)) > 4


# ── a LoRA judge on the policy's base ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lora_policy(tiny_model, tmp_path_factory):
    """An adapter on the tiny model that goes on being trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("lora") / "policy"
    shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), shape).save_pretrained(folder)
    load.load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method, start", [("RLOO", "base"), ("RLOO", "adapter"), ("PPO", "base")])
def test_a_lora_judge_on_the_policys_base_needs_no_second_base(
    method, start, run, lora_judge, lora_policy, tiny_model, tmp_path, monkeypatch
):
    def load_reward_model(*args):
        raise AssertionError("a second base")

    policy = {"base": tiny_model, "adapter": lora_policy}[start]
    assert models.on_policy_base(lora_judge, policy, "lora") and not models.on_policy_base(lora_judge, policy, "full")
    saved = "--save_strategy steps --save_steps 1" + " --num_iterations 1" * (method == "PPO")
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_reward_model", load_reward_model)
        status, out, _ = run(f"--reward_model_path {lora_judge} {saved}", method, CHATS, policy)
    assert status == 0 and "preferred (an adapter on the policy's own base: no second copy)" in out

    lines = recorded(tmp_path)
    whole = load_judge(lora_judge)([line["prompt"] for line in lines], [line["completion"] for line in lines])
    # float32, its LoRA merged or beside the base; the second rollout's policy has moved, and must not be seen
    assert [line["rewards"]["preferred"] for line in lines] == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert len(set(whole)) > 4

    files = list((tmp_path / "out").rglob("*"))
    adapters = [file for file in files if file.name == "adapter_model.safetensors"]
    # the result and two checkpoints, which keep the start of an adapter too, as TRL compares with it
    assert sorted(file.parent.name for file in adapters if file.parent.name != "ref") == [
        "checkpoint-1",
        "checkpoint-2",
        "out",
    ]
    assert not [file for file in files if file.name == "reward"]
    for file in adapters:
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if ".reward." in name or "score" in name]


@pytest.fixture
def stopped(run, lora_judge, tmp_path):
    """(completions, weights) of a run with a LoRA judge, and of one that went on from its first checkpoint."""
    flags = f"--reward_model_path {lora_judge} --save_strategy steps --save_steps 1"
    assert run(flags, rows=CHATS)[0] == 0
    out = tmp_path / "out"
    whole, weights = recorded(tmp_path), load_file(out / "adapter_model.safetensors")
    (out / "run_card.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-2")
    assert run(f"{flags} --resume_from_checkpoint auto", rows=CHATS)[0] == 0
    return whole, weights, read_rows(out / "completions.jsonl"), load_file(out / "adapter_model.safetensors")


def test_a_run_with_a_lora_judge_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(stopped):
    whole, weights, lines, again = stopped
    assert lines[-4:] == whole[-4:]
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_that_goes_on_says_no_answer_twice(stopped):
    whole, _, lines, _ = stopped
    assert lines == whole


def test_a_lora_judge_is_loaded_whole_for_another_policy(run, lora_judge, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    assert not models.on_policy_base(lora_judge, str(other), "lora")
    status, out, _ = run(f"--reward_model_path {lora_judge}", rows=CHATS, model=str(other))
    assert status == 0 and "no second copy" not in out.partition("rollouts")[0].partition("reward ")[2]
    lines = recorded(tmp_path)
    whole = load_judge(lora_judge)([line["prompt"] for line in lines], [line["completion"] for line in lines])
    assert [line["rewards"]["preferred"] for line in lines] == pytest.approx(whole, rel=1e-4, abs=1e-5)
