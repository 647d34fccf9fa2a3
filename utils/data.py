"""Data files to checked rows. Every row is looked at before training; nothing is dropped that is not counted.

A row in here is `(where, values)`: "data/kto.jsonl:17" and a dict of its columns. Standard library only, but for
parquet (pyarrow) and Hub ids (datasets), so that a bad file is refused before anything heavy is imported.
"""

import csv
import difflib
import glob
import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_args.methods import DIALOGUE, PAIR, RANKED, UNPAIRED
from utils.checks import Refused, looks_local

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 20  # problems printed; the count covers all

# What a file may hold for a method of these columns, best first: KTO also reads pairs, Reward reads pairs, ...
ACCEPTED = {
    PAIR: (PAIR, RANKED),
    UNPAIRED: (UNPAIRED, PAIR, RANKED),
    RANKED: (RANKED, PAIR),
    DIALOGUE: (DIALOGUE, ("prompt", "completion")),
}
SAMPLE = {PAIR: "data/preference.jsonl", UNPAIRED: "data/kto.jsonl", RANKED: "data/reward.jsonl",
          DIALOGUE: "data/sft.jsonl"}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class Rows:
    """What came of the files. `dropped`: (where, reason, values) of rows that cannot be used, out of `total` read."""

    train: list
    held_out: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    total: int = 0
    notes: list = field(default_factory=list)


def load_rows(train_paths, eval_paths, columns, name, max_samples=None):
    """Every row of the files, checked and in the method's own columns. Raises Refused with all problems of a file."""
    rows = Rows([])
    for flag, paths in (("--train_data_path", train_paths), ("--eval_data_path", eval_paths)):
        if paths:
            read, notes = read_rows(paths, flag)
            read = read[:max_samples] if flag == "--train_data_path" else read
            made, dropped = make_rows(read, columns, notes)
            if flag == "--train_data_path":
                rows.train = made
            else:
                rows.held_out = made
            rows.dropped += dropped
            rows.total += len(read)
            rows.notes += notes
    check_labels(rows.train, name)
    return rows


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_files(paths, flag):
    """Files behind paths, folders and globs, in order; a Hub id stays as it is. Raises Refused."""
    found, problems = [], []
    for path in paths:
        here = Path(path).expanduser()
        if here.is_dir():
            files = sorted(str(file) for file in here.iterdir() if file.suffix in ENDINGS)
            problem = f"{flag} {path}: no {', '.join(ENDINGS)} file in this folder"
        elif here.is_file():
            files, problem = (
                ([str(here)] if here.suffix in ENDINGS else []),
                f"{flag} {path}: not {', '.join(ENDINGS)}",
            )
        elif glob.has_magic(path):
            files, problem = sorted(glob.glob(path, recursive=True)), f"{flag} {path}: no file matches"
        else:
            files = [] if looks_local(path) or here.suffix in ENDINGS else [path]
            near = difflib.get_close_matches(here.name, [p.name for p in here.parent.glob("*")], 1)
            problem = f"{flag} {path}: no such file" + (f". Did you mean {here.parent / near[0]}?" if near else "")
        found += files
        if not files:
            problems.append(problem)
    if problems:
        raise Refused(problems)
    return found


def read_rows(paths, flag="--train_data_path"):
    """All rows of the files, with where they stand, and notes for the reader: (rows, notes). Raises Refused."""
    rows, notes, problems = [], [], []
    for file in find_files(paths, flag):
        before = len(rows), len(problems)
        try:
            read = READERS.get(Path(file).suffix, read_hub)
            for line, values in read(file, notes, problems):
                where = f"{file}:{line}"
                if isinstance(values, dict):
                    rows.append((where, values))
                else:
                    problems.append(f"{where}: a {type(values).__name__}, not an object with columns")
        except UnicodeDecodeError as error:
            problems.append(f"{file}: not UTF-8 (byte {error.start}). Save it as UTF-8")
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
        if (len(rows), len(problems)) == before:
            problems.append(f"{file}: no rows in it")
    refuse_rows(problems)
    return rows, notes


def read_jsonl(file, notes, problems):
    text = Path(file).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        notes.append(f"{file} is one JSON array, not a line a row; read as that")
        yield from parse_json(file, text, problems)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                problems.append(f"{file}:{number}: not valid JSON ({error.msg}, column {error.colno})")


def read_json(file, notes, problems):
    text = Path(file).read_text(encoding="utf-8-sig")
    if text.count("\n{") and not text.lstrip().startswith("["):
        notes.append(f"{file} has a JSON object a line, not an array; read as that")
        yield from read_jsonl(file, notes, problems)
    else:
        yield from parse_json(file, text, problems)


def parse_json(file, text, problems):
    try:
        content = json.loads(text) if text.strip() else []
    except ValueError as error:
        problems.append(f"{file}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})")
        return
    yield from enumerate(content if isinstance(content, list) else [content], 1)


def read_csv(file, notes, problems):
    with open(file, encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle)
        for values in reader:
            yield reader.line_num, {key: from_cell(value) for key, value in values.items() if key}


def from_cell(cell):
    """A csv cell: messages are written as JSON in it, everything else is text."""
    if cell and cell.lstrip().startswith(("[{", '["')):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def read_parquet(file, notes, problems):
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
    except pyarrow.ArrowInvalid as error:
        problems.append(f"{file}: not a parquet file ({str(error).splitlines()[0]})")


def read_hub(name, notes, problems):
    from datasets import load_dataset

    try:
        yield from enumerate(load_dataset(name, split="train"), 1)
    except Exception as error:  # noqa: BLE001  the hub client has no common base class
        problems.append(f"{name}: neither a file here nor a readable Hub dataset ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]})")  # fmt: skip


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


# ── checking and converting ──────────────────────────────────────────────────────────────────────────────────────────


def make_rows(rows, columns, notes):
    """Checked rows of the method's own kind, and those that cannot be used: (rows, dropped).

    `dropped` is a list of (where, reason, values). Broken rows raise Refused, the first 20 named and all counted.
    """
    kind = find_kind(rows, columns)
    problems, made, dropped, spoken = [], [], [], {}
    for where, values in rows:
        problem = check_row(values, kind, columns)
        if problem:
            problems.append(f"{where}: {problem}")
            continue
        row = normalize(values, kind, notes)
        spoken.setdefault(is_chat(row), where)
        reason = useless(row, columns)
        if reason:
            dropped.append((where, reason, values))
        else:
            made += [(where, converted) for converted in convert(row, columns)]
    if len(spoken) == 2:
        problems.append(f"{spoken[True]} is a chat and {spoken[False]} is plain text. One run takes one of the two")
    refuse_rows(problems)
    if columns == UNPAIRED and kind != UNPAIRED:
        made = keep_apart(made)
    extra = sorted({name for _, values in rows for name in values} - {n for k in ACCEPTED[columns] for n in k})
    extra = [name for name in extra if name != "margin"]
    if extra:
        notes.append(f"columns not used: {', '.join(extra)}")
    return made, dropped


def find_kind(rows, columns):
    """Which accepted set of columns this data has, judged by the first row that has one."""
    for _, values in rows:
        for kind in ACCEPTED[columns]:
            if set(kind) <= set(values):
                # {"prompt", "chosen", "rejected"} holds {"chosen", "rejected"}: take the fuller one
                fuller = [k for k in ACCEPTED[columns] if set(kind) < set(k) <= set(values)]
                return fuller[0] if fuller else kind
    return ACCEPTED[columns][0]


def check_row(values, kind, columns):
    """What is wrong with one row, or None."""
    missing = [name for name in kind if values.get(name) is None]
    if missing:
        others = [name for name in values if name not in kind]
        near = difflib.get_close_matches(missing[0], others, 1, cutoff=0.7)
        guess = f' Did you mean that by "{near[0]}"?' if near else ""
        accepted = " or ".join(", ".join(k) for k in ACCEPTED[columns])
        return f'no "{missing[0]}".{guess} Accepted: {accepted}, as in {SAMPLE[columns]}'
    for name in kind:
        problem = check_label(values[name]) if name == "label" else check_text(values[name], name)
        if problem:
            return problem
    texts = [name for name in kind if name != "label"]
    if len({isinstance(values[name], list) for name in texts}) > 1:
        kinds = ", ".join(f'"{n}" is {"a chat" if isinstance(values[n], list) else "plain text"}' for n in texts)
        return f"{kinds}. All of a row are lists of messages, or all are strings"
    if "prompt" in kind and isinstance(values["prompt"], list) and values["prompt"][-1:]:
        if values["prompt"][-1]["role"] == "assistant":
            return 'the "prompt" ends with the assistant\'s turn. It ends with the turn to be answered'
    return None


def check_label(label):
    if isinstance(label, bool) or label in (0, 1) or str(label).lower() in ("true", "false", "0", "1"):
        return None
    return f'"label" is {label!r}. It is true or false (1 or 0)'


def check_text(value, name):
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f'"{name}" is a {type(value).__name__}. It is a string or a list of {{"role", "content"}}'
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            return f'"{name}" has a message with {found}. A message has "role" and "content"'
        if message["role"] not in ROLES:
            return f'"{name}" has the role {message["role"]!r}. Accepted: {", ".join(ROLES)}'
        if not isinstance(message["content"], str):
            return f'"{name}" has a message whose content is a {type(message["content"]).__name__}, not a string'
    return None


def normalize(values, kind, notes):
    """One row with a prompt, whatever its kind: {prompt, chosen, rejected} and so on, messages cut to role and content."""
    row = {name: values[name] for name in kind}
    for name, value in row.items():
        if isinstance(value, list):
            row[name] = [{"role": m["role"], "content": m["content"]} for m in value]
    if "label" in row and not isinstance(row["label"], bool):
        note = "labels written as 1 and 0 are read as true and false"
        notes += [] if note in notes else [note]
        row["label"] = str(row["label"]).lower() in ("true", "1")
    if kind == RANKED:
        row = {"prompt": common_start(row["chosen"], row["rejected"]), **row}
        for side in RANKED:
            row[side] = row[side][len(row["prompt"]) :]
    if kind == ("prompt", "completion") and isinstance(row["prompt"], list):
        row = {"messages": row["prompt"] + row["completion"]}
    if isinstance(values.get("margin"), (int, float)):
        row["margin"] = float(values["margin"])
    return row


def common_start(chosen, rejected):
    """The shared beginning of two conversations (whole messages) or two texts (up to a space): the prompt."""
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, str):
        cut = max(chosen.rfind(" ", 0, length), chosen.rfind("\n", 0, length)) + 1
        return chosen[:cut]
    return chosen[:length]


def is_chat(row):
    return any(isinstance(value, list) for value in row.values())


def useless(row, columns):
    """Why a well-formed row cannot be trained on, or None."""
    if isinstance(row.get("messages"), list):
        answers = ["".join(m["content"] for m in row["messages"] if m["role"] == "assistant")]
    else:
        answers = [text_of(row[name]) for name in ("messages", "chosen", "rejected", "completion") if name in row]
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    if row.get("prompt") == [] and columns != RANKED:
        return "no prompt"
    return None


def text_of(value):
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def convert(row, columns):
    """The rows that a method of `columns` makes of one: a pair is two thumbs for KTO."""
    if columns == UNPAIRED and "chosen" in row:
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    return [row]


def keep_apart(rows):
    """Rows made of pairs, each chosen answer followed by the rejected answer of a prompt half the file away.

    KTO estimates its KL by giving each prompt of a batch its neighbour's answer, and TRL takes the rows in order: two
    answers to one prompt must not stand together.
    """
    chosen, rejected = rows[::2], rows[1::2]
    half = len(rejected) // 2
    return [row for two in zip(chosen, rejected[half:] + rejected[:half], strict=True) for row in two]


def refuse_rows(problems):
    if problems:
        more = [f"... and {len(problems) - SHOWN} more rows like these"] if len(problems) > SHOWN else []
        raise Refused(problems[:SHOWN] + more)


def check_labels(rows, name):
    """KTO on one label has nothing to compare (trl#1724)."""
    labels = {values["label"] for _, values in rows if "label" in values}
    if len(labels) == 1:
        raise Refused(
            [f"every label is {str(labels.pop()).lower()}. {name} needs rows of both labels, true and false"]
        )


def check_dropped(rows, max_drop_fraction):
    """Too many rows that cannot be used mean that the file is not what its owner thinks. None left: nothing to train."""
    share = len({where for where, _, _ in rows.dropped}) / rows.total
    if share > max_drop_fraction or share == 1:
        counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rows.dropped).items())
        first = "; ".join(f"{where} {reason}" for where, reason, _ in rows.dropped[:5])
        way_out = "Mend them" if share == 1 else "Mend them, or type --max_drop_fraction 1"
        raise Refused([f"{share:.0%} of {rows.total} rows cannot be used ({counts}), more than --max_drop_fraction "
                       f"{max_drop_fraction:g}. The first: {first}. {way_out}"])  # fmt: skip


def count_reasons(dropped):
    counts = {}
    for _, reason, _ in dropped:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def hold_out(rows, fraction, seed):
    """Moves a random share of the training rows to held_out; the two halves of a converted pair stay together."""
    places = list(dict.fromkeys(where for where, _ in rows.train))
    random.Random(seed).shuffle(places)
    held = set(places[: round(len(places) * fraction)])
    rows.held_out += [row for row in rows.train if row[0] in held]
    rows.train = [row for row in rows.train if row[0] not in held]


def hash_rows(rows):
    """sha256 over the rows as they are trained on: the same data has the same hash, whatever file it stands in."""
    digest = hashlib.sha256()
    for _, values in rows:
        digest.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
