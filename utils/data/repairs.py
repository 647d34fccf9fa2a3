"""Rules that convert rows of other frameworks: columns are moved and renamed, no text is invented.

A new rule is a row in RULES, at the end.
"""

import ast
import collections
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from rlhf_args.methods import ANSWERED, DIALOGUE, PAIR, PROMPT, RANKED, UNPAIRED
from utils.data.columns import RESERVED, ROLES as KNOWN, Kind, check_label, common_start, to_number
from utils.data.files import MESSAGES, Row

TWO, ONE = (PAIR, RANKED, UNPAIRED), (DIALOGUE, ANSWERED)  # methods with good and bad answers, and with good ones
ANY = (*TWO, *ONE, PROMPT)

ROLES = {
    **{name: name for name in KNOWN},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatbot", "chatgpt", "ai", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
# Names of columns in ShareGPT, Alpaca, OpenAI, TRL, LLaMA-Factory, ms-swift, axolotl, and in the data of their docs
TALKS = ("conversations", "conversation", "dialog", "dialogue", "context_messages")
ASKED = ("instruction", "question", "query", "problem", "input")
ANSWERS = ("output", "response", "answer", "solution")
BETTER = ("chosen_response", "response_chosen", "chosen_messages", "preferred_output", "response_j")
WORSE = ("rejected_response", "response_rejected", "rejected_messages", "non_preferred_output", "response_k")
RATINGS = ("overall_score", "score", "rating")
THUMBS = ("kto_tag", "thumbs", "thumbs_up", "feedback", "score", "rating", "reward", "preferred", "desirable", "liked")
WORDS = [  # (true, false) of a column of labels
    ("true", "false"), ("1", "0"), ("1", "-1"), ("good", "bad"), ("up", "down"), ("yes", "no"), ("like", "dislike"),
    ("positive", "negative"), ("desirable", "undesirable"), ("chosen", "rejected"), ("👍", "👎"),
]  # fmt: skip
SIDES = ("chosen", "rejected", "completion")
TEXTS = ("messages", "prompt", *SIDES)
NAMES = (*TEXTS, *TALKS, *ANSWERS, *BETTER, *WORSE)  # columns that may hold messages


@dataclass
class Seen:
    """Facts about all rows, for rules that need more than one row."""

    columns: tuple  # of the method
    repaired: bool  # True if an earlier rule changed a row
    filled: set  # columns that are set in some row
    words: dict  # {column of labels: its values}
    whole: bool  # True if some row has chats and no prompt


Rule = Callable[[dict, Seen], dict | None]  # -> the changed row; None if the rule does not apply


def look(rows: list[Row], columns: Kind, repaired: bool) -> Seen:
    seen = Seen(columns, repaired, set(), collections.defaultdict(set), False)
    for _, row in rows:
        seen.filled |= {name for name, value in row.items() if value not in (None, "")}
        seen.whole |= not has(row, "prompt") and is_dialogue(row.get("chosen"))
        for name in ("label", *THUMBS):
            if has(row, name):
                seen.words[name].add(to_word(row[name]))
    return seen


def to_word(value: object) -> str:
    number = None if isinstance(value, bool) else to_number(value)
    return str(value).strip().lower() if number is None else f"{number:g}"


def is_list(value: object) -> TypeGuard[list[dict]]:
    return isinstance(value, list) and value != [] and all(isinstance(part, dict) for part in value)


def is_dialogue(value: object) -> TypeGuard[list[dict]]:
    return is_list(value) and all(isinstance(part.get(key), str) for part in value for key in ("role", "content"))


def is_message(value: object) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys() and {"content", "value"} & value.keys())


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def has(row: dict, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def put(row: dict, without: Iterable[str], **columns: object) -> dict:
    return {name: value for name, value in row.items() if name not in without} | columns


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_written(row: dict, seen: Seen) -> dict | None:
    texts = {name: row[name] for name in NAMES if isinstance(row.get(name), str)}
    found = {name: value for name, text in texts.items() if (value := read_list(text))}
    return row | found if found else None


def read_list(text: str) -> list[dict] | None:
    """The messages in a text written as JSON or Python, or None."""
    for read in (json.loads, ast.literal_eval) if MESSAGES.match(text) else ():
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if is_list(found) and all(map(is_message, found)) else None
    return None


def wrap_message(row: dict, seen: Seen) -> dict | None:
    found = {name: [row[name]] for name in NAMES if is_message(row.get(name))}
    return row | found if found else None


def in_messages(change: Callable[[dict], dict]) -> Rule:
    """The rule that applies `change` to each message of a row."""

    def make(row: dict, seen: Seen) -> dict | None:
        found = {name: [change(part) for part in row[name]] for name in NAMES if is_list(row.get(name))}
        return row | found if any(found[name] != row[name] for name in found) else None

    return make


def name_parts(message: dict) -> dict:
    if not {"from", "value"} <= message.keys() or {"role", "content"} & message.keys():
        return message
    return put(message, ("from", "value"), role=message["from"], content=message["value"])


def join_parts(message: dict) -> dict:
    parts: Any = message.get("content")
    if is_list(parts) and all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        return message | {"content": "".join(part["text"] for part in parts)}
    return message


def name_role(message: dict) -> dict:
    role = message.get("role")
    return message | {"role": ROLES.get(role.strip().lower(), role)} if isinstance(role, str) else message


def split_turns(text: str) -> list[dict] | None:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..." as in Anthropic's HH-RLHF; None for another text."""
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.lstrip("\n"))
    if start or len(parts) < 4 or parts[0] != "Human":
        return None
    names = {"Human": "user", "Assistant": "assistant"}
    return [turn(names[who], said.strip())[0] for who, said in zip(parts[::2], parts[1::2], strict=True)]


def read_dialogue(row: dict, seen: Seen) -> dict | None:
    texts = {name: row[name] for name in (*TEXTS, "text") if isinstance(row.get(name), str)}
    read = {name: split_turns(text) for name, text in texts.items()}
    sides = [name for name in SIDES if name in texts]
    prompt = read.get("prompt")
    if prompt and not any(read[name] for name in sides):
        asked = prompt[:-1] if prompt[-1] == turn("assistant", "")[0] else prompt
        return row | {name: turn("assistant", row[name].strip()) for name in sides} | {"prompt": asked}
    if sides and all(read[name] for name in sides):
        return row | {name: read[name] for name in ("prompt", *sides) if read.get(name)}
    talk = read.get("messages") or read.get("text")
    return put(row, ("text",), messages=talk) if talk and not has(row, "prompt") else None


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rename(target: str, names: Iterable[str], kinds: tuple[type, ...] = (str, list)) -> Rule:
    """The rule that renames the only column of `names` in a row to `target`."""

    def make(row: dict, seen: Seen) -> dict | None:
        found = [name for name in names if has(row, name)]
        if len(found) == 1 and not has(row, target) and isinstance(row[found[0]], kinds):
            return put(row, found, **{target: row[found[0]]})
        return None

    return make


def move_question(row: dict, seen: Seen) -> dict | None:
    asked = [name for name in ASKED if isinstance(row.get(name), str) and row[name].strip()]
    whole = any(is_dialogue(row.get(name)) and row[name][0]["role"] != "assistant" for name in SIDES)
    history = row.get("history") or []
    paired = isinstance(history, list) and all(isinstance(two, list) and len(two) == 2 for two in history)
    if has(row, "prompt") or has(row, "messages") or whole or not paired:
        return None
    if len(asked) != 1 and asked != ["instruction", "input"]:
        return None
    earlier = [message for q, a in history for message in turn("user", q) + turn("assistant", a)]
    question = turn("user", "\n\n".join(row[name] for name in asked))
    used = [*asked, "history", *(["input"] if row.get("input") in ("", None) else [])]
    return put(row, used, prompt=earlier + question)


def take_messages(row: dict, seen: Seen) -> dict | None:
    asked = row.get("input")
    if isinstance(asked, dict) and is_dialogue(asked.get("messages")) and not has(row, "prompt"):
        return put(row, ("input",), prompt=asked["messages"])
    return None


def take_answer(row: dict, seen: Seen) -> dict | None:
    if seen.columns in TWO and has(row, "rejected"):
        return rename("chosen", ("completion", *ANSWERS))(row, seen)
    single = seen.columns in (*ONE, UNPAIRED) and has(row, "prompt") and not has(row, "messages")
    return rename("completion", ANSWERS)(row, seen) if single else None


def take_text(row: dict, seen: Seen) -> dict | None:
    return None if has(row, "prompt") else rename("messages", ("text",), (str,))(row, seen)


def take_rated(row: dict, seen: Seen) -> dict | None:
    answers: Any = row.get("completions")
    if has(row, "chosen") or has(row, "rejected") or not is_list(answers):
        return None
    ratings = [next((one[name] for name in RATINGS if one.get(name) is not None), None) for one in answers]
    rated = [(to_number(rating), one.get("response")) for rating, one in zip(ratings, answers, strict=True)]
    if any(rating is None or not isinstance(text, str) for rating, text in rated):
        return None
    best, worst = (pick(rated, key=lambda answer: answer[0] or 0) for pick in (max, min))
    return put(row, ("completions",), chosen=best[1], rejected=worst[1]) if best[0] != worst[0] else None


def take_context(row: dict, seen: Seen) -> dict | None:
    talk: Any = row.get("messages")
    if not is_dialogue(talk) or has(row, "prompt"):
        return None
    answered = talk[-1]["role"] == "assistant"
    asked, answer = (talk[:-1], talk[-1:]) if answered else (talk, None)
    if seen.columns == PROMPT:
        return row | {"prompt": asked} if asked else None
    lacking = "chosen" if has(row, "rejected") else "completion" if seen.columns == UNPAIRED else None
    if lacking is None or answered == has(row, lacking):
        return None
    if lacking == "chosen" and answered and is_dialogue(row["rejected"]) and row["rejected"][0]["role"] != "assistant":
        return put(row, ("messages",), chosen=talk)
    return put(row, ("messages",), prompt=asked, **({lacking: answer} if answered else {}))


def take_system(row: dict, seen: Seen) -> dict | None:
    system, found = row.get("system") or "", {}
    if not isinstance(system, str) or "system" not in seen.filled:
        return None
    before = turn("system", system) if system.strip() else []
    for name in TEXTS:
        value = row.get(name)
        if name == "prompt" and isinstance(value, str):
            found[name] = before + turn("user", value)
        elif is_dialogue(value) and before and value[0]["role"] == "system":
            return None
        elif is_dialogue(value) and (name in ("prompt", "messages") or value[0]["role"] == "user"):
            found[name] = before + value
    return put(row, ("system",), **found) if any(found[name] != row[name] for name in found) else None


def split_prompt(row: dict, seen: Seen) -> dict | None:
    sides = {name: row[name] for name in SIDES if has(row, name)}
    if not isinstance(row.get("prompt"), str) or not sides or not all(map(is_dialogue, sides.values())):
        return None
    start = common_start(*sides.values()) if len(sides) == 2 else [*sides.values()][0][:-1]
    if not any(message["content"].strip() == row["prompt"].strip() for message in start):
        return None
    if seen.columns == RANKED:
        return put(row, ("prompt",))
    return row | {"prompt": start} | cut(sides, start, seen)


def cut(sides: dict, start: list[dict], seen: Seen) -> dict:
    """The answers without their prompt; {} with PROMPT, whose reward functions get the answers unchanged."""
    return {} if seen.columns == PROMPT else {name: value[len(start) :] for name, value in sides.items()}


def split_whole(row: dict, seen: Seen) -> dict | None:
    sides: dict[str, Any] = {name: row.get(name) for name in RANKED}
    alike = all(map(is_dialogue, sides.values())) or all(isinstance(value, str) for value in sides.values())
    if alike and not has(row, "prompt") and (seen.repaired or "prompt" in seen.filled):
        start = common_start(*sides.values())
        return row | {"prompt": start} | cut(sides, start, seen)
    return None


def join_prompt(row: dict, seen: Seen) -> dict | None:
    if seen.whole and all(is_dialogue(row.get(name)) for name in PAIR):
        prompt = row["prompt"]
        ahead = [] if all(row[name][: len(prompt)] == prompt for name in RANKED) else prompt
        return put(row, ("prompt",), **{name: ahead + row[name] for name in RANKED})
    return None


def join_answer(row: dict, seen: Seen) -> dict | None:
    if (seen.repaired or "messages" in seen.filled) and all(is_dialogue(row.get(name)) for name in ANSWERED):
        return None if has(row, "messages") else put(row, ANSWERED, messages=row["prompt"] + row["completion"])
    return None


def make_turns(row: dict, seen: Seen) -> dict | None:
    names = ANSWERED if seen.columns in ONE else ("prompt", *SIDES)
    chats = [name for name in names if is_dialogue(row.get(name))]
    texts = [name for name in names if isinstance(row.get(name), str)]
    if seen.columns == PROMPT:  # the answers are for the reward functions
        texts = [name for name in texts if name == "prompt"]
    whole = any(row[name][0]["role"] != "assistant" for name in chats if name != "prompt")
    if chats and texts and ("prompt" in chats or not whole):
        return row | {name: turn("user" if name == "prompt" else "assistant", row[name]) for name in texts}
    return None


def take_label(row: dict, seen: Seen) -> dict | None:
    names = ["label"] if has(row, "label") else [name for name in THUMBS if has(row, name)]
    if len(names) != 1 or not has(row, "completion") or check_label(row.get("label")) is None:
        return None
    found = seen.words[names[0]]
    for words in WORDS:  # numbers: both must occur, as a 1 alone may be a rating from 1 to 5
        if found <= set(words) and (len(found) == 2 or to_number(words[0]) is None):
            return put(row, names, label=to_word(row[names[0]]) == words[0])
    return None


def free_names(row: dict, seen: Seen) -> dict | None:
    taken = [name for name in row if name in RESERVED and "image" not in name]
    return put(row, taken, **{f"given_{name}": row[name] for name in taken}) if taken else None


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

# (description, columns of the methods that it serves, function of (row, Seen) -> the changed row, or None if the rule
# does not apply). Applied in this order, each to all rows.
RULES = [
    ("messages written as text -> lists", ANY, read_written),
    ("single message -> a list with it", ANY, wrap_message),
    ("ShareGPT's from and value -> role and content", ANY, in_messages(name_parts)),
    ("content in text parts -> one string", ANY, in_messages(join_parts)),
    ("other role names (human, gpt, bot, ...) -> user, assistant, tool", ANY, in_messages(name_role)),
    ("ShareGPT's conversations -> messages", ANY, rename("messages", TALKS, (list,))),
    (f"{', '.join(BETTER)} -> chosen", (*TWO, PROMPT), rename("chosen", BETTER)),
    (f"{', '.join(WORSE)} -> rejected", (*TWO, PROMPT), rename("rejected", WORSE)),
    ('"Human: ... Assistant: ..." -> messages', ANY, read_dialogue),
    ("OpenAI's input.messages -> prompt", ANY, take_messages),
    ("instruction and input, question, query or problem -> prompt, as a user turn", ANY, move_question),
    (f"{', '.join(ANSWERS)} -> completion, or chosen in a row with rejected", (*TWO, *ONE), take_answer),
    ("rated completions -> chosen (the highest rating) and rejected (the lowest)", TWO, take_rated),
    ("text -> messages", (DIALOGUE,), take_text),
    ("messages -> prompt and last answer", (*TWO, PROMPT), take_context),
    ("text prompt beside full chats -> prompt and answers as messages", (*TWO, PROMPT), split_prompt),
    ("system -> a system turn", ANY, take_system),
    ("text beside messages -> a message", ANY, make_turns),
    (f"{', '.join(THUMBS)} or label of two values -> label, true or false", (UNPAIRED,), take_label),
    ("full dialogues in chosen and rejected -> prompt and answers", (PAIR, UNPAIRED, PROMPT), split_whole),
    ("prompt -> start of both answers, as in the other rows", (RANKED,), join_prompt),
    ("prompt and completion -> messages", ONE, join_answer),
    ("column names that TRL reserves -> given_NAME", (PROMPT,), free_names),
]


def repair(rows: list[Row], columns: Kind) -> tuple[list[Row], dict[str, int]]:
    """(the rows after all rules, {description of a rule: rows that it changed})."""
    counts, seen = {}, look(rows, columns, False)
    for says, kinds, make in RULES:
        if columns in kinds:
            made = [(where, make(row, seen) or row) for where, row in rows]
            changed = sum(new is not old for (_, new), (_, old) in zip(made, rows, strict=True))
            if changed:
                rows, counts[says], seen = made, changed, look(made, columns, True)
    return rows, counts
