"""Rows that repeat or contradict each other."""

import collections
import json

from utils.data.files import Row


def to_key(row: dict, without: tuple[str, ...] = ("label", "margin", "further")) -> str:
    """Equal for rows with the same prompt and answers. without: columns to ignore."""
    return json.dumps([(name, row[name]) for name in sorted(row) if name not in without], default=str)


def find_again(made: list[Row]) -> dict[str, str]:
    """{row: the earlier row that it repeats}, by all columns that training or a reward function uses."""
    keys: dict[str, list[str]] = collections.defaultdict(list)
    firsts: dict[tuple, str] = {}
    for where, row in made:
        keys[where].append(to_key(row, ()))
    found = {where: firsts.setdefault(tuple(key), where) for where, key in keys.items()}
    return {where: first for where, first in found.items() if first != where}


def find_against(made: list[Row]) -> dict[str, str]:
    """{row: the row that contradicts it}: with chosen and rejected swapped, or the opposite label."""
    found: dict[str, str] = {}
    said: dict[str, str] = {}
    for where, row in made:
        other = {"chosen": row["rejected"], "rejected": row["chosen"]} if "chosen" in row else {}
        other |= {"label": not row["label"]} if "label" in row else {}
        said.setdefault(to_key(row, ("margin",)), where)
        opposite = said.get(to_key(row | other, ("margin",))) if other else None
        found |= {where: opposite} if opposite else {}
    return found


def say_two(found: dict[str, str]) -> str:
    where, other = next(iter(found.items()))
    return f"{where} and {other}"


def weigh(true: int, false: int) -> str:
    """Advice on the KTO weights: weight x rows, good to bad answers, should be 1:1 to 4:3.

    Source: KTO, arXiv 2402.01306, eq. 8; trl@1.16 kto_trainer.py warns by the same rule.
    """
    if false <= true and 3 * true <= 4 * false:
        return "within KTO's 1:1 to 4:3; no weights are needed"
    if true < false:  # in hundredths, rounded inwards
        flag, least, most = "desirable_weight", -(-100 * false // true), 400 * false // (3 * true)
    else:
        flag, least, most = "undesirable_weight", -(-75 * true // false), 100 * true // false
    even, within = least if true < false else most, f"{least / 100:g} to {most / 100:g}"
    return f"type --{flag} {even / 100:g} ({within} bring them within 1:1 to 4:3)"
