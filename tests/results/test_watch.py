"""What a run is warned of, and that a sound one is not: `pytest tests/results/test_watch.py`."""

import json
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import train_rlhf
from rlhf_args.methods import DPO_LOSSES, METHODS
from tests.conftest import read_rows, slow_but
from tests.trainers.test_losses import POLICY, ROWS, losses
from utils.results import report, watch
from utils.results.watch import Watch

LN2 = math.log(2)
REWARDS = """
def one(completions, **columns):
    return [1.0] * len(completions)

def even(completion_ids, **columns):
    return [sum(number % 2 == 0 for number in ids) / len(ids) for ids in completion_ids]
"""


# ── runs of the real trainer ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path, tiny_model, capsys):
    """run(method, mode, rate, flags) trains the tiny model; (the lines of its warnings, what its watch kept)."""
    watches = []

    def run(method, mode, rate, flags="", out="out"):
        row = METHODS[method]
        words = ["--rlhf_type", method, "--train_mode", mode, "--model_name_or_path", tiny_model]
        words += ["--train_data_path", row.sample_data, "--output_dir", str(tmp_path / out), "--learning_rate", rate]
        words += ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--max_samples", "64"]
        words += ["--save_strategy", "no", "--dtype", "float32"]
        if row.sample_reward:
            (tmp_path / "rewards.py").write_text(REWARDS)
            words += ["--reward_funcs", f"{tmp_path}/rewards.py:even", "--max_completion_length", "8"]
            words += ["--num_generations", "2"]
        try:
            train_rlhf.main([*words, *flags.format(folder=tmp_path).split()])
        except RuntimeError as error:  # nothing can be sampled any more
            assert "probability tensor" in str(error)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("warning   step ")], watches[-1].warnings

    with pytest.MonkeyPatch.context() as patch:
        make = Watch.__init__
        patch.setattr(Watch, "__init__", lambda self, *a, **k: (watches.append(self), make(self, *a, **k))[1])
        yield run


@pytest.mark.parametrize(("method", "mode"), [("DPO", "lora"), ("DPO", "full"), ("RLOO", "lora"), ("RLOO", "full")])
def test_a_learning_rate_of_10_is_named_in_one_line(method, mode, run):
    lines, kept = run(method, mode, "10", "--max_steps 4")
    told = [warning for warning in kept if "all answers are truncated" not in warning["text"]]
    assert len(told) == 1 and "--learning_rate 10" in told[0]["text"]
    assert lines.count(f"warning   step {told[0]['step']}: {told[0]['text']}") == 1


@pytest.mark.parametrize(("method", "answers"), [("RLOO", 2), ("GRPO", 2), ("PPO", 1)])
def test_a_reward_that_is_always_1_is_named_in_one_line(method, answers, run):
    flags = "--reward_funcs {folder}/rewards.py:one --max_steps 5 --num_iterations 1"
    lines, _ = run(method, "full", "1e-5", f"{flags} --num_generations {answers}")
    assert len([line for line in lines if "got the same reward, so there is nothing to learn from" in line]) == 1
    assert any(line.startswith("warning   step 3: ") for line in lines)  # of the third rollout


FAST = [("DPO", "lora"), ("Reward", "lora"), ("PPO", "lora")]


@pytest.mark.parametrize(("method", "mode"), slow_but(FAST, product(METHODS, ("lora", "full", "qlora"))))
def test_a_sound_run_is_warned_of_nothing(method, mode, run):
    rate = "1e-4" if mode != "full" else "1e-5"
    lines, kept = run(method, mode, rate, "--max_steps 8 --eval_fraction 0.1")
    assert [line for line in lines if "all answers are truncated" not in line] == []  # random weights rarely end one
    assert [warning for warning in kept if "all answers are truncated" not in warning["text"]] == []


@pytest.mark.parametrize("mode", ["lora", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("full", "qlora"))])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.begins])
def test_an_adapter_that_goes_on_begins_as_its_own_reference(method, mode, run, tmp_path):
    run("SFT", "lora", "1e-2", "--max_steps 3", out="adapter")
    flags = "--max_steps 2 --eval_fraction 0.1 --model_name_or_path {folder}/adapter"
    lines, _ = run(method, mode, "1e-5", flags)
    assert lines == [] and (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_policy_with_dropout_is_said_to_have_it(run, tiny_model, tmp_path, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    def with_dropout(mlp, states):
        return torch.nn.functional.dropout(forward(mlp, states) * 30, 0.5, training=mlp.training)

    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", with_dropout)
    lines, _ = run("DPO", "full", "1e-6", "--max_steps 2 --disable_dropout False --eval_fraction 0.1")
    assert len(lines) == 1 and lines[0].startswith("warning   step 1: policy and reference differ before the first ")
    assert lines[0].endswith(": likely dropout is on. Type --disable_dropout True")


def test_a_reference_of_other_weights_is_found_before_the_first_step(run, monkeypatch):
    from utils.models import load

    load_others = load.load_other_models

    def spoil(*args, **kwargs):
        others = load_others(*args, **kwargs)
        with torch.no_grad():
            others["ref_model"].lm_head.weight.mul_(1.5)
        return others

    monkeypatch.setattr(load, "load_other_models", spoil)
    lines, kept = run("DPO", "full", "1e-6", "--max_steps 2 --eval_fraction 0.1")
    assert len(lines) == 1 and lines[0].startswith("warning   step 0: policy and reference differ before the first ")
    assert "training and reference use different weights" in lines[0]
    assert kept == [{"step": 0, "text": lines[0].partition("step 0: ")[2]}]


def test_a_resumed_run_says_nothing_twice(run, tmp_path, monkeypatch):
    flags = "--max_steps 6 --save_strategy steps --save_steps 1 --reward_funcs {folder}/rewards.py:one"
    follow = report.Report.on_step_end

    def stop_at_five(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt
        return follow(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "on_step_end", stop_at_five)
        lines, before = run("PPO", "full", "1e-5", f"{flags} --num_iterations 1")
    assert len([line for line in lines if "same reward" in line]) == 1
    lines, after = run("PPO", "full", "1e-5", f"{flags} --num_iterations 1 --resume_from_checkpoint auto")
    assert [line["step"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not [line for line in lines if "same reward" in line] and after[: len(before)] == before


# ── where a run begins ───────────────────────────────────────────────────────────────────────────────────────────────

# with beta 0.2 and label_smoothing 0.1, all log-ratios 0: log sigmoid(0) = -ln 2, sigmoid(0) = 1/2
BEGINS = {
    "sigmoid": LN2,
    "hinge": 1.0,  # relu(1 - 0)
    "ipo": 6.25,  # (0 - 1 / (2 * 0.2))^2 = 2.5^2
    "exo_pair": 0.5108256,  # 2 * 1/2 * (-ln 2) - 1/2 * (ln 0.9 + ln 0.1) = -0.6931472 + 1.2039728
    "nca_pair": 2 * LN2,  # ln 2 + ln 2 / 2 + ln 2 / 2
    "robust": LN2,  # (0.9 - 0.1) * ln 2 / (1 - 2 * 0.1)
    "bco_pair": 2 * LN2,
    "sppo_hard": 12.5,  # 2 * (0.5 / 0.2)^2
    "aot": LN2,  # (0.9 + 0.1) * ln 2
    "aot_unpaired": LN2,
    "apo_zero": 1.0,  # 1 - 1/2 + 1/2
    "apo_down": 1.0,
    "discopop": 0.8465736,  # ln 2 / 2 + exp(0) / 2
    "sft": None,  # the likelihood of the data
    "sigmoid_norm": LN2,
}


@pytest.mark.parametrize("kind", DPO_LOSSES)
def test_the_loss_that_dpo_begins_with_is_trls(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.trainers.test_losses.REFERENCE", POLICY)
    flags = {"beta": 0.2, "label_smoothing": 0.1, "loss_type": [kind]}
    expected = watch.dpo_loss(SimpleNamespace(**flags, use_weighting=False, loss_weights=None))
    assert expected == (None if BEGINS[kind] is None else pytest.approx(BEGINS[kind], abs=1e-6))
    if expected is not None:
        assert losses("DPO", ROWS, tmp_path, **flags) == [pytest.approx(expected, abs=1e-5)]  # float32


def test_losses_that_are_mixed_add_up_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.trainers.test_losses.REFERENCE", POLICY)
    flags = {"beta": 0.2, "label_smoothing": 0.0, "loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 2.0]}
    expected = 0.5 * LN2 + 2.0 * 1.0
    assert watch.dpo_loss(SimpleNamespace(**flags, use_weighting=False)) == pytest.approx(expected)
    assert losses("DPO", ROWS, tmp_path, **flags) == [pytest.approx(expected, abs=1e-5)]
    assert watch.dpo_loss(SimpleNamespace(**flags, use_weighting=True)) is None


@pytest.mark.parametrize("kind", METHODS["KTO"].losses)
def test_the_loss_that_kto_begins_with_is_half_a_rows_weight(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.trainers.test_losses.REFERENCE", POLICY)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n == 0} for n, row in enumerate(ROWS)]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 1.5}
    assert watch.kto_loss(SimpleNamespace(**weights)) == 0.75  # 1.5 * (1 - sigmoid(0))
    assert losses("KTO", rows, tmp_path, loss_type=kind, **weights) == [pytest.approx(0.75, abs=1e-5)]
    assert watch.kto_loss(SimpleNamespace(desirable_weight=1.0, undesirable_weight=1.5)) is None


def test_every_method_with_a_reference_says_where_it_begins():
    assert {name for name, method in METHODS.items() if method.begins} == {
        name for name, method in METHODS.items() if "ref_model" in method.models
    }


# ── rules, by hand ───────────────────────────────────────────────────────────────────────────────────────────────────


def make_watch(name="DPO", **flags):
    config = {"bf16": False, "fp16": False, "learning_rate": 1e-4, "max_grad_norm": 1.0, "beta": 0.1}
    config |= {"label_smoothing": 0.0, "loss_type": "sigmoid", "loss_weights": None, "use_weighting": False}
    config |= {"disable_dropout": True, "precompute_ref_log_probs": False, "num_generations": 2}
    return Watch(METHODS[name], SimpleNamespace(**config | flags))


def fed(follow, *lines, start=2, times=1):
    """The warnings of these lines of the log, each `times` times, from step `start` on."""
    step, found = start, []
    for line in lines:
        for _ in range(times):
            found += follow.see(step, {"loss": LN2, **line})
            step += 1
    return found


BEGINNING = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "logps/chosen": -600.0, "logps/rejected": -600.0}


@pytest.mark.parametrize(
    ("line", "precision", "wrong"),
    [
        ({}, "float32", None),
        ({"rewards/chosen": -0.05}, "float32", None),  # 0.1 * 600 * 0.001 = 0.06 is rounding,
        ({"rewards/chosen": -0.07}, "float32", "rewards/chosen is -0.07 and should be 0"),  # this is not,
        ({"rewards/chosen": -0.07}, "bf16", None),  # but in bfloat16: 0.1 * 600 * 0.01 = 0.6
        ({"rewards/rejected": 0.7}, "bf16", "rewards/rejected is 0.7 and should be 0"),
        ({"loss": 0.72}, "float32", "loss is 0.72 and should be 0.693"),
        ({"loss": 0.72, "aux_loss": 1.0}, "float32", None),  # a router's loss is in it
    ],
)
def test_what_differs_at_the_start_is_told_from_rounding(line, precision, wrong):
    for step, prefix in ((1, ""), (0, "eval_")):
        follow = make_watch(bf16=precision == "bf16")
        logs = {prefix + key: value for key, value in {"loss": LN2, **BEGINNING, **line}.items()}
        found = follow.see(step, logs)
        assert len(found) == (wrong is not None) and (wrong is None or f"({wrong})" in found[0])
        # an update lies behind these
        assert fed(make_watch(), {**BEGINNING, **line}, start=2) == []
        assert make_watch().see(1, {"eval_loss": 9.0, "eval_rewards/chosen": -9.0, "eval_logps/chosen": -600.0}) == []


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("DPO", {"precompute_ref_log_probs": True}, "Remove --precompute_ref_log_probs"),
        ("DPO", {"disable_dropout": False}, "Type --disable_dropout True"),
        ("DPO", {}, "training and reference use different weights"),
        ("RLOO", {"disable_dropout": False}, "(kl is 0.5 and should be 0): likely dropout is on"),
    ],
)
def test_the_cause_of_a_wrong_start_is_named(name, flags, expected):
    follow = make_watch(name, **flags)
    found = follow.see(1, {"loss": LN2, **BEGINNING, "rewards/chosen": -9.0, "kl": 0.5})
    assert len(found) == 1 and expected in found[0]
    follow = make_watch(name, **flags)
    follow.from_reference = False
    assert follow.see(1, {"loss": LN2, **BEGINNING, "rewards/chosen": -9.0, "kl": 0.5}) == []


def test_the_kl_of_an_adapters_dropout_is_not_worth_a_word():
    assert make_watch("PPO").see(1, {"loss": 0.0, "kl": 0.009}) == []
    assert make_watch("PPO").see(0, {"eval_loss": 0.0, "eval_kl": -0.011}) != []


# what is wrong: (method, flags, sound lines, lines behind them that are wrong, what is said)
SICK = {
    "a loss that blows up": ("SFT", {}, [{"loss": 2.0}], [{"loss": 21.5}], "from 2 to 21.5: "),
    "a loss that stays up": ("SFT", {}, [{"loss": 2.0}] * 3, [{"loss": 6.6}] * 5, "from 2 to 6.6: "),
    "a steep gradient": ("DPO", {}, [{"grad_norm": 0.5}], [{"grad_norm": 16.0}], "gradient norm rose from 0.5 to 16"),
    "a spike": ("DPO", {}, [{"grad_norm": 0.5}] * 11, [{"grad_norm": 51.0}], "gradient norm is 51, its median 0.5"),
    "unlikely answers": (
        "DPO",
        {},
        [BEGINNING],
        # 600 nats at the start are 1300 now: 0.1 * 700 = 70 of reward lost; 1300 / 600 = 2.2
        [{"rewards/chosen": -70.0, "rewards/rejected": -70.0, "logps/chosen": -1300.0, "logps/rejected": -1300.0}] * 2,
        "chosen and rejected answers both became far less likely (log-probabilities 2.2 and 2.2 times",
    ),
    "unlikely answers without a reference": (
        "SimPO",
        {},
        [{"logps/chosen": -1.0, "logps/rejected": -2.0}] * 20,
        [{"logps/chosen": -3.0, "logps/rejected": -6.0}] * 20,
        "chosen and rejected answers both became far less likely (log-probabilities 3.0 and 3.0 times",
    ),
    "a margin without end": ("DPO", {}, [], [{"rewards/margins": 21.0}] * 5, "the margin is 21: "),
    "a reward model too sure": ("Reward", {}, [], [{"margin": 21.0}] * 5, "the margin is 21: "),
    "a KL without end": ("RLOO", {}, [{"kl": 0.1}], [{"kl": 1.5}] * 2, "(KL 1.5 "),
    "no choice left": ("GRPO", {}, [{"entropy": 1.0}], [{"entropy": 0.01}] * 2, "entropy 0.01 "),
    "equal rewards": ("PPO", {"num_generations": 1}, [], [{"reward": 1.0, "reward_std": 1e-7}] * 3, "all answers got"),
    "equal rewards in groups": (
        "GRPO",
        {},
        [],
        [{"reward": 1.0, "reward_std": 0.5, "frac_reward_zero_std": 1.0}] * 3,
        "all answers to a prompt got the same reward",
    ),
    "no end": ("GRPO", {}, [], [{"completions/clipped_ratio": 1.0}] * 5, "all answers are truncated"),
    "growth": (
        "GRPO",
        {},
        [{"completions/mean_length": 20.0, "completions/clipped_ratio": 0.1}] * 3,
        [{"completions/mean_length": 50.0, "completions/clipped_ratio": 0.6}] * 2,
        "answers grew from 20 to 50 tokens, 60% truncated",
    ),
    "nothing said": ("GRPO", {}, [{"completions/mean_length": 9.0}], [{"completions/mean_length": 1.0}] * 2, "empty"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sickness_is_told_once_and_only_where_it_is(name):
    method, flags, sound, sick, expected = SICK[name]
    follow = make_watch(method, **flags)
    assert fed(follow, *sound, *sick[:-1]) == []  # one line less would not do
    found = fed(follow, sick[-1], times=50, start=40)
    assert len(found) == 1 and expected in found[0]
    assert follow.warnings == [{"step": 40, "text": found[0]}]


# just as far as a sound run may go, or what one method's log means and another's does not
SOUND = {
    "a loss less than 10 times and 1 up": ("SFT", {}, [{"loss": 2.0}] * 3, {"loss": 20.5}, 1),
    "a loss less than 3 times and 0.5 up": ("SFT", {}, [{"loss": 2.0}] * 3, {"loss": 6.4}, 9),
    "a loss upon one's own answers": ("PPO", {}, [{"loss": 0.01}] * 3, {"loss": 30.0}, 9),
    "gradients below the clipping": ("GRPO", {}, [{"grad_norm": 1e-4}], {"grad_norm": 9.0}, 1),
    "no gradient, then one": ("GRPO", {}, [{"grad_norm": 0.0}] * 3, {"grad_norm": 50.0}, 1),
    "a gradient 50 times as large later on": ("DPO", {}, [{"grad_norm": 0.5}] * 11, {"grad_norm": 25.0}, 1),
    "only the chosen unlikely": (
        "DPO", {}, [BEGINNING], {**BEGINNING, "rewards/chosen": -70.0, "logps/chosen": -1300.0}, 9,
    ),
    "longer rows": ("DPO", {}, [BEGINNING], {**BEGINNING, "logps/chosen": -1300.0, "logps/rejected": -1300.0}, 9),
    "margins of sums": ("DPO", {"loss_type": ["ipo"]}, [], {"rewards/margins": 50.0}, 9),
    "margins of lengths": ("CPO", {}, [], {"rewards/margins": 50.0}, 9),
    "an answer's KL, of KTO": ("KTO", {}, [], {"kl": 5.0}, 9),
    "one odd rollout": ("RLOO", {}, [{"kl": 0.1}] * 2, {"kl": 30.0, "reward_std": 0.0, "entropy": 0.001}, 1),
    "a small entropy from the start": ("GRPO", {}, [{"entropy": 0.01}], {"entropy": 0.005}, 9),
    "one answer a prompt": ("PPO", {"num_generations": 1}, [], {"reward_std": 0.5, "frac_reward_zero_std": 1.0}, 9),
    "longer answers that end": (
        "GRPO", {}, [{"completions/mean_length": 20.0, "completions/clipped_ratio": 0.1}] * 3,
        {"completions/mean_length": 90.0, "completions/clipped_ratio": 0.4}, 9,
    ),
    "answers of which some end": (
        "GRPO", {}, [{"completions/clipped_ratio": 1.0}] * 4, {"completions/clipped_ratio": 0.9}, 9,
    ),
    "what is no number": ("DPO", {}, [{"grad_norm": 0.5}], {"loss": math.inf, "grad_norm": math.inf, "kl": None}, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_what_is_usual_is_not_warned_of(name):
    method, flags, lines, last, times = SOUND[name]
    follow = make_watch(method, **flags)
    assert fed(follow, *lines) == [] and fed(follow, last, times=times, start=60) == []


def test_nothing_follows_upon_a_lost_run_and_a_replay_says_the_same():
    lines = [{"step": 2 + n, "loss": 0.5 if n < 3 else 900.0, "rewards/margins": 99.0 * (n > 2)} for n in range(20)]
    lines += [{**line, "step": line["step"] + 20, "loss": 0.5} for line in lines]
    follow, again = make_watch(), make_watch()
    found = [text for line in lines for text in follow.see(line["step"], line)]
    assert len(found) == 1 and found[0].startswith("the loss rose from 0.5 to 900: --learning_rate 0.0001 is too")
    again.replay(json.loads(json.dumps(lines[:10])))
    assert again.warnings == follow.warnings == [{"step": 5, "text": found[0]}]
    assert [text for line in lines[10:] for text in again.see(line["step"], line)] == []
