"""Encoder reward models read a pair of texts, and no text that is cut loses what the model scores on.

`pytest tests/rewards/test_encoder_rewards.py`: tiny BERT, RoBERTa and DeBERTa-v2 classifiers with such tokenizers.
"""

import json
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models as kinds, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import train_rlhf
from tests.conftest import TEMPLATE, read_rows, write_rows
from utils import score_reward_model
from utils.models.load import load_tokenizer
from utils.rewards import models
from utils.runtime.errors import Refused

ASKED = ["Say hi.", "What is 2 + 2?", "Name a colour.", "Why?", "Spell cat.", "Sing!", "Who are you?", "Count."]
CHATS = [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED]
SPECIAL = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>"), "deberta-v2": ("[CLS]", "[SEP]")}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}


def make_encoder_tokenizer(kind, pairs=True, pad="[PAD]"):
    """WordPiece with segments as BERT has it, byte-level with a doubled separator as RoBERTa has it."""
    begin, end = SPECIAL[kind]
    special = [begin, "[PAD]", end, "[MASK]", "[UNK]"]  # the pad has id 1, as RoBERTa's
    if kind == "roberta":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate(special + letters)}
        core = Tokenizer(kinds.BPE(vocabulary, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pair = f"{begin} $A {end} {end} $B {end}"
    else:
        letters = [f"{inner}{letter}" for inner in ("", "##") for letter in string.ascii_letters + string.digits]
        vocabulary = {token: number for number, token in enumerate([*special, *letters, *string.punctuation])}
        core = Tokenizer(kinds.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pair = f"{begin} $A {end} $B:1 {end}:1"
    core.add_special_tokens(special)
    if pairs:
        added = [(token, vocabulary[token]) for token in (begin, end)]
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", pair=pair, special_tokens=added
        )
    names = {"cls_token": begin, "sep_token": end, "mask_token": "[MASK]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind != "roberta")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, model_input_names=inputs, **names)


def make_encoder(folder, kind="bert", holds=48, tokenizer=None):
    """An encoder with a score head, whose scores are far apart; RoBERTa's table has 2 positions it does not use."""
    tokenizer = tokenizer or make_encoder_tokenizer(kind)
    offset = 2 * (kind == "roberta")
    further = {"vocab_size": len(tokenizer), "pad_token_id": 1, "max_position_embeddings": holds + offset}
    if kind == "deberta-v2":
        further |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        further |= {"type_vocab_size": 0}
    config = {"bert": BertConfig, "roberta": RobertaConfig, "deberta-v2": DebertaV2Config}[kind](**SHAPE, **further)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as they come all scores are nearly the same
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=SPECIAL)
def encoder(request, tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp(request.param) / "judge", request.param)


def load(folder, batch_size=8):
    rows = [(f"row:{number}", {**row, "further": {}}) for number, row in enumerate(CHATS)]
    return models.load_reward_model(folder, rows, "float32", "cpu", batch_size)


def says(text):
    return [{"role": "assistant", "content": text}]


def by_hand(folder, prompt, answer):
    """The score of a pair of texts through the model's own tokenizer, alone, without padding."""
    tokenizer = load_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(**tokenizer(prompt, answer, return_tensors="pt")).logits)


ANSWERS = ["Hi!", "four, of course", "", "a b c", "me " * 9, "x", "No.", "one two three"]


def test_a_pair_is_read_with_the_tokenizers_special_tokens(encoder):
    found = load(encoder)([row["prompt"] for row in CHATS], [says(answer) for answer in ANSWERS])
    hand = [by_hand(encoder, *pair) for pair in zip(ASKED, ANSWERS, strict=True)]
    assert found == pytest.approx(hand, rel=1e-4, abs=1e-4)  # float32, alone and in a padded batch
    assert len({round(score, 2) for score in hand}) == 8  # rows that were mixed up would be seen


def test_plain_text_is_a_pair_too(encoder):
    assert load(encoder)(ASKED[:2], ANSWERS[:2]) == pytest.approx(
        [by_hand(encoder, ASKED[0], ANSWERS[0]), by_hand(encoder, ASKED[1], ANSWERS[1])], rel=1e-4, abs=1e-4
    )


def test_a_score_alone_is_the_score_in_a_batch_of_any_size(encoder):
    reward = load(encoder)
    rows = [reward.tokens(row["prompt"], says(answer)) for row, answer in zip(CHATS, ANSWERS, strict=True)]
    assert len({len(row["input_ids"]) for row in rows}) > 4  # some are padded
    alone = [reward.score([row])[0] for row in rows]
    assert reward.score(rows) == pytest.approx(alone, rel=1e-4, abs=1e-4)
    reward.batch_size = 3
    assert reward.score(rows[::-1]) == pytest.approx(alone[::-1], rel=1e-4, abs=1e-4)


def test_a_long_prompt_loses_its_front_and_no_special_token(encoder):
    reward = load(encoder)
    whole, answer = reward.tokens("zz 9", says("ok"))["input_ids"], says("ok")
    cut = reward.tokens("y" * 200 + " zz 9", answer)["input_ids"]
    assert (len(whole) < 48, len(cut), reward.cut) == (True, 48, 1)
    specials = [token for token in whole if token in (0, 2)]
    assert cut[0] == 0 and cut[-1] == 2 and [token for token in cut if token in (0, 2)] == specials
    ending = len(whole) - 1 - 1  # all of the short prompt's end and the answer, but for its first letter and [CLS]
    assert cut[-ending:] == whole[-ending:]
    # the front of the prompt does not matter, its end and the answer do
    other_front, other_end = "x" + "y" * 200 + " zz 9", "y" * 200 + " zz 8"
    score = reward(["y" * 200 + " zz 9"], [answer])
    assert score == reward([other_front], [answer])
    assert score != reward([other_end], [answer]) and score != reward(["y" * 200 + " zz 9"], [says("no")])


def test_an_answer_longer_than_the_model_holds_keeps_its_begin_and_the_special_tokens(encoder):
    reward = load(encoder)
    specials = reward.tokenizer.num_special_tokens_to_add(pair=True)
    for letters in (48 - specials - 1, 48 - specials, 48 - specials + 1, 150):  # one prompt token fits; none; ...
        ids = reward.tokens("abc", says("b" * letters))["input_ids"]
        assert len(ids) == 48 and ids[0] == 0 and ids[-1] == 2, letters
        assert sum(token in (0, 2) for token in ids) == specials
    assert reward(["abc"], [says("c" + "b" * 150)]) != reward(["abc"], [says("b" * 151)])
    assert reward(["abc"], [says("b" * 150 + "c")]) == reward(["abc"], [says("b" * 151)])


def test_the_segments_of_a_pair_reach_the_model(tmp_path):
    reward = load(make_encoder(tmp_path / "judge", "bert"))
    row = reward.tokens("ab", says("cd"))
    # [CLS] a ##b [SEP] c ##d [SEP]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert reward.score([row]) != reward.score([{**row, "token_type_ids": [0] * 7}])


def test_turns_of_a_prompt_are_one_text(encoder):
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert load(encoder)([turns], [says("ok")])[0] == pytest.approx(by_hand(encoder, "be kind\nhi", "ok"), rel=1e-4)


def test_an_encoder_with_a_chat_template_reads_the_template(tmp_path):
    tokenizer = make_encoder_tokenizer("bert")
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", "[SEP]")
    reward = load(make_encoder(tmp_path / "judge", "bert", 64, tokenizer))
    assert "token_type_ids" not in reward.tokens(CHATS[0]["prompt"], says("ok"))
    ids = reward.tokens("y" * 200, "ok")["input_ids"]
    assert (len(ids), ids[0], reward.cut) == (64, 0, 1)  # [CLS] stays there too


@pytest.mark.parametrize("missing", ["pad_token", "[CLS]"])
def test_a_tokenizer_that_cannot_write_pairs_is_refused(missing, tmp_path, monkeypatch):
    tokenizer = make_encoder_tokenizer("bert", missing != "[CLS]", "[PAD]" if missing != "pad_token" else None)
    folder = make_encoder(tmp_path / "judge", "bert", 48, tokenizer)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(Refused) as refused:
        load(folder)
    (problem,) = refused.value.problems
    assert problem.startswith(f"--reward_model_path {folder}: ") and missing in problem


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FAST = "--rlhf_type RLOO --max_completion_length 8 --num_generations 2 --per_device_train_batch_size 4 --max_steps 2 "
FAST += "--logging_steps 1 --learning_rate 2e-2 --save_strategy no --dtype float32"


def test_a_run_learns_from_an_encoder_and_counts_what_was_cut(encoder, tiny_model, tmp_path, capsys):
    long = {"prompt": [{"role": "user", "content": "y" * 100}]}
    rows = write_rows(tmp_path / "rows.jsonl", [long if number % 2 else row for number, row in enumerate(CHATS)])
    words = f"{FAST} --model_name_or_path {tiny_model} --train_data_path {rows} --output_dir {tmp_path}/out"
    assert train_rlhf.main([*words.split(), "--reward_model_path", encoder]) == 0
    lines, said = read_rows(tmp_path / "out" / "completions.jsonl"), capsys.readouterr()
    assert len(lines) == 8
    reward = load(encoder)
    again = reward([line["prompt"] for line in lines], [line["completion"] for line in lines])
    assert [line["rewards"]["judge"] for line in lines] == pytest.approx(again, rel=1e-4, abs=1e-4)
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning ") and encoder in line]
    assert " 48 tokens" in warning and "rewards/judge/cut" in warning
    shares = [line["rewards/judge/cut"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert sum(shares) * 4 == reward.cut > 0  # of 4 answers a step


def test_held_out_pairs_measure_an_encoder(encoder, tmp_path, capsys):
    pairs = [{"prompt": "ab", "chosen": "yes " * number, "rejected": "n " * 60} for number in range(1, 4)]
    words = [encoder, write_rows(tmp_path / "pairs.jsonl", pairs), "--output_dir", str(tmp_path / "score")]
    assert score_reward_model.main(words) == 0
    found = json.loads(Path(tmp_path / "score" / "reward_model.json").read_text(encoding="utf-8"))
    assert (found["pairs"], found["cut_answers"]) == (3, 3)


# ── an answer that is cut ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_a_run_says_that_a_reward_model_does_not_see_a_cut(method, tiny_model, tmp_path, capsys):
    def notes(*judge):
        rows = write_rows(tmp_path / "rows.jsonl", CHATS)
        words = f"{FAST} --rlhf_type {method} --model_name_or_path {tiny_model} --train_data_path {rows} --check"
        assert train_rlhf.main([*words.split(), "--output_dir", f"{tmp_path}/out", *judge]) == 0
        said = capsys.readouterr().out.splitlines()
        return [line for line in said if line.startswith("note ") and "--missing_eos_penalty" in line]

    judge = ["--reward_model_path", make_encoder(tmp_path / "judge")]
    (note,) = notes(*judge)
    assert "--max_completion_length 8" in note and "--reward_model_path" in note
    assert notes(*judge, "--missing_eos_penalty", "0") == notes(*judge, "--missing_eos_penalty", "1") == []
    assert notes("--reward_funcs", "data/rewards.py:brevity") == []
