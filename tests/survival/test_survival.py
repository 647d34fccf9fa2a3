"""Runs that survive: resumes, kills, signals, damaged checkpoints, those of another run, a full disk.

    pytest tests/survival/test_survival.py               a minute; the runs are of the tiny model, in this process
    pytest tests/survival/test_survival.py -m slow       every method, twenty kills, two processes

A run that was broken off and started again ends with the weights of an undisturbed one to the last bit, and its log.
"""

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_args.methods import EVERY
from tests.conftest import ROOT, read_rows, write_rows
from tests.survival.conftest import assert_same_run, copied, log_of, steps_saved, train
from utils.results import report
from utils.runtime.errors import Failed, Refused
from utils.survival import checkpoints, resume, stops

CELLS = [(name, mode) for name in EVERY for mode in ("lora", "full")]


FAST = [("DPO", "lora"), ("KTO", "lora"), ("RLOO", "lora"), ("PPO", "full"), ("GKD", "lora")]


def tree(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# ── a resumed run ends as an unbroken one ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "mode", "at"),
    [(*cell, [4]) for cell in FAST] + [pytest.param(*cell, [1, 6], marks=pytest.mark.slow) for cell in CELLS],
)
def test_a_resumed_run_ends_as_an_unbroken_one(name, mode, at, models, tmp_path, request):
    """From within epoch 1, from within epoch 2 between two log lines (of a rollout half used), from the last step."""
    if (name, mode) == ("DPO", "lora"):
        out = request.getfixturevalue("whole")
    else:
        out = tmp_path / "whole"
        assert train(models, out, name, mode) == 0
    for step in at:
        resumed = copied(out, tmp_path / f"from-{step}", step)
        assert train(models, resumed, name, mode) == 0
        assert_same_run(out, resumed)


def test_a_checkpoint_without_all_that_a_resume_needs_is_refused(models, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "out", 2)
    for file in folder.glob("checkpoint-*/rng_state*"):
        os.remove(file)
    for checkpoint in checkpoints.list_checkpoints(folder):
        checkpoints.seal(checkpoint, checkpoints.read_manifest(checkpoint)["run"])
    assert train(models, folder) == 2
    said = capsys.readouterr().err
    assert "--save_only_model" in said and "Type --resume weights_only" in said


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "half": (lambda c: os.truncate(c / "optimizer.pt", 100), "optimizer.pt has 100 of"),
    "empty": (lambda c: os.truncate(c / "adapter_model.safetensors", 0), "adapter_model.safetensors has 0 of"),
    "missing": (lambda c: os.remove(c / "rng_state.pth"), "rng_state.pth is missing"),
    "one bit": (lambda c: flip(c / "scheduler.pt"), "scheduler.pt has changed since it was written (sha256)"),
    "no manifest": (lambda c: os.remove(c / "manifest.json"), "no manifest.json"),
    "no JSON": (lambda c: (c / "manifest.json").write_text('{"files"'), "manifest.json cannot be read"),
    "not bytes": (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "a list": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "null": (lambda c: (c / "manifest.json").write_text("null"), "manifest.json cannot be read"),
    "a number": (
        lambda c: (c / "manifest.json").write_text('{"files": {"optimizer.pt": 3}}}'),
        "cannot be read",
    ),
    "no run": (lambda c: (c / "manifest.json").write_text('{"files": {}, "run": {}}'), "manifest.json names no run"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(kind, whole, tmp_path):
    folder = copied(whole, tmp_path / "out")
    assert checkpoints.newest_whole(folder) == (folder / "checkpoint-6", [])
    damage, said = DAMAGE[kind]
    damage(folder / "checkpoint-6")
    found, (line,) = checkpoints.newest_whole(folder)
    assert found == folder / "checkpoint-5"
    assert line.startswith(f"{folder / 'checkpoint-6'} is damaged, and skipped: ") and said in line


def test_a_check_before_the_run_looks_at_the_sizes_alone(whole, tmp_path):
    folder = copied(whole, tmp_path / "out")
    flip(folder / "checkpoint-6/scheduler.pt")
    assert checkpoints.newest_whole(folder, hashes=False) == (folder / "checkpoint-6", [])


def test_a_manifest_has_the_hash_of_every_file_when_the_run_is_over(whole):
    for checkpoint in checkpoints.list_checkpoints(whole):
        files = checkpoints.read_manifest(checkpoint)["files"]
        held = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
        assert held == files.keys() | {"manifest.json"}
        assert len(files) > 5 and all(len(described["sha256"]) == 64 for described in files.values())


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_keeps_it(models, whole, tmp_path, capsys):
    """Two newer checkpoints, both damaged, and one to keep: the rotation must not delete the resumed checkpoint."""
    folder = copied(whole, tmp_path / "out")
    for step in (5, 6):
        os.truncate(folder / f"checkpoint-{step}/optimizer.pt", 100)
    assert train(models, folder, save_total_limit=1) == 0
    said = capsys.readouterr().out
    assert said.count("is damaged, and skipped: optimizer.pt has 100 of") == 2
    assert f"resumes from {folder}/checkpoint-4" in said
    assert steps_saved(folder) == [6] and not list(folder.glob("checkpoint-being*"))
    assert_same_run(whole, folder)


def test_rotation_keeps_the_newest_the_best_and_later_ones(tmp_path):
    for step in (1, 2, 3, 4, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, None, None, tmp_path / "checkpoint-4")
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 9]
    checkpoints.rotate(tmp_path, 3, str(tmp_path / "checkpoint-1"), tmp_path / "checkpoint-4")
    assert steps_saved(tmp_path) == [1, 3, 4, 9]  # the newest, the best, and one more of the three
    checkpoints.rotate(tmp_path, 1, None, tmp_path / "checkpoint-4")
    assert steps_saved(tmp_path) == [4, 9]


def start_of(models, folder, monkeypatch, *, name="DPO", mode="lora", **more):
    """What find_start says of a command line, without a training: (Start, lines), or the Refused it raises."""
    seen = []

    def stop(run):
        seen.append(real(run))
        raise Refused(["seen"])

    with monkeypatch.context() as patch:
        real = resume.find_start
        patch.setattr(resume, "find_start", stop)
        assert train(models, folder, name, mode, **more) == 2
    return seen[0] if seen else None


def test_where_every_checkpoint_is_damaged_the_run_begins_anew_and_says_so(models, whole, tmp_path, monkeypatch):
    folder = copied(whole, tmp_path / "out", 2)
    for step in (1, 2):
        os.remove(folder / f"checkpoint-{step}/manifest.json")
    start, said = start_of(models, folder, monkeypatch)
    assert start.checkpoint is None and not start.weights_only
    assert said[-1] == f"no checkpoint in {folder} to resume from: starts at step 0" and len(said) == 3


def test_a_damaged_checkpoint_that_was_named_is_refused(models, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "out", 2)
    flip(folder / "checkpoint-2/optimizer.pt")
    before = tree(folder)
    assert train(models, folder, resume_from_checkpoint=folder / "checkpoint-2") == 2
    said = f"--resume_from_checkpoint {folder}/checkpoint-2: optimizer.pt has changed since it was written (sha256)"
    assert said in capsys.readouterr().err and tree(folder) == before


# ── another run ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory):
    """Two files beside data/preference.jsonl, by what is different in them."""
    folder, rows = tmp_path_factory.mktemp("rows"), read_rows(ROOT / "data/preference.jsonl")
    changed = [dict(rows[0], chosen=[{"role": "assistant", "content": "Something else."}]), *rows[1:]]
    return {
        "one row": write_rows(folder / "changed.jsonl", changed),
        "order": write_rows(folder / "order.jsonl", rows[::-1]),
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"learning_rate": 2e-3}, "--learning_rate 0.001 there, 0.002 here"),
        ({"lora_rank": 8}, "--lora_rank 32 there, 8 here"),
        ({"beta": 0.3}, "--beta 0.1 there, 0.3 here"),
        ({"seed": 7}, "--seed 42 there, 7 here"),
        ({"per_device_train_batch_size": 1}, "rows a step 4 there, 2 here"),
        ({"train_data_path": "one row"}, "data 12 rows"),
        ({"train_data_path": "order"}, "data 12 rows"),
        ({"model": "teacher"}, "model model "),
        ({"mode": "full"}, "--train_mode lora there, full here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(more, said, models, whole, other_rows, tmp_path, capsys):
    folder = copied(whole, tmp_path / "out", 1)
    before, more = tree(folder), dict(more)
    if other := more.pop("model", None):
        more["model_name_or_path"] = models / other
    if "train_data_path" in more:
        more["train_data_path"] = other_rows[more["train_data_path"]]
    assert train(models, folder, **more) == 2
    error = capsys.readouterr().err
    assert (
        f"{folder}/checkpoint-1 is from another run: " in error and said in error and "--resume weights_only" in error
    )
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [("processes_asked", 2, "processes 1 there, 2 here"), ("engine", "zero3", "engine none there, zero3 here")],
)
def test_the_launch_is_part_of_a_run(function, value, said, whole, tmp_path, monkeypatch):
    """Another number of processes, or another engine: the states of the optimizer lie otherwise."""
    there = checkpoints.read_manifest(whole / "checkpoint-1")["run"]
    key = {"processes_asked": "processes", "engine": "engine"}[function]
    assert f"{key} {there[key]} there, {value} here" == said
    assert resume.differences(there, there | {key: value}) == [said]


def test_a_longer_run_goes_on_and_its_schedule_is_said(models, whole, tmp_path, monkeypatch):
    folder = copied(whole, tmp_path / "out", 2)
    start, said = start_of(models, folder, monkeypatch, max_steps=9)
    assert start.checkpoint == folder / "checkpoint-2" and not start.weights_only
    assert said == [
        "the learning rate follows the schedule of the new length (--max_steps 9, not -1)",
        f"resumes from {folder}/checkpoint-2",
    ]


# ── --resume weights_only ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_weights_only_starts_anew_from_the_weights_against_the_same_reference(mode, models, whole, tmp_path):
    first = whole
    if mode == "full":
        first = tmp_path / "first"
        assert train(models, first, mode=mode) == 0
    out, flags = copied(first, tmp_path / "out"), {"learning_rate": 2e-3, "resume": "weights_only", "mode": mode}
    assert train(models, out, **flags) == 0
    # The weights of the end against the reference of the beginning: the first evaluation is the last of before
    losses = [[line["eval_loss"] for line in read_rows(folder / "eval.jsonl")] for folder in (first, out)]
    assert losses[1][0] == losses[0][-1] != losses[0][0]
    assert [line["step"] for line in read_rows(out / "eval.jsonl")] == [0, 3, 6]
    assert steps_saved(out) == steps_saved(out / "earlier") == [1, 2, 3, 4, 5, 6]
    assert log_of(out / "earlier", "metrics.jsonl") == log_of(first, "metrics.jsonl")
    again = copied(out, tmp_path / "again", 4)
    assert train(models, again, **flags) == 0  # killed in its turn, and typed again
    assert_same_run(out, again)
    assert not (again / "earlier/earlier").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_rank": 8}, "--lora_rank 32 there, 8 here"),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules"),
        ({"use_dora": "True"}, "--use_dora False there, True here"),
    ],
)
def test_weights_of_another_shape_are_refused(more, said, models, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "out", 1)
    before = tree(folder)
    assert train(models, folder, resume="weights_only", **more) == 2
    error = capsys.readouterr().err
    assert f"{folder}/checkpoint-1: its weights do not fit: " in error and said in error and tree(folder) == before


def test_a_run_that_was_set_aside_is_not_gone_on_with(models, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "out", 1)
    copied(whole, folder / "earlier", 2)
    assert train(models, folder, resume_from_checkpoint=folder / "earlier/checkpoint-2") == 2
    assert f"{folder}/earlier/checkpoint-2: its run was set aside" in capsys.readouterr().err


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def signal_at(monkeypatch, step, number=signal.SIGTERM, within=(report.Report, "on_step_begin")):
    """Sends this process a signal when step `step` begins, or in the evaluation behind step `step` - 1."""
    owner, name = within
    real = getattr(owner, name)

    def follow(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            os.kill(os.getpid(), number)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(owner, name, follow)


@pytest.mark.parametrize(
    ("where", "number", "step", "saved"),
    [
        ("step", signal.SIGTERM, 2, 2),
        ("evaluation", signal.SIGINT, 4, 3),
        pytest.param("step", signal.SIGINT, 3, 3, marks=pytest.mark.slow),  # its evaluation is owed
        pytest.param("evaluation", signal.SIGTERM, 4, 3, marks=pytest.mark.slow),
        pytest.param("step", signal.SIGTERM, 6, 6, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_ends_as_an_unbroken_one(
    where, number, step, saved, models, whole, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "out"
    within = (report.Report, "on_step_begin") if where == "step" else (stops.Stops, "on_prediction_step")
    with monkeypatch.context() as patch:
        signal_at(patch, step, number, within)
        assert train(models, out, save_steps=100) == 128 + number
    said = capfd.readouterr().err
    assert f"{number.name}: finishes this step and saves a checkpoint. A second signal ends the run at once" in said
    assert "he same command with --resume_from_checkpoint auto goes on from there" in said
    assert steps_saved(out) == [saved] and checkpoints.problems_of(out / f"checkpoint-{saved}") == []
    assert not (out / "run_card.json").exists() and (out / "report.png").exists() == (saved >= 3)  # a line was logged
    assert train(models, out, save_steps=100) == 0
    assert_same_run(whole, out)


def watcher(tmp_path, **more):
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), world_size=1),
        add_callback=lambda callback: None,
        is_world_process_zero=lambda: True,
        **more,
    )
    return stops.Stops(trainer)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGTERM)
    with watcher(tmp_path) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (watch.asked, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_named_save_now_asks_for_a_checkpoint_once(tmp_path):
    watch, control = watcher(tmp_path), SimpleNamespace(should_save=False, should_training_stop=False)
    watch.on_step_end(None, None, control)
    assert not control.should_save
    (tmp_path / "SAVE_NOW").touch()
    watch.on_step_end(None, None, control)
    assert control.should_save and not control.should_training_stop
    watch.on_save(None, None, control)
    assert not (tmp_path / "SAVE_NOW").exists()


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_on_a_full_disk_fails_in_one_line_and_the_run_goes_on_later(
    models, whole, tmp_path, monkeypatch, capsys
):
    out, save = tmp_path / "out", torch.save

    def full(what, file, *rest, **kwargs):
        if "checkpoint-2/" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(what, file, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert train(models, out) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"failed: no space left on the disk of {out}: checkpoint-2 was not saved; checkpoint-1 is")
    assert steps_saved(out) == [1] and not (out / checkpoints.ASIDE).exists()
    assert train(models, out) == 0
    assert_same_run(whole, out)


class FullWriter:
    """Takes so many bytes, as a disk does."""

    def __init__(self, room):
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("error", "free", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**12, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**12, True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 10**12, True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), 0, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 0, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 10**12, False),
        (OSError(errno.EACCES, "Permission denied"), 0, False),
        (ValueError("a bug"), 0, False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, free, full, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(Failed if full else type(error)) as raised, checkpoints.says_when_full(tmp_path, "it"):
        raise error
    if full:
        said = f"no space left on the disk of {tmp_path}: it was not saved; no checkpoint is there"
        assert str(raised.value).startswith(said)


def test_what_torch_says_of_a_full_disk_is_known(tmp_path, monkeypatch):
    """Its own words, whatever its version."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(Failed), checkpoints.says_when_full(tmp_path, "it"):
        torch.save({"a": torch.ones(100_000)}, FullWriter(room=1000))


@pytest.mark.slow
def test_a_disk_that_really_is_full(models, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    try:
        out = disk / "out"
        assert train(models, out) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"failed: no space left on the disk of {out}: "), last
        found = checkpoints.list_checkpoints(out)
        assert found and [checkpoints.problems_of(path) for path in found] == [[]] * len(found)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert train(models, out) == 0
        assert train(models, tmp_path / "whole") == 0
        assert_same_run(tmp_path / "whole", out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
