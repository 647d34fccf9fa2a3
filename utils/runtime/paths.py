"""Paths that a user gives, and atomic writes."""

import difflib
import glob
import os
import shutil
from pathlib import Path

# made by utils/demo_model.py
DEMO_MODEL, DEMO_STUDENT = "models/SmolLM2-135M-Instruct", "models/SmolLM2-106M-student"


def looks_local(path: str) -> bool:
    """True if `path` can only be a file or folder here, not a Hub id (`owner/name`, or `name` as gpt2 has it)."""
    return len(Path(path).parts) not in (1, 2) or path.startswith((".", "/", "~")) or path.endswith("/")


def near_path(path: str | Path) -> str:
    """ ". Did you mean data/kto.jsonl?" if a file or folder has a similar name, otherwise ""."""
    wanted = Path(path).expanduser()
    near = difflib.get_close_matches(wanted.name, [other.name for other in wanted.parent.glob("*")], 1)
    return f". Did you mean {wanted.parent / near[0]}?" if near and not wanted.exists() else ""


def check_writable(folder: Path, flag: str = "--output_dir ") -> list[str]:
    """Problems of creating the folder or writing to it. flag: printed before the folder."""
    if folder.is_file():
        return [f"{flag}{folder}: a file of that name is there. Name a folder"]
    above = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not above.exists():
        return [f"{flag}{folder}: {above} is a link to {os.readlink(above)}, which is gone. Name another folder"]
    if not above.is_dir() or not os.access(above, os.W_OK):
        return [f"{flag}{folder}: nothing can be written in {above}. Name another folder"]
    return []


def check_overwrite(folder: str | Path, reads: list[tuple[str, str]]) -> list[str]:
    """Problems of emptying the folder. reads: (flag, path or glob) of every input of the run."""
    return [
        f"--overwrite_output_dir: would delete {path}, which --{flag} reads. Name another --output_dir"
        for flag, path in reads
        if any(is_inside(found, folder) for found in (path, *glob.glob(os.path.expanduser(path))))
    ]


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """True if `path` exists in `folder`, by its name or through links."""
    here, folder = Path(path).expanduser(), Path(folder)
    within = here.resolve().is_relative_to(folder.resolve()) or here.absolute().is_relative_to(folder.absolute())
    return within and (here.exists() or glob.has_magic(str(here)))


def empty(folder: str | Path, keep: tuple[str, ...] = ()) -> None:
    """Deletes everything in a folder except the names in `keep`. Links are deleted, never their targets."""
    for path in Path(folder).iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_whole(file: str | Path, text: str) -> None:
    """Atomic: a reader finds the old content or the new one, never a part."""
    part = Path(f"{file}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
