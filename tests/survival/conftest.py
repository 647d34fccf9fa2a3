"""What the tests of this room share."""

import shutil
import subprocess

import pytest
from safetensors.torch import load_file

import train_gkd
import train_rlhf
from rlhf_args.methods import EVERY
from tests.conftest import ROOT, make_model, read_rows
from utils.survival import checkpoints

LETTERS = "def letters(completions, **kwargs):\n    return [float(sum(map(ord, str(c))) % 7) for c in completions]\n"


ROLLOUT = {"max_completion_length": 8, "num_iterations": 2, "num_generations": 4, "steps_per_generation": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model, a teacher of it, and a reward function."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "model")
    make_model(folder / "teacher", seed=1)
    (folder / "rewards.py").write_text(LETTERS)
    return folder


def words(models, out, name="DPO", mode="lora", **more):
    """The flags of a run of 6 steps, 3 an epoch: 13 rows, one of them held out, 4 a step. None leaves one out."""
    method = EVERY[name]
    flags = {"model_name_or_path": models / "model", "train_data_path": method.sample_data, "max_samples": 13}
    flags |= {"train_mode": mode, "output_dir": out, "per_device_train_batch_size": 2, "num_train_epochs": 2}
    flags |= {"gradient_accumulation_steps": 2, "logging_steps": 3, "save_steps": 1, "learning_rate": 1e-3}
    flags |= {"eval_fraction": 0.1, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    flags |= {"resume_from_checkpoint": "auto"}
    if method.entry == "rlhf":
        flags["rlhf_type"] = name
    if method.sample_reward:
        flags |= ROLLOUT | {"reward_funcs": f"{models}/rewards.py:letters", "max_steps": 6}
    if name == "PPO":
        flags["num_generations"] = 1
    if name == "GKD":
        flags |= {"teacher_model_name_or_path": models / "teacher", "lmbda": 0.5, "max_completion_length": 8}
    given = {flag: value for flag, value in (flags | more).items() if value is not None}
    return [str(word) for flag, value in given.items() for word in (f"--{flag}", value)]


def train(models, out, name="DPO", mode="lora", **more):
    main = train_gkd.main if name == "GKD" else train_rlhf.main
    return main(words(models, out, name, mode, **more))


def steps_saved(folder):
    return sorted(checkpoints.step_of(path) for path in checkpoints.list_checkpoints(folder))


def cut(folder, last):
    """Leaves of a finished run what a kill after step `last` would have."""
    for path in checkpoints.list_checkpoints(folder):
        if checkpoints.step_of(path) > last:
            shutil.rmtree(path)
    for path in [folder / "run_card.json", *folder.glob("*.safetensors")]:
        path.unlink(missing_ok=True)


def copied(folder, target, last=6):
    shutil.copytree(folder, target)
    cut(target, last)
    return target


def log_of(folder, name):
    """The lines of a log, without what the clock says."""
    timed = ("step_time", "runtime", "per_second")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in read_rows(folder / name)]


def same_weights(one, other):
    (one,), (other,) = (list(folder.glob("*model.safetensors")) for folder in (one, other))
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def assert_same_run(one, other):
    assert same_weights(one, other)
    for name in ("metrics.jsonl", "eval.jsonl"):
        if (one / name).exists():
            assert log_of(one, name) == log_of(other, name)
    assert len(log_of(one, "metrics.jsonl")) >= 2


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An undisturbed DPO run: 6 steps, each with its checkpoint, evaluated before, after 3 and after 6."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(models, out) == 0
    assert steps_saved(out) == [1, 2, 3, 4, 5, 6]
    return out


def start(warm, models, out, name="DPO", mode="lora", **more):
    """The real command in a process of its own, its words in a log beside `out`."""
    script = [warm, f"train_{EVERY[name].entry}.py", *words(models, out, name, mode, **more)]
    with open(out.parent / f"{out.name}.log", "a") as log:
        return subprocess.Popen(script, cwd=ROOT, stdout=log, stderr=log)
