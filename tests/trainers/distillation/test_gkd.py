"""Distillation: its numbers, its two models, whose answers it learns from, and its command. Offline, a minute.

    python -m pytest tests/trainers/distillation/test_gkd.py -q

Numbers of a few tokens stand on the screen; the trainer's are those of the bigram models of test_losses.py, or
of tiny Qwen2s against a formula in float64. The commands run in this process, but for the one that is killed.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config
from trl.kernels import chunked_divergence
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from rlhf_args.methods import ANSWERED, DISTILLATION, load
from tests.conftest import make_tokenizer
from tests.trainers.distillation.conftest import answers_logits, make_qwen
from tests.trainers.test_losses import LN2, POLICY, REFERENCE, make_bigram, make_tokenizer as make_word_tokenizer
from trainers import gkd_trainer
from trainers.gkd_trainer import HELD_OUT, EveryRow, GKDTrainer, Head, sum_divergences
from utils.data.prepare import prepare_rows
from utils.data.rows import make_rows
from utils.models import load as models_load, sampling

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
        zip([*HELD_OUT, "tokens"], sum_divergences(student, head, teacher, head, torch.tensor([1, 2, 3])), strict=True)
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
    assert on_policy_steps(lmbda, 8) == steps


def on_policy_steps(lmbda, steps):
    at = (
        SimpleNamespace(state=SimpleNamespace(global_step=n), args=SimpleNamespace(lmbda=lmbda)) for n in range(steps)
    )
    return [int(GKDTrainer.is_on_policy(trainer)) for trainer in at]


def test_no_step_on_the_students_own_answers_is_lost_to_rounding():
    """As floats 100 * 0.29 = 28.999999999999996 and 100 * 0.57 = 56.99999999999999."""
    for percent in range(101):
        steps = on_policy_steps(percent / 100, 100)
        assert sum(steps) == percent
        for start in range(91):  # 10 steps have the share, rounded to one side or the other
            assert abs(sum(steps[start : start + 10]) - percent / 10) < 1, percent
    assert sum(on_policy_steps(0.001, 3000)) == 3


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
