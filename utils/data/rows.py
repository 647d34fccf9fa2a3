"""Raw rows to checked rows in the method's columns. Every row is checked; every dropped row is counted.

Standard library only.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rlhf_args.methods import ANSWERED, PROMPT, RANKED, UNPAIRED
from utils.data.columns import (
    ACCEPTED,
    SAMPLE,
    Kind,
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
from utils.data.files import Row, read_rows, say_type
from utils.runtime.errors import Refused, collecting, refuse_if

SHOWN = 20  # problems printed; the count covers all


@dataclass
class Rows:
    """The rows of a run. dropped: (where, reason, values) of unusable rows. total: rows read."""

    train: list
    held_out: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    total: int = 0
    notes: list = field(default_factory=list)
    findings: list = field(default_factory=list)  # of utils/checks/findings.py


def load_rows(
    train_paths: Iterable[str] | None,
    eval_paths: Iterable[str] | None,
    columns: Kind,
    name: str,
    max_samples: int | None = None,
    problems: Iterable[str] = (),
    collected: list[str] | None = None,
) -> Rows:
    """Every row of the files, checked and in the method's columns. Raises Refused with `problems` and all found here.

    collected: collects the problems instead of raising; the sound rows are returned.
    """
    rows, refused = Rows([]), list(problems)
    asked = (
        ("--train_data_path", train_paths, rows.train, max_samples),
        ("--eval_data_path", eval_paths, rows.held_out, None),
    )
    for flag, paths, found, limit in asked:
        if paths:
            broken: list[str] | None = None if collected is None else []
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
                refused.append(f"{flag}: {say_dropped(dropped, len(read[:limit]))}. Fix them")
    firsts = [part[0] for part in (rows.train, rows.held_out) if part]
    if len({is_chat(values) for _, values in firsts}) == 2:
        refused.append(f"{firsts[0][0]} and {firsts[1][0]}: a chat and plain text. A run needs rows of one kind")
    with collecting(collected):
        refuse_if(refused)
        check_labels(rows.train, name)
    return rows


# ── checking and converting ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Pass:
    """Facts about the raw rows, collected by `walk` beside the usable rows that it yields."""

    kind: tuple = ()  # columns by which the rows are read
    problems: list = field(default_factory=list)
    dropped: list = field(default_factory=list)  # (where, reason, values)
    names: dict = field(default_factory=dict)  # of the columns
    parts: set = field(default_factory=set)  # keys of the messages
    spoken: dict = field(default_factory=dict)  # {True for chats, False for plain text: the first such row}
    margins: dict = field(default_factory=dict)
    types: dict = field(default_factory=dict)  # {further column: {type: the first such row}}


def make_rows(
    rows: list[Row], columns: Kind, notes: list[str], problems: Iterable[str] = (), collected: list[str] | None = None
) -> tuple[list[Row], list[tuple]]:
    """(checked rows in the method's columns, dropped rows as (where, reason, values)).

    Raises Refused for broken rows and for `problems` of reading: the first 20 named, all counted. collected: collects
    them instead of raising.
    """
    found = Pass(problems=list(problems))
    made = list(walk(rows, columns, notes, found))
    with collecting(collected):
        conclude(found, columns, notes)
    if columns == UNPAIRED:
        made = keep_apart(made) if found.kind != UNPAIRED else spread(made, notes)
    return made, found.dropped


def walk(rows: Iterable[Row], columns: Kind, notes: list[str], found: Pass) -> Iterator[Row]:
    """Usable rows, (where, converted). Iterates over `rows` more than once."""
    found.kind = find_kind(rows, columns)
    found.names = {name: None for _, values in rows for name in values}
    for where, given in rows:
        # a reward function gets every column of every row, None where a row lacks it
        values = found.names | given if columns == PROMPT else given
        row_kind = found.kind
        if columns == ANSWERED and values.get("prompt") is not None and values.get("completion") is None:
            row_kind = PROMPT  # the flags decide if an answer is needed: checks/distillation.py
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


def conclude(found: Pass, columns: Kind, notes: list[str]) -> None:
    """Raises Refused for broken or inconsistent rows; notes unused columns."""
    problems, spoken, margins = found.problems, found.spoken, found.margins
    if len(spoken) == 2:
        problems.append(f"{spoken[True]} is a chat and {spoken[False]} is plain text. A run needs rows of one kind")
    if len(margins) == 2 and columns == RANKED:
        problems.append(f'{margins[False]}: no "margin", and {margins[True]} has one. All rows need one, or none')
    problems += check_further(found.types)
    refuse_rows(problems)
    extra = sorted(found.names.keys() - {name for kind in ACCEPTED[columns] for name in kind} - {"margin"})
    if extra and columns == PROMPT:
        notes.append(f"columns passed to the reward functions: {', '.join(extra)}")
    elif extra:
        notes.append(f"columns not used: {', '.join(extra)}")
    parts = sorted(found.parts - {"role", "content"})
    if parts:
        notes.append(f"message keys not used: {', '.join(parts)}")


def refuse_rows(problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more, {len(problems)} in all"] if len(problems) > SHOWN else []
        raise Refused(problems[:SHOWN] + more)


def check_labels(rows: list[Row], name: str) -> None:
    """Raises Refused if all labels are equal: KTO compares both (trl#1724)."""
    labels = {values["label"] for _, values in rows if "label" in values}
    if len(labels) == 1:
        raise Refused(
            f"--train_data_path: all {len(rows)} labels are {str(labels.pop()).lower()}. {name} needs rows "
            f"of both labels, true and false, as in {SAMPLE[UNPAIRED]}"
        )


def check_dropped(rows: Rows, max_drop_fraction: float) -> None:
    """Raises Refused if more than max_drop_fraction of the rows are unusable, or all."""
    share = len({where for where, _, _ in rows.dropped}) / rows.total
    if share > max_drop_fraction or share == 1:
        limits = [re.search(r"max_\w*length", reason) for _, reason, _ in rows.dropped]
        flag = next((limit[0] for limit in limits if limit), None)
        way_out = "Fix them" + (f", or raise --{flag}" if flag else "")
        if share < 1:
            way_out = f"More than --max_drop_fraction {max_drop_fraction:g}. {way_out}, or type --max_drop_fraction 1"
        raise Refused(f"{say_dropped(rows.dropped, rows.total)}. {way_out}")


def say_dropped(dropped: list[tuple], total: int) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(dropped).items())
    first = "; ".join(f"{where} {reason}" for where, reason, _ in dropped[:5])
    return f"{len({where for where, _, _ in dropped})} of {total} rows cannot be used ({counts}). The first: {first}"


def count_reasons(dropped: list[tuple]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, reason, _ in dropped:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def hold_out(rows: Rows, fraction: float, seed: int) -> None:
    """Move a random share of the training rows to held_out; the two halves of a converted pair stay together.

    A share above 0 is at least one row and leaves at least one. Raises Refused for a single row.
    """
    if not 0 < fraction < 1:  # any other share is refused by flags.check_common
        return
    places = list(dict.fromkeys(where for where, _ in rows.train))
    if len(places) < 2:
        raise Refused(f"--eval_fraction {fraction:g}: needs at least 2 rows. Type --eval_fraction 0")
    random.Random(seed).shuffle(places)
    held = set(places[: count_held(len(places), fraction)])
    rows.held_out += [row for row in rows.train if row[0] in held]
    rows.train = [row for row in rows.train if row[0] not in held]


def count_held(rows: int, fraction: float) -> int:
    """Number of held-out rows: with a fraction above 0 at least one, and one is left."""
    return min(max(round(rows * fraction), 1), rows - 1) if fraction else 0


def hash_rows(rows: list, in_order: bool = False) -> str:
    """sha256 of the rows, independent of their files and, unless in_order, of their order."""
    lines = (to_json(values) for _, values in rows)
    text = "\n".join(lines if in_order else sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def text_key(*values: object) -> int:
    return int.from_bytes(hashlib.sha256(to_json(values).encode()).digest()[:8], "little")


def to_json(values: object) -> str:
    """Values as JSON with sorted names. A type unknown to JSON (date, Decimal, bytes) becomes its str()."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
