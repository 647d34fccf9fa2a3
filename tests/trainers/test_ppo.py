"""PPO's arithmetic on numbers that fit on one screen, and against TRL 1.12's own. Offline, a few seconds.

    python -m pytest tests/trainers/test_ppo.py -q

The losses come from the trainer that a user of PPO gets. Where a test prescribes what the network says, the network is
a function that returns it; elsewhere it is the bigram model of test_losses.py with a critic that knows words.
ppo_reference.json was written by ppo_reference.py.
"""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_args.methods import METHODS, load
from tests.trainers.test_losses import LN2, POLICY, REFERENCE, WORDS, make_bigram, make_tokenizer
from trainers import online_trainer
from trainers.ppo_trainer import PolicyOutput, estimate_advantages, token_kl, token_rewards, value_losses, whiten

CASES = json.loads(Path(__file__).with_name("ppo_reference.json").read_text(encoding="utf-8"))["cases"]
TOLERANCE = 2e-6  # both compute in float32: 7 digits, of numbers below 5, and add up 18 of them


# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_k1_is_the_log_of_the_policy_over_the_reference():
    logps, ref_logps = tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.25]])
    assert token_kl(logps, ref_logps, "k1").tolist() == [[-1 + 1.5, -2 + 1.25]]


def test_k3_is_the_reference_over_the_policy_less_one_less_its_log():
    # sampled with p = 1/2 where the reference has q = 1/4, then p = 1/4 where it has 1/2: q/p - 1 - log q/p
    logps, ref_logps = tensor([[-LN2, -2 * LN2]]), tensor([[-2 * LN2, -LN2]])
    assert token_kl(logps, ref_logps, "k3").tolist() == [near([1 / 2 - 1 + LN2, 2 - 1 - LN2])]


def test_each_token_pays_for_its_kl_and_an_answers_last_has_the_score():
    scores = tensor([10.0, 20.0, 30.0, 40.0])
    kl = tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 9.0], [6.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])  # the last: an answer cut short, and left out
    expected = [
        [-0.5 * 1, -0.5 * 2, 10 - 0.5 * 3],
        [-0.5 * 4, 20 - 0.5 * -5, 0],
        [30 - 0.5 * 6, 0, 0],
        [0, 0, 0],
    ]
    assert token_rewards(scores, kl, mask, 0.5).tolist() == expected


def test_an_advantage_is_what_was_better_than_expected_now_and_less_and_less_later():
    # delta_t = r_t + gamma V_t+1 - V_t; A_t = delta_t + gamma lam A_t+1, here gamma 0.5, gamma lam 0.5 * 0.4 = 0.2
    rewards = tensor([[0.0, 1.0, 2.0, 8.0], [1.0, 0.0, 0.0, 3.0]])
    values = tensor([[1.0, 2.0, 4.0, 9.0], [0.0, 2.0, -2.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    short = [
        (0 + 0.5 * 2 - 1) + 0.2 * 0.6,  # 0.12
        (1 + 0.5 * 4 - 2) + 0.2 * -2,  # 0.6
        (2 + 0.5 * 0 - 4),  # -2: the 8 and the 9 behind the end are nobody's
        0,
    ]
    full = [
        (1 + 0.5 * 2 - 0) + 0.2 * -2.42,  # 1.516
        (0 + 0.5 * -2 - 2) + 0.2 * 2.9,  # -2.42
        (0 + 0.5 * 1 + 2) + 0.2 * 2,  # 2.9
        (3 + 0.5 * 0 - 1),  # 2
    ]
    advantages, returns = estimate_advantages(rewards, values, mask, 0.5, 0.4)
    assert advantages.tolist() == [near(short), near(full)]
    # a return is advantage + value
    assert returns.tolist() == [near([1 + 0.12, 2 + 0.6, 4 - 2, 0]), near([0 + 1.516, 2 - 2.42, -2 + 2.9, 1 + 2])]


@pytest.mark.parametrize(("shift_mean", "kept"), [(True, 0), (False, 3)])
def test_whitened_numbers_have_variance_one_and_no_mean_unless_it_is_kept(shift_mean, kept):
    x, mask = tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    # mean (1 + 2 + 3 + 6) / 4 = 3; variance (2^2 + 1^2 + 0^2 + 3^2) / (4 - 1)
    spread = math.sqrt(14 / 3)
    expected = [[-2 / spread + kept, -1 / spread + kept, kept], [3 / spread + kept, 0, 0]]
    assert whiten(x, mask, shift_mean).tolist() == [near(row) for row in expected]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_processes_whiten_as_one_that_has_both_their_answers(shift_mean):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    mask = (torch.arange(4) < torch.tensor([[4], [1], [3], [2], [4]])).long()
    parts = in_two_processes(
        lambda rank, reduce: whiten(x[3 * rank : 3 + 3 * rank], mask[3 * rank : 3 + 3 * rank], shift_mean, reduce)
    )
    assert torch.cat(parts).tolist() == [near(row) for row in whiten(x, mask, shift_mean).tolist()]


def test_a_value_loss_is_half_the_worse_square_of_the_value_and_the_clipped_value():
    cases = [
        # value, old, return: loss, clipped, with a range of 0.25
        (1.125, 1.0, 2.0, 0.5 * 0.875**2, False),  # within the range
        (1.5, 1.0, 2.0, 0.5 * 0.75**2, True),  # 1.25 is farther from 2 than 1.5 is
        (1.5, 1.0, 0.0, 0.5 * 1.5**2, False),  # 1.25 is nearer to 0, so 1.5 counts
        (0.5, 1.0, 0.0, 0.5 * 0.75**2, True),  # 0.75 is farther from 0 than 0.5 is
    ]
    values, old_values, returns = (tensor(column) for column in list(zip(*cases, strict=True))[:3])
    losses, clipped = value_losses(values, old_values, returns, 0.25)
    assert losses.tolist() == [loss for *_, loss, _ in cases]
    assert clipped.tolist() == [was for *_, was in cases]


def test_a_value_within_the_range_does_not_count_as_clipped():
    # by rounding, old + (value - old) is often not quite the value, nor as far from the return
    old_values, moves, returns = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)) - 0.5
    values = (old_values + 0.2 * moves).round(decimals=3)  # within 0.1 and a rounding
    assert value_losses(values, old_values, returns, 0.2)[1].sum() == 0


# ── the losses of a step ─────────────────────────────────────────────────────────────────────────────────────────────

# Two answers, q>a>b>e and b>a>e: 1+1+1 and 3+2 bits under POLICY, and what their rollout left. The last place of the
# second is empty: what stands there counts for nothing.
STEP = {
    "prompt_ids": [["b", "q"], ["a", "b"]],
    "completion_ids": [["a", "b", "</s>"], ["a", "</s>", "</s>"]],
    "completion_mask": [[1, 1, 1], [1, 1, 0]],
    "advantages": [[1.0, 0.5, -1.0], [-1.0, 0.25, 7.0]],
    "old_bits": [[2, 1, 2], [2, 2, 5]],
    "old_values": [[0.9, 1.5, -1.0], [-1.0, 2.5, 9.0]],
    "returns": [[2.0, 3.0, -1.0], [1.0, 2.0, 99.0]],
}
POLICY_LOSSES = [  # -min(ratio * A, ratio kept within 0.8 to 1.2 * A); the ratio is 2^(old bits - bits)
    [
        -1.2 * 1,  # 2^(2-1) = 2, clipped
        -1 * 0.5,  # 2^(1-1) = 1
        -2 * -1,  # 2^(2-1) = 2; a worse token grew likelier, so not clipped
    ],
    [
        -0.8 * -1,  # 2^(2-3) = 1/2, clipped
        -1 * 0.25,  # 2^(2-2) = 1
    ],
]
VALUES = {"q": 1.0, "a": 2.0, "b": -1.0, "</s>": 50.0}  # what the critic expects after a word
VALUE_LOSSES = [  # 0.5 * max((V - R)^2, (V kept within 0.2 of the old one - R)^2)
    [
        0.5 * (1 - 2) ** 2,  # behind q; 0.1 from the old
        0.5 * (1.7 - 3) ** 2,  # behind a: 2, clipped at 1.5 + 0.2
        0.5 * (-1 + 1) ** 2,  # behind b
    ],
    [
        0.5 * (-1 - 1) ** 2,  # behind b
        0.5 * (2.3 - 2) ** 2,  # behind a: 2, clipped at 2.5 - 0.2
    ],
]


def test_the_policy_loss_is_the_mean_over_all_tokens_of_the_clipped_ratios(tmp_path):
    trainer = make_trainer(tmp_path, vf_coef=0.0)
    loss = trainer.compute_loss(trainer.model, make_step())
    assert loss.item() == near(sum(map(sum, POLICY_LOSSES)) / (3 + 2))  # 0.85 / 5
    assert logged(trainer, "clip_ratio/region_mean") == near(2 / 5)


def test_the_loss_is_the_policys_and_vf_coef_times_the_critics(tmp_path):
    trainer = make_trainer(tmp_path, vf_coef=0.5)
    loss = trainer.compute_loss(trainer.model, make_step())
    value_loss = sum(map(sum, VALUE_LOSSES)) / (3 + 2)  # 3.39 / 5
    assert loss.item() == near(sum(map(sum, POLICY_LOSSES)) / (3 + 2) + 0.5 * value_loss)
    assert logged(trainer, "value_loss") == near(value_loss)
    assert logged(trainer, "clip_ratio/value_mean") == near(2 / 5)


def test_accumulated_batches_add_up_to_the_mean_over_all_their_tokens(tmp_path):
    # an answer a batch, both in one step: each is divided by the 5 tokens of both
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, vf_coef=0.5)
    assert each_answers_loss(trainer, accumulated=2) == [near(total / 5) for total in answers_totals(0.5)]


def test_a_step_on_a_part_of_the_rollout_counts_its_share_of_the_tokens(tmp_path):
    # an answer a batch, a step each: 5 tokens in two steps are 2.5 a step, as GRPO counts for its own loss
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, steps_per_generation=2, vf_coef=0.5)
    assert each_answers_loss(trainer, accumulated=1) == [near(total / 2.5) for total in answers_totals(0.5)]


def test_processes_average_to_the_mean_over_all_their_tokens(tmp_path, monkeypatch):
    # an answer a process; their gradients are averaged, so each loss is two times its part of the whole
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, vf_coef=0.5)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert each_answers_loss(trainer, accumulated=1) == [near(2 * total / 5) for total in answers_totals(0.5)]


# ── a rollout ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_keeps_what_policy_and_critic_said_of_its_tokens_and_logs_their_kl(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, beta=0.5)
    output = roll_out(trainer, scores=[1.0, 3.0], monkeypatch=monkeypatch)
    bits = [[1, 1, 1], [3, 2, 0]]  # of POLICY; none behind the end
    assert output["old_per_token_logps"].tolist() == [near([-LN2 * bit for bit in row]) for row in bits]
    assert output["old_values"].tolist() == [near([1, 2, -1]), near([-1, 2, 0])]
    # log policy/reference of the answers: REFERENCE's 2+2+2 bits less 1+1+1, and 1+2 less 3+2
    kls = [3 * LN2, -2 * LN2]
    assert logged(trainer, "kl") == near(sum(kls) / (3 + 2))
    assert logged(trainer, "rlhf_reward") == near((1 - 0.5 * kls[0] + 3 - 0.5 * kls[1]) / 2)


def test_explained_variance_is_what_the_critics_errors_leave_of_the_returns(tmp_path, monkeypatch):
    # no KL, nothing discounted, lam 1: every token's return is its answer's score
    trainer = make_trainer(tmp_path, beta=0.0, lam=1.0)
    output = roll_out(trainer, scores=[1.0, 3.0], monkeypatch=monkeypatch)
    assert output["returns"].tolist() == [near([1, 1, 1]), near([3, 3, 0])]
    assert logged(trainer, "value") == near((1 + 2 - 1 - 1 + 2) / 5)
    spread = (3 * 1**2 + 2 * 3**2) / 5 - ((3 * 1 + 2 * 3) / 5) ** 2  # of the returns: 0.96
    left = (0**2 + 1**2 + 2**2 + 4**2 + 1**2) / 5 - ((0 - 1 + 2 + 4 + 1) / 5) ** 2  # of return - value: 2.96
    assert logged(trainer, "explained_variance") == near(1 - left / spread)


def test_an_answer_without_a_verdict_gives_no_signal(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, beta=0.0)
    rewards = torch.tensor([[2.0], [math.nan]])
    monkeypatch.setattr(online_trainer.GRPOTrainer, "_calculate_rewards", lambda self, *args: rewards)
    trainer._calculate_rewards([], ["b q", "a b"], [], [])
    output = roll_out(trainer, scores=trainer._scores.tolist(), monkeypatch=monkeypatch)
    assert output["completion_mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert output["advantages"][1].tolist() == output["returns"][1].tolist() == [0, 0, 0]
    assert logged(trainer, "rlhf_reward") == near(2)  # of the one answer that was judged
    assert logged(trainer, "value") == near((1 + 2 - 1) / 3)


# ── TRL 1.12 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_has_cases_in_which_something_is_clipped():
    assert len(CASES) == 4
    assert all(case["outputs"]["policy_clipped"] > 0 and case["outputs"]["value_clipped"] > 0 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_token_rewards_are_those_of_trl_1_12(case):
    given, settings = tensors(case), case["settings"]
    mask = torch.ones_like(given["logps"], dtype=torch.long)
    kl = token_kl(given["logps"], given["ref_logps"], settings["kl_estimator"])
    rewards = token_rewards(given["scores"], kl, mask, settings["kl_coef"])
    if settings["whiten_rewards"]:
        rewards = whiten(rewards, mask, shift_mean=False)
    same(case, kl=kl, rewards=rewards)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_rollout_has_the_advantages_and_returns_of_trl_1_12(case, tmp_path, monkeypatch):
    given, trainer = tensors(case), make_trainer_of(case, tmp_path)
    tokens = make_tokens(given)

    def rollout(self, inputs):  # as TRL's leaves it: scored, and its log-probabilities taken
        self._scores = given["scores"]
        return tokens | {"old_per_token_logps": self.score_tokens(network(given["logps"], given["values"]), tokens)}

    monkeypatch.setattr(online_trainer.GRPOTrainer, "_generate_and_score_completions", rollout)
    trainer.ref_model = network(given["ref_logps"])
    output = trainer._generate_and_score_completions([])
    same(case, advantages=output["advantages"], returns=output["returns"])
    assert output["old_values"].tolist() == given["values"].tolist()
    assert output["old_per_token_logps"].tolist() == given["logps"].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_losses_their_clipping_and_their_gradients_are_those_of_trl_1_12(case, tmp_path):
    given, trainer = tensors(case), make_trainer_of(case, tmp_path)
    new_logps, new_values = given["new_logps"].requires_grad_(), given["new_values"].requires_grad_()
    batch = make_tokens(given) | {
        "advantages": given["advantages"],
        "old_per_token_logps": given["logps"],
        "old_values": given["values"],
        "returns": given["returns"],
    }
    loss = trainer.compute_loss(network(new_logps, new_values), batch)
    loss.backward()
    same(case, loss=loss, new_logps_grad=new_logps.grad, new_values_grad=new_values.grad)
    value_loss = logged(trainer, "value_loss")
    same(case, value_loss=value_loss, policy_loss=loss - case["settings"]["vf_coef"] * value_loss)
    same(case, policy_clipped=logged(trainer, "clip_ratio/region_mean"))
    same(case, value_clipped=logged(trainer, "clip_ratio/value_mean"))


# ── how a loss comes about ───────────────────────────────────────────────────────────────────────────────────────────


def near(expected):
    return pytest.approx(expected, abs=1e-6)  # the bigram model computes in float32: 7 digits, of losses below 5


def same(case, **found):
    """Every number of `found` is that of TRL 1.12."""
    for name, numbers in found.items():
        difference = torch.as_tensor(numbers, dtype=torch.float64) - tensor(case["outputs"][name])
        assert difference.abs().max() <= TOLERANCE, name


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def tensors(case):
    """What the case was given, and what TRL 1.12 made of the rollout."""
    numbers = case["inputs"] | {name: case["outputs"][name] for name in ("advantages", "returns")}
    return {name: torch.tensor(value) for name, value in numbers.items()}


def in_two_processes(work):
    """[work(0, reduce), work(1, reduce)], run at once; `reduce` sums what both give it, as accelerate's does."""
    barrier, given = threading.Barrier(2, timeout=60), [None, None]

    def process(rank):
        def reduce(sums):
            given[rank] = sums
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        return work(rank, reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


def make_trainer(folder, **flags):
    """The trainer that a user of PPO gets, with a critic that expects VALUES."""
    from datasets import Dataset

    method, tokenizer = METHODS["PPO"], make_tokenizer("</s>")
    defaults = {"per_device_train_batch_size": 2, "critic": "head", "normalize_values": False}
    config = load(method.config)(
        output_dir=str(folder), **defaults | flags, max_completion_length=3, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = load(method.trainer)(
        model=make_bigram(POLICY),
        reward_funcs=[lambda completions, **row: [0.0] * len(completions)],
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "b q"}, {"prompt": "a b"}]),
        ref_model=make_bigram(REFERENCE),
    )
    with torch.no_grad():  # the states are one-hot times the root of their size, see make_config
        trainer.model.critic.score[-1].weight.copy_(tensor([[VALUES[word] for word in WORDS]]) / math.sqrt(len(WORDS)))
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # transformers, as a step begins
    return trainer


def make_trainer_of(case, folder):
    """With the settings of the case; two are called otherwise in TRL 1.12."""
    settings = dict(case["settings"])
    renamed = {"beta": settings.pop("kl_coef"), "epsilon": settings.pop("cliprange")}
    return make_trainer(folder, per_device_train_batch_size=3, **renamed, **settings)


def make_step():
    """STEP as tensors, as the rollout hands it to a step."""
    step = dict(STEP)
    for name in ("prompt_ids", "completion_ids"):
        step[name] = [[WORDS.index(word) for word in row] for row in step[name]]
    step = {name: torch.tensor(numbers) for name, numbers in step.items()}
    step["old_per_token_logps"] = -LN2 * step.pop("old_bits")
    step["prompt_mask"] = torch.ones_like(step["prompt_ids"])
    return step | {"num_items_in_batch": step["completion_mask"].sum()}


def roll_out(trainer, scores, monkeypatch):
    """PPO's rollout of the answers of STEP, scored so, where TRL's needed no log-probabilities for itself."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")

    def rollout(self, inputs):
        self._scores = torch.tensor(scores)
        return {name: make_step()[name] for name in names}

    monkeypatch.setattr(online_trainer.GRPOTrainer, "_generate_and_score_completions", rollout)
    return trainer._generate_and_score_completions([])


def each_answers_loss(trainer, accumulated):
    """The losses of the two answers of STEP, a batch each; the tokens counted stay those of both."""
    trainer.current_gradient_accumulation_steps = accumulated
    step = make_step()
    tokens = step.pop("num_items_in_batch")
    batches = [{name: tensor[n : n + 1] for name, tensor in step.items()} for n in range(2)]
    return [trainer.compute_loss(trainer.model, batch | {"num_items_in_batch": tokens}).item() for batch in batches]


def answers_totals(vf_coef):
    """Each answer's losses of policy and critic, summed over its tokens."""
    return [sum(policy) + vf_coef * sum(value) for policy, value in zip(POLICY_LOSSES, VALUE_LOSSES, strict=True)]


def make_tokens(given):
    """Answers as wide as the numbers given, none shorter; which words they are is for a network to care about."""
    answers = torch.zeros_like(given["logps"], dtype=torch.long)
    prompts = torch.zeros(len(answers), 2, dtype=torch.long)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "num_items_in_batch": torch.tensor(answers.numel()),
    }


def network(logps, values=None):
    """A model that says so much of each token, whatever it is shown."""
    return lambda **inputs: PolicyOutput(log_probs=logps, entropy=torch.zeros_like(logps), token_values=values)


def logged(trainer, name):
    (value,) = trainer._metrics["train"][name]
    return value
