"""Data files to raw rows with their place: jsonl, json, csv, parquet, folders, globs, Hub ids.

Standard library only, except for parquet (pyarrow) and Hub ids (datasets): a bad file is refused at once.
"""

import contextlib
import csv
import glob
import io
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.runtime.errors import Refused
from utils.runtime.paths import looks_local, near_path

Row = tuple[str, dict]  # where it stands ("data/kto.jsonl:17"), and its columns
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
MESSAGES = re.compile(r"\s*\[\s*\{")  # start of a list of messages written as text


def find_files(paths: Iterable[str], flag: str) -> list[str]:
    """The files that paths, folders and globs stand for, in order; Hub ids stay unchanged. Raises Refused."""
    found, problems = [], []
    for path in paths:
        here = Path(path).expanduser()
        if not path.strip():
            files, problem = [], f"{flag}: the path is empty. Type {flag} data/preference.jsonl to try"
        elif here.is_dir():
            files = sorted(str(file) for file in here.iterdir() if is_data(file))
            problem = f"{flag} {path}: no {', '.join(ENDINGS)} file in this folder"
        elif here.is_file():
            files = [str(here)] if is_data(here) else []
            problem = f"{flag} {path}: not {', '.join(ENDINGS)}. Convert or unpack it first"
        elif glob.has_magic(path):
            files = sorted(file for file in glob.glob(str(here), recursive=True) if is_data(Path(file)))
            problem = f"{flag} {path}: no {', '.join(ENDINGS)} file matches"
        else:
            owner = here.parts[0]  # of a data set's id, OWNER/NAME
            local = looks_local(path) or len(here.parts) == 1 or Path(owner).is_dir() or is_ending(here)
            files = [] if local else [path]
            problem = f"{flag} {path}: no such file or folder{near_path(path)}"
        found += files
        if not files:
            problems.append(problem)
    if problems:
        raise Refused(problems)
    return found


def is_ending(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def is_data(path: Path) -> bool:
    return is_ending(path) and path.is_file()


class FileRows:
    """Iterates over the rows of files; each pass reads the files again, so that no file is held in memory.

    After a pass, `notes` are for the user and `problems` are unreadable rows. Raises Refused for a missing file.
    """

    def __init__(self, paths: Iterable[str], flag: str, limit: int | None = None) -> None:
        self.files, self.limit = find_files(paths, flag), limit

    def __iter__(self) -> Iterator[Row]:
        self.notes: list[str] = []
        self.problems: list[str] = []
        return itertools.islice(self.read(), self.limit)

    def read(self) -> Iterator[Row]:
        for file in self.files:
            rows, problems = 0, len(self.problems)
            try:
                read = READERS.get(Path(file).suffix.lower(), read_hub)
                for line, values in read(file, self.notes, self.problems):
                    where = f"{file}:{line}"
                    if isinstance(values, dict):
                        rows += 1
                        yield where, values
                    else:
                        self.problems.append(f"{where}: {say_type(values)}, not an object with columns")
            except UnicodeDecodeError:
                self.problems.append(say_not_utf8(file))
            except OSError as error:
                self.problems.append(f"{file}: {error.strerror or error}")
            if not rows and len(self.problems) == problems:
                self.problems.append(f"{file}: contains no rows")


def read_rows(paths: Iterable[str], flag: str) -> tuple[list[Row], list[str], list[str]]:
    """(rows of the files, notes for the user, problems of unreadable rows). Raises Refused for a missing file."""
    reader = FileRows(paths, flag)
    rows = list(reader)
    return rows, reader.notes, reader.problems


def say_not_utf8(file: str) -> str:
    try:
        Path(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"{file}:{line}: not UTF-8 (byte {error.start}). Save the file as UTF-8"
    return f"{file}: not UTF-8. Save the file as UTF-8"


def read_text(file: str) -> str:
    return Path(file).read_text(encoding="utf-8-sig")  # with or without a byte order mark, any line ends


def read_jsonl(file: str, notes: list[str], problems: list[str]) -> Iterator[tuple[int, object]]:
    with open(file, encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("[") and not has_json_line(text := read_text(file)):
            notes.append(f"{file} contains one JSON array, not one row per line; read as an array")
            yield from parse_json(file, text, problems)
            return
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.rstrip("\n"))
                except json.JSONDecodeError as error:
                    problems.append(f"{file}:{number}: not valid JSON ({error.msg}, column {error.colno})")


def has_json_line(text: str) -> bool:
    """True if the first of several lines is valid JSON, not the start of an array that spans lines."""
    first, *more = text.strip().split("\n", 1)
    try:
        return bool(more) and json.loads(first) is not None
    except ValueError:
        return False


def read_json_rows(file: str, notes: list[str], problems: list[str]) -> Iterator[tuple[int, object]]:
    text = read_text(file)
    if text.count("\n{") and not text.lstrip().startswith("["):
        notes.append(f"{file} contains one JSON object per line, not an array; read as jsonl")
        yield from read_jsonl(file, notes, problems)
    else:
        yield from parse_json(file, text, problems)


def parse_json(file: str, text: str, problems: list[str]) -> Iterator[tuple[int, object]]:
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        problems.append(f"{file}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})")
        return
    yield from enumerate(content if isinstance(content, list) else [content], 1)


def read_csv(file: str, notes: list[str], problems: list[str]) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(2**31 - 1)  # Python's default, 128 kB, is too small for a long conversation
    reader = csv.reader(io.StringIO(read_text(file)), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(header):
                problems.append(
                    f"{file}:{reader.line_num}: {len(cells)} cells, but the header has {len(header)}. "
                    'Write text with a comma, a quote or a line break in "double quotes"'
                )
            elif cells:
                yield reader.line_num, dict(zip(header, map(from_cell, cells), strict=True))
    except csv.Error as error:
        problems.append(f"{file}:{reader.line_num}: not valid csv ({error}). Write a quote inside quoted text twice")


def from_cell(cell: str) -> object:
    """The value of a csv cell: messages written as JSON, or text."""
    with contextlib.suppress(ValueError):
        return json.loads(cell) if MESSAGES.match(cell) else cell
    return cell


def read_parquet(file: str, notes: list[str], problems: list[str]) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
    except pyarrow.ArrowInvalid as error:
        problems.append(f"{file}: not a parquet file ({str(error).splitlines()[0]})")


def read_hub(name: str, notes: list[str], problems: list[str]) -> Iterator[tuple[int, object]]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; the error is reported below
    name, _, split = name.partition(":")
    try:
        yield from enumerate(load_dataset(name, split=split or "train"), 1)
    except Exception as error:  # noqa: BLE001  the hub client has no common base class
        problems.append(
            f"{name}: neither a file or folder here nor a readable Hub dataset ({type(error).__name__}: "
            f"{' '.join(str(error).split())}){near_path(name)}"
        )


READERS = {".jsonl": read_jsonl, ".json": read_json_rows, ".csv": read_csv, ".parquet": read_parquet}


def say_type(value: object) -> str:
    known = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else known.get(type(value), f"a {type(value).__name__}")
