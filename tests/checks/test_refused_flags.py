"""Whatever is wrong is refused before a model is loaded: status 2, a line a problem, nothing written.

`pytest tests/checks/test_refused_flags.py`: most cases call main() in this process, as the command does; the last
chapter types the commands themselves.
"""

import json

import pytest

from tests.checks.conftest import CHAT, GOOD, METHODS, PAIRS, Loaded
from tests.conftest import ROOT, write_rows
from utils.cli import recipes


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run):
    with pytest.raises(Loaded):
        run()
    status, out, lines = run("--check")
    assert (status, lines) == (0, []) and "4 rows to train on" in out


# ── flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────


HELP = "`python train_rlhf.py --rlhf_type DPO --help` lists them"


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
    ("DPO", "--beta 0.1 0.2", ["0.2: not a flag"]),
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
    ("DPO", "--lora_rank 0", ["--lora_rank 0: must be "]),
    ("DPO", "--lora_dropout 1", ["--lora_dropout 1: must be "]),
    ("DPO", "--eval_fraction 1.5", ["--eval_fraction 1.5: must be "]),
    ("DPO", "--eval_fraction nan", ["--eval_fraction nan: must be "]),
    ("DPO", "--max_drop_fraction 2", ["--max_drop_fraction 2: must be "]),
    ("DPO", "--max_samples -1", ["--max_samples -1: must be "]),
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
    ("DPO", "--max_length 1", ["--max_length 1: must be "]),
    ("DPO", "--learning_rate -1", ["--learning_rate -1: must be "]),
    (
        "DPO",
        "--per_device_train_batch_size 0 --gradient_accumulation_steps 0 --num_train_epochs 0",
        [
            "--per_device_train_batch_size 0: must be ",
            "--num_train_epochs 0: must be ",
            "--gradient_accumulation_steps 0: must be ",
        ],
    ),
    ("DPO", "--report_to paper", ["--report_to paper: no such tracker installed. It takes none"]),
    (
        "DPO",
        "--resume_from_checkpoint gone",
        [
            "--resume_from_checkpoint gone: no such folder. Type auto for the newest checkpoint in output_dir, or "
            "remove the flag to start a new run"
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
    (problem,) = refused(f"--eval_fraction 0.1 --eval_data_path {held}")
    assert problem.startswith("--eval_fraction and --eval_data_path together: ")
    (problem,) = refused(f"--eval_data_path {train}", data=train)
    assert problem.startswith(f"--eval_data_path {train}: ") and "Type --eval_fraction 0.1" in problem
    assert refused(f"--eval_data_path {chats}", data=train) == [
        f"{train}:1 and {chats}:1: a chat and plain text. A run needs rows of one kind"
    ]


def test_missing_model_and_data_are_named_together(refused):
    assert refused(model=None, data="none") == [
        "--train_data_path: missing. Type --train_data_path data/preference.jsonl to try",
        "--model_name_or_path: missing. Type a folder or Hub id; `python -m utils.demo_model` makes one",
    ]


def test_an_old_name_is_translated_and_said_and_no_other_beginning_of_a_name_is(run):
    status, out, lines = run("--lora_r 4 --check")
    assert status == 0 and "LoRA rank 4, alpha 16" in out
    assert lines == ["note: --lora_r is read as --lora_rank"]


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
        ["--lora_rank 0: must be ", "--max_samples 0: must be "],
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
    "empty.jsonl": (b"", ["FILE: contains no rows"]),
    "blank.jsonl": (b"\n\r\n \n", ["FILE: contains no rows"]),
    "empty.json": (b"[]", ["FILE: contains no rows"]),
    "header.csv": (b"prompt,chosen,rejected\n", ["FILE: contains no rows"]),
    "empty.csv": (b"", ["FILE: contains no rows"]),
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
        ['FILE:2: 4 cells, but the header has 3. Write text with a comma, a quote or a line break in "double quotes"'],
    ),
    "short.csv": (b"prompt,chosen,rejected\np,a\n", ["FILE:2: 2 cells, but the header has 3."]),
    "semicolon.csv": (b"prompt;chosen;rejected\np;a;b\n", ['FILE:2: no "prompt". The row has prompt;chosen;']),
    "open.csv": (
        b'prompt,chosen,rejected\np,"a,b\nq,a,b\n',
        ["FILE:3: not valid csv (unexpected end of data). Write a quote inside quoted text twice"],
    ),
    "list.csv": (
        "prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'p'}]\",a,b\n",
        ['FILE:2: "prompt" is a list of messages as text. Write it as JSON (in csv: with json.dumps)'],
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
        "--train_data_path: the path is empty. Type --train_data_path data/preference.jsonl to try"
    ]
