"""Accepted columns, roles and labels of a row, and the conversion of one kind of row into another."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rlhf_args.methods import ANSWERED, DIALOGUE, EVERY, PAIR, PROMPT, RANKED, UNPAIRED
from utils.data.files import MESSAGES, Row, say_type

Kind = tuple[str, ...]  # a set of columns, as in rlhf_args/methods.py
Text = str | list[dict]  # plain text, or a chat: messages of {role, content}
T = TypeVar("T", str, list[dict])

# {columns of a method: sets of columns that its files may have, best first}: KTO also reads pairs, ...
ACCEPTED = {
    PAIR: (PAIR, RANKED),
    UNPAIRED: (UNPAIRED, PAIR, RANKED),
    RANKED: (RANKED, PAIR),
    DIALOGUE: (DIALOGUE, ANSWERED),
    PROMPT: (PROMPT, RANKED),
    ANSWERED: (DIALOGUE, ANSWERED, PROMPT),
}
SAMPLE = {method.columns: method.sample_data for method in EVERY.values()}
ROLES = ("system", "developer", "user", "assistant", "tool")
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Names that columns for reward functions cannot have: TRL passes its own values or images under them
RESERVED = (
    "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "image", "images",
)  # fmt: skip
HALVED = "contains half of a surrogate pair (\\ud800 to \\udfff), as from a truncated emoji. Fix it"


def find_kind(rows: Iterable[Row], columns: Kind) -> Kind:
    """The columns by which to read the data: the first accepted set that some row has, or a superset of it.

    So if one row has a prompt beside chosen and rejected, all rows need a prompt.
    """
    filled = {frozenset(name for name, value in values.items() if value is not None) for _, values in rows}
    found = [kind for kind in ACCEPTED[columns] if any(names.issuperset(kind) for names in filled)]
    fuller = [kind for kind in found if set(kind) > set(found[0])]
    return (fuller or found or ACCEPTED[columns])[0]


def check_row(values: dict, kind: Kind, columns: Kind) -> str | None:
    """The problem of one row, or None."""
    missing = [name for name in kind if values.get(name) is None]
    if missing:
        others = [name for name in values if name not in kind]
        near = difflib.get_close_matches(missing[0], others, 1, cutoff=0.7)
        guess = f'Rename "{near[0]}"?' if near else f"The row has {', '.join(values) or 'nothing'}."
        accepted = " or ".join(", ".join(k) for k in ACCEPTED[columns])
        lacks = f'"{missing[0]}" is null.' if missing[0] in values else f'no "{missing[0]}". {guess}'
        return f"{lacks} Accepted: {accepted}, as in {SAMPLE[columns]}"
    for name in kind:
        problem = check_label(values[name]) if name == "label" else check_text(values[name], name)
        if problem:
            return problem
    if columns == RANKED and values.get("margin") not in (None, "") and to_number(values["margin"]) is None:
        return f'"margin" is {values["margin"]!r}. Must be a number: how much better chosen is'
    if columns == ANSWERED and isinstance(values.get("messages"), str):
        return '"messages" is plain text, so the start of the answer is unknown. Write "prompt" and "completion"'
    texts = [name for name in kind if name != "label"]
    if len({isinstance(values[name], list) for name in texts}) > 1:
        kinds = ", ".join(f'"{n}" is {"a chat" if isinstance(values[n], list) else "plain text"}' for n in texts)
        return f"{kinds}. All must be lists of messages, or all strings"
    for name in texts:
        last = values[name][-1]["role"] if isinstance(values[name], list) and values[name] else None
        if name == "prompt" and last == "assistant":
            return 'the "prompt" ends with the assistant\'s turn. It must end with the turn to answer'
        if name in ("chosen", "rejected", "completion") and last not in ("assistant", None):
            return f'the "{name}" ends with a turn of the {last}. It must end with the assistant\'s answer'
    return None


def check_characters(values: dict) -> str | None:
    """The problem of characters in any column, its name or nested values, or None.

    Untrained columns are checked too: reward functions, completions, hashes and dropped.jsonl need UTF-8.
    """
    for name, value in values.items():
        if is_halved(name):
            return f"the name of a column, {json.dumps(name)}, {HALVED}"
        if any(map(is_halved, strings_in(value))):
            return f'"{name}" {HALVED}'
    return None


def strings_in(value: object) -> Iterator[str]:
    """Every string in a value, also in lists and objects and their keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.items():
            yield from strings_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings_in(part)


def check_further(types: dict[str, dict[str, str]]) -> Iterator[str]:
    """Problems of the columns passed to reward functions: names reserved by TRL, mixed types."""
    for name, found in types.items():
        if name in RESERVED:
            yield f'{next(iter(found.values()))}: a column "{name}", a name that TRL reserves. Rename it'
        elif len(found) > 1:
            (kind, where), (other, there) = list(found.items())[:2]
            yield f'{there}: "{name}" is {other}, and {where} has {kind}. All values of a column must have one type'


def check_label(label: object) -> str | None:
    return None if str(label).lower() in LABELS else f'"label" is {label!r}. Must be true or false (1 or 0)'


def check_text(value: object, name: str) -> str | None:
    if isinstance(value, str):
        if MESSAGES.match(value) and all(re.search(f"['\"]{key}['\"] *:", value) for key in ("role", "content")):
            return f'"{name}" is a list of messages as text. Write it as JSON (in csv: with json.dumps)'
        return f'"{name}" {HALVED}' if is_halved(value) else None
    if not isinstance(value, list):
        return f'"{name}" is {say_type(value)}. Must be a string or a list of {{"role", "content"}}'
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            keys = ", ".join(message) or "nothing" if isinstance(message, dict) else say_type(message)
            return f'"{name}" has a message with {keys}. A message needs "role" and "content"'
        if message["role"] not in ROLES:
            return f'"{name}" has the role {message["role"]!r}. Accepted: {", ".join(ROLES)}'
        if not isinstance(message["content"], str):
            return f'"{name}" has a message whose content is {say_type(message["content"])}, not a string'
        if is_halved(message["content"]):
            return f'"{name}" {HALVED}'
    return None


def is_halved(text: str) -> bool:
    """True if the text cannot be written as UTF-8: JSON's \\ud83d without its other half."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def normalize(values: dict, kind: Kind, notes: list[str]) -> dict:
    """One row with a prompt: {prompt, chosen, rejected}, ...; messages with only role and content."""
    row = {name: values[name] for name in kind}
    for name, value in row.items():
        if isinstance(value, list):
            row[name] = [{"role": m["role"], "content": m["content"]} for m in value]
    if "label" in row and not isinstance(row["label"], bool):
        note = "labels written as 1 and 0 are read as true and false"
        notes += [] if note in notes or str(row["label"]).lower() in ("true", "false") else [note]
        row["label"] = LABELS[str(row["label"]).lower()]
    sides = [name for name in ("chosen", "rejected", "completion") if name in row]
    prompt = row.get("prompt")
    if sides and isinstance(prompt, list) and all(row[side][: len(prompt)] == prompt != [] for side in sides):
        note = "the prompt is removed from answers that repeat it"
        notes += [] if note in notes else [note]
        row |= {side: row[side][len(prompt) :] for side in sides}
    if kind == RANKED:
        row = {"prompt": common_start(row["chosen"], row["rejected"]), **row}
        for side in RANKED:
            row[side] = row[side][len(row["prompt"]) :]
    if kind == ANSWERED and isinstance(row["prompt"], list):
        row = {"messages": row["prompt"] + row["completion"]}
    roles = [m["role"] for m in row["messages"]] if isinstance(row.get("messages"), list) else []
    if "assistant" in roles and roles[-1] != "assistant":
        note = "turns after the assistant's last turn are not trained on"
        notes += [] if note in notes else [note]
    if to_number(values.get("margin")) is not None:
        row["margin"] = to_number(values["margin"])
    return row


def split_answer(row: dict) -> dict:
    """{prompt, completion} of messages, split before the assistant's last turn; {prompt} if there is none."""
    messages = row.get("messages")
    if messages is None:
        return row
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return {"prompt": messages}
    return {"prompt": messages[:last], "completion": messages[last : last + 1]}


def to_number(value: Any) -> float | None:
    """The value (a number or its text) as a finite float, or None."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def common_start(chosen: T, rejected: T) -> T:
    """The prompt: the common start of two chats (in whole messages) or two texts (up to a space)."""
    length, longest = 0, min(len(chosen), len(rejected)) - isinstance(chosen, list)
    while length < longest and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, str):
        cut = max(chosen.rfind(" ", 0, length), chosen.rfind("\n", 0, length)) + 1
        return chosen[:cut]
    return chosen[:length]


def is_chat(row: dict) -> bool:
    return any(isinstance(value, list) for value in row.values())


def useless(row: dict, columns: Kind) -> str | None:
    """The reason why a well-formed row is unusable, or None."""
    if columns == PROMPT:
        return None if text_of(row["prompt"]).strip() else "no prompt"
    if isinstance(row.get("messages"), list):
        answers = ["".join(m["content"] for m in row["messages"] if m["role"] == "assistant")]
    else:
        answers = [text_of(row[name]) for name in ("messages", "chosen", "rejected", "completion") if name in row]
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    if columns in (PAIR, UNPAIRED, ANSWERED) and not text_of(row["prompt"]).strip():
        return "no prompt"
    return None


def text_of(value: Text) -> str:
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def convert(row: dict, columns: Kind, values: dict) -> list[dict]:
    """One row as rows in the method's columns: a pair becomes two rows for KTO.

    The other columns of a prompt are kept as "further", for the reward functions.
    """
    if columns == PROMPT:
        return [{"prompt": row["prompt"], "further": {n: value for n, value in values.items() if n != "prompt"}}]
    if columns == UNPAIRED and "chosen" in row:
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    return [row]


def keep_apart(rows: list[Row]) -> list[Row]:
    """Rows from pairs, reordered: after each chosen answer the rejected answer to a prompt half the file away.

    KTO estimates its KL from each prompt with the neighbouring row's answer, and TRL keeps the order of the rows, so
    neighbours must not share a prompt.
    """
    chosen, rejected = rows[::2], rows[1::2]
    half = len(rejected) // 2
    return [row for two in zip(chosen, rejected[half:] + rejected[:half], strict=True) for row in two]


def spread(rows: list[Row], notes: list[str]) -> list[Row]:
    """Rows reordered so that fewer neighbours share a prompt, for KTO as above."""
    half = (len(rows) + 1) // 2
    apart = [rows[place // 2 + place % 2 * half] for place in range(len(rows))]
    if count_neighbours(apart) >= count_neighbours(rows):
        return rows
    notes.append("rows with the same prompt were moved apart: KTO compares each row with its neighbour")
    return apart


def count_neighbours(rows: list[Row]) -> int:
    return sum(one["prompt"] == other["prompt"] for (_, one), (_, other) in zip(rows, rows[1:], strict=False))
