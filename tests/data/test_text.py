"""What is trained on, token by token: `pytest tests/data/test_text.py`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_args.methods import DIALOGUE, METHODS, PAIR, RANKED, load
from tests.conftest import TEMPLATE, make_model, make_tokenizer
from utils.data import template
from utils.data.prepare import as_dataset, check_first, mark, prepare_rows
from utils.models.load import load_model, load_tokenizer
from utils.runtime.errors import Refused

CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [{"role": "assistant", "content": "ok"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
PLAIN = {"prompt": "Q: hi\nA:", "chosen": " ok", "rejected": " no"}
BOS_TEMPLATE = "{{ bos_token }}" + TEMPLATE


def prepare(values, columns, tokenizer, max_length=1024):
    template.fit_tokenizer(tokenizer, chat=isinstance(values.get("prompt", values.get("messages")), list))
    return prepare_rows([("rows.jsonl:1", values)], tokenizer, columns, max_length)


@pytest.mark.parametrize(
    "tokenizer", [make_tokenizer(), make_tokenizer(bos="<s>"), make_tokenizer(BOS_TEMPLATE, "<s>")]
)
@pytest.mark.parametrize("values", [CHAT, PLAIN], ids=["chat", "plain"])
def test_one_bos_where_the_tokenizer_adds_one_and_one_end_of_turn(values, tokenizer):
    prepared = prepare(values, PAIR, tokenizer)
    check_first(prepared, tokenizer, PAIR)
    row = prepared.rows[0]
    ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == (1 if tokenizer.bos_token else 0)
    assert row["chosen"].count("<|im_end|>") == 1 and row["chosen"].endswith("<|im_end|>")


def test_plain_text_that_brings_a_bos_of_its_own_is_refused():
    tokenizer = make_tokenizer(bos="<s>")
    prepared = prepare({**PLAIN, "prompt": "<s>Q: hi\nA:"}, PAIR, tokenizer)
    with pytest.raises(Refused, match="two BOS"):
        check_first(prepared, tokenizer, PAIR)


def test_the_end_of_turn_of_the_template_becomes_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    notes = template.fit_tokenizer(tokenizer, chat=True)
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_end|>" in notes[0] and "<pad>" in notes[0]


def test_every_preference_method_trains_on_the_same_tokens(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    seen = {}
    trained = {name: method for name, method in METHODS.items() if not method.sample_reward}  # the rest answer alone
    for name, method in trained.items():
        values = {k: v for k, v in CHAT.items() if k != "rejected" or method.columns in (PAIR, RANKED)}
        if method.columns == DIALOGUE:
            values = {"messages": CHAT["prompt"] + CHAT["chosen"]}
        elif "completion" in method.columns:
            values = {"prompt": CHAT["prompt"], "completion": CHAT["chosen"], "label": True}
        prepared = prepare(values, method.columns, tokenizer)
        prepared.rows *= 2
        config = load(method.config)(output_dir=str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=2)
        kind = AutoModelForCausalLM if method.task == "CAUSAL_LM" else AutoModelForSequenceClassification
        extra = {"num_labels": 1} if method.task == "SEQ_CLS" else {}
        trainer = load(method.trainer)(
            model=kind.from_pretrained(tiny_model, **extra),
            args=config,
            processing_class=tokenizer,
            train_dataset=as_dataset(prepared),
        )
        row = trainer.train_dataset[0]
        whole = row.get("chosen_input_ids") or row.get("input_ids") or row.get("prompt_ids", [])
        if whole == row.get("prompt_ids", []):
            whole = whole + (row.get("chosen_ids") or row.get("completion_ids"))
        seen[name] = tokenizer.decode(whole)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    assert seen == {name: expected for name in trained}


def test_sft_trains_every_turn_of_the_assistant_and_nothing_else():
    tokenizer = make_tokenizer()
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "ok"), ("user", "more"), ("assistant", "sure")]
    row = prepare({"messages": [{"role": r, "content": c} for r, c in turns]}, DIALOGUE, tokenizer).rows[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "ok<|im_end|>sure<|im_end|>"
    plain = prepare({"prompt": "2+2=", "completion": "4"}, DIALOGUE, tokenizer).rows[0]
    trained = [token for token, label in zip(plain["input_ids"], plain["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "4<|im_end|>"


def test_every_turn_is_trained_where_the_template_rewrites_earlier_ones():
    thinks = TEMPLATE.replace(
        "\n{{ m['content'] }}",
        "\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
    )
    turns = [("user", "hi"), ("assistant", "ok"), ("user", "more"), ("assistant", "sure")]
    values = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = make_tokenizer(thinks)
    prepared = prepare(values, DIALOGUE, tokenizer)
    assert mark(prepared, tokenizer, colour=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[ok<|im_end|>]]\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nsure<|im_end|>]]"
    )


def test_rows_too_long_are_counted_by_reason_and_cut_answers_too():
    tokenizer = make_tokenizer()  # a token a byte: the prompt below is 44 tokens, the pair 47
    rows = prepare(CHAT, PAIR, tokenizer, max_length=20)
    assert (rows.rows, [reason for _, reason, _ in rows.dropped]) == ([], ["prompt longer than max_length"])
    length = len(tokenizer(template.render(tokenizer, CHAT)[0])["input_ids"])
    assert prepare(CHAT, PAIR, tokenizer, max_length=length + 1).cut == 1
    ranked = prepare(CHAT, RANKED, tokenizer, max_length=length + 1)
    assert [reason for _, reason, _ in ranked.dropped] == ["longer than max_length"]


def test_a_long_dialogue_is_trained_as_far_as_max_length_reaches():
    turns = [("user", "hi"), ("assistant", "ok"), ("user", "more " * 20), ("assistant", "sure")]
    values = {"messages": [{"role": role, "content": content} for role, content in turns]}
    prepared = prepare(
        values, DIALOGUE, make_tokenizer(), max_length=60
    )  # the first answer ends at 48, a token a byte
    assert (len(prepared.rows), prepared.cut) == (1, 1)
    assert len(prepare(values, DIALOGUE, make_tokenizer(), max_length=20).dropped) == 1


def test_a_template_that_rewrites_the_prompt_is_counted():
    thinking = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    prepared = prepare(CHAT, PAIR, make_tokenizer(thinking))
    assert prepared.reshaped == 1
    assert prepared.rows[0]["prompt"] + prepared.rows[0]["chosen"] == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    )


def test_a_row_that_the_template_rejects_is_named():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    values = {**CHAT, "prompt": [{"role": "system", "content": "x"}, *CHAT["prompt"]]}
    with pytest.raises(Refused, match=r"rows.jsonl:1: the chat template refuses it .*no system turns"):
        prepare(values, PAIR, make_tokenizer(strict))


@pytest.mark.parametrize("pad", ["<|im_end|>", "<pad>", None], ids=["pad is eos", "own pad", "no pad"])
def test_a_row_alone_scores_as_in_a_padded_batch(pad, tmp_path):
    tokenizer = make_tokenizer(pad=pad)
    folder = make_model(tmp_path / "model", tokenizer)
    template.fit_tokenizer(tokenizer, chat=True)
    long = {**CHAT, "chosen": [{"role": "assistant", "content": "a much longer answer than the other"}]}
    texts = ["".join(template.render(tokenizer, values)[1][0]) for values in (CHAT, long)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    alone = tokenizer(texts[0], return_tensors="pt")
    length = alone["input_ids"].shape[1]
    for task in ("SEQ_CLS", "CAUSAL_LM"):
        model = load_model(folder, task, "float32", tokenizer=tokenizer, seed=0).eval()
        with torch.no_grad():
            together, single = model(**batch).logits[:1], model(**alone).logits
        together = together if task == "SEQ_CLS" else together[:, :length]
        torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)  # float32, sums in another order


def test_plain_text_needs_no_template_and_chat_does():
    tokenizer = make_tokenizer(template=None)
    template.fit_tokenizer(tokenizer, chat=False)
    with pytest.raises(Refused, match="has no chat template"):
        template.fit_tokenizer(tokenizer, chat=True)
