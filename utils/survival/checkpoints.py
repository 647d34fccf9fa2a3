"""Checkpoints that can be relied on: each is whole and of the run that goes on from it, or it is said and not used.

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
from pathlib import Path

from utils.runtime.errors import Failed
from utils.runtime.paths import write_whole

MANIFEST = "manifest.json"
ASIDE = "checkpoint-being-written"
NAME = re.compile(r"checkpoint-(\d+)")


# ── whole, or not ────────────────────────────────────────────────────────────────────────────────────────────────────


def seal(folder, run):
    """Writes the manifest of a checkpoint whose files are all there; `run` as of describe_run."""
    files = {str(file.relative_to(folder)): {"bytes": file.stat().st_size} for file in walk(folder)}
    write_manifest(folder, {"run": run, "files": files})


def add_hashes(folder):
    """Adds each file's sha256 to the manifest; meanwhile the run may train on, and even delete the checkpoint."""
    with contextlib.suppress(OSError):  # deleted meanwhile, or a disk that is full
        manifest = read_manifest(folder)
        for name, described in manifest["files"].items():
            described["sha256"] = hash_file(folder / name)
        write_manifest(folder, manifest)


def add_hashes_meanwhile(folder):
    """The thread in which add_hashes runs; hashing lets other threads compute."""
    thread = threading.Thread(target=add_hashes, args=(folder,))
    thread.start()
    return thread


def problems_of(folder, hashes=True):
    """What is wrong with a checkpoint's files, one line each; [] where it is whole. `hashes`: read all of them."""
    if not Path(folder, MANIFEST).exists():
        return [f"no {MANIFEST}"]
    try:
        manifest = read_manifest(folder)
        files = {Path(folder, name): described for name, described in manifest["files"].items()}
        found = [problem_of(file, described, hashes) for file, described in files.items()]
        return [problem for problem in found if problem] if manifest["run"] else [f"{MANIFEST} names no run"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]


def problem_of(file, described, hashes):
    if not file.exists():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if size != described["bytes"]:
        return f"{file.name} has {size} of {described['bytes']} bytes"
    if hashes and "sha256" in described and hash_file(file) != described["sha256"]:
        return f"{file.name} is not what was written (sha256)"
    return None


def newest_whole(folder, hashes=True):
    """(the newest checkpoint that is whole or None, a line for each newer one that is not)."""
    skipped = []
    for checkpoint in list_checkpoints(folder):
        problems = problems_of(checkpoint, hashes)
        if not problems:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is damaged, and skipped: {'; '.join(problems[:3])}")
    return None, skipped


def rename(written, target):
    """Gives a checkpoint its name; one of the same step, from before a resume, makes room for it."""
    if target.exists():
        os.replace(target, written.with_name(f"{written.name}-replaced"))
    os.replace(written, target)


def rotate(folder, keep, best, newest):
    """Deletes the oldest checkpoints but so many (None: no limit), never the newest nor the best.

    Those of later steps, from before a resume, do not count: they may be the damaged ones.
    """
    kept = {Path(newest), *([Path(best)] if best else [])}
    others = [path for path in list_checkpoints(folder) if path not in kept and step_of(path) < step_of(newest)]
    for path in others[max(keep - len(kept), 0) :] if keep else ():
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint):
    return int(NAME.fullmatch(Path(checkpoint).name)[1])


def walk(folder):
    return sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != MANIFEST)


def read_manifest(folder):
    return json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))


def write_manifest(folder, manifest):
    write_whole(Path(folder, MANIFEST), json.dumps(manifest, indent=1, ensure_ascii=False))


def hash_file(file):
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ── of the same run, or not ──────────────────────────────────────────────────────────────────────────────────────────


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def says_when_full(folder, what):
    """Turns what libraries raise on a full disk into one line: `what` was not saved there. Raises Failed."""
    try:
        yield
    except Exception as error:
        if not is_full(error, folder):
            raise
        whole = [path.name for path in list_checkpoints(folder) if not problems_of(path, hashes=False)]
        kept = f"{', '.join(whole)} {'is' if len(whole) == 1 else 'are'} whole" if whole else "no checkpoint is there"
        raise Failed(
            f"no space left on the disk of {folder}: {what} was not saved; {kept}. Make room (--save_total_limit "
            "keeps fewer), then type the same command again with --resume_from_checkpoint auto"
        ) from error


def is_full(error, folder):
    """Whether an error is that of a full disk; torch says only that writing failed."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    wrote = "failed writing" in str(error) or "write failed" in str(error) or "unexpected pos" in str(error)
    return wrote and shutil.disk_usage(folder).free < 64 * 1024**2
