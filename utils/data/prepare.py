"""Rows to the text that is trained on: chat template applied, one BOS where the tokenizer adds one, one end of turn.

TRL's trainers get this as plain text, which each of them tokenises the same way; left to themselves, DPO trains
`...ok<|im_end|>\\n` where CPO trains `...ok<|im_end|>\\n<|im_end|>`.
"""

import os
import re
from dataclasses import dataclass, field
from itertools import groupby

from rlhf_args.methods import ANSWERED, DIALOGUE, PROMPT, RANKED
from utils.data.rows import refuse_rows
from utils.data.template import count_ends, label_turns, render, say_error, split_tokens, template, tokenize
from utils.runtime.errors import Refused

CHUNK = 512  # rows whose texts are tokenised at once


@dataclass
class Prepared:
    """`rows`: what the trainer gets. `dropped`: (where, reason, values). `first`: (prompt, answer) as trained."""

    rows: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    cut: int = 0  # rows whose answer max_length cuts short
    sizes: list = field(default_factory=list)  # of each row, the tokens of each of its sequences that are padded
    reshaped: int = 0  # rows whose prompt the template writes differently once an answer follows
    first: tuple = ("", "")
    # what preflight.py says of all rows, those dropped for their length among them
    lengths: dict = field(default_factory=dict)  # {prompt, chosen, ...: tokens of each row's}
    longest: int = 0  # tokens of the longest row, prompt and answer
    spanned: int = 0  # rows of which a token spans prompt and answer
    odd: list = field(default_factory=list)  # (where, what) of rows that have not one BOS and one end of turn
    highest: int = 0  # token id


def prepare_rows(rows, tokenizer, columns, max_length, max_prompt=lambda values: 10**9):
    """Text rows for the trainer of a method with these columns. Raises Refused where the template rejects a row.

    `max_length`: tokens of prompt and answer together; where the policy answers itself, of the prompt.
    `max_prompt`: of a row's values, the tokens of its prompt beside which an answer to be sampled has its room.
    """
    prepared, problems, tokens = Prepared(), [], Tokens(tokenizer)
    limit = 10**9 if max_length is None else max_length
    for start in range(0, len(rows), CHUNK):
        turns = []
        for where, values in rows[start : start + CHUNK]:
            try:
                turns.append((where, values, *render(tokenizer, values)))
            except Exception as error:  # noqa: BLE001  templates raise what they like (jinja2, TypeError, ...)
                problems.append(f"{where}: the chat template refuses it ({say_error(error)})")
        tokens.learn([text for _, _, prompt, answers, _ in turns for text in (prompt, *map(prompt.__add__, answers))])
        for where, values, prompt, answers, reshaped in turns:
            alone, whole = tokens(prompt), [tokens(prompt + answer) for answer in answers]
            row = trainer_row(tokens, values, prompt, answers, columns)
            trained_from = starts_training_at(row, alone)
            longest = max(map(len, whole))
            if trained_from is None:
                prepared.dropped.append((where, "no assistant turn in what the template writes", values))
                continue
            measure(prepared, where, values, alone, whole, tokenizer, columns)
            if longest > limit and columns == RANKED:
                prepared.dropped.append((where, "longer than max_length", values))
            elif longest > limit and trained_from >= limit:
                limited = "max_prompt_length" if columns == PROMPT else "max_length"
                prepared.dropped.append((where, f"prompt longer than {limited}", values))
            elif len(alone) > max_prompt(values):
                prepared.dropped.append((where, "prompt leaves no room for an answer", values))
            else:
                if columns == ANSWERED:
                    row["completion_ids"] = row["completion_ids"][: limit - len(row["prompt_ids"])]
                prepared.cut += longest > limit
                prepared.reshaped += reshaped
                prepared.first = prepared.first if prepared.rows else (prompt, answers[0])
                prepared.rows.append(row)
                prepared.sizes.append([min(len(ids), limit) for ids in whole])
    refuse_rows(problems)
    prepared.highest = tokens.highest
    return prepared


def starts_training_at(row, prompt_ids):
    """The place of the first token that is trained, or None; what max_length leaves of the row must hold it."""
    if "labels" in row:
        return next((place for place, label in enumerate(row["labels"]) if label != -100), None)
    return len(prompt_ids)


def trainer_row(tokens, values, prompt, answers, columns):
    if columns == DIALOGUE:
        return label_turns(tokens, values, prompt + answers[0])
    if columns == PROMPT:  # as it came: TRL gives it to the reward functions too
        return {"prompt": values["prompt"], **values["further"]}
    if columns == ANSWERED:
        return split_tokens(tokens(prompt), tokens(prompt + answers[0]))
    if columns == RANKED:
        row = {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
    else:
        names = ("chosen", "rejected") if "chosen" in values else ("completion",)
        row = {"prompt": prompt, **dict(zip(names, answers, strict=True))}
    return row | {name: values[name] for name in ("label", "margin") if name in values}


def measure(prepared, where, values, alone, whole, tokenizer, columns):
    """Adds to `prepared` how long a row is, and what is odd in its tokens: the prompt's alone, whole with answers."""
    names = [name for name in ("messages", "chosen", "rejected", "completion") if name in values]
    told = {} if columns == DIALOGUE else {"prompt": len(alone)}
    told |= {name: len(ids) - told.get("prompt", 0) for name, ids in zip(names, whole, strict=False)}
    for name, length in told.items():
        prepared.lengths.setdefault(name, []).append(length)
    prepared.longest = max(prepared.longest, *map(len, whole))
    prepared.spanned += bool(names) and any(ids[: len(alone)] != alone for ids in whole)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in whole:
        ends = count_ends(ids, eos)
        if bos is not None and ids[:2] == [bos] * 2:
            prepared.odd.append((where, "2 BOS"))
        elif names and ends != 1:
            prepared.odd.append((where, f"{ends} ends of turn behind the answer"))
        elif names and columns != DIALOGUE and (inside := ids[len(alone) :].count(eos) - 1) > 0:
            prepared.odd.append((where, f"{inside} of {tokenizer.eos_token} inside the answer"))
        else:
            continue
        break


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokens:
    """tokenizer(text)["input_ids"] of many texts, in which what several of them have in common is tokenised once.

    Texts are cut in front of the template's own tokens, where a tokenizer cuts them too. Where that gives other ids
    than the whole text, texts are left whole.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.highest = tokenizer, 0
        self.marks = marks_of(tokenizer)
        self.known, self.proven = {}, False

    def learn(self, texts):
        """Tokenises the parts of these texts in one call, and forgets all others. The first texts prove the cuts.

        Without texts (the template refused every row of a chunk) there is nothing to prove them on yet.
        """
        if texts and not self.proven:
            self.prove(texts[:8])
        parts = dict.fromkeys(part for text in texts for part in self.cut(text))
        self.known = {part: self.known[part] for part in parts if part in self.known}
        new = [part for part in parts if part not in self.known]
        self.known |= zip(new, self.tokenize(new, whole=self.marks is None), strict=True)
        self.highest = max([self.highest, *(max(ids, default=0) for ids in self.known.values())])

    def __call__(self, text):
        if self.marks is None:
            return self.one(text)
        return [*self.front, *(token for part in self.cut(text) for token in self.one(part)), *self.back]

    def one(self, part):
        if part not in self.known:
            (self.known[part],) = self.tokenize([part], whole=self.marks is None)
        return self.known[part]

    def cut(self, text):
        if self.marks is None:
            return [text]
        places = [0, *(mark.start() for mark in self.marks.finditer(text) if mark.start()), len(text)]
        return [text[start:stop] for start, stop in zip(places, places[1:], strict=False)]

    def tokenize(self, texts, whole):
        if not texts:
            return []
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # only here: its threads do not survive a fork (data loaders)
        try:
            return self.tokenizer(texts, add_special_tokens=whole, return_attention_mask=False)["input_ids"]
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = before or "false"

    def prove(self, texts):
        """Cuts no text any more where that gives other tokens; a prefix or suffix that the tokenizer adds is seen."""
        self.proven = True
        if self.marks is None:
            return
        bare, full = (tokenize(self.tokenizer, "a", add_special_tokens=added) for added in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.front, self.back = full[:at], full[at + len(bare) :]
        if [self(text) for text in texts] != self.tokenize(texts, whole=True):
            self.marks, self.known = None, {}


def marks_of(tokenizer):
    """A pattern of the tokens that the chat template writes around turns, and that are cut out of any text whole."""
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "QUESTION"}]
    try:
        ids = tokenize(tokenizer, template(tokenizer, asked, add_generation_prompt=True))
    except Exception:  # noqa: BLE001  a template may refuse anything; texts are then left whole
        return None
    added = [tokenizer.added_tokens_decoder.get(token) for token in dict.fromkeys(ids)]
    marks = [mark.content for mark in added if mark and not (mark.lstrip or mark.single_word or mark.normalized)]
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────────


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


# ── what the trainer gets ────────────────────────────────────────────────────────────────────────────────────────────


def check_first(prepared, tokenizer, columns):
    """Two BOS never, one end of turn exactly: shown on the first row, as all rows are made in the same way."""
    if not prepared.rows:
        raise Refused(["no row is left to train on: every one is longer than --max_length. Raise it"])
    ids = prepared.rows[0]["input_ids"] if columns == DIALOGUE else tokenize(tokenizer, "".join(prepared.first))
    doubled = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    ends = count_ends(ids, tokenizer.eos_token_id)
    if doubled or ends != 1 and prepared.first[1]:
        given = "two BOS" if doubled else f"{ends} ends of turn"
        raise Refused(
            [
                f"the tokenizer gives {given} instead of one in the first row: {tokenizer.decode(ids)!r}. "
                "Check add_bos_token, add_eos_token and the chat template"
            ]
        )


def as_dataset(prepared):
    from datasets import Dataset

    return Dataset.from_list(prepared.rows) if prepared.rows else None


def check_none_lost(trainer, train, held_out):
    """TRL drops over-long rows without a word. They are counted here before it sees them, so it must find none."""
    for dataset, prepared in ((trainer.train_dataset, train), (trainer.eval_dataset, held_out)):
        if dataset is not None and len(dataset) != len(prepared.rows) and not getattr(trainer.args, "packing", False):
            raise RuntimeError(
                f"the trainer kept {len(dataset)} of {len(prepared.rows)} rows; the difference is not "
                "accounted for. Please report the row lengths and --max_length"
            )


def mark(prepared, tokenizer, colour):
    """The first row with its trained parts marked: in bold on a terminal, between [[ and ]] elsewhere."""
    on, off = ("\033[1m", "\033[0m") if colour else ("[[", "]]")
    row = prepared.rows[0]
    if "labels" not in row:
        prompt, answer = prepared.first
        return f"{prompt}{on}{answer or '(the policy answers)'}{off}"
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda token: token[1] != -100)
    texts = [(trained, tokenizer.decode([token for token, _ in run])) for trained, run in runs]
    return "".join(f"{on}{part}{off}" if trained else part for trained, part in texts)
