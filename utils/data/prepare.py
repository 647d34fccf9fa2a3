"""Rows to training text: with the chat template, one BOS if the tokenizer adds one, and one end of turn.

TRL's trainers get plain text, which all of them tokenise the same way. Given messages, DPO would train
`...ok<|im_end|>\\n` and CPO `...ok<|im_end|>\\n<|im_end|>`.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from rlhf_args.methods import ANSWERED, DIALOGUE, PROMPT, RANKED
from utils.data.files import Row
from utils.data.rows import refuse_rows
from utils.data.template import assistant_spans, count_ends, label_turns, render, say_error, shared_length, tokenize
from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase, Trainer

Room = Callable[[dict], float]  # a row's values -> the maximum tokens of its prompt
CHUNK = 512  # rows whose texts are tokenised at once


@dataclass
class Prepared:
    """Rows as the trainer takes them. dropped: (where, reason, values). first: (prompt, answer) of the first row."""

    rows: list[dict] = field(default_factory=list)
    dropped: list[tuple[str, str, dict]] = field(default_factory=list)
    cut: int = 0  # rows whose answer is truncated at max_length
    sizes: list[list[int]] = field(default_factory=list)  # tokens of each sequence of each row
    reshaped: int = 0  # rows whose prompt the template writes differently before an answer
    first: tuple[str, str] = ("", "")
    # for utils/checks/findings.py, over all rows, also those dropped for their length:
    lengths: dict[str, list[int]] = field(default_factory=dict)  # {prompt, chosen, ...: tokens in each row}
    longest: int = 0  # tokens of the longest row, prompt and answer
    spanned: int = 0  # rows in which a token spans prompt and answer
    odd: list[tuple[str, str]] = field(default_factory=list)  # (where, problem): not one BOS and one end of turn
    highest: int = 0  # highest token id


def no_limit(values: dict) -> float:
    return 10**9


def prepare_rows(
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    columns: tuple[str, ...],
    max_length: int | None,
    max_prompt: Room = no_limit,
) -> Prepared:
    """Text rows for the trainer of a method with these columns. Raises Refused where the template rejects a row.

    max_length: tokens of prompt and answer, or of the prompt alone if the policy samples the answer.
    max_prompt: the maximum tokens of a row's prompt that leave room for a sampled answer.
    """
    if columns == DIALOGUE and not tokenizer.is_fast:
        raise Refused("the tokenizer has no fast version (tokenizer.json), which locates the turns in the text")
    prepared, problems = Prepared(), []
    limit = 10**9 if max_length is None else max_length
    for start in range(0, len(rows), CHUNK):
        rendered = []
        for where, values in rows[start : start + CHUNK]:
            try:
                prompt, answers, reshaped = render(tokenizer, values)
                spans = assistant_spans(tokenizer, values, prompt + answers[0]) if columns == DIALOGUE else []
                rendered.append((where, values, prompt, answers, reshaped, spans))
            except Exception as error:  # noqa: BLE001  a template raises any class (jinja2, TypeError, ...)
                problems.append(f"{where}: the chat template refuses it ({say_error(error)})")
        if not rendered:
            continue
        texts = dict.fromkeys(prompt + answer for _, _, prompt, answers, *_ in rendered for answer in ("", *answers))
        tokens = tokenize_all(tokenizer, list(texts))
        ids = dict(zip(texts, tokens["input_ids"], strict=True))
        places = {text: place for place, text in enumerate(texts)}
        prepared.highest = max([prepared.highest, *(max(one, default=0) for one in ids.values())])
        for where, values, prompt, answers, reshaped, spans in rendered:
            alone, whole = ids[prompt], [ids[prompt + answer] for answer in answers]
            if columns == DIALOGUE:
                token_at = functools.partial(tokens.char_to_token, places[prompt + answers[0]])
                row = label_turns(whole[0], token_at, spans)
            else:
                row = trainer_row(values, prompt, answers, alone, whole, columns)
            labels = enumerate(row.get("labels", ()))
            # index of the first trained token: it must be below max_length
            trained_from = next((i for i, label in labels if label != -100), None if "labels" in row else len(alone))
            longest = max(map(len, whole))
            if trained_from is None:
                prepared.dropped.append((where, "no assistant turn in the template's output", values))
                continue
            add_lengths(prepared, where, values, alone, whole, tokenizer, columns)
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
    return prepared


def tokenize_all(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> "BatchEncoding":
    """The tokens of several texts, from one call of the tokenizer on all its threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # only here: its threads do not survive a fork (data loaders)
    try:
        return tokenizer(texts, return_attention_mask=False)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def trainer_row(
    values: dict, prompt: str, answers: list[str], alone: list[int], whole: list[list[int]], columns: tuple[str, ...]
) -> dict:
    """The row as TRL's trainer takes it. alone, whole: token ids of the prompt, and of the prompt with each answer."""
    if columns == PROMPT:  # unchanged: TRL also passes it to the reward functions
        return {"prompt": values["prompt"], **values["further"]}
    if columns == ANSWERED:
        start = shared_length(alone, whole[0])
        return {"prompt_ids": whole[0][:start], "completion_ids": whole[0][start:]}
    if columns == RANKED:
        row = {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
    else:
        names = ("chosen", "rejected") if "chosen" in values else ("completion",)
        row = {"prompt": prompt, **dict(zip(names, answers, strict=True))}
    return row | {name: values[name] for name in ("label", "margin") if name in values}


def add_lengths(
    prepared: Prepared,
    where: str,
    values: dict,
    alone: list[int],
    whole: list[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    columns: tuple[str, ...],
) -> None:
    """Add a row's lengths and odd tokens to `prepared`. alone: ids of the prompt; whole: ids with each answer."""
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
            prepared.odd.append((where, f"{ends} ends of turn after the answer"))
        elif names and columns != DIALOGUE and (inside := ids[len(alone) :].count(eos) - 1) > 0:
            prepared.odd.append((where, f"{inside} of {tokenizer.eos_token} inside the answer"))
        else:
            continue
        break


# ── what the trainer gets ────────────────────────────────────────────────────────────────────────────────────────────


def check_first(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", columns: tuple[str, ...]) -> None:
    """Raises Refused if the first row has two BOS or not exactly one end of turn. All rows are made the same way."""
    if not prepared.rows:
        raise Refused("no rows are left to train on: all are longer than --max_length. Raise it")
    ids = prepared.rows[0]["input_ids"] if columns == DIALOGUE else tokenize(tokenizer, "".join(prepared.first))
    doubled = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    ends = count_ends(ids, tokenizer.eos_token_id)
    if doubled or ends != 1 and prepared.first[1]:
        given = "two BOS" if doubled else f"{ends} ends of turn"
        raise Refused(
            f"the tokenizer gives {given} instead of one in the first row: {tokenizer.decode(ids)!r}. "
            "Check add_bos_token, add_eos_token and the chat template"
        )


def as_dataset(prepared: Prepared) -> "Dataset | None":
    from datasets import Dataset

    return Dataset.from_list(prepared.rows) if prepared.rows else None


def check_none_lost(trainer: "Trainer", train: Prepared, held_out: Prepared) -> None:
    """Raises RuntimeError if TRL dropped rows, as it silently does: over-long rows were dropped and counted before."""
    for dataset, prepared in ((trainer.train_dataset, train), (trainer.eval_dataset, held_out)):
        if dataset is not None and len(dataset) != len(prepared.rows) and not getattr(trainer.args, "packing", False):
            raise RuntimeError(
                f"the trainer kept {len(dataset)} of {len(prepared.rows)} rows; the difference is not "
                "accounted for. Please report the row lengths and --max_length"
            )


def mark(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", colour: bool) -> str:
    """The first row with its trained parts marked: in bold on a terminal, between [[ and ]] elsewhere."""
    on, off = ("\033[1m", "\033[0m") if colour else ("[[", "]]")
    row = prepared.rows[0]
    if "labels" not in row:
        prompt, answer = prepared.first
        return f"{prompt}{on}{answer or '(the policy answers)'}{off}"
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda token: token[1] != -100)
    texts = [(trained, tokenizer.decode([token for token, _ in run])) for trained, run in runs]
    return "".join(f"{on}{part}{off}" if trained else part for trained, part in texts)
