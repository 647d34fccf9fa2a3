"""The output folder. `pytest tests/checks/test_refused_folders.py`"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from rlhf_args.methods import EVERY, REJECTION, load as load_named
from tests.checks.conftest import FORM, GOOD, METHODS, Loaded, make_folder
from tests.conftest import ROOT, command, write_rows
from utils.checks import folders

# ── the output folder ────────────────────────────────────────────────────────────────────────────────────────────────


FINISHED = "contains a finished run. Name another folder, or add --overwrite_output_dir"


# what stands in the folder: (flags, what is said, None where nothing is)
FOLDERS = [
    (["run_card.json", "metrics.jsonl"], "", FINISHED),
    (["run_card.json"], "--resume_from_checkpoint auto", FINISHED),
    (["run_card.json"], "--overwrite_output_dir", None),
    (
        ["metrics.jsonl"],
        "",
        "contains an unfinished run. Add --resume_from_checkpoint auto to finish it, or "
        "--overwrite_output_dir to start a new run",
    ),
    (["metrics.jsonl"], "--resume_from_checkpoint auto", None),
    (["thesis.tex"], "", "contains files that no training run wrote. Name another folder"),
    (["thesis.tex"], "--overwrite_output_dir", "contains files that no training run wrote. Name another folder"),
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
    "--lora_rank 0": ["--lora_rank 0: must be at least 1. Type --lora_rank 32", BAD_ROW],
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
