"""Rejection sampling: its draws, its choices, its folder, its command, and a kill at any moment. Offline, a minute.

    python -m pytest tests/rejection/test_rejection.py -q
    python -m pytest tests/rejection/test_rejection.py -q -m slow        twenty kills in place of three

Numbers stand on the screen; the commands run in this process, but for those that are killed or launched. What a
server answers or judges is tests/rejection/servers/test_servers.py.
"""

import itertools
import json
import math
import os
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_args.methods import METHODS
from rlhf_args.rejection_config import RejectionConfig
from tests.conftest import write_rows
from tests.rejection.conftest import NAMES, line, read, says, trace
from tests.trainers.test_losses import LN2, POLICY, WORDS, make_bigram
from utils.data.rows import load_rows
from utils.models import sampling
from utils.rejection import folder as rejection_folder, selection
from utils.rejection.report import best_of, kl_bound
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
    found = selection.choose_answers(make_answers(written), RejectionConfig(**flags))
    samples = [[answer["sample"] for answer in part] for part in found[:2]]
    assert (*samples, found[2], {reason: count for reason, count in found[3].items() if count}) == (
        good, bad, why, gone,
    )  # fmt: skip


def test_an_answer_that_failed_takes_no_place_from_its_double():
    # b is scored where it stands last; where it stands first the judge gave up
    good, _, _, gone = selection.choose_answers(make_answers("a1 b! b5"), RejectionConfig())
    assert [answer["sample"] for answer in good] == [2] and gone == Counter(failed=1)


def test_an_answer_that_ended_is_kept_in_place_of_its_double_that_was_cut():
    # as a reference answer whose words were sampled too, up to max_new_tokens
    good, _, _, gone = selection.choose_answers(make_answers("a1 b5- b5"), RejectionConfig())
    assert [answer["sample"] for answer in good] == [2] and +gone == Counter(duplicate=1)


@pytest.mark.parametrize("flags, written", [({"select": "top_k"}, "a1 b1 c1 d0"), ({}, "a9- b8- c1 d5-")])
def test_no_answer_is_bad_that_scored_as_a_good_one_or_better(flags, written):
    good, bad, *_ = selection.choose_answers(make_answers(written), RejectionConfig(**flags))
    assert good and all(answer["score"] < good[-1]["score"] for answer in bad)


ASKED = [{"role": "user", "content": "Why?"}]


def rows_of(name, written, prompt=ASKED, **flags):
    config = RejectionConfig(**flags)
    good, bad, *_ = selection.choose_answers(make_answers(written), config)
    return list(selection.rows_of(name, prompt, good, bad, config))


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
    good, bad, *_ = selection.choose_answers(answers, RejectionConfig())
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


def lines_of(folder, prompts=3, samples=2):
    return rejection_folder.Lines(folder, "completions", prompts, samples)


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
