"""Rejection sampling: its draws, its choices, its folder, its command, and a kill at any moment. Offline, a minute.

    python -m pytest tests/rejection/test_rejection.py -q
    python -m pytest tests/rejection/test_rejection.py -q -m slow        twenty kills in place of three

Numbers stand on the screen; the commands run in this process, but for those that are killed or launched. What a
server answers or judges is tests/rejection/test_servers.py.
"""

import fcntl
import gc
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    LogitsProcessorList,
    Qwen2ForSequenceClassification,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import rejection_sampling
import train_rlhf
from rlhf_args.methods import METHODS
from rlhf_args.rejection_config import RejectionConfig
from tests.conftest import ROOT, make_model, make_tokenizer, write_rows
from tests.trainers.test_losses import LN2, POLICY, WORDS, make_bigram
from utils.data.rows import load_rows, make_rows
from utils.models import load as models_load, sampling
from utils.rejection import folder as rejection_folder, rounds, selection, stages
from utils.rejection.report import best_of, kl_bound
from utils.results import plots
from utils.runtime.errors import Refused

# ── the draws ────────────────────────────────────────────────────────────────────────────────────────────────────────

Q, A, B, END = range(4)  # the words of tests/trainers/test_losses.py, of which each says how likely the next one is
NEXT = {number: [2.0**-bits for bits in POLICY[word]] for number, word in enumerate(WORDS)}
PROMPTS = [[10, 11, 12, 13, 14, 15], [20], [30, 31, 32], [40, 41], [50, 51, 52, 53], [20]]


@pytest.fixture(scope="module")
def bigram():
    """sample(prompt, seeds, ...): the answers of the model of words to one prompt, one a seed."""
    model = make_bigram(POLICY).eval()
    model.generation_config.eos_token_id = END
    tokenizer = SimpleNamespace(pad_token_id=END, get_vocab=lambda: {word: n for n, word in enumerate(WORDS)})

    def sample(prompt, seeds, **how):
        return sampling.sample(model, tokenizer, [prompt] * len(seeds), sampling.Sampling(**how), seeds)

    return sample


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """sample(prompts, seeds, ...) of a tiny Qwen2, in float32."""
    tokenizer = models_load.load_tokenizer(tiny_model)
    model = models_load.load_model(tiny_model, "CAUSAL_LM", "float32", tokenizer=tokenizer, seed=0).eval()

    def sample(prompts, seeds, **how):
        return sampling.sample(model, tokenizer, prompts, sampling.Sampling(**{"max_new_tokens": 16, **how}), seeds)

    return sample


def test_an_answer_is_the_same_alone_in_another_batch_and_in_another_order(tiny):
    seeds = [sampling.seed_of(0, number) for number in range(len(PROMPTS))]
    together = tiny(PROMPTS, seeds)
    assert [tiny([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)] == together
    assert tiny(PROMPTS[::-1], seeds[::-1])[::-1] == together
    assert tiny(PROMPTS[:3], seeds[:3]) + tiny(PROMPTS[3:], seeds[3:]) == together
    assert len({tuple(answer) for answer in together}) == 6  # the same prompt under two seeds among them


def test_a_seed_is_all_that_an_answer_hangs_on(tiny):
    assert tiny(PROMPTS[:1] * 2, [7, 7])[0] == tiny(PROMPTS[:1] * 2, [7, 8])[0]
    first, second = tiny(PROMPTS[:1] * 2, [7, 8])
    assert first != second and len(first) == len(second) == 16


def test_the_likeliest_token_is_taken_at_temperature_0(bigram):
    # q > a (1/2), a > b (1/2), b > </s> (1/2), at which it ends
    assert bigram([B, Q], [1, 2, 3], max_new_tokens=8, temperature=0) == [[A, B, END]] * 3


def chi_square(counts, expected):
    return sum((counts.get(key, 0) - number) ** 2 / number for key, number in expected.items())


def within(degrees):
    """What chi-square stays below: its mean is `degrees` and its variance twice that; five deviations above."""
    return degrees + 5 * math.sqrt(2 * degrees)


def test_two_draws_in_a_row_follow_the_models_probabilities(bigram):
    answers = Counter(tuple(ids) for ids in bigram([B, Q], list(range(4096)), max_new_tokens=2))
    # from q: </s> 1/8 of the time, at once; else x and then y with P(x | q) P(y | x), as 1/2 * 1/8 for a and q
    expected = {(END,): 4096 * NEXT[Q][END]}
    expected |= {(x, y): 4096 * NEXT[Q][x] * NEXT[x][y] for x in (Q, A, B) for y in (Q, A, B, END)}
    assert sum(expected.values()) == sum(answers.values()) == 4096 and min(expected.values()) == 64
    assert chi_square(answers, expected) < within(12)  # 13 kinds of answers
    shuffled = {key: expected[other] for key, other in zip(expected, [*expected][1:] + [*expected][:1], strict=True)}
    assert chi_square(answers, shuffled) > 10 * within(12)  # other probabilities would be seen


# From q, P = 1/8 q, 1/2 a, 1/4 b, 1/8 </s>
WARPED = {
    "as they are": ({}, {Q: 1 / 8, A: 1 / 2, B: 1 / 4, END: 1 / 8}),
    "temperature 0.5 squares": ({"temperature": 0.5}, {Q: 1 / 22, A: 16 / 22, B: 4 / 22, END: 1 / 22}),
    "temperature 2 takes roots": (
        {"temperature": 2.0},
        {word: NEXT[Q][word] ** 0.5 / sum(p**0.5 for p in NEXT[Q]) for word in range(4)},
    ),
    "top_k 2": ({"top_k": 2}, {A: 2 / 3, B: 1 / 3}),
    "top_k 1": ({"top_k": 1}, {A: 1}),
    "top_p 0.7 needs two": ({"top_p": 0.7}, {A: 2 / 3, B: 1 / 3}),
    "top_p 0.4 needs one": ({"top_p": 0.4}, {A: 1}),
    # 16/22 + 4/22 = 0.909; without the temperature 1/2 + 1/4 would not be enough
    "temperature before top_p": ({"temperature": 0.5, "top_p": 0.9}, {A: 4 / 5, B: 1 / 5}),
    # of the two that are left a has 2/3, which is enough; of all four it has 1/2
    "top_k before top_p": ({"top_k": 2, "top_p": 0.6}, {A: 1}),
}


@pytest.mark.parametrize("how, expected", WARPED.values(), ids=WARPED)
def test_temperature_top_k_and_top_p_warp_as_transformers_does(how, expected, bigram):
    counts = Counter(ids[0] for ids in bigram([Q], list(range(2000)), max_new_tokens=1, **how))
    assert set(counts) == set(expected)
    expected = {word: 2000 * share for word, share in expected.items()}
    assert chi_square(counts, expected) <= within(len(expected) - 1)


def test_the_token_drawn_is_where_the_cumulated_probabilities_of_transformers_warpers_pass_the_number():
    how = sampling.Sampling(max_new_tokens=3, temperature=0.7, top_k=30, top_p=0.8)
    seeds, ids = [3, 4, 5, 6], torch.zeros(4, 5, dtype=torch.long)
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    chosen = sampling.choose_seeded(how, seeds, 4, "cpu")(ids, scores.clone())
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.8)]
    probabilities = LogitsProcessorList(warpers)(ids, scores.clone()).double().softmax(-1)
    assert {row.isfinite().sum().item() for row in chosen} == {1}
    for row, seed, shares in zip(chosen, seeds, probabilities.tolist(), strict=True):
        # 5 tokens where the prompt has 4: the second of the seed's three numbers
        number = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[1].item()
        token = next(n for n, total in enumerate(itertools.accumulate(shares)) if total > number)
        assert row.argmax().item() == token and shares[token] > 0


# ── best of n ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_best_of_n_by_hand():
    # of 1, 2, 4, 8: all alone 15/4; the pairs' best 2, 4, 8, 4, 8, 8; the triples' 4, 8, 8, 8; and all
    assert best_of([4, 1, 8, 2]) == pytest.approx([15 / 4, 34 / 6, 28 / 4, 8], rel=1e-12)


@pytest.mark.parametrize("scores", [[3], [-1.5, -2], [0, 0, 1, 1, 5], [2.5, -3, 2.5, 7, 0, -11]], ids=str)
def test_the_best_of_n_is_the_mean_over_all_subsets(scores):
    every = [list(itertools.combinations(scores, n)) for n in range(1, len(scores) + 1)]
    brute = [sum(map(max, subsets)) / len(subsets) for subsets in every]
    assert best_of(scores) == pytest.approx(brute, rel=1e-12)  # float64


@pytest.mark.parametrize("n, nats", [(1, 0), (2, LN2 - 1 / 2), (4, 2 * LN2 - 3 / 4)])
def test_the_bound_on_kl(n, nats):
    assert kl_bound(n) == pytest.approx(nats, abs=1e-12)


def test_the_best_of_twelve_hundred_answers():
    # 0, 1, ..., 1199: of one the mean, of all the highest; C(1199, 599) is no float
    curve = best_of(list(range(1200)))
    assert (curve[0], curve[-1]) == (pytest.approx(1199 / 2), 1199)


# ── what is chosen ───────────────────────────────────────────────────────────────────────────────────────────────────


def make_answers(written):
    """Scored answers, their samples in order: "a5 b3- c2! =1 d?" are a with 5, b with 3 that was cut, ...

    - cut, ! the scorer failed, ? the answer failed; nothing before the number: an empty answer, = is as good as one.
    """
    answers = []
    for sample, word in enumerate(written.split()):
        text, score, mark = re.fullmatch(r"([a-z]*)=?(-?[\d.]*)([-!?]?)", word).groups()
        answer = {"prompt": 0, "sample": sample, "completion": text, "tokens": 1, "ended": mark != "-"}
        if mark == "?":
            answer = {"prompt": 0, "sample": sample, "failed": "no reply"}
        elif mark == "!":
            answer["failed"] = "no verdict"
        else:
            answer |= {"score": float(score), "scores": {"length": float(score)}}
        answers.append(answer)
    return answers


NAMES = ("SFT", "DPO", "KTO", "Reward")  # of the files
EQUAL, NOT_ENDED = "all answers equal", "no answer that ended"
NO_PAIR, TOO_LOW = "no pair of that margin", "none reaches the threshold"
# (flags, answers, samples that are good, samples that are bad, why none, what fell away)
CHOICES = {
    "best": ({}, "a1 b5 c3", [1], [0], None, {}),
    "best, ties by sample": ({}, "a5 b5 c1 d1", [0], [3], None, {}),
    "best of one": ({}, "a1", [0], [], None, {}),
    "best, all equal": ({}, "a1 b1 c1", [], [], EQUAL, {}),
    "best, all the same text": ({}, "a1 a1 a1", [], [], EQUAL, {"duplicate": 2}),
    "best, a duplicate": ({}, "a1 b5 b5 c3", [1], [0], None, {"duplicate": 1}),
    "best, an empty one": ({}, "=9 b5 c3", [1], [2], None, {"empty": 1}),
    "best, failed ones": ({}, "a? b5 c9! d3", [1], [3], None, {"failed": 2}),
    "best, all failed": ({}, "a? b!", [], [], NOT_ENDED, {"failed": 2}),
    "best, all empty": ({}, "=1 =2", [], [], NOT_ENDED, {"empty": 2}),
    "best, cut ones are not chosen": ({}, "a9- b5 c3", [1], [2], None, {}),
    "best, cut ones are rejected": ({}, "a1- b5 c3", [1], [0], None, {}),
    "best, cut ones kept": ({"keep_cut": True}, "a9- b5 c3", [0], [2], None, {}),
    "best, all cut": ({}, "a9- b5-", [], [], NOT_ENDED, {}),
    "best, all cut and kept": ({"keep_cut": True}, "a9- b5-", [0], [1], None, {}),
    "best of one that is left": ({}, "a? b! c2", [2], [], None, {"failed": 2}),
    "top_k": ({"select": "top_k"}, "a1 b5 c3 d4 e2", [1, 3], [4, 0], None, {}),
    "top_k of all": ({"select": "top_k", "select_k": 9}, "a1 b5 c3", [1, 2, 0], [], None, {}),
    "top_k, few left to reject": ({"select": "top_k"}, "a1 b5 c3", [1, 2], [0], None, {}),
    "top_k, ties by sample": ({"select": "top_k"}, "a5 b5 c5 d1 e0", [0, 1], [3, 4], None, {}),
    "threshold": ({"select": "threshold", "threshold": 3.0}, "a1 b5 c3 d2", [1, 2], [3, 0], None, {}),
    "threshold, none": ({"select": "threshold", "threshold": 9.0}, "a1 b5 c3", [], [1, 2, 0], TOO_LOW, {}),
    "threshold, all equal": ({"select": "threshold", "threshold": 1.0}, "a1 b1", [0, 1], [], None, {}),
    "threshold, cut": ({"select": "threshold", "threshold": 3.0}, "a5- b4 c1-", [1], [2], None, {}),
    "pairs": ({"select": "pairs"}, "a1 b5 c3", [1], [0], None, {}),
    "pairs, margin met": ({"select": "pairs", "min_margin": 4.0}, "a1 b5 c3", [1], [0], None, {}),
    "pairs, margin missed": ({"select": "pairs", "min_margin": 4.5}, "a1 b5 c3", [], [], NO_PAIR, {}),
    "pairs of one": ({"select": "pairs"}, "a1", [], [], NO_PAIR, {}),
    "pairs, all equal": ({"select": "pairs"}, "a1 b1", [], [], EQUAL, {}),
    "pairs, the ended one is the worst": ({"select": "pairs"}, "a1 b5-", [], [], NO_PAIR, {}),
    "pairs, a difference of rounding alone": ({"select": "pairs"}, "a0.3 b0.30000000000000004", [], [], NO_PAIR, {}),
}


@pytest.mark.parametrize("flags, written, good, bad, why, gone", CHOICES.values(), ids=CHOICES)
def test_what_is_good_and_what_is_bad(flags, written, good, bad, why, gone):
    found = selection.choose(make_answers(written), RejectionConfig(**flags))
    samples = [[answer["sample"] for answer in part] for part in found[:2]]
    assert (*samples, found[2], {reason: count for reason, count in found[3].items() if count}) == (
        good, bad, why, gone,
    )  # fmt: skip


def test_an_answer_that_failed_takes_no_place_from_its_double():
    # b is scored where it stands last; where it stands first the judge gave up
    good, _, _, gone = selection.choose(make_answers("a1 b! b5"), RejectionConfig())
    assert [answer["sample"] for answer in good] == [2] and gone == Counter(failed=1)


def test_an_answer_that_ended_is_kept_in_place_of_its_double_that_was_cut():
    # as a reference answer whose words were sampled too, up to max_new_tokens
    good, _, _, gone = selection.choose(make_answers("a1 b5- b5"), RejectionConfig())
    assert [answer["sample"] for answer in good] == [2] and +gone == Counter(duplicate=1)


@pytest.mark.parametrize("flags, written", [({"select": "top_k"}, "a1 b1 c1 d0"), ({}, "a9- b8- c1 d5-")])
def test_no_answer_is_bad_that_scored_as_a_good_one_or_better(flags, written):
    good, bad, *_ = selection.choose(make_answers(written), RejectionConfig(**flags))
    assert good and all(answer["score"] < good[-1]["score"] for answer in bad)


ASKED = [{"role": "user", "content": "Why?"}]


def says(text):
    return [{"role": "assistant", "content": text}]


def rows_of(name, written, prompt=ASKED, **flags):
    config = RejectionConfig(**flags)
    good, bad, *_ = selection.choose(make_answers(written), config)
    return list(selection.rows_of(name, prompt, good, bad, config))


def trace(sample, score):
    return {"sample": sample, "score": score, "scores": {"length": score}}


def test_the_rows_of_a_chat():
    pair = {"prompt": ASKED, "chosen": says("b"), "rejected": says("a")}
    whence = {"chosen": trace(1, 5.0), "rejected": trace(0, 1.0)}
    assert rows_of("DPO", "a1 b5 c3") == rows_of("Reward", "a1 b5 c3") == [(pair, whence)]
    assert rows_of("SFT", "a1 b5 c3") == [({"messages": ASKED + says("b")}, trace(1, 5.0))]
    assert rows_of("KTO", "a1 b5 c3") == [
        ({"prompt": ASKED, "completion": says("b"), "label": True}, trace(1, 5.0)),
        ({"prompt": ASKED, "completion": says("a"), "label": False}, trace(0, 1.0)),
    ]


def test_the_rows_of_plain_text():
    found = {name: [row for row, _ in rows_of(name, "a1 b5", "Why? ")] for name in NAMES}
    pair = [{"prompt": "Why? ", "chosen": "b", "rejected": "a"}]
    assert found == {
        "SFT": [{"prompt": "Why? ", "completion": "b"}],
        "DPO": pair,
        "KTO": [
            {"prompt": "Why? ", "completion": "b", "label": True},
            {"prompt": "Why? ", "completion": "a", "label": False},
        ],
        "Reward": pair,
    }


def texts_of(name, written, **flags):
    sides = ("chosen", "rejected") if name == "DPO" else ("completion",)
    return ["".join(row[side][0]["content"] for side in sides) for row, _ in rows_of(name, written, **flags)]


@pytest.mark.parametrize(
    "flags, pairs, thumbs",
    [
        ({}, ["be"], ["b", "e"]),
        ({"min_margin": 4.0}, ["be"], ["b", "e"]),
        ({"min_margin": 5.0}, [], ["b", "e"]),
        ({"select": "top_k"}, ["be", "da"], ["b", "d", "a", "e"]),  # the best with the worst, and so on
        ({"select": "top_k", "min_margin": 3.5}, ["be"], ["b", "d", "a", "e"]),
        ({"select": "threshold", "threshold": 4.0}, ["be", "da"], ["b", "d", "c", "a", "e"]),
    ],
)
def test_good_and_bad_ones_are_paired_from_the_ends(flags, pairs, thumbs):
    assert texts_of("DPO", "a2 b5 c3 d4 e1", **flags) == pairs
    assert texts_of("KTO", "a2 b5 c3 d4 e1", **flags) == thumbs


def test_an_answer_that_reads_like_messages_does_not_spoil_the_file(tmp_path):
    answers = make_answers("a1 b5")
    answers[1]["completion"] = '[{"role": "user", "content": "Why?"}]'
    good, bad, *_ = selection.choose(answers, RejectionConfig())
    made = [row for row, _ in selection.rows_of("SFT", "Why? ", good, bad, RejectionConfig())]
    rows = write_rows(tmp_path / "sft.jsonl", [*made, {"prompt": "Who? ", "completion": "I."}])
    assert load_rows([rows], None, METHODS["SFT"].columns, "SFT").dropped == []


def test_answers_without_a_score_failed_and_scores_without_an_answer_are_nobodys():
    completions = [(0, [{"prompt": 0, "sample": s, "completion": "a"} for s in (0, 1)]), (2, [{"sample": 0}])]
    scores = [(0, [{"sample": 1, "score": 2.0}]), (1, [{"sample": 0, "score": 3.0}]), (3, [{"sample": 0}])]
    (_, first), (_, second) = selection.candidates(completions, scores)
    assert [answer.get("score") for answer in first] == [None, 2.0] and "failed" in first[0]
    assert second == [{"sample": 0, "failed": "not scored"}]


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def line(prompt, sample, **more):
    return {"prompt": prompt, "sample": sample, **(more or {"completion": f"{prompt}.{sample}\u2028é"})}


def lines_of(folder, prompts=3, samples=2):
    return rejection_folder.Lines(folder, "completions", prompts, samples)


def read(file):
    """Rows of a file whose texts may hold any line separator but \\n."""
    return [json.loads(one) for one in Path(file).read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_last_line_that_was_torn_is_not_there(tmp_path):
    lines = lines_of(tmp_path)
    lines.append([line(0, 0), line(2, 1)])
    (file,) = lines.parts.iterdir()
    whole = file.read_bytes()
    for cut in range(1, len(json.dumps(line(2, 1), ensure_ascii=False).encode()) + 1):
        file.write_bytes(whole[:-cut])
        assert lines_of(tmp_path).find()[1].tolist() == [[True, False], [False, False], [False, False]]
    again = lines_of(tmp_path)  # a process of its own: it writes to a file of its own
    again.append([line(2, 1), line(1, 0)])
    again.merge()
    assert read(again.file) == [line(0, 0), line(1, 0), line(2, 1)]


def test_lines_are_merged_in_order_of_prompt_and_sample(tmp_path):
    keys = [(n, s) for n in range(3) for s in range(2)]
    for seed in range(3):
        random.Random(seed).shuffle(keys)
        lines = lines_of(tmp_path / str(seed))
        lines.append([line(*key) for key in keys[:2]])
        lines.merge()
        lines.append([line(*key) for key in keys[2:3]])
        lines.append([line(*key) for key in keys[3:]])
        lines.merge()
        assert read(lines.file) == [line(n, s) for n in range(3) for s in range(2)]
        assert not lines.parts.exists() and [number for number, _ in lines.groups()] == [0, 1, 2]


def test_what_failed_is_not_done_and_a_sound_line_wins_wherever_it_stands(tmp_path):
    failed = {"failed": "no reply"}
    lines = lines_of(tmp_path)
    lines.append([line(0, 0, **failed), line(0, 1), line(1, 0, **failed)])
    lines.merge()
    lines.append([line(0, 0), line(0, 1, **failed), line(1, 0, failed="once more")])
    assert lines.find()[1].tolist() == [[True, True], [False, False], [False, False]]
    lines.merge()
    assert read(lines.file) == [line(0, 0), line(0, 1), line(1, 0, failed="once more")]


@pytest.mark.parametrize("cleaned", [0, 1])
def test_a_kill_between_the_merge_and_its_cleaning_up_loses_and_doubles_nothing(cleaned, tmp_path, monkeypatch):
    def kill(parts):
        for file in sorted(parts.iterdir())[:cleaned]:
            file.unlink()
        raise KeyboardInterrupt

    for batch in ([line(2, 0), line(0, 1)], [line(0, 0)]):
        lines_of(tmp_path).append(batch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rejection_folder.shutil, "rmtree", kill)
        lines_of(tmp_path).merge()
    lines = lines_of(tmp_path)
    assert lines.file.exists() and len(list(lines.parts.iterdir())) == 2 - cleaned
    assert lines.find()[1].sum() == 3
    lines.append([line(1, 1)])
    lines.merge()
    assert read(lines.file) == [line(0, 0), line(0, 1), line(1, 1), line(2, 0)]


def test_a_kill_in_the_midst_of_a_merge_changes_nothing(tmp_path, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt

    lines_of(tmp_path).append([line(1, 0), line(0, 0)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rejection_folder.os, "replace", kill)
        lines_of(tmp_path).merge()
    assert not lines_of(tmp_path).file.exists()
    (tmp_path / "completions.jsonl.part").write_text("torn")
    lines_of(tmp_path).merge()
    assert read(lines_of(tmp_path).file) == [line(0, 0), line(1, 0)]


def test_a_second_process_is_refused_and_told_which_one_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(rejection_folder, "LOCK_SECONDS", 0)
    with rejection_folder.locked(tmp_path):
        with pytest.raises(Refused) as refusal, rejection_folder.locked(tmp_path):
            raise AssertionError("two at work")
        assert refusal.value.problems == [
            f"--output_dir {tmp_path}: process {os.getpid()} is at work in it. Wait, or end it"
        ]
    with rejection_folder.locked(tmp_path):
        pass  # it is free again


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

QUESTIONS = ["Say hi.", "What is 2 + 2?", "Name a colour.", "Why?", "Sing!", "Who?", "Spell cat.", "Tell me a tale."]
CHATS = [{"prompt": [{"role": "user", "content": asked}]} for asked in QUESTIONS]
TEXTS = [{"prompt": f"Q: {asked} A: "} for asked in QUESTIONS]
ALL = "SFT,DPO,KTO,Reward"
FAST = f"--num_completions 4 --max_new_tokens 12 --keep_cut True --write {ALL}"  # a random model hardly ever ends
REWARD = '''"""How much the answers' characters add up to, up to 10."""


def total(completions, **columns):
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [float(sum(map(ord, text)) % 11) for text in texts]
'''
FINAL = ("prompts", "completions", "scores", "sft", "dpo", "kto", "reward")  # .jsonl, with report.json


class Loaded(Exception):
    """Nothing stood in the way: a model would be loaded."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Collections of garbage, which a run asks for between its stages, need not look at what the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *args: None)


@pytest.fixture
def run(tmp_path, tiny_model, capsys, no_picture):
    """run(flags, ...) types a whole command; (status, lines of stdout, lines of stderr without bars)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(flags="", rows=CHATS, model=tiny_model, out=tmp_path / "out", reward="total", fast=FAST):
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        words = f"--model_name_or_path {model} --train_data_path {path} --output_dir {out} {fast} {flags} "
        if reward:
            if not (tmp_path / "reward.py").exists():
                (tmp_path / "reward.py").write_text(REWARD)
            words += f"--reward_funcs {tmp_path / 'reward.py'}:{reward}"
        capsys.readouterr()
        status = rejection_sampling.main(shlex.split(words))
        said = capsys.readouterr()
        run.err = said.err
        lines = re.sub(r"\r?(generate|score): [^]]*\]", "", said.err).splitlines()
        return status, said.out.splitlines(), [line for line in lines if line.strip()]

    return run


def files_in(folder):
    """{name: bytes} of all below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stamps(folder):
    return {str(file): file.stat().st_mtime_ns for file in [folder, *folder.rglob("*")] if file.exists()}


def line_with(lines, start):
    (found,) = (one for one in lines if one.startswith(start))
    return found


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """{"chat" or "text": folder with a scored pool}, and beside each its words of command."""
    made = {}
    folder = tmp_path_factory.mktemp("scored")
    (folder / "reward.py").write_text(REWARD)
    for kind, rows in (("chat", CHATS), ("text", TEXTS)):
        words = f"--model_name_or_path {tiny_model} --train_data_path {write_rows(folder / f'{kind}.jsonl', rows)} "
        words += f"--reward_funcs {folder / 'reward.py'}:total {FAST} "
        (folder / kind).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "draw", lambda *args: None)
            assert rejection_sampling.main(f"{words} --output_dir {folder / kind}".split()) == 0
        made[kind] = folder / kind, words
    return made


def test_one_command_samples_scores_and_writes_all_files(run, tmp_path, monkeypatch):
    monkeypatch.undo()  # the picture is drawn
    status, out, lines = run("--num_completions 3 --max_samples 4")
    assert (status, lines) == (0, [])
    files = {f"{name}.jsonl" for name in (*FINAL, "dropped")} | {"report.json", "report.png", "settings.json", ".lock"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert line_with(out, "generate ") == "generate  12 answers to sample, 0 are there"
    assert line_with(out, "prompts ") == "prompts   4; refused: none"


def test_the_lines_and_rows_are_those_of_the_model_and_of_the_scorer(scored):
    folder, _ = scored["chat"]
    answers, scores = read(folder / "completions.jsonl"), read(folder / "scores.jsonl")
    keys = [(n, s) for n in range(8) for s in range(4)]
    assert [(one["prompt"], one["sample"]) for one in answers] == keys
    assert [(one["prompt"], one["sample"]) for one in scores] == keys
    assert all(one["tokens"] == 12 and one["ended"] is False for one in answers)
    totals = [float(sum(map(ord, one["completion"])) % 11) for one in answers]
    assert [one["score"] for one in scores] == totals and len(set(totals)) > 5
    assert [one["scores"] for one in scores] == [{"total": total} for total in totals]
    # the best of each prompt's four, the worst of them, and whence
    for number, (row, pair) in enumerate(zip(read(folder / "sft.jsonl"), read(folder / "dpo.jsonl"), strict=True)):
        mine = totals[4 * number : 4 * number + 4]
        best, worst = mine.index(max(mine)), 3 - mine[::-1].index(min(mine))
        texts = [one["completion"] for one in answers[4 * number : 4 * number + 4]]
        assert row["messages"] == CHATS[number]["prompt"] + says(texts[best])
        assert (pair["chosen"], pair["rejected"]) == (says(texts[best]), says(texts[worst]))
        assert pair["provenance"]["answer"]["rejected"] == {
            "sample": worst, "score": mine[worst], "scores": {"total": mine[worst]},
        }  # fmt: skip


def test_every_row_says_where_it_comes_from(scored, tiny_model):
    folder, _ = scored["text"]
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "seed": 42}
    seen = 0
    for name in NAMES:
        for row in read(folder / f"{name.lower()}.jsonl"):
            whence = row["provenance"]
            assert (whence["model"], whence["engine"], whence["sampling"]) == (tiny_model, "transformers", drawn)
            file, _, number = whence["source"].rpartition(":")
            assert read(file)[int(number) - 1]["prompt"] == row["prompt"]
            traces = whence["answer"].values() if name in ("DPO", "Reward") else [whence["answer"]]
            assert all(set(trace) == {"sample", "score", "scores"} for trace in traces)
            seen += 1
    assert seen == 8 + 8 + 16 + 8


def test_the_report_is_that_of_the_pool(scored):
    folder, _ = scored["chat"]
    report = json.loads((folder / "report.json").read_text())
    totals = [one["score"] for one in read(folder / "scores.jsonl")]
    groups = [totals[start : start + 4] for start in range(0, 32, 4)]
    assert report["mean_reward"] == pytest.approx(sum(totals) / 32)
    curve = [
        sum(max(c) for g in groups for c in itertools.combinations(g, n)) / 8 / math.comb(4, n) for n in (1, 2, 3, 4)
    ]  # noqa: E501
    assert [point["reward"] for point in report["best_of_n"]] == pytest.approx(curve)
    assert [point["n"] for point in report["best_of_n"]] == [1, 2, 3, 4]
    assert report["written"] == {"SFT": 8, "DPO": 8, "KTO": 16, "Reward": 8}
    assert (report["prompts"], report["answers"], report["cut"], report["failed"]) == (8, 32, 32, 0)


def test_the_same_command_again_samples_nothing_and_changes_no_byte(run, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise Loaded

    assert run()[0] == 0
    before = files_in(tmp_path / "out")
    monkeypatch.setattr(models_load, "load_model", load)
    status, out, _ = run()
    assert status == 0 and {**before, ".lock": b""} == {**files_in(tmp_path / "out"), ".lock": b""}
    assert line_with(out, "generate ") == "generate  0 answers to sample, 32 are there"
    assert line_with(out, "score ") == "score     0 answers to score, 32 are there"
    # and of a seed of its own everything is another
    with pytest.raises(Loaded):
        run("--seed 7", out=tmp_path / "other")


def test_the_stages_one_by_one_come_to_the_same(run, scored, tmp_path):
    folder, words = scored["chat"]
    for stage in ("generate", "score", "select"):
        assert rejection_sampling.main(f"{words} --output_dir {tmp_path / 'out'} --stages {stage}".split()) == 0
    found, expected = files_in(tmp_path / "out"), files_in(folder)
    assert {name: found[f"{name}.jsonl"] for name in FINAL} == {name: expected[f"{name}.jsonl"] for name in FINAL}


def test_batches_of_another_size_answer_the_same(run, scored, tmp_path):
    folder, words = scored["chat"]
    words += f"--output_dir {tmp_path / 'out'} --generate_batch_size 5 --score_batch_size 3"
    assert rejection_sampling.main(words.split()) == 0
    for name in FINAL:
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes(), name


def test_one_answer_at_temperature_0_is_the_likeliest_one(run, tmp_path, tiny):
    assert run("--num_completions 1 --temperature 0 --write SFT,DPO")[0] == 0
    tokenizer = make_tokenizer()
    prompts = [tokenizer(f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for a in QUESTIONS]
    likeliest = tiny(prompts, None, temperature=0, max_new_tokens=12)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in likeliest]
    assert [one["completion"] for one in read(tmp_path / "out" / "completions.jsonl")] == texts
    rows = read(tmp_path / "out" / "sft.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == texts and len(set(texts)) > 4
    assert read(tmp_path / "out" / "dpo.jsonl") == []  # one answer is no pair


SELECTIONS = ["best", "top_k", "threshold --threshold 5", "pairs --min_margin 2"]


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_every_written_file_is_accepted_by_every_method_without_a_dropped_row(
    select, kind, chunked, scored, no_picture, tiny_model, tmp_path, capsys
):
    folder, words = scored[kind]
    shutil.copytree(folder, tmp_path / "out")
    words += f"--stages select --select {select} {'--chunk_size 3' if chunked else ''} --output_dir {tmp_path / 'out'}"
    assert rejection_sampling.main(words.split()) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())["written"]
    fed = [method for method in METHODS if selection.file_for(method)]
    assert fed == ["DPO", "CPO", "SimPO", "CPOSimPO", "ORPO", "KTO", "Reward", "SFT"]
    for method in fed:
        file = selection.file_for(method)
        path = tmp_path / "out" / (file.lower() if chunked else f"{file.lower()}.jsonl")
        rows = load_rows([str(path)], None, METHODS[method].columns, method)
        assert (len(rows.train), rows.dropped) == (written[file], []) and written[file] >= 4
        capsys.readouterr()
        flags = f"--rlhf_type {method} --model_name_or_path {tiny_model} --train_data_path {path} --check "
        assert train_rlhf.main([*flags.split(), "--output_dir", str(tmp_path / "trained")]) == 0
        said = line_with(capsys.readouterr().out.splitlines(), "data ")
        assert said.startswith(f"data      {written[file]} rows to train on") and said.endswith("refused: none")


@pytest.mark.parametrize("kind, method", [("chat", "SFT"), ("text", "DPO"), ("chat", "KTO"), ("text", "Reward")])
def test_a_method_trains_on_its_file(kind, method, scored, tiny_model, tmp_path):
    folder, _ = scored[kind]
    flags = f"--rlhf_type {method} --model_name_or_path {tiny_model} --max_steps 1 --train_mode full "
    flags += f"--train_data_path {folder / f'{method.lower()}.jsonl'} "
    flags += "--per_device_train_batch_size 2 --save_strategy no"
    assert train_rlhf.main([*flags.split(), "--output_dir", str(tmp_path / "trained")]) == 0
    card = json.loads((tmp_path / "trained" / "run_card.json").read_text())
    assert (tmp_path / "trained" / "dropped.jsonl").read_text() == "" and card["method"] == method


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_kto_is_given_no_neighbours_of_one_prompt(kind, scored):
    # TRL gives each prompt of a batch its neighbour's answer to estimate the KL, in the order of the file, as
    # utils/data.py says of pairs: keep_apart
    folder, _ = scored[kind]
    rows, _ = make_rows([("", row) for row in read(folder / "kto.jsonl")], METHODS["KTO"].columns, [])
    asked = [row["prompt"] for _, row in rows]
    assert len(asked) == 16 and not [one for one, two in itertools.pairwise(asked) if one == two]


def test_files_of_chunk_size_rows_hold_what_the_one_file_holds(scored, no_picture, tmp_path):
    folder, words = scored["chat"]
    shutil.copytree(folder, tmp_path / "out")
    words += f"--output_dir {tmp_path / 'out'} --stages select"
    assert rejection_sampling.main(f"{words} --chunk_size 3".split()) == 0
    for name, count in (("sft", 8), ("dpo", 8), ("kto", 16), ("reward", 8)):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == [f"{number:05d}.jsonl" for number in range(math.ceil(count / 3))]
        assert [len(read(file)) for file in files] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
        assert b"".join(file.read_bytes() for file in files) == (folder / f"{name}.jsonl").read_bytes()
        assert not (tmp_path / "out" / f"{name}.jsonl").exists()  # of the selection before
    assert rejection_sampling.main(f"{words} --write SFT".split()) == 0
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert "sft.jsonl" in left and not left & {"sft", "dpo", "kto", "reward", "dpo.jsonl", "selected.part"}


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reference_answer_joins_the_candidates(run, tmp_path):
    rows = [{**row, "chosen": says(f"Because {n}.")} for n, row in enumerate(CHATS)]
    rows[3]["chosen"] = None
    assert run("--reference_column chosen --keep_cut False", rows=rows)[0] == 0
    answers = read(tmp_path / "out" / "completions.jsonl")
    references = [one for one in answers if one["sample"] == 4]
    assert [(one["prompt"], one["completion"]) for one in references] == [
        (n, f"Because {n}.") for n in range(8) if n != 3
    ]
    assert all(one["ended"] and one["reference"] for one in references) and len(answers) == 8 * 4 + 7
    # what was sampled is cut: of each prompt the reference alone can be chosen
    rows = read(tmp_path / "out" / "sft.jsonl")
    assert {row["messages"][-1]["content"] for row in rows} <= {f"Because {n}." for n in range(8)} and len(rows) >= 5
    assert {row["provenance"]["answer"]["sample"] for row in rows} == {4}
    # and the curve is of the model's own
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["answers"] == 32 and len(report["best_of_n"]) == 4


def test_the_reference_answer_of_a_pair_that_repeats_its_prompt_is_the_answer(run, tmp_path):
    rows = [{"chosen": f"Q: {asked} A: Yes.", "rejected": f"Q: {asked} A: No."} for asked in QUESTIONS]
    assert run("--reference_column chosen --keep_cut False", rows=rows)[0] == 0
    assert read(tmp_path / "out" / "prompts.jsonl")[3]["prompt"] == "Q: Why? A: "
    references = [one for one in read(tmp_path / "out" / "completions.jsonl") if one["sample"] == 4]
    assert {one["completion"] for one in references} == {"Yes."}


@pytest.mark.parametrize("value", [3, True, ["So.", "Thus."], {"text": "So."}], ids=str)
def test_a_reference_column_that_holds_no_answers_is_refused(value, run):
    rows = [{**row, "best": value} for row in CHATS]
    status, _, lines = run("--reference_column best", rows=rows)
    assert status == 2 and lines and all('"best" ' in line for line in lines)


def test_a_system_prompt_is_in_every_row_that_has_none(run, tmp_path):
    own = [{"role": "system", "content": "Be long."}]
    rows = [*CHATS[:3], {"prompt": own + CHATS[3]["prompt"]}]
    assert run("--system_prompt 'Be brief.'", rows=rows)[0] == 0
    given = [{"role": "system", "content": "Be brief."}] + CHATS[0]["prompt"]
    assert read(tmp_path / "out" / "prompts.jsonl")[0]["prompt"] == given
    first = read(tmp_path / "out" / "sft.jsonl")[0]["messages"]
    assert first[:2] == given and first[2]["role"] == "assistant" and len(first) == 3
    assert read(tmp_path / "out" / "dpo.jsonl")[3]["prompt"] == own + CHATS[3]["prompt"]


def test_max_samples_takes_the_first_rows(run, tmp_path):
    assert run("--max_samples 3")[0] == 0
    assert [one["prompt"] for one in read(tmp_path / "out" / "prompts.jsonl")] == [row["prompt"] for row in CHATS[:3]]


def test_a_prompt_that_stands_twice_is_taken_once_and_that_is_said(run, tmp_path):
    rows = [CHATS[0], CHATS[1], CHATS[0], {**CHATS[1]}, {**CHATS[2]}]
    status, out, _ = run(rows=rows)
    assert status == 0 and line_with(out, "prompts ") == "prompts   3; refused: none; 2 repeated ones left out"
    assert [one["prompt"] for one in read(tmp_path / "out" / "prompts.jsonl")] == [row["prompt"] for row in CHATS[:3]]
    # the same question with another column is another row, as for a reward function it is
    rows = [{**CHATS[0], "answer": "1"}, {**CHATS[0], "answer": "2"}, {**CHATS[0], "answer": "1"}]
    assert line_with(run(rows=rows, out=tmp_path / "other")[1], "prompts ").startswith("prompts   2;")


# 60 bytes and 19 more tokens around them (tests/trainers/test_gkd.py counts them); the others have 24 bytes at most
LONG = {"prompt": [{"role": "user", "content": "Say it. " * 7 + "Now!"}]}


def test_prompts_that_are_too_long_are_counted(run, tmp_path):
    status, out, _ = run("--max_prompt_length 60 --max_drop_fraction 0.2", rows=[*CHATS, LONG])
    assert status == 0
    assert line_with(out, "prompts ") == "prompts   8; refused: 1 prompt leaves no room for an answer"
    assert len(read(tmp_path / "out" / "prompts.jsonl")) == 8
    (dropped,) = read(tmp_path / "out" / "dropped.jsonl")
    assert LONG["prompt"][0]["content"] in json.dumps(dropped)


def test_more_prompts_than_max_drop_fraction_that_are_too_long_are_refused(run, tmp_path):
    status, out, lines = run("--max_prompt_length 60", rows=[*CHATS, LONG])
    assert (status, out, len(lines)) == (2, [], 1)
    said = f"refused: 1 of 9 rows cannot be used (1 prompt leaves no room for an answer). The first: {tmp_path}"
    assert lines[0].startswith(said) and not (tmp_path / "out").exists()


def test_a_prompt_may_be_as_long_as_what_the_model_holds_beside_an_answer(run, tmp_path):
    # the model holds 2048 tokens; 79 of the prompt leave room for 1969
    assert run("--max_new_tokens 1969 --check", rows=[LONG])[0] == 0
    status, _, lines = run("--max_new_tokens 1970 --check", rows=[LONG])
    assert status == 2 and "1 of 1 rows cannot be used (1 prompt leaves no room for an answer)" in lines[0]
    status, _, lines = run("--max_new_tokens 2048 --check", rows=[LONG])
    said = "--max_new_tokens 2048: the model holds 2048 tokens, prompt and answer. Type --max_new_tokens 1024"
    assert (status, lines) == (2, [f"refused: {said}"])


def test_held_out_prompts_and_the_others_are_apart_and_together_all(run, tmp_path):
    assert run("--eval_fraction 0.25")[0] == 0
    assert run("--eval_fraction 0.25 --held_out_prompts True", out=tmp_path / "held")[0] == 0
    sampled, held = ({one["prompt"] for one in read(tmp_path / out / "scores.jsonl")} for out in ("out", "held"))
    assert not sampled & held and sampled | held == set(range(8)) and len(held) == 2
    assert {row["provenance"]["source"] for row in read(tmp_path / "out" / "sft.jsonl")} == {
        f"{tmp_path / 'rows.jsonl'}:{number + 1}" for number in sampled
    }


def test_check_looks_at_everything_and_writes_nothing(run, tmp_path):
    status, out, _ = run("--check")
    assert (status, out) == (0, ["checked   nothing stands in the way; no model was loaded, nothing was written"])
    assert not (tmp_path / "out").exists()


# ── killed, and several processes ────────────────────────────────────────────────────────────────────────────────────

MANY = [{"prompt": [{"role": "user", "content": f"{asked} {n}"}]} for n in range(5) for asked in QUESTIONS]
SLOW = """import os
import time


def total(completions, **columns):
    time.sleep(0.004 * len(completions))
    if len(completions) > 4:  # more than it is tried on
        with open({ranks!r}, "a") as handle:
            handle.write(os.environ.get("RANK", "0"))
    return [float(sum(map(ord, answer[0]["content"])) % 11) for answer in completions]
"""
BEGUN = {"generate": "prompts.jsonl", "score": "completions.jsonl", "select": "scores.jsonl"}


@pytest.fixture
def slow_command(tiny_model, tmp_path):
    """command(out): words of a run of 40 prompts, 4 answers each, that takes its time over each stage."""
    rows = write_rows(tmp_path / "rows.jsonl", MANY)
    (tmp_path / "reward.py").write_text(SLOW.format(ranks=str(tmp_path / "ranks")))
    words = f"--model_name_or_path {tiny_model} --train_data_path {rows} "
    words += f"--reward_funcs {tmp_path / 'reward.py'}:total "
    return lambda out: f"{words} {FAST} --generate_batch_size 8 --output_dir {out}".split()


def finished(words, folder, **env):
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **env}, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return {f"{name}.jsonl": (folder / f"{name}.jsonl").read_bytes() for name in FINAL} | {
        "report.json": (folder / "report.json").read_bytes()
    }, done


def wait_until_free(folder):
    """Until the killed process is gone: it holds the folder's lock to its end."""
    with open(folder / ".lock", "a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)


def stage_of(folder):
    """The stage that was at work, by what is there."""
    if (folder / "scores.jsonl").exists() and not (folder / "scores.parts").exists():
        return "select"
    if (folder / "completions.jsonl").exists() and not (folder / "completions.parts").exists():
        return "score"
    return "generate"


def answers_kept(folder, name):
    """How many answers there are whole lines of, merged or not."""
    files = [*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.parts/*.jsonl")]
    whole = [json.loads(one) for file in files for one in file.read_bytes().split(b"\n")[:-1]]
    return len({(one["prompt"], one["sample"]) for one in whole})


def kill_in(stage, after, words, folder):
    """Starts a run and kills it `after` seconds into a stage; the stage that it was in, None where it had ended."""
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not (folder / BEGUN[stage]).exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(after)
        process.kill()
        status = process.wait()
    wait_until_free(folder)
    return stage_of(folder) if status == -signal.SIGKILL else None


# How long a stage takes, in seconds, about: as long a kill in it is waited with
TAKES = {"generate": 1.0, "score": 0.7, "select": 0.7}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_run_that_was_killed_at_any_moment_ends_as_one_that_was_not(kills, warm, slow_command, tmp_path):
    whole, _ = finished([warm, "rejection_sampling.py", *slow_command(tmp_path / "whole")], tmp_path / "whole")
    assert whole["completions.jsonl"].count(b"\n") == whole["scores.jsonl"].count(b"\n") == 160
    moments, hit, begun = random.Random(0), dict.fromkeys(TAKES, 0), 0
    for number in range(3 * kills):
        folder, stage = tmp_path / str(number), min(TAKES, key=hit.get)
        words = [warm, "rejection_sampling.py", *slow_command(folder)]
        met = kill_in(stage, moments.random() * TAKES[stage], words, folder)
        if met is None:
            continue  # it had ended
        hit[met] += 1
        begun += any(folder.glob("*.parts"))  # in the midst of a stage's lines
        kept = [answers_kept(folder, name) for name in ("completions", "scores")]
        found, done = finished(words, folder)
        said = [line_with(done.stdout.splitlines(), start) for start in ("generate ", "score ")]
        assert said == [  # what was written stays
            f"generate  {160 - kept[0]} answers to sample, {kept[0]} are there",
            f"score     {160 - kept[1]} answers to score, {kept[1]} are there",
        ]
        assert {name for name in whole if found[name] != whole[name]} == set(), (number, stage)
        assert not any(folder.glob("*.part*"))
        if sum(hit.values()) >= kills and min(hit.values()) > kills // 5:
            break
    assert sum(hit.values()) >= kills and min(hit.values()) > kills // 5 <= begun, (hit, begun)


def test_two_processes_write_what_one_does(warm, slow_command, tmp_path):
    one, _ = finished([warm, "rejection_sampling.py", *slow_command(tmp_path / "one")], tmp_path / "one")
    assert set((tmp_path / "ranks").read_text()) == {"0"}
    (tmp_path / "ranks").unlink()
    words = ["bash", "rejection_run.sh", *slow_command(tmp_path / "two")]
    two, done = finished(words, tmp_path / "two", LAUNCH="cpu", NUM_PROCESSES="2", PYTHON=warm)
    assert {name for name in one if one[name] != two[name]} == set()
    assert set((tmp_path / "ranks").read_text()) == {"0", "1"}  # both scored
    assert "| 80/80 " in done.stderr and "| 160/160 " not in done.stderr  # and the first answered half
    assert done.stdout.count("generate  160 answers to sample, 0 are there") == 1  # one of them speaks


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...) is the list of problems, said before a model is loaded and with nothing written."""

    def load(*args, **kwargs):
        raise Loaded

    def refused(*args, out=tmp_path / "out", **kwargs):
        before = stamps(out)
        status, said, lines = run(*args, out=out, **kwargs)
        assert (status, said) == (2, []), lines
        assert lines and all(one.startswith("refused: ") for one in lines), lines
        assert stamps(out) == before
        return [one.removeprefix("refused: ") for one in lines]

    monkeypatch.setattr(models_load, "load_model", load)
    return refused


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run, refused):
    with pytest.raises(Loaded):
        run()


BAD = [
    ("--num_completions 0", ["--num_completions 0: 1 or more"]),
    ("--max_new_tokens 0", ["--max_new_tokens 0: 1 or more"]),
    pytest.param("--max_prompt_length 0", ["--max_prompt_length 0: 1 or more"]),
    ("--temperature -1", ["--temperature -1: 0 (the likeliest token) or more"]),
    ("--temperature nan", ["--temperature nan: 0 (the likeliest token) or more"]),
    ("--temperature 0", ["--temperature 0 with --num_completions 4: the same answer so many times. Type"]),
    ("--top_p 0", ["--top_p 0: above 0, up to 1"]),
    ("--top_p 1.1", ["--top_p 1.1: above 0, up to 1"]),
    ("--top_k -1", ["--top_k -1: 0 (all tokens) or more"]),
    ("--generate_batch_size 0", ["--generate_batch_size 0: 1 or more"]),
    ("--score_batch_size 0", ["--score_batch_size 0: 1 or more"]),
    ("--max_failed_fraction 2", ["--max_failed_fraction 2: a share from 0 to 1"]),
    ("--reward_weights 1 2", ["--reward_weights: 2 of them for 1 rewards. Give each its weight"]),
    ("--reward_weights nan", ["--reward_weights nan: finite numbers"]),
    ("--stages generate,judge", ["--stages generate,judge: takes generate, score, select, some or all"]),
    ("--stages ,", ["--stages : takes generate, score, select, some or all", "--output_dir "]),
    ("--write SFT,PPO", ["--write PPO: takes SFT, "]),
    pytest.param("--write ,", ["--write: names no fil"]),
    ("--select worst", ["--select: invalid choice: 'worst' (choose from"]),
    ("--select threshold", ["--select threshold and --threshold NUMBER belong together: give both, or neither"]),
    ("--threshold 3", ["--select threshold and --threshold NUMBER belong together: give both, or neither"]),
    pytest.param("--select threshold --threshold nan", ["--threshold nan: a finite"]),
    ("--select_k 0", ["--select_k 0: 1 or more"]),
    ("--min_margin -1", ["--min_margin -1: 0 or more"]),
    ("--chunk_size 0", ["--chunk_size 0: 1 or more rows a file"]),
    ("--max_samples 0", ["--max_samples 0: 1 or more"]),
    pytest.param("--held_out_prompts True", ["--held_out_prompts: "]),
    ("--reference_column chosen", ["--reference_column chosen: no such column. There are none beside the prompt"]),
    ("--then PPO", ["--then PPO: it samples for itself, with --rlhf_type. It takes DPO, CPO, SimPO, "]),
    ("--then DPOO", ["--then DPOO: no such method. It takes DPO, "]),
    ("--then SFT --rounds 0", ["--rounds 0: 1 or more"]),
    ("--then SFT --stages generate", ["--then with --stages generate: it needs all of them. Leave --stages out"]),
    ("--then Reward --rounds 2", ["--then Reward with --rounds: a reward model cannot answer in the next round"]),
    ("--rounds 2", ["--rounds 2: a round ends with a training. Add --then DPO (or another)"]),
    ("--lora_rank 8", ["--lora_rank: nothing is trained without --then. Leave it out"]),
    pytest.param("--lora-rank 8", ["--lora_rank: nothing is trained without --then. Leave it out"]),
    ("--train_mode full", ["--train_mode: nothing is trained without --then. Leave it out"]),
    ("--eval_data_path data/prompts.jsonl", ["--eval_data_path: measures what --then trains. Leave it out"]),
    ("--num_completion 4", ["--num_completion: no such flag for rejection sampling. Did you mean --num_completions?"]),
    ("--learning_rate 1", ["--learning_rate: no such flag for rejection sampling. It is one of DPO, "]),
    ("--seed 1 4", ["4: not a flag. Every value follows its --flag"]),
    ("--judge_template x.txt", ["--judge_template: without --judge_model there is no judge. Type --judge_model NAME"]),
    ("--api_model x", ["--api_model: is for --engine openai, and this is transformers. Add --engine openai"]),
    (
        "--num_completions 0 --top_p 2 --select_k 0",
        ["--num_completions 0: 1 or more", "--top_p 2: above 0, up to 1", "--select_k 0: 1 or more"],
    ),
]


@pytest.mark.parametrize("flags, problems", BAD, ids=[getattr(bad, "values", bad)[0] for bad in BAD])
def test_a_flag_that_is_wrong_is_refused(flags, problems, refused):
    found = refused(flags)
    assert [one[: len(problem)] for one, problem in zip(found, problems, strict=True)] == problems


def test_no_scorer_is_refused_unless_nothing_is_scored(refused, run):
    assert refused(reward=None) == [
        "no scorer: what is a good answer? Type --reward_funcs data/rewards.py:brevity to try, "
        "--reward_model_path FOLDER or --judge_model NAME"
    ]
    with pytest.raises(Loaded):
        run("--stages generate", reward=None)


def test_model_and_data_that_are_missing_are_refused(tmp_path, capsys):
    assert rejection_sampling.main(["--output_dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = ["no scorer", "--train_data_path: missing", "--model_name_or_path: missing"]
    assert [one.removeprefix("refused: ")[: len(start)] for one, start in zip(lines, starts, strict=True)] == starts


def test_a_system_prompt_for_data_that_are_plain_text_is_refused(refused, tmp_path):
    assert refused("--system_prompt Hi.", rows=TEXTS[:2]) == [
        f"{tmp_path / 'rows.jsonl'}:{n}: plain text, and --system_prompt is for chats. Leave it out" for n in (1, 2)
    ]


# ── a folder of other settings ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def done(run, tmp_path):
    assert run("--max_samples 3")[0] == 0
    return tmp_path / "out"


def test_a_folder_of_a_run_with_other_settings_is_refused_by_what_differs(done, refused):
    anew = "Name another --output_dir, or add --overwrite_output_dir to start afresh"
    holds = f"--output_dir {done}: holds a run with"
    assert refused("--max_samples 3 --temperature 0.5") == [f"{holds} temperature 1.0, and this one has 0.5. {anew}"]
    assert refused("--seed 1 --max_samples 5 --system_prompt Hi.") == [
        f"{holds} max_samples 3, and this one has 5. {anew}",
        f"{holds} seed 42, and this one has 1. {anew}",
        f'{holds} system_prompt null, and this one has "Hi.". {anew}',
    ]


def test_other_data_and_another_model_are_other_settings(done, refused, tmp_path):
    (problem,) = refused("--max_samples 3", rows=CHATS[:5])
    assert problem.startswith(f'--output_dir {done}: holds a run with data {{"{tmp_path / "rows.jsonl"}": ')
    other = make_model(tmp_path / "other", seed=3)
    starts = [f"--output_dir {done}: holds a run with {name} " for name in ("model", "weights")]
    found = refused("--max_samples 3", model=other)
    assert [one[: len(start)] for one, start in zip(found, starts, strict=True)] == starts


def test_an_edited_reward_function_and_other_scorers_are_refused(done, refused, run, tmp_path, monkeypatch):
    file = tmp_path / "reward.py"
    anew = f"Name another --output_dir, or rm -r {done}/scores.* to score the same answers anew"
    assert refused("--max_samples 3 --reward_weights 2") == [
        f"--output_dir {done}: holds a run with reward_weights null, and this one has [2.0]. {anew}"
    ]
    file.write_text(REWARD.replace("% 11", "% 7"))
    (problem,) = refused("--max_samples 3")
    assert problem.startswith(f'--output_dir {done}: holds a run with reward_funcs {{"{file}:total": ')
    assert problem.endswith(anew)
    # which does what it says
    subprocess.run(f"rm -r {done}/scores.*", shell=True, check=True)
    before = (done / "completions.jsonl").read_bytes()
    assert run("--max_samples 3")[0] == 0 and (done / "completions.jsonl").read_bytes() == before
    totals = [sum(map(ord, one["completion"])) % 7 for one in read(done / "completions.jsonl")]
    assert [one["score"] for one in read(done / "scores.jsonl")] == totals


def test_what_is_selected_may_change(done, run):
    assert run("--max_samples 3 --select top_k --select_k 3 --write SFT")[0] == 0
    assert len(read(done / "sft.jsonl")) == 9


def test_stages_that_find_nothing_of_those_before_are_refused(refused, tmp_path):
    out = tmp_path / "out"
    assert refused("--stages score") == [f"--output_dir {out}: no completions in it. Add generate to --stages"]
    assert refused("--stages select") == [f"--output_dir {out}: no completions in it. Add generate to --stages"]


def test_a_folder_that_holds_something_else_is_refused(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    for flags in ("", "--overwrite_output_dir", "--then SFT"):
        assert refused(flags) == [
            f"--output_dir {tmp_path / 'out'}: holds files that no rejection sampling made. Name another folder"
        ]


def test_an_output_folder_that_is_a_file_or_is_missing_is_refused(refused, tmp_path, capsys):
    (tmp_path / "out").write_text("dear")
    assert refused() == [f"--output_dir {tmp_path / 'out'}: a file of that name is there. Name a folder"]
    assert rejection_sampling.main("--reward_funcs data/rewards.py:brevity".split()) == 2
    assert "refused: --output_dir: missing. A folder for the answers, scores and files" in capsys.readouterr().err


def test_overwriting_starts_afresh(done, run):
    (done / "left.txt").write_text("over")
    status, out, _ = run("--max_samples 3 --temperature 0.5 --overwrite_output_dir")
    assert status == 0 and not (done / "left.txt").exists()
    assert line_with(out, "generate ") == "generate  12 answers to sample, 0 are there"


def test_overwriting_works_behind_a_link(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert run(rows=[*CHATS[:3], {"prompt": "text among chats"}])[0] == 2
    assert (tmp_path / "out").is_symlink() and not any((tmp_path / "disk").iterdir())
    (tmp_path / "disk" / "settings.json").write_text("{}")
    (tmp_path / "disk" / "old").symlink_to(tmp_path)
    assert run("--max_samples 3 --overwrite_output_dir")[0] == 0
    assert (tmp_path / "out").is_symlink() and not (tmp_path / "disk" / "old").exists() and tmp_path.exists()


def test_overwriting_does_not_delete_what_the_run_needs(done, refused):
    data_path = shutil.copy(done / "prompts.jsonl", done / "mine.jsonl")
    (problem,) = refused("--overwrite_output_dir", rows=str(data_path))
    assert problem.startswith(f"--overwrite_output_dir: would delete {data_path}, which --train_data_path reads")


def test_overwriting_does_not_delete_a_recipe_a_reward_function_or_a_judges_template(done, refused):
    template = Path("data/judge_score.txt").read_text()
    judged = f"--judge_model m --judge_base_url http://127.0.0.1:9/v1 --judge_template {done}/mine.txt"
    cases = [
        ("mine.yaml", "seed: 1", "--config", f"--config {done}/mine.yaml"),
        ("mine.txt", template, "--judge_template", judged),
        ("mine.py", REWARD, "--reward_funcs", f"--reward_funcs {done}/mine.py:total"),
    ]
    for name, content, flag, given in cases:
        (done / name).write_text(content)
        reward = None if flag == "--reward_funcs" else "total"
        problem = refused(f"--overwrite_output_dir {given}", reward=reward)[
            -1
        ]  # a server that is not there is another
        assert f"would delete {done}/{name}" in problem and flag in problem


OVER = pytest.param("--overwrite_output_dir")


@pytest.mark.parametrize("flags", ["", OVER])
def test_a_folder_in_which_another_process_works_is_left_as_it_is(flags, done, refused, monkeypatch):
    monkeypatch.setattr(rejection_folder, "LOCK_SECONDS", 0)
    with rejection_folder.locked(done):
        assert refused(f"--max_samples 3 {flags}") == [
            f"--output_dir {done}: process {os.getpid()} is at work in it. Wait, or end it"
        ]


def test_a_refusal_in_a_folder_of_rounds_deletes_none_of_them(refused, tmp_path):
    out = tmp_path / "out"
    (out / "round-1" / "trained").mkdir(parents=True)
    (out / "round-1" / "trained" / "model.safetensors").write_text("hours")
    (out / "rounds.json").write_text("[]")
    refused("--max_prompt_length 1")  # every prompt is too long
    assert (out / "round-1" / "trained" / "model.safetensors").exists()


# ── scorers that cannot score ────────────────────────────────────────────────────────────────────────────────────────


def test_a_language_model_as_reward_model_is_refused(refused, tiny_model):
    assert refused(f"--reward_model_path {tiny_model}", reward=None) == [
        f"--reward_model_path {tiny_model}: a language model, whose score head would be random. Train one with "
        "--rlhf_type Reward"
    ]


def make_classifier(folder, tiny_model, head):
    """A sequence classifier on the tiny model's tokenizer, with its head's weights or without."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    torch.manual_seed(1)
    model = Qwen2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    if not head:
        tensors = load_file(folder / "model.safetensors")
        del tensors["score.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_reward_model_without_its_head_is_refused_before_anything_is_sampled(run, tiny_model, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise Loaded

    folder = make_classifier(tmp_path / "judge", tiny_model, head=False)
    monkeypatch.setattr(models_load, "load_model", load)  # of the one that answers
    status, _, lines = run(f"--reward_model_path {folder}", reward=None)
    assert (status, lines) == (
        2,
        [
            f"refused: --reward_model_path {folder}: no weights for score.weight in it. A reward model has a trained "
            "head"
        ],
    )
    assert not (tmp_path / "out").exists()


def test_a_reward_model_scores_beside_a_function_each_by_its_weight(run, tiny_model, tmp_path):
    folder = make_classifier(tmp_path / "judge", tiny_model, head=True)
    assert run(f"--reward_model_path {folder} --reward_weights 0.5 -2 --score_batch_size 3")[0] == 0
    lines = read(tmp_path / "out" / "scores.jsonl")
    assert len(lines) == 32 and len({one["scores"]["judge"] for one in lines}) > 16
    for one in lines:
        assert set(one["scores"]) == {"total", "judge"}
        assert one["score"] == pytest.approx(0.5 * one["scores"]["total"] - 2 * one["scores"]["judge"])


RAISES = REWARD.replace("    return", '    if len(texts) > 4:\n        raise KeyError("no such answer")\n    return')


def test_a_reward_function_that_raises_ends_the_run_in_one_line_and_the_answers_stay(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES)  # not on the four that it is tried on
    status, _, lines = run()
    assert (status, len(lines)) == (1, 1)
    said = f"failed: total raised KeyError: 'no such answer' at {tmp_path / 'reward.py'}:7"
    assert lines[0].startswith(said)
    answers = (tmp_path / "out" / "completions.jsonl").read_bytes()
    (tmp_path / "reward.py").write_text(REWARD)
    status, out, _ = run()
    assert status == 0 and line_with(out, "generate ") == "generate  0 answers to sample, 32 are there"
    assert (tmp_path / "out" / "completions.jsonl").read_bytes() == answers


def test_the_reason_of_a_failure_stands_on_a_line_of_its_own(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES)
    assert run()[0] == 1 and "failed: total raised" in run.err
    assert any(line.startswith("failed: ") for line in re.split(r"[\r\n]+", run.err))


def test_a_reward_function_that_raises_on_what_it_is_tried_on_is_refused(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES.replace("> 4", "> 0"))
    status, _, lines = run()
    assert status == 2 and lines[0].startswith("refused: --reward_funcs: tried on the first 4 rows, total raised KeyE")
    assert len(lines) == 1 and not (tmp_path / "out").exists()


def test_scores_that_do_not_apply_are_failed_and_tried_again(run, tmp_path):
    # None: the function does not judge this answer. Of 32, those whose total is above 5
    (tmp_path / "reward.py").write_text(REWARD.replace("[float(", "[None if sum(map(ord, text)) % 11 > 5 else float("))
    status, out, lines = run()
    scores = read(tmp_path / "out" / "scores.jsonl")
    failed = sum("failed" in one for one in scores)
    assert 4 <= failed < 32 and len(scores) == 32 and all(one["score"] <= 5 for one in scores if "score" in one)
    share = f"{failed / 32:.0%}"
    assert (status, lines) == (1, [f"failed: {share} failed, more than --max_failed_fraction 0.1"])
    assert line_with(out, "failed ").startswith(f"failed    {failed} of 32 in {tmp_path / 'out' / 'scores.jsonl'}: ")
    status, out, _ = run("--max_failed_fraction 1")
    assert status == 0 and line_with(out, "score ") == f"score     {failed} answers to score, {32 - failed} are there"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["failed"], report["answers"]) == (failed, 32 - failed)


def test_an_interrupted_run_is_told_how_it_goes_on(run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "prepare", interrupt)
    status, _, lines = run()
    assert status == 130 and len(lines) == 1 and "--resume_from_checkpoint" not in lines[0]


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def parts(monkeypatch, tiny_model):
    """What the rounds started, [words]; samplings run in this process, and a training copies the model."""
    started = []

    def start(part, what):
        (program, *words), env = part
        if program == "bash":
            started.append([env["RLHF_TYPE"], env["MODEL"], env["TRAIN_DATA"], *words])
            shutil.copytree(tiny_model, env["OUTPUT_DIR"])
            (Path(env["OUTPUT_DIR"]) / "run_card.json").write_text("{}")
        else:
            started.append(words[2:])
            assert rejection_sampling.main(words[3:]) == 0

    monkeypatch.setattr(rounds, "start", start)
    monkeypatch.setattr(rounds, "check_training", lambda *args: None)
    return started


def value_of(words, flag):
    return words[words.index(flag) + 1]


def test_each_round_samples_from_the_last_ones_model_and_what_is_done_is_not_done_again(
    run, parts, tiny_model, tmp_path
):
    flags = "--then SFT --rounds 2 --eval_fraction 0.25 --train_mode full --learning_rate 1e-3"
    assert run(flags)[0] == 0
    out, first, second = (tmp_path / "out" / name for name in ("", "round-1", "round-2"))
    samplings = [words for words in parts if words[0] == "rejection_sampling.py"]
    trainings = [words for words in parts if words[0] == "SFT"]
    asked = [tuple(value_of(words, flag) for flag in ("--model_name_or_path", "--output_dir")) for words in samplings]
    assert asked == [
        (tiny_model, str(out / "held-out-0")),
        (tiny_model, str(first)),
        (str(first / "trained"), str(out / "held-out-1")),
        (str(first / "trained"), str(second)),
        (str(second / "trained"), str(out / "held-out-2")),
    ]
    assert [words[1:3] for words in trainings] == [
        [tiny_model, str(first / "sft.jsonl")],
        [str(first / "trained"), str(second / "sft.jsonl")],
    ]
    assert all(words[-2:] == ["--learning_rate", "1e-3"] for words in trainings)
    table = json.loads((out / "rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1, 2] and all("held_out_reward" in row for row in table)
    for row in table:
        scores = [one["score"] for one in read(out / f"held-out-{row['round']}" / "scores.jsonl")]
        assert len(scores) == 2 * 4 and row["held_out_reward"] == pytest.approx(sum(scores) / 8)

    parts.clear()
    assert run(flags)[0] == 0
    assert not [words for words in parts if words[0] == "SFT"]
    assert json.loads((out / "rounds.json").read_text()) == table


def test_reference_answers_are_not_measured_as_the_models(run, parts, tmp_path):
    rows = [{**row, "chosen": says("zzz")} for row in CHATS]  # 3 * 122 = 366 = 33 * 11 + 3
    assert run("--then SFT --eval_fraction 0.25 --reference_column chosen --train_mode full", rows=rows)[0] == 0
    for row in json.loads((tmp_path / "out" / "rounds.json").read_text()):
        folder = tmp_path / "out" / f"held-out-{row['round']}"
        scores = [one["score"] for one in read(folder / "scores.jsonl") if one["sample"] < 4]
        assert row["held_out_reward"] == pytest.approx(sum(scores) / 8)


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--learning_rate 5e-3", "flags of the training"),
        ("--learning_rate 1e-3 --select top_k", "select"),
        ("--learning_rate 1e-3 --then DPO", "then"),
        ("--learning_rate 1e-3 --train_mode lora", "train_mode"),
    ],
)
def test_rounds_that_were_trained_otherwise_are_refused_by_what_differs(flags, name, run, parts, tmp_path):
    assert run("--then SFT --train_mode full --learning_rate 1e-3")[0] == 0
    before = files_in(tmp_path / "out")
    status, _, lines = run(f"--then SFT --train_mode full {flags}")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"refused: --output_dir {tmp_path / 'out'}: holds a run with {name} ")
    assert files_in(tmp_path / "out") == before


def test_a_round_that_selects_nothing_fails_and_says_where_to_look(run, parts, tmp_path):
    status, _, lines = run("--then SFT --keep_cut False")
    assert (status, lines) == (
        1,
        [
            f"failed: {tmp_path / 'out' / 'round-1' / 'sft.jsonl'}: nothing was selected to train on; "
            f"{tmp_path / 'out' / 'round-1'}/report.json says why"
        ],
    )


def test_a_training_flag_that_is_mistyped_is_refused_before_anything_is_sampled(refused, warm, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm)  # of the training's own check
    assert refused("--then SFT --learning_rat 1e-3") == [
        "--then SFT: --learning_rat: no such flag for SFT. Did you mean --learning_rate?"
    ]


@pytest.mark.slow
def test_two_rounds_of_training_end_to_end(warm, tiny_model, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", CHATS), tmp_path / "out"
    (tmp_path / "reward.py").write_text(REWARD)
    words = f"--model_name_or_path {tiny_model} --train_data_path {rows} "
    words += f"--reward_funcs {tmp_path / 'reward.py'}:total "
    words += f"{FAST} --then SFT --rounds 2 --eval_fraction 0.25 --train_mode full --max_steps 3 --learning_rate 1e-2 "
    command = [warm, "rejection_sampling.py", *f"{words} --output_dir {out}".split()]

    def run():
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    folders = {"round-1", "round-2", "held-out-0", "held-out-1", "held-out-2"}
    assert {file.name for file in out.iterdir()} == folders | {"rounds.json", "settings.json", ".lock"}
    table = json.loads((out / "rounds.json").read_text())
    assert [row["model"] for row in table] == [
        tiny_model,
        str(out / "round-1" / "trained"),
        str(out / "round-2" / "trained"),
    ]
    assert [row.get("rows") for row in table] == [None, 6, 6]
    made_with = json.loads((out / "round-2" / "settings.json").read_text())["generate"]
    assert made_with["model"] == str(out / "round-1" / "trained")
    answers = [(out / name / "completions.jsonl").read_bytes() for name in ("round-1", "round-2")]
    assert answers[0] != answers[1]  # the model has changed
    held = [{one["prompt"] for one in read(out / f"held-out-{n}" / "scores.jsonl")} for n in range(3)]
    sampled = [{one["prompt"] for one in read(out / f"round-{n}" / "scores.jsonl")} for n in (1, 2)]
    assert held[0] == held[1] == held[2] and sampled[0] == sampled[1] and held[0] | sampled[0] == set(range(8))
    assert not held[0] & sampled[0]
    for row in table:
        shown = next(one.split() for one in done.stdout.splitlines() if re.match(f" +{row['round']} ", one))
        assert shown[-2:] == [f"{row['held_out_reward']:.4f}", row["model"]]
    for number in (1, 2):
        card = json.loads((out / f"round-{number}" / "trained" / "run_card.json").read_text())
        assert card["method"] == "SFT"

    before = {name: content for name, content in files_in(out).items() if not name.endswith(".lock")}
    done = run()
    assert done.returncode == 0 and "trains " not in done.stdout, done.stderr
    assert {name: content for name, content in files_in(out).items() if not name.endswith(".lock")} == before
