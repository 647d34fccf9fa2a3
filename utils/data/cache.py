"""A cache of prepared rows, as JSON in ~/.cache/rlhf_prepared (or XDG_CACHE_HOME).

The key hashes all inputs: the rows, the tokenizer with its template, the limits and the code. A file that cannot be
read or written is ignored.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_args.methods import PROMPT
from utils.data import prepare
from utils.data.files import Row
from utils.data.prepare import Room, no_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOM = 4 * 1024**3  # bytes of all entries; an entry above half of it is not kept


def prepare_once(
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    columns: tuple[str, ...],
    max_length: int | None,
    max_prompt: Room = no_limit,
) -> prepare.Prepared:
    """prepare.prepare_rows, or its result from an earlier start with the same inputs."""
    made_of = make_key(rows, tokenizer, columns, max_length, max_prompt)
    file = folder() / f"{made_of}.json" if made_of else None
    prepared = read(file, rows, columns) if file else None
    if prepared is None:
        prepared = prepare.prepare_rows(rows, tokenizer, columns, max_length, max_prompt)
        if file and os.environ.get("LOCAL_RANK", "0") == "0":
            write_entry(file, rows, columns, prepared)
    return prepared


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_prepared"


def make_key(
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    columns: tuple[str, ...],
    max_length: int | None,
    max_prompt: Room,
) -> str | None:
    """A hash of all inputs of prepare_rows; None for a tokenizer that cannot be serialised."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    template = json.dumps(tokenizer.chat_template)
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    today = time.strftime("%Y-%m-%d") if "strftime_now" in template else ""  # the template may write the date
    parts = [columns, max_length, template, special, versions, today, tokenizer.backend_tokenizer.to_str()]
    parts += [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(json.dumps(part).encode()).digest())
    for where, values in rows:
        used = {name: value for name, value in values.items() if name != "further"}
        line = json.dumps([where, used, max_prompt(values)], default=str)
        total.update(hashlib.sha256(line.encode()).digest())
    return total.hexdigest()


def read(file: Path, rows: list[Row], columns: tuple[str, ...]) -> prepare.Prepared | None:
    """The Prepared that `write` stored for the same rows, or None."""
    try:
        digest, _, body = file.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest() != digest.decode():
            return None
        held = json.loads(body)
        os.utime(file)  # marks the entry as used
    except (OSError, ValueError):
        return None
    dropped = dict(held["dropped"])
    held["dropped"] = [(rows[place][0], reason, rows[place][1]) for place, reason in dropped.items()]
    held["odd"] = [tuple(odd) for odd in held["odd"]]
    held["first"] = tuple(held["first"])
    if columns == PROMPT:
        kept = [values for place, (_, values) in enumerate(rows) if place not in dropped]
        held["rows"] = [{"prompt": values["prompt"], **values["further"]} for values in kept]
    return prepare.Prepared(**held)


def write_entry(file: Path, rows: list[Row], columns: tuple[str, ...], prepared: prepare.Prepared) -> None:
    """Atomic; only the user can read the file."""
    places = {id(values): place for place, (_, values) in enumerate(rows)}
    dropped = [(places[id(values)], reason) for _, reason, values in prepared.dropped]
    held = vars(prepared) | {"dropped": dropped, "rows": [] if columns == PROMPT else prepared.rows}
    body = json.dumps(held).encode()
    if len(body) > ROOM // 2:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_room(file.parent, len(body))
        handle, part = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(part, file)
        except OSError:
            os.unlink(part)


def make_room(folder: Path, wanted: int) -> None:
    """Delete the least recently used entries until `wanted` bytes fit."""
    entries = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.iterdir())
    total = sum(size for _, size, _ in entries)
    for _, size, file in entries:
        if total + wanted <= ROOM:
            break
        file.unlink(missing_ok=True)
        total -= size
