"""PPO's critics: which weights they read, share, train and save, and at which rates. Offline, some seconds.

python -m pytest tests/trainers/test_critics.py -q
"""

import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf_args.methods import METHODS, load
from rlhf_args.ppo_config import SCALE
from tests.conftest import make_model, make_tokenizer
from tests.trainers.test_ppo import make_step, make_trainer as make_bigram_trainer, near, roll_out, tensor
from trainers.critics import FixedScale, ReturnScale, clip_apart
from utils.checks.flags import check_critic
from utils.runtime.errors import Refused

WIDTH = 64  # the hidden size of conftest's tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tiny):
    """A reward model of the policy's shape, with a head of ones."""
    return make_judge(tmp_path_factory.mktemp("judge"))


def make_judge(folder, labels=1):
    from transformers import AutoModelForSequenceClassification

    make_model(folder, seed=7)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    torch.nn.init.ones_(model.score.weight)
    model.save_pretrained(folder)
    return folder


def make_lora_judge(folder, base, rank=4, alpha=8):
    """The adapter of a reward model on `base`, whose numbers are all 0.5, with a head of ones."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.5)
        if "modules_to_save" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_config(folder, **flags):
    defaults = {"per_device_train_batch_size": 2, "max_completion_length": 3, "gradient_checkpointing": False}
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "output_dir": str(folder)}
    return load(METHODS["PPO"].config)(**defaults | flags, **fixed)


def make_trainer(folder, policy, lora=False, four_bit=False, **flags):
    """The trainer that a user of PPO gets, of a tiny model; with full weights or an adapter of rank 4."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from utils.models.load import four_bit_config

    held = {"quantization_config": four_bit_config(torch.float32)} if four_bit else {}
    shape = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = load(METHODS["PPO"].trainer)(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, **held),
        reward_funcs=[lambda completions, **row: [0.0] * len(completions)],
        args=make_config(folder, **{"beta": 0.0} | flags),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        peft_config=shape,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def make_batch():
    """Two answers of three and two tokens, with advantages and returns of some size."""
    ids = torch.arange(10, 20).view(2, 5)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones(2, 2, dtype=torch.int64),
        "completion_ids": ids[:, 2:],
        "completion_mask": mask,
        "advantages": torch.tensor([[1.0, -0.5, 1.0], [-1.0, 0.5, 0.0]]),
        "old_per_token_logps": None,
        "old_values": torch.zeros(2, 3),
        "returns": torch.tensor([[1.0, 0.5, 2.0], [-1.0, 1.0, 0.0]]),
        "num_items_in_batch": mask.sum(),
    }


def learn(trainer):
    """{name: gradient} of one step's loss, of the parameters that got one that is not zero."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, make_batch()).backward()
    named = trainer.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and p.grad.abs().max() > 0}


def critic_of(trainer):
    return trainer.policy().critic


# ── which weights learn ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_a_critic_on_the_policys_states_sends_no_gradient_into_the_policy(kind, tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic=kind)
    torch.nn.init.ones_(critic_of(trainer).score[-1].weight)  # at zero no gradient would pass in any case
    batch = make_batch() | {"advantages": torch.zeros(2, 3)}
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    moved = {n for n, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all("critic." in name for name in moved)


def test_a_critic_with_a_model_of_its_own_trains_all_of_it_and_the_policy_by_its_own_loss(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny)
    assert trainer.critic_kind == "model"
    torch.nn.init.ones_(critic_of(trainer).score[-1].weight)
    named = dict(trainer.model.named_parameters())
    trunk = {name for name in named if name.startswith("critic.backbone.layers.")}
    assert len(trunk) == len([name for name in named if name.startswith("model.layers.")])
    assert trunk <= set(learn(trainer))
    assert torch.equal(named["critic.backbone.norm.weight"], named["model.norm.weight"])  # a copy of the policy
    assert named["critic.backbone.norm.weight"] is not named["model.norm.weight"]


def test_a_critics_adapter_shares_the_frozen_base_and_learns_apart(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, lora=True)
    assert trainer.critic_kind == "lora"
    critic, trunk = critic_of(trainer), trainer.policy().model
    ours, policys = critic.backbone.layers[0].self_attn.q_proj, trunk.layers[0].self_attn.q_proj
    assert ours.base_layer.weight is policys.base_layer.weight
    assert ours.lora_A["default"].weight is not policys.lora_A["default"].weight
    torch.nn.init.ones_(critic.score[-1].weight)
    learnt = learn(trainer)
    parts = {"critic." in name for name in learnt}
    assert parts == {True, False} and all("lora_" in name or "critic.score" in name for name in learnt)
    frozen = trainer.model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "critic." in name and "lora_" in name:
                parameter.add_(1.0)
    assert torch.equal(ours.base_layer.weight, frozen)
    other = {name: gradient for name, gradient in learn(trainer).items() if "critic." not in name}
    assert all(torch.allclose(gradient, learnt[name]) for name, gradient in other.items())  # the policy saw none of it


def test_a_critic_of_another_model_has_an_adapter_of_its_own_under_lora(tiny, judge, tmp_path):
    trainer = make_trainer(tmp_path, tiny, lora=True, value_model_path=str(judge))
    assert trainer.critic_kind == "model"
    torch.nn.init.ones_(critic_of(trainer).score[-1].weight)
    learnt = {name for name in learn(trainer) if "critic.backbone" in name}
    assert learnt and all("lora_" in name for name in learnt)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_a_critic_reads_the_layer_that_is_asked_for(layer, tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head", critic_layer=layer)
    seen, batch = [], make_batch()
    critic_of(trainer).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trainer.score_tokens(trainer.model, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        asked = trainer.model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    if layer is None:
        wanted = asked.last_hidden_state
    elif layer == 0:
        wanted = asked.hidden_states[1]  # 0 is the embedding
    else:
        states = []
        trainer.model.model.layers[1].register_forward_hook(lambda *call: states.append(call[-1]))
        trainer.model.model(input_ids=ids, attention_mask=mask)
        wanted = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
    assert torch.allclose(seen[0], wanted, atol=1e-6)


def test_the_reference_does_not_ask_the_critic(tiny, tmp_path):
    trainer, asked = make_trainer(tmp_path, tiny, lora=True, beta=0.05), []
    critic_of(trainer).register_forward_hook(lambda *call: asked.append(1))
    with trainer.reference() as reference:
        trainer.score_tokens(reference, make_batch())
    assert not asked
    trainer.score_tokens(trainer.model, make_batch())
    assert asked and all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)


# ── where its weights come from ──────────────────────────────────────────────────────────────────────────────────────


def test_the_trunk_and_the_head_of_a_reward_model_are_taken(tiny, judge, tmp_path):
    critic = critic_of(make_trainer(tmp_path, tiny, value_model_path=str(judge)))
    theirs = load_file(judge / "model.safetensors")
    ours = critic.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[f"model.{name}"]) for name in ours)
    assert torch.equal(critic.guess, torch.ones(1, WIDTH)) and critic.score[-1].weight.abs().max() == 0
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_the_adapter_and_the_head_of_a_reward_model_on_the_same_base_are_taken(tiny, tmp_path):
    path = make_lora_judge(tmp_path / "judge", tiny)
    trainer = make_trainer(tmp_path / "out", tiny, lora=True, value_model_path=str(path))
    assert trainer.critic_kind == "lora"
    weights = {n: p for n, p in critic_of(trainer).backbone.named_parameters() if "lora_" in n}
    assert weights and all(torch.all(weight == 0.5) for weight in weights.values())
    assert torch.equal(critic_of(trainer).guess, torch.ones(1, WIDTH))
    policys = [p for n, p in trainer.model.named_parameters() if "lora_B" in n and "critic." not in n]
    assert all(torch.all(weight == 0) for weight in policys)


def test_an_adapter_of_another_rank_is_refused_with_both_shapes(tiny, tmp_path):
    path = make_lora_judge(tmp_path / "judge", tiny, rank=2)
    with pytest.raises(Refused, match=r"--lora_rank") as refusal:
        make_trainer(tmp_path / "out", tiny, lora=True, value_model_path=str(path))
    assert "(2, 64)" in str(refusal.value) and "(4, 64)" in str(refusal.value)


def test_a_value_model_of_two_labels_is_refused(tiny, tmp_path):
    with pytest.raises(Refused, match="scores 2 labels"):
        make_trainer(tmp_path / "out", tiny, value_model_path=str(make_judge(tmp_path / "judge", labels=2)))


# ── rates and clipping ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "lora", "trunk", "head"),
    [
        ({"critic": "head", "learning_rate": 1e-6}, False, None, 1 / WIDTH),
        ({"critic": "mlp", "learning_rate": 1e-6}, False, None, 1 / WIDTH),
        ({"learning_rate": 1e-6}, False, 1e-5, 0.1 / WIDTH),  # a whole trunk needs more than the policy's rate
        ({"learning_rate": 1e-2}, False, 1e-2, 1e-2),
        ({"learning_rate": 1e-4}, True, 1e-4, 0.1 / WIDTH),
        ({"critic_learning_rate": 3e-4}, False, 3e-4, 3e-4),
        ({"critic": "head", "critic_learning_rate": 3e-4}, False, None, 3e-4),
    ],
)
def test_the_critics_parts_have_rates_of_their_own(flags, lora, trunk, head, tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, lora=lora, **flags)
    rates = {}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        rates |= {names[parameter]: group["lr"] for parameter in group["params"]}
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = {"policy": set(), "trunk": set(), "head": set()}
    for name, rate in rates.items():
        found["head" if "critic.score" in name else "trunk" if "critic." in name else "policy"].add(rate)
    assert found == {"policy": {trainer.args.learning_rate}, "trunk": {trunk} if trunk else set(), "head": {head}}


def test_the_critics_gradient_and_the_policys_are_clipped_by_their_own_norms(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head", max_grad_norm=1.0)
    for name, parameter in trainer.model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        if name == "model.norm.weight":
            parameter.grad[0] = 0.5  # below 1: stays
        if name.endswith("score.0.weight"):
            parameter.grad[0, 0] = 100.0  # becomes 1
    assert trainer._clip_grad_norm(trainer.model) == pytest.approx(0.5)
    assert trainer._metrics["train"]["critic_grad_norm"] == [pytest.approx(100)]
    assert trainer.model.model.norm.weight.grad[0] == pytest.approx(0.5)
    assert critic_of(trainer).score[0].weight.grad[0, 0] == pytest.approx(1, rel=1e-5)


def test_a_critics_gradient_that_is_no_number_is_not_hidden_by_the_policys_norm(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head")
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    critic_of(trainer).score[0].weight.grad[0, 0] = math.nan
    assert math.isnan(trainer._clip_grad_norm(trainer.model))


class Zero:
    """What clip_apart uses of DeepSpeed's ZeRO-3 optimizer: three parts in two groups, the second the critic's."""

    loss_scale, sub_group_to_group_id = 1.0, {0: 0, 1: 0, 2: 1}

    def __init__(self):
        self.optimizer = type("Adam", (), {"param_groups": [{}, {"critic": True}]})()
        self.clipped = {}

    def unscale_and_clip_grads(self, part, total):
        self.clipped[part] = float(total)

    def step(self, norms):
        total = combine_grad_norm_groups(norms)
        for part in range(3):
            self.unscale_and_clip_grads(part, total)
        return total


def combine_grad_norm_groups(norms):
    return torch.linalg.vector_norm(torch.tensor([float(norm) for norm in norms]))


def test_deepspeed_clips_each_part_by_the_norm_of_its_side(monkeypatch):
    import sys

    plain = combine_grad_norm_groups
    monkeypatch.setattr(sys.modules[__name__], "combine_grad_norm_groups", plain)
    zero = Zero()
    clip_apart(zero)
    assert hasattr(zero, "norms_apart")  # before the first step: a pass more must not wrap it again
    again = Zero()
    clip_apart(again)  # of another trainer of this process
    assert sys.modules[__name__].combine_grad_norm_groups.of_deepspeed is plain
    assert again.step([3.0, 4.0, 12.0]) == pytest.approx(13)
    clip_apart(zero := Zero())
    assert zero.step([3.0, 4.0, 12.0]) == pytest.approx(13)  # the norm that is logged elsewhere stays that of all
    assert zero.clipped == {0: pytest.approx(5), 1: pytest.approx(5), 2: pytest.approx(12)}
    assert {side: float(norm) for side, norm in zero.norms_apart.items()} == {False: 5, True: 12}


# ── the scale of the values ──────────────────────────────────────────────────────────────────────────────────────────


def reduce_alone(sums):
    return sums


def test_the_first_rollout_sets_the_scale_and_later_ones_move_it_by_a_tenth():
    scale, mask = ReturnScale(), torch.tensor([[1, 1, 0]])
    scale.update(tensor([[1.0, 3.0, 99.0]]), mask, reduce_alone)
    assert (scale.mean, scale.spread) == (2, 1)  # variance ((1-2)^2 + (3-2)^2) / 2
    scale.update(tensor([[10.0, 14.0, 99.0]]), mask, reduce_alone)
    assert (scale.mean, scale.spread) == (pytest.approx(2 + 0.1 * 10), pytest.approx(1 + 0.1 * 1))
    assert scale.values(scale.normalise(tensor([5.0]))).tolist() == [pytest.approx(5)]


@pytest.mark.parametrize("kind", [ReturnScale, FixedScale])
def test_a_scale_begins_with_the_first_rollout_whose_returns_differ(kind):
    scale, mask = kind(), torch.ones(1, 2)
    scale.update(tensor([[7.0, 7.0]]), mask, reduce_alone)
    assert not scale.begun and scale.spread == 1
    scale.update(tensor([[2.0, 6.0]]), mask, reduce_alone)
    assert scale.begun and (scale.mean, scale.spread) == ((4, 2) if kind is ReturnScale else (0, 1))


def test_equal_returns_move_the_mean_alone():
    scale, mask = ReturnScale(), torch.ones(1, 2)
    scale.update(tensor([[1.0, 3.0]]), mask, reduce_alone)
    scale.update(tensor([[7.0, 7.0]]), mask, reduce_alone)
    assert (scale.mean, scale.spread) == (pytest.approx(2 + 0.1 * 5), 1)


def test_a_rollout_without_a_counted_token_moves_nothing():
    scale = ReturnScale()
    scale.update(tensor([[5.0, 7.0]]), torch.ones(1, 2), reduce_alone)
    scale.update(tensor([[5.0, 7.0]]), torch.zeros(1, 2), reduce_alone)
    assert (scale.mean, scale.spread) == (6, 1)


def test_a_scale_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match="--normalize_values False"):
        ReturnScale().load(FixedScale().state())


@pytest.mark.parametrize("kind", [ReturnScale, FixedScale])
def test_a_guess_is_fitted_to_the_returns_by_least_squares(kind):
    scale, mask = kind(), torch.ones(1, 3)
    guesses, returns = tensor([[1.0, 2.0, 3.0]]), tensor([[12.0, 14.0, 16.0]])  # returns = 10 + 2 * guess
    scale.update(returns, mask, reduce_alone)
    scale.fit_guess(guesses, returns, mask, reduce_alone)
    values = scale.values(scale.gain * guesses + scale.shift)
    assert values.tolist() == [near([12, 14, 16])]


def test_a_guess_counts_after_the_first_rollout_too(tiny, judge, tmp_path):
    trainer = make_trainer(tmp_path, tiny, value_model_path=str(judge))
    trainer.scale.gain, trainer.scale.shift = 2.0, 1.0
    trainer.score_tokens(trainer.model, make_batch())
    assert trainer._guesses.abs().min() > 0 and torch.allclose(trainer._values, 2 * trainer._guesses + 1)


@pytest.mark.parametrize(("factor", "offset"), [(1, 5), (1, -5), (10, 0), (1, 1e4)])
def test_an_offset_or_a_scale_of_the_rewards_changes_nothing_that_is_learnt(factor, offset, tmp_path, monkeypatch):
    """Two rollouts, the scale moving between them. The tolerance: float32 holds 7 digits, of rewards up to 1e4."""
    found = []
    for times, more in ((1, 0), (factor, offset)):
        trainer = make_bigram_trainer(tmp_path, beta=0.0, critic="head", normalize_values=True)
        for scores in ([1.0, 3.0], [2.0, 1.5]):
            rollout = roll_out(trainer, [times * score + more for score in scores], monkeypatch)
        found.append([rollout[name] for name in ("advantages", "returns", "old_values")])
    for plain, moved in zip(*found, strict=True):
        assert moved.flatten().tolist() == pytest.approx(plain.flatten().tolist(), abs=5e-3 if offset == 1e4 else 1e-5)


def test_without_normalisation_an_offset_is_in_the_returns(tmp_path, monkeypatch):
    trainer = make_bigram_trainer(tmp_path, beta=0.0, lam=1.0, normalize_values=False)
    assert roll_out(trainer, [6.0, 8.0], monkeypatch)["returns"].tolist() == [near([6, 6, 6]), near([8, 8, 0])]


def test_a_held_out_rollout_does_not_move_the_scale(tmp_path, monkeypatch):
    trainer = make_bigram_trainer(tmp_path, beta=0.0, normalize_values=True)
    roll_out(trainer, [1.0, 3.0], monkeypatch)
    before = trainer.scale.state()
    trainer.model.eval()
    roll_out(trainer, [100.0, 300.0], monkeypatch)
    assert torch.equal(trainer.scale.state(), before)


def test_a_held_out_rollout_before_the_training_does_not_set_the_scale(tmp_path, monkeypatch):
    trainer = make_bigram_trainer(tmp_path, beta=0.0, normalize_values=True)
    trainer.model.eval()
    found = roll_out(trainer, [100.0, 300.0], monkeypatch)
    assert found["returns"].abs().max() < 3  # in units of its own spread
    assert not trainer.scale.begun
    trainer.model.train()
    roll_out(trainer, [1.0, 3.0], monkeypatch)
    assert trainer.scale.begun and trainer.scale.mean < 3


# ── lambda, warm-up, passes ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_critic_may_have_a_lambda_of_its_own(tmp_path, monkeypatch):
    plain = roll_out(make_bigram_trainer(tmp_path, beta=0.0, lam=0.5), [1.0, 3.0], monkeypatch)
    own = roll_out(make_bigram_trainer(tmp_path, beta=0.0, lam=0.5, critic_lam=1.0), [1.0, 3.0], monkeypatch)
    assert own["returns"].tolist() == [near([1, 1, 1]), near([3, 3, 0])]  # lambda 1: what was really rewarded
    assert torch.equal(own["advantages"], plain["advantages"])
    assert not torch.equal(own["returns"], plain["returns"])


def test_while_it_warms_up_the_critic_learns_alone(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head", critic_warmup_steps=2)
    trainer.state.global_step = 1
    assert {"critic." in name for name in learn(trainer)} == {True}
    trainer.state.global_step = 2
    assert {"critic." in name for name in learn(trainer)} == {True, False}


def test_each_pass_draws_its_mini_batches_anew(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head", num_mini_batches=4, num_iterations=3)
    trainer.model.train()
    rows = [{"completion_ids": torch.arange(2 * n, 2 * n + 2)[:, None], "num": torch.tensor(5)} for n in range(4)]
    trainer._buffered_inputs, drawn = rows, []
    for trainer._step in range(4, 12):  # the second and the third pass
        drawn.append(trainer._prepare_inputs([])["completion_ids"].flatten().tolist())
    second, third = sum(drawn[:4], []), sum(drawn[4:], [])
    assert sorted(second) == sorted(third) == list(range(8))
    assert second != third and second != list(range(8))


def test_one_step_a_pass_is_not_drawn_anew(tiny, tmp_path):
    trainer = make_trainer(tmp_path, tiny, critic="head", num_iterations=3)
    trainer.model.train()
    trainer._buffered_inputs = [{"completion_ids": torch.arange(2)[:, None]}]
    trainer._step = 1
    assert trainer._prepare_inputs([])["completion_ids"].flatten().tolist() == [0, 1]


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


SAVED = [("head", "full"), ("mlp", "lora"), ("lora", "lora"), ("lora", "qlora"), ("model", "full")]


@pytest.mark.parametrize(("kind", "mode"), SAVED)
def test_a_saved_critic_is_another_runs_start(kind, mode, tiny, tmp_path):
    policy = {"lora": mode != "full", "four_bit": mode == "qlora"}
    trainer = make_trainer(tmp_path / "out", tiny, **policy, critic=kind, save_critic=True)
    trainer.scale.update(tensor([[1.0, 4.0]]), torch.ones(1, 2), reduce_alone)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "critic." in name and parameter.requires_grad:
                parameter.add_(0.25)
    trainer.save_model(tmp_path / "out")
    file = tmp_path / "out" / "critic.safetensors"
    held = load_file(file)
    trained = {n for n, p in critic_of(trainer).named_parameters() if p.requires_grad}
    assert set(held) == trained | {SCALE}  # no frozen base
    assert not any("critic" in name for name in load_file(next((tmp_path / "out").glob("*model.safetensors"))))
    other = make_trainer(tmp_path / "two", tiny, **policy, critic=kind, critic_path=str(file))
    ours, theirs = (dict(critic_of(one).named_parameters()) for one in (other, trainer))
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    assert (other.scale.mean, other.scale.spread, other.scale.begun) == (2.5, 1.5, True)


def test_the_head_of_a_reward_model_is_saved_with_the_critic(tiny, judge, tmp_path):
    trainer = make_trainer(tmp_path / "out", tiny, value_model_path=str(judge), save_critic=True)
    trainer.save_model(tmp_path / "out")
    file = str(tmp_path / "out" / "critic.safetensors")
    assert torch.equal(critic_of(make_trainer(tmp_path / "two", tiny, critic_path=file)).guess, torch.ones(1, WIDTH))


def test_a_critic_of_another_kind_is_refused(tiny, tmp_path):
    make_trainer(tmp_path / "out", tiny, critic="head", save_critic=True).save_model(tmp_path / "out")
    with pytest.raises(Refused, match="--critic_path .*critic.safetensors"):
        make_trainer(tmp_path / "two", tiny, critic="mlp", critic_path=str(tmp_path / "out" / "critic.safetensors"))


# ── what is refused before a model is loaded ─────────────────────────────────────────────────────────────────────────


def refused(tiny, mode, kind=None, **flags):
    """The problems of a critic's flags, of a run with adapters of rank 4."""
    common = {"train_mode": mode, "model_name_or_path": tiny, "model_revision": None}
    common |= {"lora_rank": 4, "lora_alpha": 8, "use_dora": False}
    common = type("Common", (), common)()
    config = make_config("out", critic=kind, **flags)
    return " ".join(check_critic(common, config, config.critic_kind(mode)))


def test_what_a_critic_cannot_do_is_refused_with_what_to_type(tiny, judge, tmp_path):
    adapter = make_lora_judge(tmp_path / "adapter", tiny)
    assert "--critic model" in refused(tiny, "full", "lora")
    assert "--critic lora" in refused(tiny, "qlora", "model")
    assert "--value_model_path MODEL" in refused(tiny, "lora", "model")
    assert f"--value_model_path {judge}" in refused(tiny, "full", "mlp", value_model_path=str(judge))
    assert "merge_lora" in refused(tiny, "full", "model", value_model_path=str(adapter))
    assert "--critic model" in refused(tiny, "lora", "lora", value_model_path=str(judge))
    assert "Type 0 to 1" in refused(tiny, "full", "head", critic_layer=2)
    assert "head or mlp" in refused(tiny, "full", "model", critic_layer=0)
    assert "no such file" in refused(tiny, "full", critic_path="gone.safetensors")
    weights = f"{judge}/model.safetensors"
    assert f"--critic_path {weights}: not a critic" in refused(tiny, "full", critic_path=weights)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((8).to_bytes(8, "little") + b"not json")
    assert f"--critic_path {torn}: not a critic" in refused(tiny, "full", critic_path=str(torn))
    assert "--critic_warmup_steps 3: all 3 steps" in refused(tiny, "full", critic_warmup_steps=3, max_steps=3)
    other = make_lora_judge(tmp_path / "other", tiny, alpha=64)
    said = refused(tiny, "lora", value_model_path=str(other))
    assert "lora_alpha 64" in said and "Type --lora_alpha 64" in said


def test_what_a_critic_can_do_is_not_refused(tiny, judge, tmp_path):
    adapter = make_lora_judge(tmp_path / "adapter", tiny)
    assert not refused(tiny, "full") and not refused(tiny, "lora") and not refused(tiny, "qlora")
    assert not refused(tiny, "full", value_model_path=str(judge))
    assert not refused(tiny, "lora", value_model_path=str(judge))  # a model of its own, without being told
    assert not refused(tiny, "lora", value_model_path=str(adapter))
    assert not refused(tiny, "full", "head", critic_layer=1)


def test_weight_decay_would_move_the_policy_while_the_critic_warms_up(tmp_path):
    with pytest.raises(ValueError, match="--weight_decay 0"):
        make_config(tmp_path, critic_warmup_steps=1, weight_decay=0.1)


def test_the_step_of_the_bigram_model_is_what_it_is_with_a_fixed_scale(tmp_path):
    """Arithmetic of tests/trainers/test_ppo.py holds with normalisation too, once the scale is that of no scale."""
    trainer = make_bigram_trainer(tmp_path, vf_coef=0.5, normalize_values=True)
    fixed = make_bigram_trainer(tmp_path, vf_coef=0.5)
    step = make_step()
    assert trainer.compute_loss(trainer.model, dict(step)).item() == fixed.compute_loss(fixed.model, step).item()
