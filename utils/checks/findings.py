"""Facts and warnings about a run before a model is loaded: weights, lengths, rows, disk.

They are printed at the start of a run and by --check, and kept in run_card.json.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.checks import flags
from utils.checks.folders import check_vocabulary
from utils.checks.schedule import check_disk, check_schedule
from utils.cli.run import Run
from utils.data import repeats
from utils.data.prepare import Prepared
from utils.data.rows import Rows
from utils.models.folders import ModelFolder

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Finding:
    """kind: "warning", or the first word of an informing line. text: one line; a warning ends with its fix."""

    kind: str
    text: str


def find(run: Run) -> list[Finding]:
    """The findings of a run with prepared text. Raises Refused if the run cannot work."""
    common, config, rows, train, held_out = run.common, run.config, run.rows, run.train, run.held_out
    check_vocabulary(common, run.tokenizer, max(train.highest, held_out.highest))
    warnings = [
        *check_versions(),
        *check_lengths(run),
        *check_row_tokens(train, held_out),
        *check_rows(rows),
        *check_balance(config, rows),
        *check_schedule(run),
    ]
    disk, further = check_disk(run)
    lines = [
        ("weights", ModelFolder.at(common.model_name_or_path).describe_weights()),
        ("lengths", describe_lengths(train)),
        disk,
    ]
    told = [Finding(kind, text) for kind, text in lines if text]
    return told + [Finding("warning", text) for text in [*warnings, *further]]


# ── the installation ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_versions(file: Path = Path(__file__).parents[2] / "requirements.txt") -> Iterator[str]:
    """Warn of packages in another version than requirements.txt pins."""
    from packaging.version import Version

    for name, pinned in re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is not installed, pinned {pinned}. Type pip install -r {file.name}"
            continue
        if Version(installed).public != pinned:
            yield f"{name} {installed} is installed, pinned {pinned}. Type pip install -r {file.name}"


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_lengths(train: Prepared) -> str:
    """ "prompt 17, 40, 93; chosen ... tokens (median, 95 %, longest)", over all rows read."""
    said = [f"{name} {', '.join(map(str, percentiles(lengths)))}" for name, lengths in train.lengths.items()]
    return f"{'; '.join(said)} tokens (median, 95 %, longest)" if said else ""


def percentiles(lengths: list[int]) -> list[int]:
    """[median, 95th percentile, longest]: each is the smallest length that this share of rows does not exceed."""
    ordered = sorted(lengths)
    return [ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 1)]


def check_lengths(run: Run) -> Iterator[str]:
    """Warn where max_length cuts or drops rows, and name a length that would not."""
    common, config, train, held_out = run.common, run.config, run.train, run.held_out
    flag = config.length_flag
    dropped = sum("longer than" in reason for _, reason, _ in train.dropped + held_out.dropped)
    cut, longest = train.cut + held_out.cut, max(train.longest, held_out.longest)
    if not cut and not dropped:
        return
    total = sum(len(part.rows) + len(part.dropped) for part in (train, held_out))
    held = ModelFolder.at(common.model_name_or_path).positions
    room = held and held - (config.max_completion_length if run.method.sample_reward else 0)
    way_out = f"--{flag} {longest} would keep all rows whole"
    if room and room < longest:
        way_out = f"the longest has {longest} tokens; the model's context allows --{flag} {room}"
    limit = flags.length_limit(config, common.model_name_or_path)
    yield f"--{flag} {limit} drops {dropped} and cuts {cut} of {total} rows; {way_out}"


def check_row_tokens(train: Prepared, held_out: Prepared) -> Iterator[str]:
    """Warn where a token spans prompt and answer, or a row does not have exactly one BOS and one end of turn."""
    total = len(train.rows) + len(held_out.rows)
    spanned = train.spanned + held_out.spanned
    if spanned:
        yield (
            f"in {spanned} of {total} rows ({spanned / max(total, spanned):.0%}) a token spans prompt and answer, "
            "which never happens in generation. Move the space at the end of the prompts to the start of the answers"
        )
    odd = train.odd + held_out.odd
    if odd:
        (where, what), *_ = odd
        yield (
            f"{len(odd)} rows do not have exactly one BOS and one end of turn, as {where} ({what}). Remove the "
            "special tokens from the data: the chat template adds them"
        )


def check_rows(rows: Rows) -> Iterator[str]:
    """Warn of duplicate rows, contradicting rows, and held-out rows that are also trained on."""
    mend, total = "python -m utils.doctor_data FILE --fix OUT.jsonl", len(dict(rows.train))
    again, against = repeats.find_again(rows.train), repeats.find_against(rows.train)
    if again:
        two = repeats.say_two(again)
        yield f"{len(again)} of {total} rows repeat another, as {two}. `{mend}` keeps the first of each"
    if against:
        two = repeats.say_two(against)
        yield f"{len(against)} of {total} rows contradict another, as {two}. Remove the wrong ones"
    known = {repeats.to_key(row): where for where, row in rows.train} if rows.held_out else {}
    held = {where: known[key] for where, row in rows.held_out if (key := repeats.to_key(row)) in known}
    if held:
        yield (
            f"{len(held)} of {len(dict(rows.held_out))} held-out rows are also training rows, as "
            f"{repeats.say_two(held)}: the evaluation would look too good. Remove them from one file"
        )


def check_balance(config: TrainingArguments, rows: Rows) -> Iterator[str]:
    """Warn if KTO's weight x rows, desirable to undesirable, is not within 1:1 to 4:3. Source: repeats.weigh."""
    labels = [values["label"] for _, values in rows.train if "label" in values]
    true, false = labels.count(True), labels.count(False)
    if not true or not false:
        return
    good, bad = true * config.desirable_weight, false * config.undesirable_weight
    if not bad <= good <= bad * 4 / 3 + 1e-9:
        way_out = repeats.weigh(true, false)
        way_out = way_out if way_out.startswith("type") else "remove both weights"
        yield (
            f"{true} true and {false} false labels: with --desirable_weight {config.desirable_weight:g} and "
            f"--undesirable_weight {config.undesirable_weight:g} the ratio is {good:g} to {bad:g}, and KTO needs 1:1 "
            f"to 4:3: {way_out}"
        )
