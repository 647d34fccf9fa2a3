"""The run scripts: what their variables become as flags. `python -m pytest tests/test_variables.py -n 0 -q`

PYTHON is a program that shows what the script would start: its words, and the variables that it exports.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from rlhf_args.methods import METHODS
from tests.conftest import ROOT
from utils import launch
from utils.cli import recipes, variables
from utils.runtime.errors import Refused

SHOWN = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
SCRIPTS = ("rlhf_run.sh", "gkd_run.sh", "rejection_run.sh")


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """show(script, words, VARIABLE=value) is (script in Python, {flag: value}, environment that is left)."""
    python = tmp_path_factory.mktemp("bin") / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -IS -c '{SHOWN}' \"$@\"\n")
    python.chmod(0o755)

    def show(script, *words, **given):
        env = {"PATH": os.environ["PATH"], "PYTHON": str(python), **given}
        done = subprocess.run(["bash", script, *words], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
        started, env = json.loads(done.stdout)
        assert started[:3] == ["-m", "utils.launch", "--variables"] and started[4:] == list(words)
        job, *typed = started[3:]
        job, *filled = variables.fill([job, *typed], env)
        assert filled[: len(typed)] == typed
        return job, recipes.given_flags(filled), env

    return show


def flags(show, script, *words, **given):
    return show(script, *words, **given)[1]


# ── every spelling of a flag ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words",
    [["--train_mode", "full"], ["--train_mode=full"], ["--train-mode", "full"], ["--train-mode=full"]]
    + [["--use_peft", "False"], ["--bf16", "--train_mode", "full"]],
)
def test_full_weights_have_the_methods_learning_rate_and_their_folder(words, show):
    found = flags(show, "rlhf_run.sh", *words)
    assert found["train_mode"] == "full" and found["output_dir"] == "output/DPO-full"
    assert "learning_rate" not in found  # DPO's own; 1e-4 is a rate for adapters
    adapter = flags(show, "rlhf_run.sh", "--bf16")
    assert (adapter["output_dir"], adapter["learning_rate"]) == ("output/DPO-lora", "1e-4")


def test_a_flag_without_a_value_takes_no_other_flag_for_its_value(show):
    found = flags(show, "gkd_run.sh", "--seq_kd", "--lmbda", "0")
    assert (found["seq_kd"], found["lmbda"], found["output_dir"]) == ("", "0", "output/SeqKD-full-lmbda0")
    assert flags(show, "gkd_run.sh", "--lmbda", "0", "--seq_kd")["output_dir"] == "output/SeqKD-full-lmbda0"


@pytest.mark.parametrize("value", ["false", "False", "0", "no", "n", "F"])
@pytest.mark.parametrize("typed", [False, True])
def test_a_seq_kd_that_is_off_is_gkd(value, typed, show):
    words, given = (["--seq_kd", value], {}) if typed else ([], {"SEQ_KD": value})
    found = flags(show, "gkd_run.sh", *words, **given)
    assert found["output_dir"] == "output/GKD-full" and found["seq_kd"] == value


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "Y"])
def test_a_seq_kd_that_is_on_is_seqkd(value, show):
    assert flags(show, "gkd_run.sh", SEQ_KD=value)["output_dir"] == "output/SeqKD-full"


# ── typed flag, recipe, variable, default ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    values = {"train_mode": "full", "num_train_epochs": 5, "learning_rate": 3e-6, "train_data_path": "mine.jsonl"}
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.mark.parametrize("joined", [False, True])
def test_a_typed_flag_wins_over_the_recipe_over_a_variable_over_a_default(joined, recipe, show):
    words = [f"--config={recipe}"] if joined else ["--config", recipe]
    given = {"TRAIN_MODE": "qlora", "EPOCHS": "3", "BATCH_SIZE": "7", "TRAIN_DATA": "other.jsonl"}
    found = flags(show, "rlhf_run.sh", *words, "--num-train-epochs=9", **given)
    assert found["num_train_epochs"] == "9"  # typed
    assert found["train_mode"] == "full" and found["train_data_path"] == "mine.jsonl"  # recipe
    assert float(found["learning_rate"]) == 3e-6 and found["output_dir"] == "output/DPO-full"
    assert found["per_device_train_batch_size"] == "7"  # variable
    assert found["eval_fraction"] == "0.07" and "max_steps" not in found  # default; the data are not the sample


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_a_shipped_recipe_means_the_same_through_its_script(name, show):
    path = f"recipes/{name}"
    typed = recipes.given_flags(["--config", path])
    script = "gkd_run.sh" if "teacher_model_name_or_path" in typed else "rlhf_run.sh"
    script = "rejection_run.sh" if "num_completions" in typed else script
    found = flags(show, script, "--config", path)
    assert len(typed) > 8 and {flag: found[flag] for flag in typed} == typed


def test_a_recipe_that_cannot_be_read_is_refused(show):
    with pytest.raises(Refused, match="--config gone.yaml: no such file"):
        flags(show, "rlhf_run.sh", "--config", "gone.yaml")


def test_old_names_of_flags_win_too(show):
    found = flags(show, "gkd_run.sh", "--teacher_model", "t", "--dataset_name", "d", TEACHER="x", TRAIN_DATA="y")
    assert "x" not in found.values() and "y" not in found.values() and "max_steps" not in found
    found = flags(show, "rlhf_run.sh", "--response_length=99", RLHF_TYPE="RLOO")
    assert "max_completion_length" not in found  # of the sample's flags; --response_length is its old name


# ── defaults that depend on other flags ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_methods_sample_comes_with_its_flags_and_reward(name, typed, show):
    method = METHODS[name]
    words, given = (["--rlhf_type", name], {}) if typed else ([], {"RLHF_TYPE": name})
    found = flags(show, "rlhf_run.sh", *words, **given)
    assert found["train_data_path"] == method.sample_data and found["output_dir"] == f"output/{name}-lora"
    assert found.items() >= recipes.read_flags(method.sample_flags).items()
    assert found.get("reward_funcs") == method.sample_reward
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == tuple(
        map(str, method.batch)
    )
    own = flags(show, "rlhf_run.sh", *words, **given, TRAIN_DATA="my.jsonl", MAX_STEPS="-1")
    assert (own["train_data_path"], own["max_steps"], own.get("reward_funcs")) == ("my.jsonl", "-1", None)


@pytest.mark.parametrize(
    ("reward", "flag"), [("my.py:f", "reward_funcs"), ("output/Reward-lora", "reward_model_path"), ("a.py/b", None)]
)
def test_a_reward_is_a_function_or_a_model(reward, flag, show):
    found = flags(show, "rlhf_run.sh", RLHF_TYPE="PPO", REWARD=reward)
    assert found[flag or "reward_model_path"] == reward and len(found.keys() & set(variables.REWARD)) == 1
    typed = flags(show, "rlhf_run.sh", "--reward_model_path", "r", RLHF_TYPE="PPO", REWARD=reward)
    assert typed["reward_model_path"] == "r" and "reward_funcs" not in typed


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_data_replace_the_fraction(script, show):
    given = {"EVAL_FRACTION": "0.5", "THEN": "DPO"}
    assert flags(show, script, **given)["eval_fraction"] == "0.5"
    assert "eval_fraction" not in flags(show, script, "--eval_data_path=held.jsonl", **given)


def test_the_shipped_pair_is_distilled_in_minutes(show):
    shipped = flags(show, "gkd_run.sh")
    assert shipped.items() >= {"max_steps": "16", "learning_rate": "1e-4", "max_completion_length": "32"}.items()
    assert shipped["model_name_or_path"] == variables.DEMO_STUDENT
    assert shipped["teacher_model_name_or_path"] == variables.DEMO_MODEL
    own = flags(show, "gkd_run.sh", "--model_name_or_path=mine", LMBDA="0.3", BETA="1")
    assert own["output_dir"] == "output/GKD-full-lmbda0.3-beta1" and not own.keys() & {"max_steps", "learning_rate"}


def test_rejection_sampling_passes_what_a_training_takes_only_with_then(show):
    _, alone, env = show("rejection_run.sh", TRAIN_MODE="full", EPOCHS="4", EVAL_FRACTION="0.3", LEARNING_RATE="2")
    assert not alone.keys() & {"train_mode", "num_train_epochs", "eval_fraction", "rounds"}
    assert alone["output_dir"] == "output/rejection" and alone["max_samples"] == "40"
    assert env["LEARNING_RATE"] == "2"  # rlhf_run.sh's
    then = flags(show, "rejection_run.sh", "--then", "KTO", TRAIN_MODE="full", EPOCHS="4")
    assert (then["train_mode"], then["num_train_epochs"], then["eval_fraction"]) == ("full", "4", "0.2")
    assert then["output_dir"] == "output/rejection-KTO" and then["rounds"] == "1"
    assert flags(show, "rejection_run.sh", THEN="DPO", TRAIN_DATA="p.jsonl")["eval_fraction"] == "0.1"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_the_job_starts_does_not_inherit_its_variables(script, show):
    """REWARD=r THEN=DPO bash rejection_run.sh: DPO has no reward."""
    job, found, env = show(script, REWARD="r", MODEL="m", LAUNCH="cpu")
    taken = {*variables.SCRIPTS[job][0]}
    assert found["model_name_or_path"] == "m" and len(taken) > 10 and not taken & env.keys()
    assert env["LAUNCH"] == "cpu"  # the launcher's own
    assert ("reward_model_path" in found) == (script != "gkd_run.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_variable_of_a_script_is_a_flag_or_the_launchers(script, show):
    named = set(re.findall(r"^([A-Z_]+)=", (ROOT / script).read_text(), re.M))
    launchers = {"LAUNCH", "NUM_PROCESSES", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_TIMEOUT"}
    job, _, _ = show(script)
    assert named - launchers - {"PYTHON"} == {*variables.SCRIPTS[job][0]}


# ── the launch ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("processes", "checks"), [(1, 0), (2, 1)])
def test_one_process_is_not_checked_beforehand(processes, checks, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(os, "environ", {**os.environ, "LAUNCH": "cpu", "NUM_PROCESSES": str(processes)})
    monkeypatch.setattr(launch.subprocess, "call", lambda command, **_: seen.append(command) or 0)
    monkeypatch.setattr(launch, "launch", lambda plan, job: 0)
    assert launch.main(["train_rlhf.py", "--x"]) == 0
    assert [command[-1] for command in seen] == ["--check"] * checks


@pytest.mark.parametrize(
    ("words", "alone"), [(["--check"], True), (["--check=False"], False), (["--check", "no"], False)]
)
def test_a_check_that_is_off_is_a_launch(words, alone, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "environ", {**os.environ, "LAUNCH": "cpu"})
    monkeypatch.setattr(launch.subprocess, "call", lambda command, **_: seen.append("check") or 0)
    monkeypatch.setattr(launch, "launch", lambda plan, job: seen.append("launch") or 0)
    assert launch.main(["train_rlhf.py", *words]) == 0 and seen == (["check"] if alone else ["launch"])


@pytest.mark.parametrize("in_recipe", [False, True])
def test_rejection_sampling_in_rounds_starts_its_own_launches(in_recipe, monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text("then: DPO\n")
    words = ["--config", str(tmp_path / "recipe.yaml")] if in_recipe else ["--then=DPO"]

    def become(command, env):
        assert command == [sys.executable, "rejection_sampling.py", *words]
        raise SystemExit("became it")

    monkeypatch.setattr(launch, "become", become)
    monkeypatch.setattr(launch, "read_plan", None)
    with pytest.raises(SystemExit, match="became it"):
        launch.main(["rejection_sampling.py", *words])


def test_a_demo_model_that_is_not_there_is_made(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(launch.subprocess, "call", lambda command: made.append(command[2:]) or len(made) > 2)
    launch.make_demo_models(["train_gkd.py", "--model_name_or_path", variables.DEMO_STUDENT])
    launch.make_demo_models(["train_gkd.py", "--teacher_model_name_or_path", variables.DEMO_MODEL])
    assert made == [["utils.demo_model", "--student"], ["utils.demo_model"]]
    launch.make_demo_models(["train_rlhf.py", "--model_name_or_path", "mine"])
    launch.make_demo_models(["train_rlhf.py", "--help", "--model_name_or_path", variables.DEMO_MODEL])
    assert len(made) == 2
    with pytest.raises(SystemExit) as stop:  # it cannot be had
        launch.make_demo_models(["train_rlhf.py", "--model_name_or_path", variables.DEMO_MODEL])
    assert stop.value.code == 1
