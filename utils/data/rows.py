"""Raw rows to checked ones in the method's columns. Every row is looked at; nothing is dropped that is not counted.

A row in here is `(where, values)`: "data/kto.jsonl:17" and a dict of its columns. Standard library only.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field

from rlhf_args.methods import ANSWERED, PROMPT, RANKED, UNPAIRED
from utils.data.columns import (
    ACCEPTED,
    SAMPLE,
    check_characters,
    check_further,
    check_row,
    convert,
    find_kind,
    is_chat,
    keep_apart,
    normalize,
    split_answer,
    spread,
    useless,
)
from utils.data.files import read_rows, say_type
from utils.runtime.errors import Refused, collecting, refuse_if

SHOWN = 20  # problems printed; the count covers all


@dataclass
class Rows:
    """What came of the files. `dropped`: (where, reason, values) of rows that cannot be used, out of `total` read."""

    train: list
    held_out: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    total: int = 0
    notes: list = field(default_factory=list)
    findings: list = field(default_factory=list)  # of preflight.py, once their text is prepared


def load_rows(train_paths, eval_paths, columns, name, max_samples=None, problems=(), collected=None):
    """Every row of the files, checked and in the method's columns. Raises Refused: `problems` and all of its own.

    `collected`: a list that takes them instead (checks.collecting); the rows are then those that are sound.
    """
    rows, refused = Rows([]), list(problems)
    asked = (
        ("--train_data_path", train_paths, rows.train, max_samples),
        ("--eval_data_path", eval_paths, rows.held_out, None),
    )
    for flag, paths, found, limit in asked:
        if paths:
            broken = None if collected is None else []
            try:
                read, notes, unreadable = read_rows(paths, flag)
                made, dropped = make_rows(read[:limit], columns, notes, unreadable, broken)
            except Refused as refusal:
                refused += refusal.problems
                continue
            refused += broken or ()
            found += made
            rows.dropped += dropped
            rows.total += len(read[:limit])
            rows.notes += notes
            if dropped and not made and not broken:
                refused.append(f"{flag}: {say_dropped(dropped, len(read[:limit]))}. Mend them")
    firsts = [part[0] for part in (rows.train, rows.held_out) if part]
    if len({is_chat(values) for _, values in firsts}) == 2:
        refused.append(
            f"{firsts[0][0]} and {firsts[1][0]}: one is a chat, one plain text. One run takes one of the two"
        )
    with collecting(collected):
        refuse_if(refused)
        check_labels(rows.train, name)
    return rows


# ── checking and converting ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Pass:
    """What one pass over raw rows came upon besides those that it made."""

    kind: tuple = ()  # the columns that they are read by
    problems: list = field(default_factory=list)
    dropped: list = field(default_factory=list)  # (where, reason, values)
    names: dict = field(default_factory=dict)  # of their columns
    parts: set = field(default_factory=set)  # of their messages
    spoken: dict = field(default_factory=dict)  # {whether it is a chat: the first such row}
    margins: dict = field(default_factory=dict)
    types: dict = field(default_factory=dict)  # {further column: {type: the first such row}}


def make_rows(rows, columns, notes, problems=(), collected=None):
    """Checked rows of the method's own kind, and those that cannot be used: (rows, dropped).

    `dropped` is a list of (where, reason, values). Broken rows, and `problems` that reading found, raise Refused, the
    first 20 named and all counted; or go into the list `collected`.
    """
    found = Pass(problems=list(problems))
    made = list(walk(rows, columns, notes, found))
    with collecting(collected):
        conclude(found, columns, notes)
    if columns == UNPAIRED:
        made = keep_apart(made) if found.kind != UNPAIRED else spread(made, notes)
    return made, found.dropped


def walk(rows, columns, notes, found):
    """Yields the rows that can be used, (where, converted); `rows` are gone over more than once."""
    found.kind = find_kind(rows, columns)
    found.names = {name: None for _, values in rows for name in values}
    for where, given in rows:
        # a reward function is given every column of every row, None where a row has none
        values = found.names | given if columns == PROMPT else given
        row_kind = found.kind
        if columns == ANSWERED and values.get("prompt") is not None and values.get("completion") is None:
            row_kind = PROMPT  # whether an answer is needed hangs on the flags: teacher.check_distillation
        messages = (message for name in found.kind if isinstance(values.get(name), list) for message in values[name])
        problem = check_row(values, row_kind, columns) or check_characters(given)
        if problem:
            found.problems.append(f"{where}: {problem}")
            continue
        found.parts.update(part for message in messages for part in message)
        row = normalize(values, row_kind, notes)
        row = split_answer(row) if columns == ANSWERED else row
        found.spoken.setdefault(is_chat(row), where)
        found.margins.setdefault("margin" in row, where)
        for name in found.names if columns == PROMPT else ():
            if name != "prompt" and values[name] is not None:
                found.types.setdefault(name, {}).setdefault(say_type(values[name]), where)
        reason = useless(row, columns)
        if reason:
            found.dropped.append((where, reason, values))
        else:
            yield from ((where, converted) for converted in convert(row, columns, values))


def conclude(found, columns, notes):
    """Raises Refused where rows are broken or do not go together; notes what is not used of them."""
    problems, spoken, margins = found.problems, found.spoken, found.margins
    if len(spoken) == 2:
        problems.append(f"{spoken[True]} is a chat and {spoken[False]} is plain text. One run takes one of the two")
    if len(margins) == 2 and columns == RANKED:
        problems.append(f'{margins[False]}: no "margin", and {margins[True]} has one. All rows have one, or none has')
    problems += check_further(found.types)
    refuse_rows(problems)
    extra = sorted(found.names.keys() - {name for kind in ACCEPTED[columns] for name in kind} - {"margin"})
    if extra and columns == PROMPT:
        notes.append(f"columns that the reward functions are given: {', '.join(extra)}")
    elif extra:
        notes.append(f"columns not used: {', '.join(extra)}")
    parts = sorted(found.parts - {"role", "content"})
    if parts:
        notes.append(f"of the messages only role and content are used, not {', '.join(parts)}")


def refuse_rows(problems):
    if problems:
        more = [f"... and {len(problems) - SHOWN} more, {len(problems)} in all"] if len(problems) > SHOWN else []
        raise Refused(problems[:SHOWN] + more)


def check_labels(rows, name):
    """KTO on one label has nothing to compare (trl#1724)."""
    labels = {values["label"] for _, values in rows if "label" in values}
    if len(labels) == 1:
        raise Refused(
            [
                f"--train_data_path: all {len(rows)} labels are {str(labels.pop()).lower()}. {name} needs rows "
                f"of both labels, true and false, as in {SAMPLE[UNPAIRED]}"
            ]
        )


def check_dropped(rows, max_drop_fraction):
    """Too many rows that cannot be used mean that the file is not what its owner thinks. None left: no training."""
    share = len({where for where, _, _ in rows.dropped}) / rows.total
    if share > max_drop_fraction or share == 1:
        limits = [re.search(r"max_\w*length", reason) for _, reason, _ in rows.dropped]
        flag = next((limit[0] for limit in limits if limit), None)
        way_out = "Mend them" + (f", or raise --{flag}" if flag else "")
        if share < 1:
            way_out = f"More than --max_drop_fraction {max_drop_fraction:g}. {way_out}, or type --max_drop_fraction 1"
        raise Refused([f"{say_dropped(rows.dropped, rows.total)}. {way_out}"])


def say_dropped(dropped, total):
    counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(dropped).items())
    first = "; ".join(f"{where} {reason}" for where, reason, _ in dropped[:5])
    return f"{len({where for where, _, _ in dropped})} of {total} rows cannot be used ({counts}). The first: {first}"


def count_reasons(dropped):
    counts = {}
    for _, reason, _ in dropped:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def hold_out(rows, fraction, seed):
    """Moves a random share of the training rows to held_out; the two halves of a converted pair stay together.

    A share above 0 is one row at least, and leaves one. Raises Refused where there is only one.
    """
    if not 0 < fraction < 1:  # any other share is refused by flags.check_common
        return
    places = list(dict.fromkeys(where for where, _ in rows.train))
    if len(places) < 2:
        raise Refused([f"--eval_fraction {fraction:g}: of one row nothing can be held out. Type --eval_fraction 0"])
    random.Random(seed).shuffle(places)
    held = set(places[: count_held(len(places), fraction)])
    rows.held_out += [row for row in rows.train if row[0] in held]
    rows.train = [row for row in rows.train if row[0] not in held]


def count_held(rows, fraction):
    """How many of so many rows are held out: of a share above 0 one at least, and one is left."""
    return min(max(round(rows * fraction), 1), rows - 1) if fraction else 0


def hash_rows(rows: list, in_order: bool = False) -> str:
    """sha256 over the rows, whatever file they stand in and, unless `in_order`, in whatever order."""
    lines = (to_json(values) for _, values in rows)
    text = "\n".join(lines if in_order else sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def text_key(*values):
    return int.from_bytes(hashlib.sha256(to_json(values).encode()).digest()[:8], "little")


def to_json(values) -> str:
    """Values as JSON with sorted names. What JSON does not know (a date, Decimal or bytes of parquet) is its str()."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
