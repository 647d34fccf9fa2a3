"""The rooms of the house: no import circle, and no room that imports one above it. `pytest tests/test_rooms.py`"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a file imports from its own floor and from those below. Within a floor there is no circle either.
FLOORS = (
    ("rlhf_args", "utils/runtime"),
    ("utils/models", "utils/data", "utils/cli", "common_args.py"),
    ("utils/rewards", "utils/survival"),
    ("utils/checks", "utils/results", "trainers"),
    ("utils/training",),
    ("utils/rejection", "utils/plan"),
    ("utils", "train_rlhf.py", "train_gkd.py", "rejection_sampling.py"),
)


def floor_of(file):
    """The floor of a path from the repository's root: that of its folder, or its own."""
    name = file.as_posix()
    return next(floor for floor, rooms in enumerate(FLOORS) if name in rooms or file.parent.as_posix() in rooms)


def files():
    found = [
        file.relative_to(ROOT) for room in ("rlhf_args", "trainers", "utils") for file in (ROOT / room).rglob("*.py")
    ]
    return [*found, *(file.relative_to(ROOT) for file in ROOT.glob("*.py"))]


def imports(file, known):
    """The project's files that `file` imports, at its top or within a function."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (path for name in names if (path := Path(*name.split(".")).with_suffix(".py")) in known)


def arrows():
    known = set(files())
    return {file: set(imports(file, known)) - {file} for file in known}


def test_no_room_imports_one_above_it():
    upwards = [
        f"{file} imports {other}"
        for file, others in arrows().items()
        for other in others
        if floor_of(other) > floor_of(file)
    ]
    assert not upwards, "\n".join(sorted(upwards))


def test_there_is_no_import_circle():
    left = arrows()
    assert len(left) > 60
    while free := [file for file, others in left.items() if not others & set(left)]:
        left = {file: others for file, others in left.items() if file not in free}
    assert not left, sorted(map(str, left))


def test_a_flat_file_in_utils_is_a_command():
    flat = {file.stem for file in (ROOT / "utils").glob("*.py")} - {"__init__"}
    assert flat == {"launch", "chat", "merge_lora", "verify", "doctor_data", "score_reward_model", "demo_model"}
    for name in flat:
        assert 'if __name__ == "__main__":' in (ROOT / "utils" / f"{name}.py").read_text(encoding="utf-8"), name


def test_a_function_name_has_one_meaning():
    """Two modules may share a name only where they do the same: a command's way in."""
    found: dict[str, list[Path]] = {}
    for file in files():
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, []).append(file)
    assert len(found) > 500
    assert {name: where for name, where in found.items() if len(where) > 1}.keys() == {"main", "train_from_words"}
