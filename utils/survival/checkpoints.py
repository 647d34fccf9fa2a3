"""Checkpoints that a run can rely on: complete, and of the run that resumes; a damaged one is reported and skipped.

A checkpoint is written in a folder aside and renamed when it is complete, with a manifest of its files and its run.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from utils.runtime.errors import Failed
from utils.runtime.paths import write_whole

MANIFEST = "manifest.json"
ASIDE = "checkpoint-being-written"
NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path, run: dict) -> None:
    """Writes the manifest of a checkpoint whose files are complete. `run`: from resume.describe_run."""
    files = {str(file.relative_to(folder)): {"bytes": file.stat().st_size} for file in list_files(folder)}
    write_manifest(folder, {"run": run, "files": files})


def add_hashes(folder: Path) -> None:
    """Adds the sha256 of each file to the manifest, while training continues and may delete the checkpoint."""
    with contextlib.suppress(OSError):  # deleted in the meantime, or the disk is full
        manifest = read_manifest(folder)
        for name, described in manifest["files"].items():
            described["sha256"] = hash_file(folder / name)
        write_manifest(folder, manifest)


def add_hashes_meanwhile(folder: Path) -> threading.Thread:
    """Runs add_hashes in a thread; hashing does not hold Python's lock."""
    thread = threading.Thread(target=add_hashes, args=(folder,))
    thread.start()
    return thread


def problems_of(folder: str | Path, hashes: bool = True) -> list[str]:
    """One line per damaged file of a checkpoint; [] if it is whole. `hashes`: read every file, not only its size."""
    if not Path(folder, MANIFEST).exists():
        return [f"no {MANIFEST}"]
    try:
        manifest = read_manifest(folder)
        found = [problem_of(Path(folder, name), wanted, hashes) for name, wanted in manifest["files"].items()]
        return [problem for problem in found if problem] if manifest["run"] else [f"{MANIFEST} names no run"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]


def problem_of(file: Path, wanted: dict, hashes: bool) -> str | None:
    if not file.exists():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != wanted["bytes"]:
        return f"{file.name} has {size} of {wanted['bytes']} bytes"
    if hashes and "sha256" in wanted and hash_file(file) != wanted["sha256"]:
        return f"{file.name} has changed since it was written (sha256)"
    return None


def newest_whole(folder: str | Path, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that is whole or None, a line for each newer, damaged one)."""
    skipped: list[str] = []
    for checkpoint in list_checkpoints(folder):
        problems = problems_of(checkpoint, hashes)
        if not problems:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is damaged, and skipped: {'; '.join(problems[:3])}")
    return None, skipped


def move_into_place(written: Path, target: Path) -> None:
    """Gives a checkpoint its name. One of the same step, from before a resume, is moved away."""
    if target.exists():
        os.replace(target, written.with_name(f"{written.name}-replaced"))
    os.replace(written, target)


def rotate(folder: Path, keep: int | None, best: str | None, newest: Path) -> None:
    """Deletes the oldest checkpoints until `keep` are left (None: no limit), never the newest nor the best.

    Checkpoints of later steps, from before a resume, are not counted: they may be damaged.
    """
    kept = {Path(newest), *([Path(best)] if best else [])}
    others = [path for path in list_checkpoints(folder) if path not in kept and step_of(path) < step_of(newest)]
    for path in others[max(keep - len(kept), 0) :] if keep else ():
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_files(folder: str | Path) -> list[Path]:
    return sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != MANIFEST)


def read_manifest(folder: str | Path) -> dict:
    return json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))


def write_manifest(folder: str | Path, manifest: dict) -> None:
    write_whole(Path(folder, MANIFEST), json.dumps(manifest, indent=1, ensure_ascii=False))


def hash_file(file: str | Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def says_when_full(folder: str | Path, what: str) -> Iterator[None]:
    """Inside, an error from a full disk becomes one line: `what` was not saved. Raises Failed."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        whole = [path.name for path in list_checkpoints(folder) if not problems_of(path, hashes=False)]
        kept = f"{', '.join(whole)} {'is' if len(whole) == 1 else 'are'} whole" if whole else "no checkpoint is there"
        raise Failed(
            f"no space left on the disk of {folder}: {what} was not saved; {kept}. Free space (--save_total_limit "
            "keeps fewer checkpoints), then type the same command with --resume_from_checkpoint auto"
        ) from error


def is_disk_full(error: Exception, folder: str | Path) -> bool:
    """True if the disk is full; torch says only that writing failed."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    wrote = any(text in str(error) for text in ("failed writing", "write failed", "unexpected pos"))
    return wrote and shutil.disk_usage(folder).free < 64 * 1024**2
