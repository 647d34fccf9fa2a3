"""Whatever is wrong is refused before a model is loaded: status 2, a line a problem, nothing written.

`pytest tests/checks/test_refusals.py`: most cases call main() in this process, as the command does; the last
chapter types the commands themselves.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_rlhf
from rlhf_args.methods import EVERY, METHODS as TABLE, REJECTION, load as load_named
from tests.conftest import ROOT, command, write_rows
from utils.checks import folders
from utils.cli import recipes
from utils.models import load
from utils.models.folders import check_folder

GOOD = {"prompt": "Say hi. ", "chosen": "Hi there.", "rejected": "No."}
CHAT = {
    "prompt": [{"role": "user", "content": "Say hi."}],
    "chosen": [{"role": "assistant", "content": "Hi there."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
PAIRS = "Accepted: prompt, chosen, rejected or chosen, rejected, as in data/preference.jsonl"


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded a model."""


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch, capsys):
    """run(flags, ...) types a whole, sound command but for `flags`; (status, stdout, lines of stderr)."""

    def load_policy(**source):
        raise Loaded

    def run(flags="", method="DPO", data=None, model=tiny_model, out=tmp_path / "out"):
        data = data or write_rows(tmp_path / "good.jsonl", [GOOD] * 4)
        words = ["--rlhf_type", method, "--output_dir", str(out)]
        words += ["--model_name_or_path", str(model)] if model else []
        words += ["--train_data_path", *([data] if isinstance(data, str) else data)] if data != "none" else []
        before = listing(out)
        status = train_rlhf.main(words + (flags if isinstance(flags, list) else flags.split()))
        said = capsys.readouterr()
        assert listing(out) == before
        return status, said.out, said.err.splitlines()

    monkeypatch.setattr(load, "load_policy", load_policy)
    return run


@pytest.fixture
def refused(run):
    """refused(flags, ...) is the list of problems, and fails where nothing is refused or anything else is said."""

    def refused(*args, **kwargs):
        status, out, lines = run(*args, **kwargs)
        assert (status, out) == (2, "")
        assert lines and all(line.startswith("refused: ") for line in lines), lines
        return [line.removeprefix("refused: ") for line in lines]

    return refused


def listing(folder):
    return sorted((str(file), file.stat().st_mtime_ns) for file in [folder, *folder.rglob("*")] if file.exists())


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run):
    with pytest.raises(Loaded):
        run()
    status, out, lines = run("--check")
    assert (status, lines) == (0, []) and "4 rows to train on" in out


# ── flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────

HELP = "`python train_rlhf.py --rlhf_type DPO --help` lists them"
METHODS = ", ".join(TABLE)
OVERFLOW = "its log-probabilities overflow to NaN. It takes --dtype bfloat16 or float32"
# (method, flags, the problems)
FLAGS = [
    ("SimPO", "--simpo_gama 1", ["--simpo_gama: no such flag for SimPO. Did you mean --simpo_gamma?"]),
    ("simpo", "--simpo-gama=1", ["--simpo-gama: no such flag for SimPO. Did you mean --simpo_gamma?"]),
    ("DPO", "--simpo_gamma 1", ["--simpo_gamma: no such flag for DPO. It is one of CPO, SimPO, CPOSimPO"]),
    ("DPO", "--zzz 1", [f"--zzz: no such flag for DPO. {HELP}"]),
    ("DPO", "--lora_ra 8", ["--lora_ra: no such flag for DPO. Did you mean --lora_rank?"]),
    (
        "DPO",
        "--lora_ra 8 --zzz 1",
        ["--lora_ra: no such flag for DPO. Did you mean --lora_rank?", f"--zzz: no such flag for DPO. {HELP}"],
    ),
    ("DPO", "--beta 0.1 0.2", ["0.2: not a flag. Every value follows its --flag"]),
    ("DPO", "--lora_rank", ["--lora_rank: expected one argument"]),
    (
        "DPO",
        "--lora_rank x --train_mode loora",
        ["--lora_rank: invalid int value: 'x'", "--train_mode: invalid choice: 'loora' (choose from"],
    ),
    (
        "DPO",
        "--learning_rate fast --zzz 1 --bf16 True --fp16 True",
        [
            "--learning_rate: invalid float value: 'fast'",
            f"--zzz: no such flag for DPO. {HELP}",
            "--bf16 and --fp16 together: choose one. bfloat16 is the default where the hardware has it",
        ],
    ),
    ("DPO", "--eval_strategy sometimes", ["--eval_strategy: invalid choice: 'sometimes' (choose from"]),
    ("DPO", "--use_dora perhaps", ["--use_dora: Truthy value expected: got perhaps"]),
    (
        "DPO",
        "--bf16 --fp16",
        ["--bf16 and --fp16 together: choose one. bfloat16 is the default where the hardware has it"],
    ),
    ("DPO", "--dtype bf16", ["--dtype: invalid choice: 'bf16' (choose from"]),
    ("CPO", "--dtype float16", [f"float16 with CPO: {OVERFLOW}"]),
    ("SimPO", "--fp16", [f"float16 with SimPO: {OVERFLOW}"]),
    ("CPOSimPO", "--fp16 True", [f"float16 with CPOSimPO: {OVERFLOW}"]),
    ("ORPO", "--dtype float16", [f"float16 with ORPO: {OVERFLOW}"]),
    (
        "DPO",
        "--use_dora --train_mode full",
        ["--use_dora with --train_mode full: DoRA is a kind of adapter. Type --train_mode lora"],
    ),
    ("DPO", "--lora_rank 0", ["--lora_rank 0: a rank is 1 or more. Type --lora_rank 32"]),
    ("DPO", "--lora_dropout 1", ["--lora_dropout 1.0: a dropout is from 0 to below 1"]),
    ("DPO", "--eval_fraction 1.5", ["--eval_fraction 1.5: a share from 0 to below 1, 0.1 holds out a tenth"]),
    ("DPO", "--eval_fraction nan", ["--eval_fraction nan: a share from 0 to below 1, 0.1 holds out a tenth"]),
    ("DPO", "--max_drop_fraction 2", ["--max_drop_fraction 2.0: a share from 0 to 1"]),
    ("DPO", "--max_samples -1", ["--max_samples -1: 1 or more; leave it out for all rows"]),
    (
        "DPO",
        "--use_dora --train_mode full --lora_rank 0 --eval_fraction 1.5 --max_samples 0",
        ["--use_dora with", "--lora_rank 0:", "--eval_fraction 1.5:", "--max_samples 0:"],
    ),
    (
        "DPO",
        "--eval_strategy steps",
        ["--eval_strategy steps: no held-out rows. Add --eval_data_path FILE or --eval_fraction 0.1"],
    ),
    ("DPO", "--max_length 1", ["--max_length 1: too short for a prompt and an answer. TRL's default is 1024"]),
    ("DPO", "--learning_rate -1", ["--learning_rate -1.0: a positive number, like 1e-5"]),
    (
        "DPO",
        "--per_device_train_batch_size 0 --gradient_accumulation_steps 0 --num_train_epochs 0",
        [
            "--per_device_train_batch_size 0: 1 or more",
            "--gradient_accumulation_steps 0: 1 or more",
            "--num_train_epochs 0: nothing would be trained. More than 0, 0.1 is a tenth",
        ],
    ),
    ("DPO", "--report_to paper", ["--report_to paper: no such tracker installed. It takes none"]),
    (
        "DPO",
        "--resume_from_checkpoint gone",
        [
            "--resume_from_checkpoint gone: no such folder. Type auto for the newest checkpoint in output_dir, or "
            "leave the flag out to start afresh"
        ],
    ),
    ("DPO", "--load_best_model_at_end", ["--load_best_model_at_end requires the save and eval strategy to match"]),
    ("DPO", "--accelerator_config gone.json", ["[Errno 2] No such file or directory: 'gone.json'"]),
    ("DPOO", "", [f"--rlhf_type DPOO: no such method. There are {METHODS}. Did you mean DPO?"]),
    (
        "XYZ",
        "--lora_rank x",
        ["--lora_rank: invalid int value: 'x'", f"--rlhf_type XYZ: no such method. There are {METHODS}"],
    ),
]


@pytest.mark.parametrize("method, flags, problems", FLAGS, ids=[f"{method} {flags}" for method, flags, _ in FLAGS])
def test_a_flag_that_is_wrong_is_refused(method, flags, problems, refused):
    found = refused(flags, method)
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_held_out_rows_come_from_one_place_are_not_the_training_rows_and_are_of_their_kind(refused, tmp_path):
    held, chats = write_rows(tmp_path / "held.jsonl", [GOOD] * 2), write_rows(tmp_path / "chats.jsonl", [CHAT] * 2)
    train = write_rows(tmp_path / "train.jsonl", [GOOD] * 4)
    assert refused(f"--eval_fraction 0.1 --eval_data_path {held}") == [
        "--eval_fraction and --eval_data_path together: held-out rows come from one of them"
    ]
    assert refused(f"--eval_data_path {train}", data=train) == [
        f"--eval_data_path {train}: the training data again. Type --eval_fraction 0.1, or OWNER/NAME:test"
    ]
    assert refused(f"--eval_data_path {chats}", data=train) == [
        f"{train}:1 and {chats}:1: one is a chat, one plain text. One run takes one of the two"
    ]


def test_missing_model_and_data_are_named_together(refused):
    assert refused(model=None, data="none") == [
        "--train_data_path: missing. Type --train_data_path data/preference.jsonl to try",
        "--model_name_or_path: missing. A model folder or Hub id; `python -m utils.demo_model` makes one",
    ]


def test_an_old_name_is_translated_and_said_and_no_other_beginning_of_a_name_is(run):
    status, out, lines = run("--lora_r 4 --check")
    assert status == 0 and "LoRA rank 4, alpha 16" in out
    assert lines == ["note: --lora_r is called --lora_rank here, and is read as that"]


@pytest.mark.parametrize("flags", ["--use_dora", "--use_dora True", "--use-dora=true --bf16", "--bf16 True"])
def test_a_switch_may_stand_alone_or_with_its_value(flags, run):
    status, out, lines = run(f"{flags} --check")
    assert (status, lines) == (0, []) and ("DoRA" in out) == ("dora" in flags)


# ── a recipe ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RECIPES = {
    "unknown key": ("lerning_rate: 1e-5\n", ["--lerning_rate: no such flag for DPO. Did you mean --learning_rate?"]),
    "wrong choice": ("train_mode: loora\n", ["--train_mode: invalid choice: 'loora' (choose from"]),
    "wrong choice of the method": ("lr_scheduler_type: up\n", ["--lr_scheduler_type: invalid choice: 'up' (choose"]),
    "wrong type": ("lora_rank: many\n", ["--lora_rank: invalid int value: 'many'"]),
    "several": (
        "lora_rank: 0\nmax_samples: 0\n",
        ["--lora_rank 0: a rank is 1 or more", "--max_samples 0: 1 or more"],
    ),
    "a list": ("- lora_rank\n", ["FILE: not a mapping. A recipe has a line `flag: value` for each flag"]),
    "a word": ("lora_rank 8\n", ["FILE: not a mapping. A recipe has a line `flag: value` for each flag"]),
    "empty": ("", ["FILE: not a mapping. A recipe has a line `flag: value` for each flag"]),
    "broken": ("lora_rank: [\nseed: 1\n", ["FILE:3: not valid yaml"]),
    "not UTF-8": (b"lora_rank: \xe9\n", ["--config FILE: not UTF-8 (byte 11). Save the file as UTF-8"]),
}


@pytest.mark.parametrize("joined", [False, True], ids=["--config FILE", "--config=FILE"])
@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_is_wrong_is_refused(case, joined, refused, tmp_path):
    content, problems = RECIPES[case]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused([f"--config={file}"] if joined else ["--config", str(file)])
    problems = [problem.replace("FILE", str(file)) for problem in problems]
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_a_recipe_that_is_not_there_is_refused(refused, tmp_path):
    assert refused("--config") == ["--config: no file given. Type --config recipes/NAME.yaml"]
    assert refused("--config gone.yaml") == ["--config gone.yaml: no such file or directory"]
    assert refused(f"--config {tmp_path}") == [f"--config {tmp_path}: is a directory"]
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    assert refused(f"--config {tmp_path}/recpie.yaml") == [
        f"--config {tmp_path}/recpie.yaml: no such file or directory. Did you mean {tmp_path}/recipe.yaml?"
    ]


@pytest.mark.parametrize("named", ["one", "two"])
def test_a_recipe_that_names_a_recipe_is_refused(named, refused, tmp_path):
    """A file that names itself, and two that name each other: reading them must end."""
    for name, other in (("one", named), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"seed: 1\nconfig: {tmp_path}/{other}.yaml\n")
    (problem,) = refused(f"--config {tmp_path}/one.yaml")
    assert problem.startswith(f"{tmp_path}/one.yaml:2: config:") and f"--config {tmp_path}/one.yaml" in problem


# a line of a recipe: the words that it stands for
LINES = {
    "save_strategy: no": ["--save_strategy", "no"],
    "eval_strategy: No": ["--eval_strategy", "No"],
    "use_dora: yes": ["--use_dora", "yes"],
    "report_to: [none, off]": ["--report_to", "none", "off"],
    "model_revision: 0123": ["--model_revision", "0123"],
    "model_revision: 1.10": ["--model_revision", "1.10"],
    "system_prompt: 'null'": ["--system_prompt", "null"],
    "learning_rate: 1.0e-6": ["--learning_rate", "1.0e-6"],
    "seed: &same 3": ["--seed", "3"],
    "lr_scheduler_kwargs: {rate: 0.5, last: true}": ["--lr_scheduler_kwargs", '{"rate": 0.5, "last": true}'],
}


@pytest.mark.parametrize("line", LINES)
def test_a_value_of_a_recipe_is_read_as_it_is_written(line, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{line}\n")
    assert recipes.expand(["--config", str(tmp_path / "recipe.yaml")]) == LINES[line]


@pytest.mark.parametrize("word, on", {"yes": True, "on": True, "true": True, "no": False, "Off": False}.items())
def test_a_switch_in_a_recipe_takes_what_yaml_calls_a_boolean(word, on, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"use_dora: {word}\nsave_strategy: no\n")
    status, out, lines = run(f"--config {tmp_path}/recipe.yaml --check")
    assert (status, lines) == (0, []) and ("DoRA" in out) == on


@pytest.mark.parametrize("value, said", {"null": "null", "~": "~", "": "no value", "[1, null]": "null"}.items())
def test_a_recipe_that_gives_a_flag_no_value_is_refused(value, said, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"seed: 1\nmax_length: {value}\n")
    (problem,) = refused(f"--config {tmp_path}/recipe.yaml")
    assert problem.startswith(f"{tmp_path}/recipe.yaml:2: max_length: {said}.") and "Delete the line" in problem


def test_the_command_line_wins_over_a_recipe(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora_rank: 0\nlora_alpha: 3\n")
    status, out, _ = run(f"--lora_rank 2 --config {tmp_path}/recipe.yaml --check")
    assert status == 0 and "LoRA rank 2, alpha 3" in out


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LINE = json.dumps(GOOD)
# name of the file: (what it holds, the problems, FILE standing for its path)
FILES = {
    "empty.jsonl": (b"", ["FILE: no rows in it"]),
    "blank.jsonl": (b"\n\r\n \n", ["FILE: no rows in it"]),
    "empty.json": (b"[]", ["FILE: no rows in it"]),
    "header.csv": (b"prompt,chosen,rejected\n", ["FILE: no rows in it"]),
    "empty.csv": (b"", ["FILE: no rows in it"]),
    "empty.parquet": (b"", ["FILE: not a parquet file ("]),
    "broken.parquet": (b"PAR1 and no more", ["FILE: not a parquet file ("]),
    "python.jsonl": (f"{LINE}\n{GOOD}\n", ["FILE:2: not valid JSON (Expecting property name enclosed in double quo"]),
    "cut.jsonl": (f"{LINE}\n{LINE[:-9]}", ["FILE:2: not valid JSON (Unterminated string starting at, column"]),
    "broken.json": (f"[{LINE},\n{LINE}\n{LINE}]", ["FILE:3: not valid JSON (Expecting ',' delimiter, column 1)"]),
    "number.json": (b"3", ["FILE:1: a number, not an object with columns"]),
    "wrapped.json": (f'{{"data": [{LINE}]}}', [f'FILE:1: no "prompt". The row has data. {PAIRS}']),
    "rows.jsonl": (
        b'[1, 2]\n"a"\nnull\n',
        [f"FILE:{n}: {what}, not an object with columns" for n, what in enumerate(("a list", "text", "null"), 1)],
    ),
    "both.jsonl": (
        f'{LINE}\n{{"prompt"\n{{"prompt": "p", "chosen": "c"}}\n',
        ["FILE:2: not valid JSON (Expecting ':' delimiter, column 10)", 'FILE:3: no "rejected". The row has prompt,'],
    ),
    "latin1.jsonl": (
        f'{LINE}\n{{"prompt": "café"}}\n'.encode("latin-1"),
        [f"FILE:2: not UTF-8 (byte {len(LINE) + 16}). Save the file as UTF-8"],
    ),
    "utf16.jsonl": (LINE.encode("utf-16"), ["FILE:1: not UTF-8 (byte 0). Save the file as UTF-8"]),
    "latin1.csv": (b"prompt,chosen,rejected\ncaf\xe9,a,b\n", ["FILE:2: not UTF-8 (byte 26). Save the file as UTF-8"]),
    "comma.csv": (
        b"prompt,chosen,rejected\nYes, or no?,a,b\n",
        [
            "FILE:2: 4 cells under a header of 3. Text that holds a comma, a quote or a line end stands in "
            '"double quotes"'
        ],
    ),
    "short.csv": (b"prompt,chosen,rejected\np,a\n", ["FILE:2: 2 cells under a header of 3."]),
    "semicolon.csv": (b"prompt;chosen;rejected\np;a;b\n", ['FILE:2: no "prompt". The row has prompt;chosen;']),
    "open.csv": (
        b'prompt,chosen,rejected\np,"a,b\nq,a,b\n',
        ["FILE:3: not valid csv (unexpected end of data). A quote inside a quoted text is written twice"],
    ),
    "list.csv": (
        "prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'p'}]\",a,b\n",
        ['FILE:2: "prompt" is a list of messages turned into text. Write it as JSON: with json.dumps in csv'],
    ),
    "rows.txt": (LINE, ["--train_data_path FILE: not .jsonl, .json, .csv, .parquet. Convert or unpack it first"]),
    "rows.jsonl.gz": (b"\x1f\x8b", ["--train_data_path FILE: not .jsonl, .json, .csv, .parquet. Convert or unpack"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused(name, refused, tmp_path):
    content, problems = FILES[name]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused(data=str(file))
    problems = [problem.replace("FILE", str(file)) for problem in problems]
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


# path: the rest of the message
PATHS = {
    "missing.jsonl": "no such file or folder",
    "data/preferences.jsonl": "no such file or folder. Did you mean data/preference.jsonl?",
    "dta/preference.jsonl": "no such file or folder",
    "dat/": "no such file or folder. Did you mean data?",
    "/nowhere": "no such file or folder",
    "data/*.parquet": "no .jsonl, .json, .csv, .parquet file matches",
    "*.md": "no .jsonl, .json, .csv, .parquet file matches",
    "utils": "no .jsonl, .json, .csv, .parquet file in this folder",
    "train_rlhf.py": "not .jsonl, .json, .csv, .parquet. Convert or unpack it first",
}


@pytest.mark.parametrize("flag", ["--train_data_path", "--eval_data_path"])
@pytest.mark.parametrize("path", PATHS)
def test_a_path_with_no_data_is_refused(path, flag, refused, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused(f"{flag} {path}") == [f"{flag} {path}: {PATHS[path]}"]


def test_all_paths_with_no_data_are_named_together(refused, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused("--eval_data_path three.csv", data=["one.jsonl", "data/kto.jsonl", "two.json"]) == [
        "--train_data_path one.jsonl: no such file or folder",
        "--train_data_path two.json: no such file or folder",
        "--eval_data_path three.csv: no such file or folder",
    ]


def test_an_empty_shell_variable_as_data_is_not_the_current_folder(refused):
    assert refused(["--train_data_path", ""]) == [
        "--train_data_path: an empty name. Type --train_data_path data/preference.jsonl to try"
    ]


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def chat(**changed):
    return {**CHAT, **changed}


def message(**parts):
    return chat(prompt=[parts])


ROLES = "Accepted: system, developer, user, assistant, tool"
FORM = 'It is a string or a list of {"role", "content"}'
THUMB = {"prompt": "p", "completion": "c", "label": False}
# name: (method, a good row, the bad row after it, what is said of it)
ROWS = {
    "misspelt column": (
        "DPO",
        GOOD,
        {"prompt": "p", "choosen": "c", "rejected": "r"},
        f'no "chosen". Did you mean that by "choosen"? {PAIRS}',
    ),
    "missing column": (
        "DPO",
        GOOD,
        {"instruction": "p", "output": "c"},
        f'no "prompt". The row has instruction, output. {PAIRS}',
    ),
    "empty row": ("DPO", GOOD, {}, f'no "prompt". The row has nothing. {PAIRS}'),
    "null": ("DPO", GOOD, {**GOOD, "prompt": None}, f'"prompt" is null. {PAIRS}'),
    "prompt in some rows": (
        "DPO",
        GOOD,
        {"chosen": "p c", "rejected": "p r"},
        f'no "prompt". The row has chosen, rejected. {PAIRS}',
    ),
    "number": ("DPO", GOOD, {**GOOD, "prompt": 3}, f'"prompt" is a number. {FORM}'),
    "boolean": ("DPO", GOOD, {**GOOD, "chosen": True}, f'"chosen" is a boolean. {FORM}'),
    "object": ("DPO", CHAT, chat(prompt=CHAT["prompt"][0]), f'"prompt" is an object. {FORM}'),
    "no role": (
        "DPO",
        CHAT,
        message(content="p"),
        '"prompt" has a message with content. A message has "role" and "content"',
    ),
    "other names": (
        "DPO",
        CHAT,
        message(**{"from": "human", "value": "p"}),
        '"prompt" has a message with from, value. A message has "role" and "content"',
    ),
    "list of strings": (
        "DPO",
        CHAT,
        chat(prompt=["p"]),
        '"prompt" has a message that is text. A message has "role" and "content"',
    ),
    "unknown role": ("DPO", CHAT, message(role="human", content="p"), f"\"prompt\" has the role 'human'. {ROLES}"),
    "number as role": ("DPO", CHAT, message(role=1, content="p"), f'"prompt" has the role 1. {ROLES}'),
    "number as content": (
        "DPO",
        CHAT,
        message(role="user", content=3),
        '"prompt" has a message whose content is a number, not a string',
    ),
    "null as content": (
        "DPO",
        CHAT,
        message(role="user", content=None),
        '"prompt" has a message whose content is null, not a string',
    ),
    "parts as content": (
        "DPO",
        CHAT,
        message(role="user", content=[{"type": "text", "text": "p"}]),
        '"prompt" has a message whose content is a list, not a string',
    ),
    "answer in the prompt": (
        "DPO",
        CHAT,
        message(role="assistant", content="p"),
        'the "prompt" ends with the assistant\'s turn. It ends with the turn to be answered',
    ),
    "answer of the user": (
        "DPO",
        CHAT,
        chat(chosen=CHAT["prompt"]),
        'the "chosen" ends with a turn of the user. It ends with the assistant\'s answer',
    ),
    "chat and plain": (
        "DPO",
        CHAT,
        chat(prompt="p"),
        '"prompt" is plain text, "chosen" is a chat, "rejected" is a chat. All of a row are lists of '
        "messages, or all are strings",
    ),
    "chat as text": (
        "DPO",
        CHAT,
        chat(prompt=json.dumps(CHAT["prompt"])),
        '"prompt" is a list of messages turned into text. Write it as JSON: with json.dumps in csv',
    ),
    "half an emoji": (
        "DPO",
        GOOD,
        {**GOOD, "chosen": "smile \ud83d"},
        '"chosen" holds half a character (\\ud800 to \\udfff), as of an emoji that was cut in two. Mend it',
    ),
    "label in words": ("KTO", THUMB, {**THUMB, "label": "good"}, "\"label\" is 'good'. It is true or false (1 or 0)"),
    "label out of range": ("KTO", THUMB, {**THUMB, "label": 2}, '"label" is 2. It is true or false (1 or 0)'),
    "no label": (
        "KTO",
        THUMB,
        {"prompt": "p", "completion": "c"},
        'no "label". The row has prompt, completion. Accepted: prompt, completion, label or prompt, chosen, '
        "rejected or chosen, rejected, as in data/kto.jsonl",
    ),
    "one answer": (
        "Reward",
        GOOD,
        {"prompt": "p", "chosen": "c"},
        'no "rejected". The row has prompt, chosen. '
        "Accepted: chosen, rejected or prompt, chosen, rejected, as in data/reward.jsonl",
    ),
    "margin in words": (
        "Reward",
        {**GOOD, "margin": 1},
        {**GOOD, "margin": "much"},
        "\"margin\" is 'much'. It is a number: by how much chosen is better",
    ),
    "other dialogue": (
        "SFT",
        {"messages": "m"},
        {"conversations": [{"from": "human", "value": "p"}]},
        'no "messages". The row has conversations. Accepted: messages or prompt, completion, as in data/sft.jsonl',
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_is_wrong_is_refused_with_its_line(case, refused, tmp_path):
    method, good, bad, problem = ROWS[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))  # \ud83d stays an escape
    assert refused(method=method, data=str(file)) == [f"{file}:2: {problem}"]


@pytest.mark.parametrize("ending, lines", {".json": (1, 2), ".csv": (2, 3), ".parquet": (1, 2)}.items())
def test_a_misspelt_column_is_refused_in_every_kind_of_file(ending, lines, refused, tmp_path):
    rows = [{"prompt": "p", "choosen": "c", "rejected": "r"}] * 2
    file = tmp_path / f"rows{ending}"
    if ending == ".json":
        file.write_text(json.dumps(rows))
    elif ending == ".csv":
        with open(file, "w", newline="") as handle:
            csv.writer(handle).writerows([rows[0], *(row.values() for row in rows)])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    said = f'no "chosen". Did you mean that by "choosen"? {PAIRS}'
    assert refused(data=str(file)) == [f"{file}:{line}: {said}" for line in lines]


def test_of_thirty_bad_rows_twenty_are_shown_and_all_are_counted(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, *[{**GOOD, "prompt": 3}] * 30])
    shown = [f'{file}:{line}: "prompt" is a number. {FORM}' for line in range(2, 22)]
    assert refused(data=file) == [*shown, "... and 10 more, 30 in all"]


def test_different_problems_of_a_file_are_shown_together(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": 3}, {"prompt": "p"}, GOOD, CHAT])
    assert refused(data=file) == [
        f'{file}:2: "prompt" is a number. {FORM}',
        f'{file}:3: no "chosen". The row has prompt. {PAIRS}',
        f"{file}:5 is a chat and {file}:1 is plain text. One run takes one of the two",
    ]


def test_chat_and_plain_rows_of_two_files_do_not_mix(refused, tmp_path):
    chats, texts = write_rows(tmp_path / "a.jsonl", [CHAT]), write_rows(tmp_path / "b.jsonl", [GOOD])
    assert refused(data=[texts, chats]) == [
        f"{chats}:1 is a chat and {texts}:1 is plain text. One run takes one of the two"
    ]


def test_a_margin_in_some_rows_only_is_refused(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "margin": 1}, GOOD])
    assert refused(method="Reward", data=file) == [
        f'{file}:2: no "margin", and {file}:1 has one. All rows have one, or none has'
    ]


@pytest.mark.parametrize("label, said", [(True, "true"), (0, "false")])
def test_kto_refuses_labels_of_one_kind(label, said, refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**THUMB, "label": label}] * 4)
    assert refused(method="KTO", data=file) == [
        f"--train_data_path: all 4 labels are {said}. KTO needs rows of both labels, true and false, as in "
        "data/kto.jsonl"
    ]


def test_kto_refuses_a_batch_of_one(refused):
    assert refused("--per_device_train_batch_size 1", method="KTO") == [
        "--per_device_train_batch_size 1: KTO compares rows of a batch and needs 2 or more a device"
    ]


def test_too_many_rows_that_cannot_be_used_are_refused_unless_allowed(refused, run, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "chosen": " "}] * 2 + [GOOD] * 8)
    assert refused(data=file) == [
        f"2 of 10 rows cannot be used (2 empty answer). The first: {file}:1 empty answer; {file}:2 empty answer. "
        "More than --max_drop_fraction 0.1. Mend them, or type --max_drop_fraction 1"
    ]
    status, out, _ = run("--max_drop_fraction 0.2 --check", data=file)
    assert status == 0 and "8 rows to train on" in out and "refused: 2 empty answer" in out


@pytest.mark.parametrize("flag", ["--train_data_path", "--eval_data_path"])
def test_a_file_with_no_usable_row_is_refused_whatever_is_allowed(flag, refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "rejected": GOOD["chosen"]}])
    assert refused(f"--max_drop_fraction 1 {flag} {file}") == [
        f"{flag}: 1 of 1 rows cannot be used (1 chosen equals rejected). The first: {file}:1 chosen equals rejected. "
        "Mend them"
    ]


def test_rows_longer_than_max_length_are_refused_with_the_flag_that_helps(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD])  # 8 bytes of prompt, a token each
    assert refused("--max_length 8", data=file) == [
        "1 of 1 rows cannot be used (1 prompt longer than max_length). "
        f"The first: {file}:1 prompt longer than max_length. Mend them, or raise --max_length"
    ]
    short = write_rows(tmp_path / "short.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert refused(f"--max_length 8 --max_drop_fraction 1 --eval_data_path {short}", data=file) == [
        "no row is left to train on: every one is longer than --max_length. Raise it"
    ]


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

REWARD_MODEL = "a trained reward model, which scores and cannot answer. DPO starts from a language model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# name: (files to leave out, files to write, the problems, FOLDER standing for the model's)
MODELS = {
    "no config": (
        ["config.json"],
        {},
        ["--model_name_or_path FOLDER: no config.json (nor adapter_config.json) in it, so not a model "],
    ),
    "no tokenizer": (
        ["tokenizer.json"],
        {},
        ["FOLDER: no tokenizer (tokenizer.json or tokenizer.model) in it. Copy it from the original "],
    ),
    "pickled weights": (
        ["model.safetensors"],
        {"pytorch_model.bin": "x", "training_args.bin": "x"},
        [
            "FOLDER: only pickled weights (pytorch_model.bin), which can run code when read. Needed: "
            "*.safetensors (model.save_pretrained writes them)"
        ],
    ),
    "no weights": (["model.safetensors"], {}, ["FOLDER: no weights. Needed: *.safetensors (model.save_pretrained "]),
    "a pointer for weights": (
        [],
        {"model.safetensors": POINTER},
        [
            "FOLDER/model.safetensors: not a whole safetensors file (a broken download, or a Git "
            "LFS pointer: `git lfs pull`)"
        ],
    ),
    "a pointer for a tokenizer": (
        [],
        {"tokenizer.json": POINTER},
        ["--model_name_or_path FOLDER: its tokenizer cannot be loaded ("],
    ),
    "neither weights nor tokenizer": (
        ["model.safetensors", "tokenizer.json"],
        {},
        ["FOLDER: no tokenizer", "FOLDER: no weights"],
    ),
    "broken config": ([], {"config.json": "{"}, ["FOLDER/config.json: not valid JSON. Copy it from the original "]),
    "list as config": ([], {"config.json": "[]"}, ["FOLDER/config.json: not a JSON object. Copy it from the "]),
    "reward model": (
        [],
        {"config.json": '{"architectures": ["Qwen2ForSequenceClassification"]}'},
        [f"FOLDER: {REWARD_MODEL}"],
    ),
    "adapter of a reward model": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "a/b", "task_type": "SEQ_CLS"}'},
        [f"FOLDER: {REWARD_MODEL}"],
    ),
    "adapter without its base": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "/gone/base"}'},
        ["FOLDER: its base model /gone/base is not there. Set base_model_name_or_path in its adapter_config.json"],
    ),
    "adapter of nothing": ([], {"adapter_config.json": "{}"}, ["FOLDER: its base model (unnamed) is not there."]),
    "adapter of an empty folder": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "/tmp"}'},
        ["FOLDER: its base model /tmp is not there."],
    ),
    "adapter of another kind": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "a/b", "peft_type": "IA3"}'},
        ["FOLDER: an adapter of the kind IA3. Only LoRA adapters are read"],
    ),
}


def make_folder(folder, source, without, written):
    folder.mkdir()
    for name in set(MODEL_FILES) - set(without):
        shutil.copy(Path(source) / name, folder)
    for name, content in written.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_that_is_wrong_is_refused(case, refused, tiny_model, tmp_path):
    without, written, problems = MODELS[case]
    folder = make_folder(tmp_path / "model", tiny_model, without, written)
    found = refused(model=folder)
    problems = [problem.replace("FOLDER", str(folder)) for problem in problems]
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_a_model_folder_that_is_not_there_is_refused(refused, tmp_path):
    assert refused(model="/gone/model") == [
        "--model_name_or_path /gone/model: no such folder. "
        "`python -m utils.demo_model` makes models/SmolLM2-135M-Instruct"
    ]
    (tmp_path / "SmolLM2-135M").mkdir()
    assert refused(model=tmp_path / "SmolLM-135M") == [
        f"--model_name_or_path {tmp_path}/SmolLM-135M: no such folder. Did you mean {tmp_path}/SmolLM2-135M?"
    ]


@pytest.fixture
def hub(monkeypatch):
    """A Hub on 127.0.0.1 that has Qwen/Qwen9 alone."""
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/api/models/Qwen/Qwen9"
            body = b'{"id": "Qwen/Qwen9"}' if known else b"{}"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Other", "Qwen/Qwen9", "Else/Qwen9"])
def test_a_hub_id_is_left_to_the_loader_whatever_folders_there_are(name, hub, tmp_path, monkeypatch):
    """An owner's name may be a folder's too, with a model of nearly that name in it."""
    (tmp_path / "Qwen" / "Qwen8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert check_folder(name, "--model_name_or_path") == ([], None)


@pytest.mark.parametrize("name", ["Qwenn", "Qwen/Qwen7"])
@pytest.mark.parametrize("reached", [True, False])
def test_a_misspelt_folder_is_refused_whether_the_hub_is_reached_or_not(reached, name, hub, tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if not reached:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (problem,), _ = check_folder(name, "--model_name_or_path")
    near = {"Qwenn": "Qwen", "Qwen/Qwen7": "Qwen/Qwen8"}[name]
    assert problem == f"--model_name_or_path {name}: no such folder. Did you mean {near}?"


def test_a_hub_id_that_cannot_be_reached_is_one_line(tmp_path):
    flags = ["--model_name_or_path", "gpt2", "--train_data_path", "data/preference.jsonl", "--output_dir", tmp_path]
    done = command("train_rlhf.py", *flags, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: --model_name_or_path gpt2: ") and "no such folder here" in line


# what the template is: the beginning of what is said of it, for chats
TEMPLATES = {
    None: "the data are chats, and this model's tokenizer has no chat template. Take the instruct model, save a "
    "chat_template.jinja in its folder, or write the data as plain text",
    "{% for m in %}": "this model's chat template cannot write a question and its answer (TemplateSyntaxError: "
    "Expected an expression",
    "{{ raise_exception('not today') }}": "this model's chat template cannot write a question and its answer "
    "(TemplateError: not today). Mend chat_template.jinja in the model's folder",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_need_a_template_that_works(template, refused, run, tiny_model, tmp_path):
    written = {"chat_template.jinja": template} if template else {}
    folder = make_folder(tmp_path / "model", tiny_model, ["chat_template.jinja"], written)
    found = refused(model=folder, data=write_rows(tmp_path / "rows.jsonl", [CHAT]))
    assert len(found) == 1 and found[0].startswith(TEMPLATES[template])
    with pytest.raises(Loaded):
        run(model=folder)  # plain text needs none


# ── the output folder ────────────────────────────────────────────────────────────────────────────────────────────────

FINISHED = "holds a finished run. Name another folder, or add --overwrite_output_dir"
# what stands in the folder: (flags, what is said, None where nothing is)
FOLDERS = [
    (["run_card.json", "metrics.jsonl"], "", FINISHED),
    (["run_card.json"], "--resume_from_checkpoint auto", FINISHED),
    (["run_card.json"], "--overwrite_output_dir", None),
    (
        ["metrics.jsonl"],
        "",
        "holds an unfinished run. Add --resume_from_checkpoint auto to finish it, or "
        "--overwrite_output_dir to start afresh",
    ),
    (["metrics.jsonl"], "--resume_from_checkpoint auto", None),
    (["thesis.tex"], "", "holds files that no run of ours made. Name another folder"),
    (["thesis.tex"], "--overwrite_output_dir", "holds files that no run of ours made. Name another folder"),
    ([], "", None),
]


@pytest.mark.parametrize("there, flags, said", FOLDERS)
def test_a_folder_that_holds_something_is_not_written_over(there, flags, said, run, refused, tmp_path):
    out = tmp_path / "there"
    out.mkdir()
    for name in there:
        (out / name).write_text("{}")
    if said:
        assert refused(flags, out=out) == [f"--output_dir {out}: {said}"]
    else:
        with pytest.raises(Loaded):
            run(flags, out=out)


# flag: what it is given, OUT standing for the output folder
NEEDED = {
    "model_name_or_path": "OUT/model",
    "train_data_path": ["data/sft.jsonl", "OUT/rows.jsonl"],
    "eval_data_path": ["OUT/ro*.jsonl"],
    "chat_template_path": "OUT/chat.jinja",
    "reward_model_path": "OUT/model",
    "reward_funcs": ["data/rewards.py:brevity", "OUT/reward.py:score"],
    "judge_template": "OUT/judge.txt",
    "value_model_path": "OUT/model",
    "critic_path": "OUT/critic.safetensors",
    "teacher_model_name_or_path": "OUT/model",
    "answers_dir": "OUT/answers",
    "deepspeed": "OUT/zero.json",
}


def test_every_flag_that_names_a_path_is_known_to_be_read_or_written():
    """A new flag of this kind joins folders.READS and NEEDED, or the names here."""
    others = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
    others |= {"restore_callback_states_from_checkpoint", "enable_jit_checkpoint"}
    kinds = [load_named(kind) for row in (*EVERY.values(), REJECTION) for kind in (row.arguments, row.config)]
    flags = {field.name for kind in kinds for field in fields(kind)}
    paths = {flag for flag in flags if re.search(r"(^|_)(path|dir|file|folder|template|funcs|checkpoint)$", flag)}
    assert paths - others <= {*folders.READS} <= flags and {*NEEDED} == {*folders.READS}


@pytest.mark.parametrize("flag", NEEDED)
def test_overwriting_deletes_nothing_that_the_run_reads(flag, tmp_path):
    """By the folder's own name, and through a link to it."""
    out = tmp_path / "out"
    for name in ("model", "answers"):
        (out / name).mkdir(parents=True)
    for name in ("run_card.json", "rows.jsonl", "chat.jinja", "reward.py", "judge.txt", "critic.safetensors"):
        (out / name).write_text("{}")
    (out / "zero.json").write_text("{}")
    (tmp_path / "way").symlink_to(out)
    for place in (out, tmp_path / "way"):
        given = json.loads(json.dumps(NEEDED[flag]).replace("OUT", str(place)))
        common = SimpleNamespace(overwrite_output_dir=True, **{flag: given})
        (problem,) = folders.check_output_dir(common, SimpleNamespace(output_dir=str(out)))
        assert f"would delete {place}/" in problem and f"--{flag}" in problem
    common = SimpleNamespace(overwrite_output_dir=True, **{flag: json.loads(json.dumps(given).replace("way", "no"))})
    assert not folders.check_output_dir(common, SimpleNamespace(output_dir=str(out)))


def test_overwriting_does_not_delete_the_base_of_an_adapter_or_a_recipe(refused, tiny_model, tmp_path):
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    shutil.copytree(tiny_model, out / "base")
    (out / "run_card.json").write_text("{}")
    (out / "mine.yaml").write_text("seed: 1")
    make_folder(adapter, tiny_model, ["config.json"], {})
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(out / "base")}))
    found = refused(f"--overwrite_output_dir --config {out}/mine.yaml", model=adapter, out=out)
    says = [(f"{out}/base", "--model_name_or_path"), (f"{out}/mine.yaml", "--config")]
    assert all(path in one and flag in one for one, (path, flag) in zip(found, says, strict=True)), found


def test_a_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "link").symlink_to("gone")
    for out in (tmp_path / "link", tmp_path / "link" / "out"):
        (problem,) = refused(out=out)
        assert problem.startswith(f"--output_dir {out}: {tmp_path}/link is a link to gone")
    file = tmp_path / "file"
    file.write_text("")
    assert refused(out=file) == [f"--output_dir {file}: a file of that name is there. Name a folder"]
    assert refused(out=file / "a" / "b") == [
        f"--output_dir {file}/a/b: nothing can be written in {file}. Name another folder"
    ]


# ── the commands themselves ──────────────────────────────────────────────────────────────────────────────────────────


BAD_ROW = f'BAD:2: "prompt" is a number. {FORM}'
FAST = {
    "--rlhf_type DPOO": [f"--rlhf_type DPOO: no such method. There are {METHODS}. Did you mean DPO?"],
    "--lora_rank 0": ["--lora_rank 0: a rank is 1 or more. Type --lora_rank 32", BAD_ROW],
    "--model_name_or_path utils": [
        "--model_name_or_path utils: no config.json (nor adapter_config.json) in it, so not a model folder",
        BAD_ROW,
    ],
    "--train_data_path missing.jsonl": ["--train_data_path missing.jsonl: no such file or folder"],
    "": [BAD_ROW],
}


@pytest.mark.parametrize("flags", FAST)
def test_what_needs_no_library_is_refused_before_torch_is_imported(flags, tiny_model, tmp_path):
    """Which is what makes it an answer within a second."""
    bad = write_rows(tmp_path / "bad.jsonl", [GOOD, {**GOOD, "prompt": 3}])
    words = ["--rlhf_type", "DPO", "--model_name_or_path", tiny_model, "--train_data_path", bad, *flags.split()]
    code = "import sys, train_rlhf; print(train_rlhf.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = command("-c", code, *words)
    assert done.stdout == "2 False\n"
    assert done.stderr.splitlines() == [f"refused: {problem.replace('BAD', bad)}" for problem in FAST[flags]]


def test_the_command_ends_with_status_2_and_one_line(tiny_model, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [GOOD, {**GOOD, "prompt": 3}])
    out = tmp_path / "out"
    done = command(
        "train_rlhf.py",
        "--rlhf_type",
        "DPO",
        "--model_name_or_path",
        tiny_model,
        "--train_data_path",
        bad,
        "--output_dir",
        out,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'refused: {bad}:2: "prompt" is a number. {FORM}\n'
    assert not out.exists()


def test_the_run_script_passes_one_refusal_on(tiny_model, tmp_path):
    out = tmp_path / "out"
    env = {"RLHF_TYPE": "SimPO", "MODEL": tiny_model, "OUTPUT_DIR": str(out), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "rlhf_run.sh", "--simpo_gama", "1"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "refused: --simpo_gama: no such flag for SimPO. Did you mean --simpo_gamma?\n"
    assert not out.exists()
