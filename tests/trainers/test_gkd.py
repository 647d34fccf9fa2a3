"""Distillation: its numbers, its two models, whose answers it learns from, and its command. Offline, a minute.

    python -m pytest tests/trainers/test_gkd.py -q

Numbers of a few tokens stand on the screen; the trainer's are those of the bigram models of test_losses.py, or
of tiny Qwen2s against a formula in float64. The commands run in this process, but for the one that is killed.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl.kernels import chunked_divergence
from trl.trainer.distillation_trainer import _chunked_divergence_loss

import train_gkd
import train_rlhf
from rlhf_args.methods import ANSWERED, DISTILLATION, load
from tests.conftest import ROOT, make_tokenizer, read_rows, undocumented, write_rows
from tests.trainers.test_losses import LN2, POLICY, REFERENCE, make_bigram, make_tokenizer as make_word_tokenizer
from trainers import gkd_trainer
from trainers.gkd_trainer import HELD_OUT, EveryRow, GKDTrainer, Head, compare
from utils.data.prepare import prepare_rows
from utils.data.rows import make_rows
from utils.models import folders, load as models_load, sampling

# ── the divergence ───────────────────────────────────────────────────────────────────────────────────────────────────

# Next-token probabilities of a teacher and a student, at one place. Between them, in bits:
TEACHER = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
STUDENT = [1 / 8, 1 / 2, 1 / 8, 1 / 4]
FORWARD = 1 / 2 * 2 - 1 / 4 * 1 + 1 / 8 * 0 - 1 / 8 * 1  # KL(t || s) = 5/8: log2 t/s is 2, -1, 0, -1
REVERSE = -1 / 8 * 2 + 1 / 2 * 1 + 1 / 8 * 0 + 1 / 4 * 1  # KL(s || t) = 4/8
# arXiv 2306.13649, eq. 1 to 3: beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s; 0 and 1 are the
# two KLs.
DIVERGENCES = {
    0: FORWARD * LN2,
    # m = 1/4 t + 3/4 s = 7/32, 7/16, 1/8, 7/32
    0.25: 1 / 4 * (1 / 2 * math.log(16 / 7) + 1 / 4 * math.log(4 / 7) + 1 / 8 * math.log(4 / 7))
    + 3 / 4 * (1 / 8 * math.log(4 / 7) + 1 / 2 * math.log(8 / 7) + 1 / 4 * math.log(8 / 7)),
    # m = (t + s) / 2 = 5/16, 3/8, 1/8, 3/16
    0.5: 1 / 2 * (1 / 2 * math.log(8 / 5) + 1 / 4 * math.log(2 / 3) + 1 / 8 * math.log(2 / 3))
    + 1 / 2 * (1 / 8 * math.log(2 / 5) + 1 / 2 * math.log(4 / 3) + 1 / 4 * math.log(4 / 3)),
    1: REVERSE * LN2,
}
TOLERANCE = 1e-6  # float32: 7 digits, of numbers below 2


def near(value):
    return pytest.approx(value, abs=TOLERANCE)


def divergence(student, teacher, **options):
    """(loss, entropy, tokens) of rows of probabilities, where a head that is the identity makes them of log p."""
    student, teacher = (torch.tensor(rows).log() for rows in (student, teacher))
    identity = torch.eye(student.size(-1))
    mask = torch.ones(1, len(student))
    found = _chunked_divergence_loss(student[None], teacher[None], identity, identity, mask, **options)
    return [number.item() for number in found]


@pytest.mark.parametrize("beta", DIVERGENCES)
def test_the_divergence_is_the_papers_at_each_beta(beta):
    # a second place, where both agree, adds nothing, and halves the mean
    loss, entropy, tokens = divergence([STUDENT, TEACHER], [TEACHER, TEACHER], beta=beta)
    assert loss == near(DIVERGENCES[beta] / 2)
    # the student's entropy, summed: 1/8 * 3 + 1/2 * 1 + 1/8 * 3 + 1/4 * 2 bits, and the same numbers once more
    assert (entropy, tokens) == (near((1.75 + 1.75) * LN2), 2)
    assert divergence([STUDENT, TEACHER], [TEACHER, TEACHER], beta=beta, num_items_in_batch=8)[0] == near(
        DIVERGENCES[beta] / 8
    )


def test_no_two_betas_mean_the_same():
    assert len({round(value, 3) for value in DIVERGENCES.values()}) == 4


def test_the_temperature_softens_both_distributions():
    # at 2 probabilities become their square roots, normed: 4, 1, 4 ninths are 2, 1, 2 fifths
    teacher, student = [4 / 9, 1 / 9, 4 / 9], [1 / 9, 4 / 9, 4 / 9]
    softened = 2 / 5 * math.log(2 / 1) + 1 / 5 * math.log(1 / 2) + 2 / 5 * math.log(1)
    assert divergence([student], [teacher], beta=0.0, temperature=2.0)[0] == near(softened)
    assert divergence([student], [teacher], beta=0.0)[0] == near(4 / 9 * math.log(4) + 1 / 9 * math.log(1 / 4))


def written_out(student, teacher, beta, temperature):
    """Divergence a token of logits (N, V), as the formula stands in the paper."""
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    s, t = student.exp(), teacher.exp()
    if beta in (0, 1):
        return (t * (teacher - student) if beta == 0 else s * (student - teacher)).sum(-1)
    mixed = (beta * t + (1 - beta) * s).log()
    return (beta * t * (teacher - mixed) + (1 - beta) * s * (student - mixed)).sum(-1)


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 1])
def test_a_divergence_in_chunks_is_that_of_all_at_once_and_so_is_its_gradient(beta, monkeypatch):
    random = torch.Generator().manual_seed(0)
    shapes = {"states": (7, 5), "head": (11, 5), "bias": (11,), "taught": (7, 6), "teaching": (11, 6)}
    given = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}

    def run(loss, dtype):
        """The loss and its gradients for the student's part, in the precision asked for."""
        parts = {name: tensor.to(dtype, copy=True) for name, tensor in given.items()}
        trained = [parts[name].requires_grad_() for name in ("states", "head", "bias")]
        found = loss(**parts)
        return found.item(), torch.autograd.grad(found, trained)

    def at_once(states, head, bias, taught, teaching):
        return written_out(states @ head.T + bias, taught @ teaching.T, beta, 0.7).sum() / 7

    def in_chunks(states, head, bias, taught, teaching):
        chunked = states[None], taught[None], head, teaching, torch.ones(1, 7)
        return _chunked_divergence_loss(*chunked, beta, student_lm_head_bias=bias, temperature=0.7)[0]

    widths, project = [], chunked_divergence._project

    def counting(tile, *args):
        widths.append(tuple(tile.shape))
        project(tile, *args)

    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 3)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 4)
    monkeypatch.setattr(chunked_divergence, "_project", counting)
    (loss, gradients), (exact, exact_gradients) = run(in_chunks, torch.float32), run(at_once, torch.float64)
    assert set(widths) == {(n, v) for n in (3, 1) for v in (4, 3)}  # 7 tokens by 3, 11 words by 4
    # float32: 7 digits of sums of 11 logits up to 10 in size, so 1e-6 of them
    assert loss == pytest.approx(exact, abs=1e-5)
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


# ── what is measured on held-out rows ────────────────────────────────────────────────────────────────────────────────


def make_head(weight, vocabulary=None, bias=None):
    """The Head of a model of which nothing is there but its output layer."""
    layer = SimpleNamespace(weight=weight, bias=bias)
    model = SimpleNamespace(get_output_embeddings=lambda: layer, config=Qwen2Config(vocab_size=len(weight)))
    return Head(model, vocabulary or len(weight))


def test_what_is_held_out_is_summed_over_all_its_tokens(monkeypatch):
    # in bits:      KL(t || s)                  KL(s || t)                  same   -log s   -log t
    # 1, token 1    FORWARD = 5/8               REVERSE = 4/8               no     1        2
    # 2, token 2    -1/8 * 1 + 1/4 * 1 = 1/8    1/4 * 1 - 1/8 * 1 = 1/8     yes    3        2
    # 3, token 3    5/8                         4/8                         no     2        3
    teacher = torch.tensor([TEACHER, [1 / 8, 1 / 2, 1 / 4, 1 / 8], TEACHER]).log()
    student = torch.tensor([STUDENT, [1 / 4, 1 / 2, 1 / 8, 1 / 8], STUDENT]).log()
    monkeypatch.setattr(gkd_trainer, "CHUNK", 2)
    head = make_head(torch.eye(4))
    sums = dict(
        zip([*HELD_OUT, "tokens"], compare(student, head, teacher, head, torch.tensor([1, 2, 3])), strict=True)
    )
    assert {name: total.item() for name, total in sums.items()} == {
        "forward_kl": near((5 + 1 + 5) / 8 * LN2),
        "reverse_kl": near((4 + 1 + 4) / 8 * LN2),
        "token_agreement": 1,
        "student_loss": near((1 + 3 + 2) * LN2),
        "teacher_loss": near((2 + 2 + 3) * LN2),
        "tokens": 3,
    }


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_trainer(folder, student, teacher, rows, tokenizer=None, **flags):
    """The trainer that a user gets, of models and rows in memory."""
    method = DISTILLATION["GKD"]
    flags = {"per_device_train_batch_size": len(rows), "lmbda": 0.0, "gradient_checkpointing": False} | flags
    config = load(method.config)(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        max_grad_norm=0.0, **flags,
    )  # fmt: skip
    return load(method.trainer)(
        model=student,
        args=config,
        teacher_model=teacher,
        processing_class=tokenizer or make_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )


def make_qwen(seed, vocabulary=264, hidden=16, sharp=10):
    """A Qwen2 in memory, whose head is `sharp` times that of a new one: a distribution, where that has hardly any."""
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    positions = {"num_key_value_heads": 1, "max_position_embeddings": 2048}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, eos_token_id=1, bos_token_id=None, **shape, **positions)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


def save_qwen(folder, model):
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    models_load.load_tokenizer(folder).save_pretrained(
        folder
    )  # with <|endoftext|>, which transformers adds to a Qwen2's
    return str(folder)


# tokens of the byte-level tokenizer; prompts and answers of different lengths, so that both are padded
ROWS = [
    {"prompt_ids": [10, 11, 12, 13], "completion_ids": [20, 21, 1]},
    {"prompt_ids": [30], "completion_ids": [31, 32, 33, 34, 1]},
    {"prompt_ids": [40, 41], "completion_ids": [1]},
]
TOKENS = 3 + 5 + 1


def first_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def answers_logits(model, rows):
    """Logits at each place of each answer, row by row and so without padding: (N, V)."""
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        found.append(model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1])
    return torch.cat(found)


@pytest.mark.parametrize("beta, bits", [(0, (5 / 8, 2 / 8, 5 / 8)), (1, (4 / 8, 2 / 8, 4 / 8))])
def test_the_loss_is_the_mean_divergence_over_the_tokens_of_the_answers(beta, bits, tmp_path):
    # KL in bits behind q, a and b, between REFERENCE, who teaches, and POLICY, by the numbers of test_losses.py:
    #          KL(t || s)                                  KL(s || t)
    # q    1/2 * 2 - 1/4 * 1 - 1/8 * 1      = 5/8    -1/8 * 2 + 1/2 * 1 + 1/4 * 1 = 4/8
    # a    1/4 * (1 + 1 - 1 + 0)            = 2/8    -1/8 * 1 - 1/8 * 1 + 1/2 * 1 = 2/8
    # b    -1/8 * 1 + 1/2 * 2 - 1/4 * 1     = 5/8    1/4 * 1 - 1/8 * 2 + 1/2 * 1  = 4/8
    q, a, b = bits
    rows = [{"prompt": "b q ", "completion": "a b"}, {"prompt": "b ", "completion": "a"}]  # q>a>b>e and b>a>e
    tokenizer = make_word_tokenizer("</s>")
    made, _ = make_rows([(f"row {n}", row) for n, row in enumerate(rows, 1)], ANSWERED, [])
    prepared = prepare_rows(made, tokenizer, ANSWERED, 1024)
    trainer = make_trainer(
        tmp_path, make_bigram(POLICY), make_bigram(REFERENCE), prepared.rows, tokenizer, beta=float(beta)
    )
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert loss.item() == pytest.approx(((q + a + b) + (b + a)) / 5 * LN2, abs=1e-5)  # float32, as in test_losses.py


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_and_gradients_are_those_of_trls_gkd_trainer(beta, tmp_path):
    from trl.experimental.gkd import GKDConfig, GKDTrainer as TheirTrainer

    ours = make_trainer(tmp_path, make_qwen(1), make_qwen(2), ROWS, beta=beta)
    inputs = first_batch(ours)
    loss = ours.compute_loss(ours.model, inputs)
    loss.backward()

    config = GKDConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, beta=beta
    )
    theirs = TheirTrainer(
        model=make_qwen(1), teacher_model=make_qwen(2), args=config, processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "Why?"}]}]),
    )  # fmt: skip
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    assert inputs["prompt_mask"][:, -1].all() and not inputs["prompt_mask"][:, 0].all()  # padded on the left
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].size(1)] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = theirs.compute_loss(theirs.model.train(), batch, num_items_in_batch=torch.tensor(TOKENS))
    expected.backward()

    assert loss.item() > 0.01
    # float32 in both, added up in another order: 1e-6 of numbers up to 1
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.model.named_parameters()}
    assert len(gradients) == 15  # embeddings, head, norm, and the 12 of a layer
    for name, parameter in ours.model.named_parameters():
        assert gradients[name].abs().max() > 1e-6, name
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


def test_rows_at_once_train_as_rows_one_after_another(tmp_path):
    # an answer of 5 tokens counts 5 times one of 1, whatever batch it is in
    def weights(batch_size, accumulated):
        trainer = make_trainer(
            tmp_path, make_qwen(1), make_qwen(2), ROWS, per_device_train_batch_size=batch_size, max_steps=1,
            gradient_accumulation_steps=accumulated, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        trainer.train()
        return trainer.model.lm_head.weight.detach()

    at_once, before = weights(3, 1), make_qwen(1).lm_head.weight
    assert (at_once - before).abs().max() > 1e-3
    torch.testing.assert_close(weights(1, 3), at_once, atol=1e-6, rtol=1e-5)  # float32, added up in another order


# ── vocabularies of different sizes ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("ours, theirs", [(300, 280), (280, 300)])
def test_of_two_sizes_of_vocabulary_what_both_have_is_compared(ours, theirs, beta, tmp_path):
    student, teacher = make_qwen(1, ours), make_qwen(2, theirs)
    trainer = make_trainer(tmp_path, student, teacher, ROWS, beta=float(beta))
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    with torch.no_grad():
        cut = [answers_logits(model, ROWS)[:, :280].double() for model in (student, teacher)]
    assert loss.item() == pytest.approx(written_out(*cut, beta, 1.0).mean().item(), rel=1e-5)  # float32
    gradient = student.lm_head.weight.grad
    assert gradient.shape == (ours, 16) and gradient[:280].abs().min() > 0
    assert torch.count_nonzero(gradient[280:]) == 0


def test_a_head_is_cut_with_its_bias():
    weight, bias = torch.arange(12.0).reshape(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])
    # states 1, 1, 1: 0 + 1 + 2 and 3 + 4 + 5, and the bias
    for head in (make_head(weight, 2, bias), make_head(weight, 2, bias).cut()):
        assert head.logits(torch.ones(1, 3)).tolist() == [[3 + 1, 12 + 2]]
    assert (head.weight.tolist(), head.bias.tolist()) == ([[0, 1, 2], [3, 4, 5]], [1, 2])
    assert make_head(weight, 4, bias).cut().weight is weight  # a whole one stays the parameter that it is


# ── whose answers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "lmbda, steps", [(0, [0] * 8), (1, [1] * 8), (0.5, [0, 1] * 4), (0.25, [0, 0, 0, 1] * 2), (0.75, [0, 1, 1, 1] * 2)]
)
def test_steps_on_the_students_own_answers_are_spaced_evenly(lmbda, steps):
    at = (SimpleNamespace(state=SimpleNamespace(global_step=n), args=SimpleNamespace(lmbda=lmbda)) for n in range(8))
    assert [int(GKDTrainer.is_on_policy(trainer)) for trainer in at] == steps


def test_a_step_learns_from_the_rows_or_from_the_student_and_says_which(tmp_path):
    trainer = make_trainer(tmp_path, make_qwen(1), make_qwen(2), ROWS, lmbda=0.5, max_completion_length=7)
    answers = {tuple(row["completion_ids"]) for row in ROWS}
    learnt = []
    for trainer.state.global_step in (0, 1):
        trainer._step, batch = 0, first_batch(trainer)
        found = zip(batch["completion_ids"].tolist(), batch["completion_mask"].bool().tolist(), strict=True)
        learnt.append({tuple(token for token, real in zip(*row, strict=True) if real) for row in found})
    assert learnt[0] == answers and not learnt[1] & answers
    assert trainer._metrics["train"]["on_policy"] == [0.0, 1.0]
    trainer.model.eval()
    held = trainer._generate_and_score_completions(ROWS)
    assert held["completion_mask"].sum() == TOKENS and held["completion_ids"][1].tolist() == [31, 32, 33, 34, 1]
    assert trainer._metrics["train"]["on_policy"] == [0.0, 1.0]


def test_the_student_answers_with_a_cache_although_training_checkpoints(tmp_path):
    student = make_qwen(1)
    trainer = make_trainer(
        tmp_path, student, make_qwen(2), ROWS, lmbda=1.0, max_steps=1, max_completion_length=6,
        gradient_checkpointing=True,
    )  # fmt: skip
    calls = []

    def count(decoder, args, kwargs):
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        calls.append((torch.is_grad_enabled(), ids.size(1), any(m.gradient_checkpointing for m in decoder.layers)))

    student.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    *sampled, (learns, width, checkpointed) = calls
    assert [tokens for _, tokens, _ in sampled] == [4, 1, 1, 1, 1, 1]  # the longest prompt, then a token a time
    assert not any(learns for learns, *_ in sampled)
    assert learns and checkpointed and width == 4 + 6


def test_fully_trained_weights_are_computed_with_in_the_precision_asked_for(run, trainers, monkeypatch):
    """accelerate's autocast is on `forward`, in whose place TRL calls the loss."""
    seen = set()
    loss = gkd_trainer._chunked_divergence_loss

    def look(states, taught, head, *args, **kwargs):
        seen.add((states.dtype, head.dtype))
        return loss(states, taught, head, *args, **kwargs)

    monkeypatch.setattr(gkd_trainer, "_chunked_divergence_loss", look)
    assert run("--lmbda 0 --max_steps 1 --bf16")[0] == 0
    assert {head for _, head in seen} == {torch.float32}  # what the optimizer keeps
    layer = trainers[0].model.model.layers[0].mlp.down_proj
    found = []
    layer.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    trainers[0].evaluate(trainers[0].train_dataset)
    assert set(found) == {torch.bfloat16}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows, chunks", [(7, 2), (8, 2), (3, 1), (1, 1)])
def test_an_epoch_has_every_row_although_they_do_not_fill_its_last_step(rows, chunks, shuffle):
    epoch, sizes = [0], {"mini_repeat_count": 1, "batch_size": 4, "repeat_count": 3}
    sampler = EveryRow(lambda: epoch[0], range(rows), **sizes, shuffle=shuffle, seed=0)
    places = list(sampler)
    assert len(places) == len(sampler) == chunks * 4 * 3
    parts = [places[start : start + 4] for start in range(0, len(places), 4)]
    assert all(parts[start] == parts[start + 1] == parts[start + 2] for start in range(0, len(parts), 3))
    once = [place for part in parts[::3] for place in part]
    assert set(once) == set(range(rows)) and max(once.count(row) for row in once) <= -(-chunks * 4 // rows)
    if not shuffle:
        assert once == [n % rows for n in range(chunks * 4)]
    # a run that goes on from a checkpoint in epoch 1 finds that epoch's order in a new sampler
    epoch[0] = 1
    assert list(sampler) == list(EveryRow(lambda: 1, range(rows), **sizes, shuffle=shuffle, seed=0))
    assert (list(sampler) != places) == (shuffle and rows > 1)


def test_the_trainer_takes_every_row_in_as_many_steps_as_they_need(tmp_path):
    rows = [{"prompt_ids": [10 + n], "completion_ids": [20 + n, 1]} for n in range(7)]
    trainer = make_trainer(
        tmp_path, make_qwen(1), make_qwen(2), rows, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=1,
    )  # fmt: skip
    seen, teach = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(inputs) or teach(inputs)
    trainer.train()
    assert trainer.state.global_step == 2  # 7 rows by 2 * 2
    assert [len(inputs) for inputs in seen] == [4, 4]
    assert {row["prompt_ids"][0] for inputs in seen for row in inputs} == set(range(10, 17))


# ── the teacher's answers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(folder of a student, folder of a teacher that is surer of itself)."""
    folder = tmp_path_factory.mktemp("pair")
    return save_qwen(folder / "student", make_qwen(1, hidden=32)), save_qwen(
        folder / "teacher", make_qwen(2, hidden=32, sharp=40)
    )


PROMPTS = [[10, 11, 12, 13, 14, 15], [20], [30, 31, 32], [40, 41], [50, 51, 52, 53]]


def test_an_answer_in_a_padded_batch_is_the_answer_alone(pair):
    tokenizer, model = models_load.load_tokenizer(pair[1]), AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    likeliest = sampling.Sampling(max_new_tokens=12, temperature=0)
    together = sampling.sample(model, tokenizer, PROMPTS, likeliest)
    assert together == [sampling.sample(model, tokenizer, [prompt], likeliest)[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) == len(PROMPTS)


def test_an_answer_ends_behind_the_first_of_its_ends():
    assert sampling.cut_at_end([5, 7, 2, 9, 1, 1], {1, 2}) == [5, 7, 2]
    assert sampling.cut_at_end([1, 1, 1], {1, 2}) == [1]
    assert sampling.cut_at_end([5, 7, 9], {1, 2}) == [5, 7, 9]


def test_answers_that_were_interrupted_are_those_of_a_run_that_was_not(pair, tmp_path, monkeypatch):
    tokenizer, model = models_load.load_tokenizer(pair[1]), AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    drawn = sampling.Sampling(max_new_tokens=12, seed=3)

    def answer(folder):
        folder.mkdir(exist_ok=True)
        missing = sampling.missing_prompts(folder, [*PROMPTS, PROMPTS[0]])
        sampling.answer_prompts(model, tokenizer, missing, drawn, folder, batch_size=2)
        files = sorted(folder.glob("answers-0-*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        return files, "".join(file.read_text() for file in files)

    def interrupt(model, tokenizer, prompts, drawn):
        if len(prompts[0]) < 4:
            raise KeyboardInterrupt
        return sample(model, tokenizer, prompts, drawn)

    sample, (_, whole) = sampling.sample, answer(tmp_path / "whole")
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == [
        sampling.prompt_key(prompt) for prompt in sorted(PROMPTS, key=len, reverse=True)
    ]
    monkeypatch.setattr(sampling, "sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "cut")
    monkeypatch.setattr(sampling, "sample", sample)
    (file,) = (tmp_path / "cut").glob("answers-*.jsonl")
    begun = file.read_text()
    assert whole.startswith(begun) and len(begun.splitlines()) == 2
    file.write_text(whole[: len(begun) + 30])  # and half a line
    assert len(sampling.read_answers(tmp_path / "cut")) == 2
    (_, other), _ = answer(tmp_path / "cut")
    assert begun + other.read_text() == whole


def test_answers_are_kept_apart_by_model_and_setting(tmp_path):
    drawn = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    others = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1}
    folder = sampling.answers_folder(tmp_path, ["model"], sampling.Sampling(**drawn))
    again = sampling.answers_folder(tmp_path, ["model"], sampling.Sampling(**drawn))
    assert folder == again and json.loads((folder / "made_with.json").read_text())["sampling"] == drawn
    apart = [sampling.answers_folder(tmp_path, ["another"], sampling.Sampling(**drawn))]
    apart += [
        sampling.answers_folder(tmp_path, ["model"], sampling.Sampling(**drawn | {name: value}))
        for name, value in others.items()
    ]
    assert len({folder, *apart}) == 1 + 6


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def says(asked, answer=None):
    messages = [{"role": "user", "content": asked}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer else [])}


CHATS = [says(f"Say {n}.", f"{n} it is.") for n in range(6)]
ASKED = [says(f"Say {n}.") for n in range(6)]
FAST = "--dtype float32 --train_mode full --save_strategy no --logging_steps 1 --max_completion_length 8"


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded a model."""


@pytest.fixture
def run(tmp_path, pair, capsys):
    """run(flags, ...) types a whole command; (status, lines of stdout, lines of stderr without bars)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(flags="", rows=CHATS, model=pair[0], teacher=pair[1], out=tmp_path / "out"):
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        words = f"--model_name_or_path {model} --train_data_path {path} --output_dir {out} "
        words += f"--answers_dir {tmp_path / 'answers'} {FAST} "
        words += f"--teacher_model_name_or_path {teacher} " if teacher else ""
        capsys.readouterr()
        status = train_gkd.main(f"{words} {flags}".split())
        said = capsys.readouterr()
        lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.strip()]
        bars = ("step/s", "prompt/s", "warning   step ")
        return status, said.out.splitlines(), [line for line in lines if not any(bar in line for bar in bars)]

    return run


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...) is the list of problems, said before a model is loaded and with nothing written."""

    def load(*args, **kwargs):
        raise Loaded

    def refused(*args, **kwargs):
        status, out, lines = run(*args, **kwargs)
        assert (status, out) == (2, [])
        assert lines and all(line.startswith("refused: ") for line in lines), lines
        assert not (tmp_path / "out").exists() and not (tmp_path / "answers").exists()
        return [line.removeprefix("refused: ") for line in lines]

    monkeypatch.setattr(models_load, "load_model", load)
    return refused


def answers_in(folder):
    """{file: lines} of all that is in the folder that answers are kept in."""
    return {file: file.read_text().splitlines() for file in sorted(folder.glob("*/answers-*.jsonl"))}


def line_with(lines, begin):
    (line,) = [line for line in lines if line.startswith(begin)]
    return line


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert before == []
    status, out, lines = run("--check --seq_kd True --eval_fraction 0.2")
    assert (status, lines) == (0, [])
    assert out[-1] == "checked   nothing stands in the way; no model was loaded, nothing was written; 1 warning"
    assert line_with(out, "warning ").startswith("warning   a step takes ")
    assert f"answers   5 by the teacher, kept in {tmp_path / 'answers'}" in out
    assert "data      5 rows to train on, 1 held out; refused: none" in out
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "rows.jsonl"]


def test_a_student_comes_nearer_to_its_teacher_and_the_run_says_how_much(run, tmp_path):
    status, out, _ = run("--lmbda 0 --beta 0 --max_steps 12 --learning_rate 1e-2 --eval_fraction 0.34")
    assert status == 0
    before, after = read_rows(tmp_path / "out" / "eval.jsonl")
    assert {f"eval_{name}" for name in HELD_OUT} <= set(before)
    assert (before["step"], after["step"]) == (0, 12)
    assert after["eval_forward_kl"] < 0.8 * before["eval_forward_kl"]
    assert after["eval_teacher_loss"] == before["eval_teacher_loss"]  # nobody trained the teacher
    for line in (before, after):
        assert line["eval_loss"] == pytest.approx(line["eval_forward_kl"], rel=1e-5)  # of beta 0, in one batch
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())["held_out"]
    labels = {label: name for label, name in DISTILLATION["GKD"].metrics}
    assert set(labels.values()) == set(HELD_OUT)
    for label, name in labels.items():
        assert card["before"][label] == before[f"eval_{name}"] and card["after"][label] == after[f"eval_{name}"]
    shown = line_with(out, "forward KL").split()
    assert shown[2:] == [f"{line['eval_forward_kl']:.4f}" for line in (before, after)]
    assert f"continue  TEACHER={card_teacher(tmp_path)} LMBDA=0 BETA=0 " in line_with(out, "continue")


def card_teacher(tmp_path):
    return json.loads((tmp_path / "out" / "run_card.json").read_text())["arguments"]["teacher_model_name_or_path"]


@pytest.mark.parametrize("ours, theirs", [(151936, 152064), (152064, 151936)])
def test_qwens_two_sizes_of_vocabulary_train_together(ours, theirs, run, tmp_path):
    student = save_qwen(tmp_path / "student", make_qwen(1, ours, hidden=4))
    teacher = save_qwen(tmp_path / "teacher", make_qwen(2, theirs, hidden=4))
    status, out, _ = run("--lmbda 0 --max_steps 1 --eval_fraction 0.2", model=student, teacher=teacher)
    assert status == 0
    assert line_with(out, "note      embeddings") == (
        f"note      embeddings of {ours} (student) and {theirs} (teacher) rows for one tokenizer: compared over the "
        "151936 that both have"
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.get_input_embeddings().weight.shape == saved.lm_head.weight.shape == (ours, 4)
    assert read_rows(tmp_path / "out" / "metrics.jsonl")[0]["loss"] > 0


@pytest.mark.parametrize(
    "ours, theirs, flags", [(600, 264, "--lmbda 1"), (264, 600, "--seq_kd True")], ids=["student", "teacher"]
)
def test_whoever_answers_says_nothing_that_the_other_has_no_row_for(ours, theirs, flags, run, tmp_path):
    # more than half of what the larger one would say are rows that no token stands for, and the other would not have
    student = save_qwen(tmp_path / "student", make_qwen(1, ours, sharp=1))
    teacher = save_qwen(tmp_path / "teacher", make_qwen(2, theirs, sharp=1))
    status, _, _ = run(f"{flags} --max_steps 1", model=student, teacher=teacher)
    assert status == 0


# ── a teacher that is the student's own base ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the commands of a test made."""
    made, make = [], train_gkd.make_trainer

    def keep(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(train_gkd, "make_trainer", keep)
    return made


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_teacher_that_is_what_the_student_starts_from_is_refused(mode, refused, pair):
    assert refused(f"--train_mode {mode}", teacher=pair[0]) == [
        f"--teacher_model_name_or_path {pair[0]}: the model that the student starts from, of which there is nothing "
        "to learn. A base teaches an adapter that has moved away from it: give that as --model_name_or_path"
    ]


def test_an_adapter_learns_from_its_base_as_from_a_copy_of_it(run, pair, trainers, tmp_path):
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), shape).save_pretrained(tmp_path / "adapter")
    models_load.load_tokenizer(pair[0]).save_pretrained(tmp_path / "adapter")
    shutil.copytree(pair[0], tmp_path / "copy")
    logs = []
    for teaching, said in ((pair[0], "no second copy"), (tmp_path / "copy", "held in float32")):
        out = tmp_path / f"out-{len(logs)}"
        flags = "--lmbda 0 --train_mode lora --max_steps 2 --learning_rate 1e-2 --eval_fraction 0.34"
        status, lines, _ = run(flags, model=tmp_path / "adapter", teacher=teaching, out=out)
        assert status == 0 and said in line_with(lines, "teacher   ")
        assert undocumented("GKD", out) == []
        logs.append(read_rows(out / "metrics.jsonl") + read_rows(out / "eval.jsonl"))
    assert trainers[0].teacher_model is None and trainers[1].teacher_model is not None
    assert logs[0][0]["loss"] > 1e-3
    names = ["loss", "eval_forward_kl", "eval_teacher_loss"]
    mine, copied = ([line[name] for line in log for name in names if name in line] for log in logs)
    assert mine == pytest.approx(copied, rel=1e-4)  # float32, and an adapter's product merged into no weight
    assert len(mine) == 2 + 2 * 2


# ── SeqKD, and a run that is killed ──────────────────────────────────────────────────────────────────────────────────

MANY = [says(f"Say {'much ' * (n % 7)}{n}.") for n in range(48)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pair):
    """A folder in which SeqKD was killed while its teacher answered: (folder, its lines then)."""
    folder = tmp_path_factory.mktemp("killed")
    rows = write_rows(folder / "rows.jsonl", MANY)
    flags = f"--model_name_or_path {pair[0]} --teacher_model_name_or_path {pair[1]} --train_data_path {rows} "
    flags += f"--output_dir {folder / 'out'} --answers_dir {folder / 'answers'} {FAST} --max_completion_length 64 "
    words = [sys.executable, "train_gkd.py", *flags.split(), "--seq_kd", "True", "--answers_batch_size", "2"]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said)
    until = time.monotonic() + 120
    while sum(map(len, answers_in(folder / "answers").values())) < 6:
        assert process.poll() is None and time.monotonic() < until, (folder / "said").read_text()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (file,) = answers_in(folder / "answers")
    with open(file, "a") as handle:
        handle.write('{"prompt": "0a')  # as a kill in the midst of a line leaves it
    lines = answers_in(folder / "answers")[file][:-1]
    assert 6 <= len(lines) < len(MANY) and not (folder / "out").exists()
    return folder, file, lines


def test_a_killed_seqkd_goes_on_and_nothing_is_answered_twice(killed, run):
    folder, file, lines = killed
    flags = f"--seq_kd True --answers_dir {folder / 'answers'} --max_completion_length 64 --answers_batch_size 2"
    status, out, _ = run(f"{flags} --max_steps 1", rows=MANY)
    assert status == 0
    assert f"answers   {48 - len(lines)} to sample, {len(lines)} in {file.parent} already" in out
    found = answers_in(folder / "answers")
    assert found.pop(file)[:-1] == lines
    (others,) = found.values()
    keys = [json.loads(line)["prompt"] for line in lines + others]
    assert len(keys) == len(set(keys)) == 48

    # once more: the teacher is not even loaded
    status, out, _ = run(f"{flags} --max_steps 1 --overwrite_output_dir", rows=MANY)
    assert status == 0 and f"answers   0 to sample, 48 in {file.parent} already" in out
    assert answers_in(folder / "answers")[file][:-1] == lines and len(answers_in(folder / "answers")) == 2


def test_what_is_trained_on_are_the_teachers_answers(run, tmp_path, trainers):
    assert run("--seq_kd True --max_steps 1 --eval_fraction 0.34")[0] == 0
    (lines,) = answers_in(tmp_path / "answers").values()
    answers = {line["prompt"]: line["ids"] for line in map(json.loads, lines)}
    rows = list(trainers[0].train_dataset)
    assert len(rows) == len(answers) == 4
    assert [row["completion_ids"] for row in rows] == [answers[sampling.prompt_key(row["prompt_ids"])] for row in rows]
    # the held-out rows keep the answers of the data
    decode = trainers[0].processing_class.decode
    held = {decode(row["completion_ids"]) for row in trainers[0].eval_dataset}
    assert held <= {f"{n} it is.<|im_end|>" for n in range(6)} and len(held) == 2


def test_other_settings_and_other_weights_have_answers_of_their_own(run, pair, tmp_path, monkeypatch):
    def load_policy(**source):
        raise Loaded

    monkeypatch.setattr(models_load, "load_policy", load_policy)
    teaching = tmp_path / "teacher"
    shutil.copytree(pair[1], teaching)
    rows = ASKED[:1]
    for count, flags in enumerate(("", "", "--temperature 0.7", "--max_completion_length 9", "--seed 7")):
        with pytest.raises(Loaded):
            run(f"--seq_kd True {flags}", rows=rows, teacher=teaching)
        assert len(answers_in(tmp_path / "answers")) == max(count, 1)
    save_qwen(teaching, make_qwen(3, hidden=32, sharp=40))
    with pytest.raises(Loaded):
        run("--seq_kd True", rows=rows, teacher=teaching)
    assert len(answers_in(tmp_path / "answers")) == 5


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(rows, **limits):
    """[(prompt, answer)] as text, of rows as they come to the trainer, and what became of the others."""
    tokenizer = make_tokenizer()
    made, dropped = make_rows([(f"row {n}", row) for n, row in enumerate(rows, 1)], ANSWERED, [])
    assert not dropped
    prepared = prepare_rows(made, tokenizer, ANSWERED, **{"max_length": 1024} | limits)
    return [
        tuple(map(tokenizer.decode, (row["prompt_ids"], row["completion_ids"]))) for row in prepared.rows
    ], prepared


ASKS, ANSWERS = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>"


@pytest.mark.parametrize(
    "row, expected",
    [
        (says("Why?", "So."), (ASKS, ANSWERS)),
        (
            {"prompt": says("Why?")["messages"], "completion": [{"role": "assistant", "content": "So."}]},
            (ASKS, ANSWERS),
        ),
        ({"prompt": "Why? ", "completion": "So."}, ("Why? ", ANSWERS)),
        ({"prompt": says("Why?")["messages"]}, (ASKS, "")),
        ({"prompt": "Why? "}, ("Why? ", "")),
        (says("Why?"), (ASKS, "")),
    ],
    ids=["messages", "chat", "text", "asked as a chat", "asked as text", "messages without an answer"],
)
def test_a_row_is_a_prompt_and_its_answer_with_one_end_of_turn(row, expected):
    assert prepare([row])[0] == [expected]


def test_the_answer_of_a_dialogue_is_the_assistants_last_turn():
    dialogue = {"messages": says("Who?", "I.")["messages"] + says("Why?", "So.")["messages"]}
    before = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n"
    assert prepare([dialogue])[0] == [(before + ASKS, ANSWERS)]


def test_an_answer_that_is_too_long_is_cut_and_counted():
    # the prompt: 4 special tokens and 5 + 4 + 1 + 10 bytes ("user\n", "Why?", "\n", "assistant\n"), 23 in all
    rows, prepared = prepare([says("Why?", "So it is."), says("Why?", "So.")], max_length=28)
    assert [len(row["prompt_ids"]) for row in prepared.rows] == [23, 23]
    assert rows == [(ASKS, "So it"), (ASKS, ANSWERS)] and prepared.cut == 1


def test_a_cut_answer_is_said(run):
    assert (
        "          1 answers are cut at --max_length 28"
        in run("--lmbda 0 --check --max_length 28", rows=[says("Why?", "So it is."), says("Why?", "So.")])[1]
    )


PROMPTS_ALONE = {
    "chats": [CHATS[0], CHATS[1], says("Why?"), says("Who?")],
    "text": [{"prompt": "Say. ", "completion": "So."}, {"prompt": "Say. ", "completion": None}, {"prompt": "Why? "}],
}


@pytest.mark.parametrize("lmbda", ["0", "0.5"])
@pytest.mark.parametrize("rows, line, lacking", [("chats", 3, "2 of 4"), ("text", 2, "2 of 3")])
def test_rows_without_an_answer_are_refused_where_it_is_learnt_from(rows, line, lacking, lmbda, refused, tmp_path):
    assert refused(f"--lmbda {lmbda}", rows=PROMPTS_ALONE[rows]) == [
        f"{tmp_path / 'rows.jsonl'}:{line}: no answer, and so {lacking} rows; --lmbda {lmbda} learns from the answers "
        "in the data. Type --seq_kd True for the teacher's, or --lmbda 1 for the student's own"
    ]


@pytest.mark.parametrize("flags", ["--lmbda 1", "--seq_kd True"])
@pytest.mark.parametrize("rows", PROMPTS_ALONE)
def test_rows_without_an_answer_serve_where_a_model_answers(rows, flags, run):
    status, out, _ = run(f"{flags} --check", rows=PROMPTS_ALONE[rows])
    assert status == 0 and f"data      {len(PROMPTS_ALONE[rows])} rows to train on" in line_with(out, "data ")


LONG = says("Say it. " * 10, "It.")  # 80 bytes, 19 more tokens around them; and 16 at most of the others


@pytest.mark.parametrize(
    "flags, dropped", [("--lmbda 1", True), ("--lmbda 0.5", True), ("--seq_kd True", True), ("--lmbda 0", False)]
)
def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_where_one_is_sampled(flags, dropped, run):
    # the models hold 2048 tokens
    flags += " --check --max_completion_length 1990 --max_drop_fraction 0.5"
    status, out, _ = run(flags, rows=[*CHATS, LONG])
    counts = "6 rows", "1 prompt leaves no room for an answer" if dropped else "none"
    counts = counts if dropped else ("7 rows", "none")
    said = f"data      {counts[0]} to train on, none held out (--eval_fraction 0.1 would); refused: {counts[1]}"
    assert (status, line_with(out, "data ")) == (0, said)


def test_a_held_out_prompt_that_leaves_no_room_for_the_teachers_answer_is_dropped(run, tmp_path):
    # nothing is sampled for training, and the teacher answers what is held out without an answer
    held = write_rows(tmp_path / "held.jsonl", [*ASKED, {"messages": LONG["messages"][:1]}])
    flags = f"--lmbda 0 --check --max_completion_length 1990 --max_drop_fraction 0.5 --eval_data_path {held}"
    status, out, _ = run(flags)
    assert status == 0
    assert line_with(out, "answers ").startswith("answers   6 by the teacher")
    assert line_with(out, "data ") == (
        "data      6 rows to train on, 6 held out; refused: 1 prompt leaves no room for an answer"
    )


def test_held_out_prompts_are_answered_by_the_teacher(run, tmp_path, trainers):
    held = write_rows(tmp_path / "held.jsonl", [says("Who?"), says("What is it?")])
    status, out, _ = run(f"--lmbda 1 --max_steps 1 --eval_data_path {held}", rows=ASKED)
    assert status == 0
    (lines,) = answers_in(tmp_path / "answers").values()
    answers = {line["prompt"]: line["ids"] for line in map(json.loads, lines)}
    rows = list(trainers[0].eval_dataset)
    assert len(answers) == len(rows) == 2 and line_with(out, "answers   2 to sample, 0 in ")
    assert [row["completion_ids"] for row in rows] == [answers[sampling.prompt_key(r["prompt_ids"])] for r in rows]
    before, after = read_rows(tmp_path / "out" / "eval.jsonl")
    assert before["eval_completions/mean_length"] == sum(map(len, answers.values())) / 2
    # what the teacher says of its own answers, by a model that the trainer never had
    model = AutoModelForCausalLM.from_pretrained(trainers[0].args.teacher_model_name_or_path).eval()
    with torch.no_grad():
        logs = answers_logits(model, rows).log_softmax(-1)
    tokens = torch.tensor([token for row in rows for token in row["completion_ids"]])
    by_hand = -logs.gather(1, tokens[:, None]).mean().item()
    assert before["eval_teacher_loss"] == pytest.approx(by_hand, rel=1e-5)  # float32


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

TEMPERATURE = "--temperature 0: answers are sampled, so above 0"
BAD = [
    ("--lmbda 1.5", ["--lmbda 1.5: from 0 to 1"]),
    ("--lmbda -0.1", ["--lmbda -0.1: from 0 to 1"]),
    ("--lmbda nan", ["--lmbda nan: from 0 to 1"]),
    ("--beta 2", ["--beta 2: from 0 to 1"]),
    ("--beta nan", ["--beta nan: from 0 to 1"]),
    ("--lmbda 3 --beta 2", ["--lmbda 3: from 0 to 1; --beta 2: from 0 to 1"]),
    ("--temperature 0 --answers_batch_size 0", ["--answers_batch_size 0: 1 or more", TEMPERATURE]),
    (
        "--seq_kd True --lmbda 1",
        [
            "--seq_kd True with --lmbda 1: every step would be on the student's own answers, and none on the "
            "teacher's. Type --lmbda 0 for SeqKD, or leave --seq_kd out"
        ],
    ),
    ("--temperature 0", [TEMPERATURE]),
    ("--answers_batch_size 0", ["--answers_batch_size 0: 1 or more"]),
    ("--max_completion_length 0", ["--max_completion_length 0: 1 or more"]),
    (
        "--max_completion_length 2048",
        [
            "--max_completion_length 2048: the model holds 2048 tokens, prompt and answer. Type "
            "--max_completion_length 1024"
        ],
    ),
    ("--reward_funcs data/rewards.py:brevity", ["--reward_funcs: no such flag for GKD. "]),
    ("--rlhf_type GKD", ["--rlhf_type: no such flag for GKD. "]),
    ("--lmbd 1", ["--lmbd: no such flag for GKD. Did you mean --lmbda?"]),
]


@pytest.mark.parametrize("flags, problems", BAD, ids=[flags for flags, _ in BAD])
def test_a_flag_that_is_wrong_is_refused(flags, problems, refused):
    found = refused(flags)
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_no_teacher_is_refused(refused):
    assert refused(teacher=None) == [
        "--teacher_model_name_or_path: missing. A model folder or Hub id with the student's tokenizer"
    ]


def test_a_teacher_that_is_not_there_is_refused(refused, tmp_path):
    flag = f"--teacher_model_name_or_path {tmp_path / 'gone'}"
    (problem,) = refused(teacher=tmp_path / "gone")
    assert problem.startswith(f"{flag}: no such folder")
    (tmp_path / "gone").mkdir()
    (problem,) = refused(teacher=tmp_path / "gone")
    assert problem == f"{flag}: no config.json (nor adapter_config.json) in it, so not a model folder"


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "a trained reward model, which scores and cannot answer. A teacher is a language model",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantised already. Take the original; --teacher_load_in_4bit holds it in 4 bits",
        ),
    ],
    ids=["reward model", "quantised"],
)
def test_a_teacher_that_cannot_teach_is_refused(change, problem, refused, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert refused(teacher=tmp_path / "teacher") == [f"--teacher_model_name_or_path {tmp_path / 'teacher'}: {problem}"]


def test_a_teacher_that_is_an_adapter_without_its_base_is_refused(refused, pair, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(pair[1], folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    assert refused(teacher=folder) == [
        f"{folder}: its base model (unnamed) is not there. Set base_model_name_or_path in its adapter_config.json"
    ]


def test_a_teacher_of_another_tokenizer_is_refused_by_the_first_token_that_differs(refused, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    assert (vocabulary["A"], vocabulary["B"]) == (36, 37)  # 4 special tokens, and "A" is the 32nd behind "!"
    vocabulary["A"], vocabulary["B"] = 37, 36
    file.write_text(json.dumps(described))
    assert refused(teacher=tmp_path / "teacher") == [
        f"--teacher_model_name_or_path {tmp_path / 'teacher'}: its tokenizer is not the student's: token 36 is 'B' in "
        "it and 'A' in the model that is trained. Distillation compares the two token by token: take a teacher of the "
        "student's family"
    ]


def add_token(folder, token):
    """Gives a model's tokenizer one more token, behind the last row of its embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([*(f"<{number}>" for number in range(len(tokenizer), rows)), token])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def test_a_token_that_only_one_has_is_refused_where_the_rows_use_it(run, pair, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(pair[0], student)
    number = add_token(student, "<much>")
    larger = AutoModelForCausalLM.from_pretrained(student)
    larger.resize_token_embeddings(number + 1)
    larger.save_pretrained(student)
    plain, marked = ({"prompt": "How much?", "completion": text} for text in ("Two.", "<much>"))
    assert run("--lmbda 0 --check", [plain] * 4, student)[0] == 0
    status, _, said = run("--lmbda 0 --check", [plain, marked], student)
    assert status == 2
    assert f"has no token {number} ('<much>'), which the student's template or data use" in said[-1]


def test_a_smaller_teacher_is_wondered_at_and_not_refused(run, pair, tmp_path):
    save_qwen(tmp_path / "large", make_qwen(1, hidden=64))
    status, out, lines = run("--check", model=tmp_path / "large")
    assert (status, lines) == (0, [])
    assert "warning   the teacher has 0M parameters, the student 0M: is it the better one?" in out
    status, out, _ = run("--check", teacher=tmp_path / "large")
    assert status == 0 and not [line for line in out if line.startswith("warning   the teacher")]


def test_the_other_script_says_which_one_distils(tmp_path, pair, capsys):
    words = f"--rlhf_type GKD --model_name_or_path {pair[0]} --output_dir {tmp_path / 'out'}"
    assert train_rlhf.main([*words.split(), "--train_data_path", "data/sft.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: --rlhf_type GKD: no such method. ") and line.endswith(". That is train_gkd.py")


# (what others type, what is said, where in the plan it is seen)
RENAMED = [
    ("--max_new_tokens 2047", "--max_new_tokens is called --max_completion_length here", None),
    ("--lora_r 5 --train_mode lora", "--lora_r is called --lora_rank here", "LoRA rank 5, alpha 16"),
    ("--torch_dtype float32", "--torch_dtype is called --dtype here", "full; float32"),
    ("--use_peft", "--use_peft is --train_mode lora here", "lora, LoRA rank 32"),
    ("--use_peft True", "--use_peft is --train_mode lora here", "lora, LoRA rank 32"),
    ("--use_peft False", "--use_peft is --train_mode full here", "full; float32"),
]


@pytest.mark.parametrize("flags, note, seen", RENAMED, ids=[flags for flags, *_ in RENAMED])
def test_a_flag_is_read_by_the_name_that_others_have_for_it(flags, note, seen, run):
    status, out, lines = run(f"--check --lmbda 1 --max_drop_fraction 1 {flags}")
    assert lines[0] == f"note: {note}, and is read as that"
    if seen:
        assert (status, len(lines)) == (0, 1) and seen in line_with(out, "mode ")
    else:  # one token of 2048 is left for the prompt
        assert status == 2 and "6 prompt leaves no room for an answer" in lines[1]


def test_teacher_and_data_are_read_by_the_names_that_trls_script_has_for_them(pair, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", CHATS)
    words = f"--model_name_or_path {pair[0]} --teacher_model {pair[1]} --dataset_name {rows} --check"
    assert train_gkd.main([*words.split(), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "note: --dataset_name is called --train_data_path here, and is read as that",
        "note: --teacher_model is called --teacher_model_name_or_path here, and is read as that",
    ]
    assert "data      6 rows to train on" in said.out
    assert line_with(said.out.splitlines(), "teacher   ").startswith(f"teacher   {pair[1]}, held in ")


def test_the_lines_that_say_what_is_learnt_from_are_those_of_the_flags(run):
    said = {
        "": "50% of the steps on the student's own answers, the others on the answers in the data; Jensen-Shannon "
        "divergence (beta 0.5), temperature 1",
        "--seq_kd True --beta 0": "no step on the student's own answers, the others on the teacher's answers, given "
        "once; forward KL (beta 0), temperature 1",
        "--lmbda 1 --beta 1 --temperature 0.9": "every step on the student's own answers; reverse KL (beta 1), "
        "temperature 0.9",
        "--lmbda 0.25 --beta 0.1": "25% of the steps on the student's own answers, the others on the answers in the "
        "data; generalized Jensen-Shannon divergence (beta 0.1), temperature 1",
    }
    for flags, expected in said.items():
        assert line_with(run(f"--check {flags}")[1], "distils ") == f"distils   {expected}"


def test_parameters_are_counted_from_the_headers_of_the_files(pair):
    assert folders.count_numbers(pair[0]) == sum(p.numel() for p in make_qwen(1, hidden=32).parameters())
