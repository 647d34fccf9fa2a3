"""One row through the chat template: its text, its tokens, and which of them are trained."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: "PreTrainedTokenizerBase", values: dict) -> tuple[str, list[str], bool]:
    """(prompt, [answer, ...], reshaped): texts; each answer ends with exactly one end of turn.

    For a row with only a prompt, the answer is "".
    """
    names = [name for name in ("chosen", "rejected", "completion") if name in values]
    if "messages" in values:
        if isinstance(values["messages"], str):
            return "", [end_turn(tokenizer, values["messages"])], False
        last = max(i for i, message in enumerate(values["messages"]) if message["role"] == "assistant")
        messages, names, sides = values["messages"][:last], ["messages"], [values["messages"][last : last + 1]]
    else:
        messages, sides = values["prompt"], [values[name] for name in names]
    if not sides:
        chat = isinstance(messages, list)
        return template(tokenizer, messages, add_generation_prompt=True) if chat else messages, [""], False
    if not isinstance(sides[0], list):
        return messages, [end_turn(tokenizer, side) for side in sides], False
    prompt = template(tokenizer, messages, add_generation_prompt=True) if messages else ""
    whole = [end_turn(tokenizer, template(tokenizer, messages + side)) for side in sides]
    shared = min(shared_length(prompt, text) for text in whole)
    return whole[0][:shared], [text[shared:] for text in whole], shared < len(prompt)


def template(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], **kwargs: bool) -> str:
    """The chat template's text, without the BOS that the tokenizer adds."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and adds_bos(tokenizer) else text


@functools.lru_cache(maxsize=8)  # called for every text
def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def end_turn(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """`text` with one end of turn at its end: a newline after it is removed, a missing one is added."""
    eos = tokenizer.eos_token
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos) else text + eos


def shared_length(a: Sequence, b: Sequence) -> int:
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, **kwargs: bool) -> list[int]:
    return tokenizer(text, **kwargs)["input_ids"]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt, with the generation prompt of the template."""
    return tokenize(tokenizer, render(tokenizer, {"prompt": prompt})[0])


def tokenize_pair(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, chosen: str, rejected: str
) -> tuple[list[int], list[int], list[int]]:
    """Token ids (prompt, chosen, rejected). A token that spans prompt and answer belongs to the answer, as in DPO.

    Source: trl 1.16.0, trainer/dpo_trainer.py, _prepare_dataset.
    """
    alone, *whole = (tokenize(tokenizer, text) for text in (prompt, prompt + chosen, prompt + rejected))
    start = min(shared_length(alone, ids) for ids in whole)
    return alone[:start], whole[0][start:], whole[1][start:]


def label_turns(
    ids: list[int], token_at: Callable[[int], int | None], spans: list[tuple[int, int]]
) -> dict[str, list[int]]:
    """{input_ids, labels} of a dialogue: every assistant turn is trained with its end of turn, the rest is -100.

    token_at: character -> index of its token, or None for a character that the tokenizer drops.
    spans: (start, end) of the turns, in characters. A token that spans a start is trained, as in DPO.
    """
    labels = [-100] * len(ids)
    for start, end in spans:
        inside = range(start, end)
        first, last = (
            next((token for place in places if (token := token_at(place)) is not None), None)
            for places in (inside, reversed(inside))
        )
        if first is not None and last is not None:
            labels[first : last + 1] = ids[first : last + 1]
    return {"input_ids": ids, "labels": labels}


def assistant_spans(tokenizer: "PreTrainedTokenizerBase", values: dict, text: str) -> list[tuple[int, int]]:
    """(start, end) of each assistant turn in `text`, in characters, with its end of turn."""
    if isinstance(values.get("messages"), str):
        return [(0, len(text))]
    if "messages" not in values:
        return [(len(values["prompt"]), len(text))]
    spans = []
    for i, message in enumerate(values["messages"]):
        if message["role"] == "assistant":
            before = template(tokenizer, values["messages"][:i], add_generation_prompt=True) if i else ""
            after = end_turn(tokenizer, template(tokenizer, values["messages"][: i + 1]))
            start = shared_length(before, text)
            # some templates write a turn differently when another follows (Qwen3 removes the thoughts)
            end = text.find(tokenizer.eos_token, start) + len(tokenizer.eos_token)
            spans.append((start, len(after) if text.startswith(after) else end))
    return spans


def fit_tokenizer(tokenizer: "PreTrainedTokenizerBase", chat: bool) -> list[str]:
    """Set pad and end of turn on the tokenizer. Returns a note for each change. Raises Refused without a template."""
    notes = []
    if chat and not tokenizer.chat_template:
        raise Refused(
            "the data are chats, and this model's tokenizer has no chat template. Use the instruct model, "
            "save a chat_template.jinja in its folder, or write the data as plain text"
        )
    if chat:
        try:
            end = end_of_turn(tokenizer)
        except Exception as error:  # noqa: BLE001  a broken template raises any class
            raise Refused(
                f"this model's chat template fails on a question and its answer ({say_error(error)}). "
                "Fix chat_template.jinja in the model's folder"
            ) from None
        if end and end != tokenizer.eos_token:
            notes.append(f"eos_token set to {end}, which ends a turn in the chat template (was {tokenizer.eos_token})")
            tokenizer.eos_token = end
    if tokenizer.eos_token is None:
        raise Refused("this model's tokenizer has no eos_token, which ends an answer. Set it in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"pad_token set to {tokenizer.pad_token}: the tokenizer has none")
    tokenizer.padding_side = "right"  # a reward model scores the last token that is not padding
    return notes


def say_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The special token that the template writes after an answer, or None."""
    answer = "ANSWER"
    text = template(tokenizer, [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}])
    tail = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return next((tokenizer.convert_ids_to_tokens(token) for token in tail if token in special), None)


def count_ends(ids: list[int], eos: int) -> int:
    """Number of end-of-turn tokens at the end."""
    return next((n for n, token in enumerate(reversed(ids)) if token != eos), len(ids))
