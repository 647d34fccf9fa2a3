"""What RLOO, GRPO, PPO and GKD do around a rollout, each fact by one that would be false if the code were wrong.

    python -m pytest tests/trainers/test_online_trainer.py -q

Arithmetic uses the bigram model of test_losses.py; what needs layers runs the real command on a tiny model.
"""

import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

import train_rlhf
from rlhf_args.methods import ANSWERED, DIALOGUE, METHODS, PAIR, PROMPT, RANKED, UNPAIRED, load
from tests.conftest import make_tokenizer, read_rows, slow_but
from tests.trainers import test_ppo
from tests.trainers.distillation import test_gkd
from tests.trainers.test_losses import (
    LN2,
    POLICY,
    REFERENCE,
    WORDS,
    make_bigram,
    make_tokenizer as make_word_tokenizer,
)
from trainers import online_trainer
from trainers.online_trainer import disable_dropout
from trainers.safe_trainer import Safe
from utils.data import template
from utils.data.prepare import prepare_rows
from utils.models.load import load_tokenizer
from utils.rewards.functions import RewardFailed
from utils.survival.stops import Left
from utils.training import chapters

ONLINE = ["RLOO", "GRPO", "PPO"]
END = WORDS.index("</s>")
VARIED = """
def varied(completion_ids, **columns):
    return [float(ids[0] % 7) for ids in completion_ids]
"""


def make_trainer(name, folder, **flags):
    """The trainer that a user of the method gets, of a bigram model and two prompts."""
    config = load(METHODS[name].config)(
        output_dir=str(folder), **{"per_device_train_batch_size": 2, "num_generations": 2} | flags, use_cpu=True,
        max_completion_length=3, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return load(METHODS[name].trainer)(
        model=make_bigram(POLICY),
        reward_funcs=[lambda completions, **row: [0.0] * len(completions)],
        args=config,
        processing_class=make_word_tokenizer("</s>"),
        train_dataset=Dataset.from_list([{"prompt": f"{word} q"} for word in "abqabqabq"]),
        ref_model=make_bigram(REFERENCE),
    )


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch):
    """run(method, flags) trains for 2 steps of 4 answers and returns the lines of metrics.jsonl; nothing is saved."""
    (tmp_path / "rewards.py").write_text(VARIED)
    monkeypatch.setattr(chapters, "save_and_verify", lambda *args, **kwargs: None)

    def run(name, flags="", model=tiny_model, mode="lora"):
        words = f"--rlhf_type {name} --model_name_or_path {model} --train_data_path data/prompts.jsonl --max_steps 2 "
        words += f"--train_mode {mode} --output_dir {tmp_path}/out --reward_funcs {tmp_path}/rewards.py:varied "
        words += "--max_completion_length 8 --num_generations 2 --per_device_train_batch_size 4 --logging_steps 1 "
        words += f"--learning_rate 2e-2 --save_strategy no --dtype float32 {flags}"
        assert train_rlhf.main(words.split()) == 0
        return read_rows(tmp_path / "out" / "metrics.jsonl")

    return run


# ── the penalty on answers that are cut ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ONLINE)
def test_an_answer_without_its_end_pays_the_penalty_and_one_with_it_does_not(name, tmp_path):
    trainer = make_trainer(name, tmp_path, missing_eos_penalty=2.0, reward_weights=[3.0])
    cut, ended = [1, 2, 1], [1, END]
    assert trainer.missing_eos(completion_ids=[cut, ended, [END]]) == [-2.0, 0.0, 0.0]
    assert trainer.reward_func_names[-1] == "missing_eos"
    assert trainer.reward_weights.tolist() == [3.0, 1.0]
    assert "missing_eos" not in make_trainer(name, tmp_path).reward_func_names


@pytest.mark.parametrize("name", ONLINE)
def test_one_answer_among_others_that_no_function_judges_ends_the_run(name, tmp_path, monkeypatch):
    trainer = make_trainer(name, tmp_path, missing_eos_penalty=2.0)
    trainer.reward_func_names[0] = "odd"
    given = {"judged": [[1.0, 0.0], [2.0, -2.0]], "not": [[1.0, 0.0], [math.nan, -2.0]]}
    for trl_trainer in (trl.RLOOTrainer, trl.GRPOTrainer):
        monkeypatch.setattr(trl_trainer, "_calculate_rewards", lambda self, which, *args: torch.tensor(given[which]))
    assert trainer._calculate_rewards("judged", ["a q", "b q"], [], []).tolist() == given["judged"]
    with pytest.raises(RewardFailed, match="^odd returned None for one answer"):
        trainer._calculate_rewards("not", ["a q", "b q"], [], [])


def test_each_answer_is_recorded_with_the_step_that_learns_from_it(run, tmp_path):
    run("GRPO")
    assert [line["step"] for line in read_rows(tmp_path / "out" / "completions.jsonl")] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_a_prompt_is_asked_as_the_template_writes_it_up_to_the_answer(bos):
    tokenizer = make_tokenizer(bos=bos)
    trainer = SimpleNamespace(processing_class=tokenizer, chat_template_kwargs={})
    prompts = [[{"role": "user", "content": "Hi"}], "Hi"]
    (chat, plain), *rest = online_trainer.Online._tokenize_prompts(trainer, prompts)
    assert rest == [None, {}]
    written = f"{bos or ''}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", f"{bos or ''}Hi"
    assert tuple(tokenizer.decode(ids) for ids in (chat, plain)) == written


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_process_takes_the_scores_of_its_own_answers(tmp_path, monkeypatch):
    trainer = make_trainer("PPO", tmp_path, reward_weights=[2.0])
    of_both = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # two answers of each of two processes
    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", lambda self, *args: of_both)
    for rank, scores in enumerate([[2.0, 4.0], [6.0, 8.0]]):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        assert torch.equal(trainer._calculate_rewards([], ["a q", "b q"], [], []), of_both)
        assert trainer._scores.tolist() == scores


def test_sums_are_added_up_over_processes(tmp_path, monkeypatch):
    trainer = make_trainer("PPO", tmp_path)
    reduced = {"sum": lambda sums: sums + torch.tensor([10.0, 20.0])}  # the other process's
    monkeypatch.setattr(type(trainer.accelerator), "reduce", lambda self, sums, reduction: reduced[reduction](sums))
    assert trainer.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [11.0, 22.0]


def test_advantages_are_whitened_over_the_answers_of_all_processes(tmp_path, monkeypatch):
    # a second process with the same 5 tokens: the mean stays, the variance is 2 S / (10 - 1) and was S / (5 - 1)
    alone, both = (test_ppo.make_trainer(tmp_path, beta=0.5) for _ in range(2))
    expected = test_ppo.roll_out(alone, [1.0, 3.0], monkeypatch)["advantages"]
    monkeypatch.setattr(type(both.accelerator), "reduce", lambda self, sums, reduction: 2 * sums)
    found = test_ppo.roll_out(both, [1.0, 3.0], monkeypatch)["advantages"]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected * math.sqrt((2 * 5 - 1) / (2 * (5 - 1))), atol=1e-5, rtol=0)


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An adapter that has moved away from its base, to go on being trained."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    shape = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), shape).save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


STARTS = [("RLOO", "tiny_model", "lora"), ("GRPO", "tiny_model", "lora"), ("PPO", "tiny_model", "lora"),
          ("RLOO", "tiny_model", "full"), ("RLOO", "adapter", "lora"), ("PPO", "adapter", "lora")]  # fmt: skip


@pytest.mark.parametrize(("name", "start", "mode"), slow_but(STARTS[1:4], STARTS))
def test_a_policy_that_moved_is_away_from_its_reference_where_it_began(name, start, mode, run, request):
    first, second = run(name, "--beta 0.01 --num_iterations 1", request.getfixturevalue(start), mode)
    assert abs(first["kl"]) < 1e-6  # float32; batches of one shape, so mostly 0
    assert abs(second["kl"]) > 1e-4  # Adam moved each weight by 0.02


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def log_ratios(monkeypatch):
    """Of each pass of a step, the largest |log ratio| of its tokens (RLOO: of its answers) to what sampled them."""
    found, newest = [], []

    def spy(trainer_class):
        score, loss = trainer_class._get_per_token_logps_and_entropies, trainer_class._compute_loss

        def keep(self, *args, **kwargs):
            scored = score(self, *args, **kwargs)
            newest[:] = [scored[0].detach()]
            return scored

        def compare(self, model, inputs):
            result = loss(self, model, inputs)
            mask = inputs["completion_mask"]
            if "old_logps" in inputs:
                found.append(((newest[0] * mask).sum(1) - inputs["old_logps"]).abs().max().item())
            else:
                found.append(((newest[0] - inputs["old_per_token_logps"]) * mask).abs().max().item())
            return result

        monkeypatch.setattr(trainer_class, "_get_per_token_logps_and_entropies", keep)
        monkeypatch.setattr(trainer_class, "_compute_loss", compare)

    spy(trl.GRPOTrainer)
    spy(trl.RLOOTrainer)
    return found


@pytest.fixture(scope="module")
def dropping(tiny_model, tmp_path_factory):
    """The tiny model with dropout in its attention layers."""
    folder = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return str(folder)


BEGUN = [("RLOO", "dropping"), ("GRPO", "tiny_model"), ("PPO", "dropping"), ("GRPO", "adapter"), ("PPO", "adapter")]


@pytest.mark.parametrize(("name", "start"), slow_but(BEGUN[:3], BEGUN))
def test_before_an_update_the_policy_says_what_it_sampled_with(name, start, run, log_ratios, request):
    run(name, "--num_iterations 2", request.getfixturevalue(start))
    before, after = log_ratios
    assert before < 1e-6  # float32 in batches of one shape
    assert after > 1e-3  # the second pass over the same rollout, after an update: what is compared can differ


@pytest.mark.parametrize(("name",), slow_but([("GRPO",)], [(name,) for name in ONLINE]))
def test_dropout_that_is_asked_for_shows_in_the_first_ratio(name, run, log_ratios, adapter):
    run(name, "--num_iterations 2 --disable_dropout False --beta 0", adapter)  # its own lora_dropout is 0.5
    assert log_ratios[0] > 1e-3


def test_dropout_of_an_attention_layer_is_switched_off_too():
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_hidden_layers=1, **shape, attention_dropout=0.5)).train()
    ids = torch.arange(20)[None]

    def differs():
        return not model(input_ids=ids).logits.equal(model(input_ids=ids).logits)

    assert differs()
    disable_dropout(model)
    assert not differs()
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    assert differs()
    disable_dropout(model)
    assert not differs()


# ── the order of the rows ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ONLINE)
def test_a_run_that_goes_on_takes_the_prompts_in_the_order_of_its_epoch(name, tmp_path):
    through = make_trainer(name, tmp_path)
    sampler = super(online_trainer.Online, through)._get_train_sampler(through.train_dataset)  # TRL's own
    epochs = [list(sampler) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for epoch, expected in enumerate(epochs):
        resumed = make_trainer(name, tmp_path)
        sampler, resumed.state.epoch = resumed._get_train_sampler(), epoch + 0.5  # the rows before are skipped
        assert list(sampler) == list(sampler) == expected


def test_a_distillation_that_goes_on_takes_the_rows_in_the_order_of_its_epoch(tmp_path):
    rows = [{"prompt_ids": [10 + n], "completion_ids": [20 + n, 1]} for n in range(7)]

    def make():
        return test_gkd.make_trainer(
            tmp_path, test_gkd.make_qwen(1), test_gkd.make_qwen(2), rows, per_device_train_batch_size=2
        )

    trainer, orders = make(), []
    for step in (0, 3, 4, 7, 8):  # 7 rows in batches of 2 are 4 steps an epoch
        trainer.state.global_step = step
        orders.append(list(trainer._get_train_sampler()))
        resumed = make()
        resumed.state.global_step = step
        assert list(resumed._get_train_sampler()) == orders[-1]
    assert orders[0] == orders[1] and orders[2] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


class Base:
    """What Safe needs of a trainer to go on from a checkpoint, here of step 3."""

    args = SimpleNamespace(gradient_accumulation_steps=4, process_index=0, device=torch.device("cpu"))
    _step, _buffered_inputs, called = 0, None, ()

    def __init__(self, max_steps):
        self.state, self.control = SimpleNamespace(global_step=3, max_steps=max_steps), SimpleNamespace()

    def _run_epoch(self):
        self.called = "epoch"

    def _load_rng_state(self, checkpoint):
        self.called = "restored"

    def _finalize_training(self):
        pass

    def _evaluate(self):
        self._metrics = {"eval": {"kl": [1.0]}}
        self.drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
        raise Left


class Resumed(Safe, Base):
    pass


def test_an_evaluation_that_is_left_is_owed_and_will_draw_the_same_numbers():
    trainer, drawn = Resumed(4), []
    for _ in range(2):
        with pytest.raises(Left):
            trainer._evaluate()
        drawn.append(trainer.drawn)
        assert trainer.owed and trainer._metrics == {"eval": {}}
    assert drawn[0] == drawn[1]


def test_what_holds_for_one_process_holds_for_the_step():
    trainer = Resumed(4)
    trainer.args = SimpleNamespace(world_size=2, device="cpu")
    for of_the_other, found in ((0, [False, True]), (1, [True, True])):
        trainer.accelerator = SimpleNamespace(reduce=lambda flag, reduction, other=of_the_other: flag + other)
        assert [trainer.of_any_process(flag) for flag in (False, True)] == found


@pytest.mark.parametrize(("max_steps", "called"), [(3, ()), (4, "epoch")])
def test_a_run_that_goes_on_from_its_last_step_makes_no_further_one(max_steps, called):
    trainer = Resumed(max_steps)
    trainer._run_epoch()
    assert trainer.called == called and hasattr(trainer.control, "should_training_stop") == (max_steps == 3)


@pytest.mark.parametrize(("passes", "kept"), [(4, {"_step": 11, "_buffered_inputs": [5]}), (2, {"_step": 3 * 4})])
def test_what_a_checkpoint_counted_comes_back_and_a_rollout_of_other_passes_does_not(passes, kept, tmp_path):
    torch.save({"passes": passes, "_step": 11, "_buffered_inputs": [5]}, tmp_path / "progress_0.pt")
    trainer = Resumed(3)
    trainer.to_restore = tmp_path
    trainer._finalize_training()  # where no step was left, nothing else has restored it
    assert trainer.called == "restored" and trainer.to_restore is None
    assert {"_step": trainer._step, "_buffered_inputs": trainer._buffered_inputs} == {"_buffered_inputs": None} | kept


# ── GKD ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_loss_of_a_distillation_is_softened_by_the_temperature(temperature, tmp_path):
    student, teacher = test_gkd.make_qwen(1), test_gkd.make_qwen(2)
    trainer = test_gkd.make_trainer(tmp_path, student, teacher, test_gkd.ROWS, beta=0.0, temperature=temperature)
    loss = trainer.compute_loss(trainer.model, test_gkd.first_batch(trainer))
    with torch.no_grad():
        logits = [test_gkd.answers_logits(model, test_gkd.ROWS).double() for model in (student, teacher)]
    expected, unsoftened = (test_gkd.written_out(*logits, 0, t).mean().item() for t in (temperature, 1.0))
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32
    assert unsoftened != pytest.approx(expected, rel=0.1)
    softened = (logits[0] / temperature).log_softmax(-1)
    (entropy,) = trainer._metrics["train"]["entropy"]  # of the student, a token of the answers
    assert entropy == pytest.approx(-(softened.exp() * softened).sum(-1).mean().item(), rel=1e-5)


HEADS = {  # what a family does to its logits before the softmax
    "Cohere": {"logit_scale": 4.0},
    "Granite": {"logits_scaling": 0.25},
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
}


@pytest.mark.parametrize("family", HEADS)
def test_a_distillation_compares_the_logits_that_the_family_computes(family, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "vocab_size": 264, "eos_token_id": 1, "bos_token_id": None}
        config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=1, **HEADS[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(10)  # a distribution, where a new head has hardly any
        return model

    trainer = test_gkd.make_trainer(tmp_path, make(1), make(2), test_gkd.ROWS, beta=0.0)
    loss = trainer.compute_loss(trainer.model, test_gkd.first_batch(trainer)).item()
    held_out = trainer.evaluate(trainer.train_dataset)["eval_forward_kl"]
    with torch.no_grad():
        logits = [test_gkd.answers_logits(make(seed), test_gkd.ROWS).double() for seed in (1, 2)]
    expected = test_gkd.written_out(*logits, 0, 1.0).mean().item()
    assert expected > 1e-3
    assert loss == pytest.approx(expected, rel=1e-4) and held_out == pytest.approx(expected, rel=1e-4)  # float32


def test_held_out_numbers_of_a_distillation_are_of_all_batches(tmp_path):
    found = []
    for size in (3, 1, 2):
        models_ = test_gkd.make_qwen(1), test_gkd.make_qwen(2)
        trainer = test_gkd.make_trainer(tmp_path, *models_, test_gkd.ROWS, per_device_eval_batch_size=size)
        if size < 3:
            trainer.evaluate(trainer.train_dataset.select([0]))  # of which nothing is left in the next one
        metrics = trainer.evaluate(trainer.train_dataset)
        found.append([metrics[f"eval_{name}"] for name in test_gkd.HELD_OUT])
    assert found[0][0] > 0.01
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


# ── CPO, SimPO, ORPO ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_simpos_beta_is_for_a_mean_per_token():
    # The reward is a mean log-probability a token, of around 1 nat, where CPO's is a sum of a hundred: at CPO's 0.1 a
    # difference of 0.5 nats a token moves sigmoid by 0.01 from 1/2. The paper (arXiv 2405.14734, table 7) has 2 to 10.
    named = ("SimPO", "CPOSimPO", "CPO")
    betas = [load(METHODS[name].config)(output_dir="out", bf16=False).beta for name in named]
    assert betas == [2.0, 2.0, 0.1]
    assert 1 / (1 + math.exp(-0.1 * 0.5)) - 0.5 < 0.013 < 0.2 < 1 / (1 + math.exp(-2.0 * 0.5)) - 0.5


LIKE_CPO = ["CPO", "SimPO", "CPOSimPO", "ORPO"]


def make_like_cpo(name, folder, model, **flags):
    config = load(METHODS[name].config)(output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", **flags)
    return load(METHODS[name].trainer)(
        model=model,
        args=config,
        processing_class=make_word_tokenizer("</s>"),
        train_dataset=Dataset.from_list([{"prompt": "b q ", "chosen": "a b</s>", "rejected": "q</s>"}]),
    )


@pytest.mark.parametrize("name", LIKE_CPO)
def test_log_probabilities_are_added_up_in_float32(name, tmp_path):
    trainer = make_like_cpo(name, tmp_path, make_bigram(POLICY).bfloat16())
    outputs = trainer.model(input_ids=torch.tensor([[0, 1, 2]]))
    assert trainer.model.dtype == torch.bfloat16 and outputs.logits.dtype == torch.float32
    # log P(a | q) = -1 bit
    assert outputs.logits.log_softmax(-1)[0, 0, 1].item() == pytest.approx(-LN2, abs=0.02)  # weights are in bfloat16


@pytest.mark.parametrize("name", LIKE_CPO)
def test_a_pair_is_cut_at_max_length_and_no_token_earlier(name, tmp_path):
    b, q, a, end = (WORDS.index(word) for word in ("b", "q", "a", "</s>"))
    pair = {"prompt": "b q ", "chosen": "a b </s>", "rejected": "q </s>"}  # 2 + 3 and 2 + 2 tokens
    for limit in (5, 4):
        row = make_like_cpo(name, tmp_path, make_bigram(POLICY), max_length=limit).tokenize_row(pair)
        assert row["prompt_input_ids"] == [b, q]
        assert row["chosen_input_ids"] == [b, q, a, b, end][:limit] and row["rejected_input_ids"] == [b, q, q, end]
        assert row["chosen_labels"] == [-100, -100, a, b, end][:limit]
        assert row["rejected_labels"] == [-100, -100, q, end]
        assert row["chosen_attention_mask"] == [1] * limit and row["rejected_attention_mask"] == [1] * 4


# ── the limits, to the token ─────────────────────────────────────────────────────────────────────────────────────────


SIDE = [{"role": "assistant", "content": "Four."}]
ASKED = [{"role": "user", "content": "2 + 2?"}]
LIMITED = {
    "a pair": (PAIR, {"prompt": ASKED, "chosen": SIDE, "rejected": [{"role": "assistant", "content": "5"}]}),
    "a rated answer": (UNPAIRED, {"prompt": ASKED, "completion": SIDE, "label": True}),
    "an answer": (ANSWERED, {"prompt": ASKED, "completion": SIDE}),
    "a dialogue": (DIALOGUE, {"messages": ASKED + SIDE}),
}


def prepare(columns, values, limit):
    return prepare_rows([("rows.jsonl:1", values)], make_tokenizer(), columns, limit)


@pytest.mark.parametrize(("columns", "values"), LIMITED.values(), ids=LIMITED)
def test_a_row_of_max_length_is_whole_and_one_token_more_is_cut(columns, values):
    (size,) = prepare(columns, values, None).sizes
    length = max(size)
    whole, cut = (prepare(columns, values, limit) for limit in (length, length - 1))
    assert (whole.cut, cut.cut, len(whole.rows), len(cut.rows)) == (0, 1, 1, 1)
    if columns == ANSWERED:
        assert len(whole.rows[0]["completion_ids"]) == len(cut.rows[0]["completion_ids"]) + 1


@pytest.mark.parametrize(("columns", "values"), LIMITED.values(), ids=LIMITED)
def test_a_row_of_whose_answer_max_length_leaves_one_token_is_kept_and_of_none_dropped(columns, values):
    tokenizer = make_tokenizer()
    prompt = len(template.prompt_ids(tokenizer, ASKED))
    assert len(prepare(columns, values, prompt + 1).rows) == 1
    dropped = prepare(columns, values, prompt)
    assert (dropped.rows, [reason for _, reason, _ in dropped.dropped]) == ([], ["prompt longer than max_length"])


def test_a_ranked_row_of_max_length_is_kept_and_one_token_more_dropped():
    values = {"prompt": [], "chosen": ASKED + SIDE, "rejected": ASKED + [{"role": "assistant", "content": "5"}]}
    length = max(*prepare(RANKED, values, None).sizes)
    assert len(prepare(RANKED, values, length).rows) == 1
    assert [reason for _, reason, _ in prepare(RANKED, values, length - 1).dropped] == ["longer than max_length"]


def test_a_prompt_of_max_prompt_length_is_kept_and_one_token_more_dropped():
    values, length = {"prompt": ASKED, "further": {}}, len(template.prompt_ids(make_tokenizer(), ASKED))
    assert len(prepare(PROMPT, values, length).rows) == 1
    (dropped,) = prepare(PROMPT, values, length - 1).dropped
    assert dropped[1] == "prompt longer than max_prompt_length"


def test_a_prompt_with_just_its_room_is_kept_and_one_token_more_dropped():
    values, length = {"prompt": ASKED}, len(template.prompt_ids(make_tokenizer(), ASKED))
    row = [("rows.jsonl:1", values)]
    kept, dropped = (
        prepare_rows(row, make_tokenizer(), ANSWERED, 1024, lambda values, room=room: room)
        for room in (length, length - 1)
    )
    assert len(kept.rows) == 1
    assert [reason for _, reason, _ in dropped.dropped] == ["prompt leaves no room for an answer"]


def test_an_answer_that_does_not_end_has_max_completion_length_tokens(run):
    first, _ = run("RLOO", "--num_iterations 1")  # of 256 byte tokens the end is one: few of 8 end by themselves
    assert first["completions/max_length"] == 8
