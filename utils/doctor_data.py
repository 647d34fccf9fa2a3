"""Check data files without training: `python -m utils.doctor_data FILE --rlhf_type DPO`.

--fix OUT.jsonl writes the rows, repaired by the rules of utils/data/repairs.py. Unusable rows go to
OUT.jsonl.dropped.jsonl, with place and reason. Exit status: 0 if training accepts the data (with --fix: the written
file), 2 if it refuses them or a flag is bad.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
from pathlib import Path

from common_args import SharedArgs
from rlhf_args.methods import ANSWERED, EVERY
from utils.checks.findings import percentiles
from utils.data.columns import Kind, is_chat, is_halved, split_answer, text_of
from utils.data.files import Row, find_files, read_rows, read_text
from utils.data.repairs import TEXTS, is_list, is_message, repair
from utils.data.repeats import find_again, find_against, say_two, to_key, weigh
from utils.data.rows import SHOWN, Pass, check_dropped, conclude, count_reasons, load_rows, walk
from utils.runtime.errors import Refused, guess_name, refuse_if
from utils.runtime.paths import check_writable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders, globs or Hub datasets to train on")
    parser.add_argument("--rlhf_type", default="DPO", help=f"method to train: {', '.join(EVERY)}; default: DPO")
    parser.add_argument("--eval", nargs="+", metavar="FILE", help="held-out data, to compare with FILE")
    parser.add_argument("--fix", metavar="OUT.jsonl", help="write the repaired rows to this file")
    parser.add_argument("--overwrite", action="store_true", help="with --fix: replace an existing file")
    asked = parser.parse_args(argv)
    try:
        return doctor(asked, find_name(asked.rlhf_type))
    except Refused as refusal:
        Refused([with_doctor_flags(problem) for problem in refusal.problems]).say()
        return 2


def doctor(asked: argparse.Namespace, name: str) -> int:
    columns = EVERY[name].columns
    files = list(dict.fromkeys(find_files(asked.files, "FILE")))
    held = find_files(asked.eval or (), "--eval")
    refuse_if(check_out(asked, files + held))
    rows, notes, unreadable = read_rows(files, "FILE")
    counts = collections.Counter(where.rpartition(":")[0] for where, _ in rows)
    say_finding("rows", "; ".join(f"{counts[file]} of {file}" for file in files))
    sound = judge(files, held, columns, name, "the data")
    parts = [part for _, row in rows for value in row.values() if is_list(value) for part in value]
    roles = collections.Counter(str(part["role" if "role" in part else "from"]) for part in parts if is_message(part))
    if roles:
        say_finding("roles", ", ".join(f"{role} {count}" for role, count in roles.most_common()))
    repaired, rules = repair(rows, columns)
    for rule, count in rules.items():
        say_finding("repair" if asked.fix else "--fix", f"{rule}: {count} row{'s' * (count > 1)}")
    examine(repaired, held, columns, notes)
    if asked.fix:
        raw = [keep_raw(problem, files) for problem in unreadable]
        write_mended(asked.fix, *keep_usable(rows, repaired, columns, raw), changed=bool(rules))
        sound = judge([asked.fix], held, columns, name, asked.fix)
    return 0 if sound else 2


def find_name(asked: str) -> str:
    found = next((name for name in EVERY if name.lower() == asked.lower()), None)
    if found is None:
        raise Refused(f"--rlhf_type {asked}: no such method. There are {', '.join(EVERY)}{guess_name(asked, EVERY)}")
    return found


def check_out(asked: argparse.Namespace, files: list[str]) -> list[str]:
    """Problems of the output file."""
    if not asked.fix:
        return ["--overwrite: only used with --fix. Type --fix OUT.jsonl"] if asked.overwrite else []
    out = Path(asked.fix)
    if out.suffix != ".jsonl":
        return [f"--fix {out}: must end in .jsonl: one row per line"]
    if out.resolve() in [Path(file).resolve() for file in files]:
        return [f"--fix {out}: is also an input. Name another file"]
    there = [path for path in (out, name_dropped(out)) if path.exists()]
    if there and not asked.overwrite:
        return [f"--fix {out}: {there[0]} already exists. Name another file, or add --overwrite"]
    return [problem.replace("--output_dir", "--fix") for problem in check_writable(out.parent)]


def say_finding(head: str, text: str) -> None:
    print(f"{head:<9} {text}")


def with_doctor_flags(problem: str) -> str:
    """A problem of training, with this command's flag names."""
    return problem.replace("--train_data_path", "FILE").replace("--eval_data_path", "--eval")


def judge(paths: list[str], held_paths: list[str], columns: Kind, name: str, what: str) -> bool:
    """Print why training with default flags refuses these files, called `what`. True if it accepts them."""
    problems = []
    try:
        rows = load_rows(paths, held_paths, columns, name)
        check_dropped(rows, SharedArgs.max_drop_fraction)
    except Refused as refusal:
        problems = refusal.problems
    say_finding(name, f"refuses {what}:" if problems else f"accepts {what}")
    for problem in problems:
        say_finding("", with_doctor_flags(problem))
    return not problems


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def examine(rows: list[Row], held_paths: list[str], columns: Kind, notes: list[str]) -> None:
    """Print statistics of the repaired, usable rows."""
    made, dropped = convert_rows(rows, columns, notes)
    for reason, count in count_reasons(dropped).items():
        first = next(where for where, why, _ in dropped if why == reason)
        say_finding("dropped", f"{count} {reason}, as {first}. Fix them, or drop them with --fix")
    for note in notes:
        say_finding("note", note)
    again, total = find_again(made), len(dict(made))
    if again:
        say_finding("repeated", f"{len(again)} of {total} rows, as {say_two(again)}. --fix keeps the first of each")
    against = find_against(made)
    if against:
        text = f"{len(against)} of {total} rows contradict another, as {say_two(against)}. Remove the wrong one"
        say_finding("against", text)
    if held_paths:
        held, _ = convert_rows(repair(read_rows(held_paths, "--eval")[0], columns)[0], columns, [])
        known = {to_key(row): where for where, row in made}
        both = {where: known[to_key(row)] for where, row in held if to_key(row) in known}
        way_out = f", as {say_two(both)}. Remove them from one file" if both else ""
        say_finding("--eval", f"{len(both)} of {len(dict(held))} rows are in the training data{way_out}")
    labels = collections.Counter(row["label"] for _, row in made if "label" in row)
    if len(labels) == 2:
        say_finding("labels", f"{labels[True]} true, {labels[False]} false: {weigh(labels[True], labels[False])}")
    lacking = sum("completion" not in row for _, row in made) if columns == ANSWERED else 0
    if lacking:
        say_finding("answers", f"{lacking} of {len(made)} rows have none. Type --lmbda 1 or --seq_kd True")
    texts = [split_answer(row) if is_chat(row) else row for _, row in made]
    for name in dict.fromkeys(name for row in texts for name in row if name in TEXTS):
        middle, most, longest = percentiles([len(text_of(row[name])) for row in texts if name in row])
        say_finding("length", f"{name}: median {middle}, 95 % within {most}, longest {longest} characters")
    if made:
        chats = sum(is_chat(row) for _, row in made)
        say_finding("form", f"{chats / len(made):.0%} chats, {1 - chats / len(made):.0%} plain text")


def convert_rows(rows: list[Row], columns: Kind, notes: list[str]) -> tuple[list[Row], list[tuple]]:
    """(rows as training converts them, rows that it drops); broken rows are in neither."""
    found = Pass()
    made = list(walk(rows, columns, notes, found))
    with contextlib.suppress(Refused):  # judge prints it
        conclude(found, columns, notes)
    return made, found.dropped


# ── the repaired file ────────────────────────────────────────────────────────────────────────────────────────────────


def keep_raw(problem: str, files: list[str]) -> tuple[str, str, str]:
    """(where, reason, text) of an unreadable line. Raises Refused if the problem may hide further rows."""
    file = next((file for file in files if problem.startswith(f"{file}:") and file.lower().endswith(".jsonl")), "")
    line = re.match(r":(\d+): ", problem.removeprefix(file))
    with contextlib.suppress(UnicodeDecodeError):
        text = read_text(file) if line else ""
        if line and not text.lstrip().startswith("["):
            return f"{file}:{line[1]}", problem.removeprefix(f"{file}{line[0]}"), text.split("\n")[int(line[1]) - 1]
    raise Refused(f"{problem}. It may hide further rows: fix it or leave out the file, then type --fix again")


def keep_usable(
    rows: list[Row], repaired: list[Row], columns: Kind, raw: list[tuple]
) -> tuple[list[dict], list[tuple]]:
    """(usable repaired rows without repeats, rows left out as (where, reason, original row))."""
    found = Pass()
    made = list(walk(repaired, columns, [], found))
    again, reasons = find_again(made), {where: reason for where, reason, _ in found.dropped}
    taken = {where for where, _ in made} | reasons.keys()
    broken = [where for where, _ in repaired if where not in taken]  # one problem each, in order
    reasons |= {where: said[len(where) + 2 :] for where, said in zip(broken, found.problems, strict=True)}
    reasons |= dict.fromkeys(again, "repeats an earlier row")
    kept = [row for where, row in repaired if where not in reasons]
    return kept, raw + [(where, reasons[where], row) for where, row in rows if where in reasons]


def write_mended(out: str, rows: list[dict], dropped: list[tuple], changed: bool) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    name_dropped(out).unlink(missing_ok=True)
    Path(out).write_text("".join(map(to_line, rows)), encoding="utf-8")
    for reason, count in list(count_reasons(dropped).items())[:SHOWN]:
        say_finding("left out", f"{count} {reason}")
    if dropped:
        lines = [{"where": where, "reason": reason, "row": row} for where, reason, row in dropped]
        name_dropped(out).write_text("".join(map(to_line, lines)), encoding="utf-8")
        say_finding("", f"{name_dropped(out)} lists all {len(dropped)}, with place and reason")
    elif not changed:
        say_finding("note", "nothing to repair: the rows are written unchanged")
    say_finding("written", f"{out}: {len(rows)} of {len(rows) + len(dropped)} rows")


def name_dropped(out: str | Path) -> Path:
    return Path(f"{out}.dropped.jsonl")


def to_line(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return (json.dumps(row, default=str) if is_halved(text) else text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
