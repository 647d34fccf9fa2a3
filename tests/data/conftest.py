"""What the tests of this room share."""

import pytest

from tests.conftest import write_rows
from tests.data.test_data import assistant, user
from utils import doctor_data


@pytest.fixture
def doctor(tmp_path, capsys):
    """Runs the command on rows (or a path): (exit status, lines of stdout, lines of stderr)."""

    def run(rows, *flags):
        path = write_rows(tmp_path / "in.jsonl", rows) if isinstance(rows, list) else str(rows)
        status = doctor_data.main([path, *map(str, flags)])
        out, err = capsys.readouterr()
        return status, [line.replace(f"{tmp_path}/", "") for line in out.splitlines()], err.replace(f"{tmp_path}/", "")

    return run


def said(lines, head):
    return [line[10:] for line in lines if line.startswith(f"{head:<9} ")]


def other(message, names=("from", "value")):
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    return {names[0]: roles[message["role"]], names[1]: message["content"]}


def others(messages):
    return [other(message) for message in messages]


TALKS = [user(f"q{n}") + assistant(f"good {n}") for n in (1, 2)]


ANSWERS = [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS]


THUMBS = [{**ANSWERS[0], "label": True}, {**ANSWERS[1], "label": False}]


def named(rows):
    return [(f"in.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
