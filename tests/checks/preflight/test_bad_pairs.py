"""--check with two and three things wrong at once: `pytest tests/checks/preflight/test_bad_pairs.py`."""

import itertools
import json
import shutil

import pytest

import train_gkd
import train_rlhf
from tests.checks.preflight.conftest import PAIRS
from tests.conftest import write_rows

TEXT = {"template", "long", "raises"}  # found in the text, or after it
# {what is wrong: the problems that it hides, because their stage needs what is refused}
HIDES = {
    "no data": TEXT,
    "words": {*TEXT, "output", "checkpoint", "same", "no teacher"},
    "no model": {*TEXT, "same"},
    "json": {*TEXT, "same", "output"},
    "template": {"long", "raises", "same"},
}


def make_parts(tmp_path, tiny_model, rows):
    """({flag: sound value}, {what is wrong: its flags}) of a run with a tiny model."""
    for name in ("model", "json", "template", "teacher"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "json" / "config.json").write_text("{")
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    for name in ("cut", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    sound = {
        "--model_name_or_path": tmp_path / "model",
        "--train_data_path": write_rows(tmp_path / "rows.jsonl", rows),
        "--output_dir": tmp_path / "out",
    }
    wrong = {
        "no data": {"--train_data_path": tmp_path / "none.jsonl"},
        "broken row": {"--train_data_path": write_rows(tmp_path / "broken.jsonl", [*rows, {"prompt": 3}])},
        "words": {"--zzz": 1},
        "rank": {"--lora_rank": 0},
        "share": {"--eval_fraction": 2},
        "no model": {"--model_name_or_path": tmp_path / "gone"},
        "json": {"--model_name_or_path": tmp_path / "json"},
        "template": {"--model_name_or_path": tmp_path / "template"},
        "output": {"--output_dir": tmp_path / "foreign"},
        "checkpoint": {"--resume_from_checkpoint": tmp_path / "cut"},
    }
    return sound, wrong


@pytest.fixture
def grpo(tmp_path, tiny_model):
    sound, wrong = make_parts(tmp_path, tiny_model, PAIRS)
    (tmp_path / "rewards.py").write_text("def good(completions, **_):\n    return [0.0] * len(completions)\n")
    (tmp_path / "raises.py").write_text("def good(completions, **_): return 1 / 0\n")
    sound |= {"--rlhf_type": "GRPO", "--reward_funcs": f"{tmp_path}/rewards.py:good"}
    wrong["no reward"] = {"--reward_funcs": f"{tmp_path}/rewards.py:none"}
    wrong["raises"] = {"--reward_funcs": f"{tmp_path}/raises.py:good"}
    wrong["long"] = {"--max_prompt_length": 4}
    return train_rlhf.main, sound, wrong


@pytest.fixture
def gkd(tmp_path, tiny_model):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    sound, wrong = make_parts(tmp_path, tiny_model, rows)
    sound["--teacher_model_name_or_path"] = tmp_path / "teacher"
    wrong["no teacher"] = {"--teacher_model_name_or_path": tmp_path / "none"}
    wrong["same"] = {"--teacher_model_name_or_path": tmp_path / "model"}
    wrong["long"] = {"--max_length": 4}
    return train_gkd.main, sound, wrong


@pytest.mark.parametrize("script", ["grpo", "gkd"])
def test_several_problems_are_said_at_once_each_once_and_nothing_that_follows_from_one(script, request, capsys):
    main, sound, wrong = request.getfixturevalue(script)
    capsys.readouterr()  # what making the model printed

    def refused(*names):
        flags = sound | {flag: value for name in names for flag, value in wrong[name].items()}
        status = main([*(str(word) for item in flags.items() for word in item), "--check"])
        lines = [line.split("; ")[0] for line in capsys.readouterr().err.splitlines()]
        assert status == 2 and lines and all(line.startswith("refused: ") for line in lines), (names, status, lines)
        assert len(lines) == len(set(lines)), names
        return set(lines)

    alone = {name: refused(name) for name in wrong}
    assert all(len(lines) == 1 for lines in alone.values()), json.dumps({k: [*v] for k, v in alone.items()}, indent=1)
    groups = [*itertools.combinations(wrong, 2), *itertools.islice(itertools.combinations(wrong, 3), 0, None, 17)]
    tried = 0
    for names in groups:
        if len({flag for name in names for flag in wrong[name]}) < len(names):
            continue  # one flag has one value
        hidden = {other for name in names for other in HIDES.get(name, ())}
        must = set().union(*(alone[name] for name in names if name not in hidden))
        found = refused(*names)
        if {"broken row", "long"} <= {*names}:  # the count of rows is another
            found, must = ({line for line in lines if "rows cannot be used" not in line} for lines in (found, must))
        assert must <= found, (names, must - found)
        assert found <= set().union(*(alone[name] for name in names)), (names, found)
        tried += 1
    assert tried > 60
