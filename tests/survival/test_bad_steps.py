"""What breaks a run in its midst: numbers that are none, memory that runs out, keys that would leak.

    pytest tests/survival/test_bad_steps.py           half a minute; runs of the tiny model, in this process
    pytest tests/survival/test_bad_steps.py -m slow   every method that names a row, and two processes

A model that gives nan for "~" stands for rows that no model can bear, of which the fifth is one.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_gkd
import train_rlhf
from rlhf_args.methods import EVERY
from tests.conftest import ROOT, make_model, read_rows, write_rows
from trainers.safe_trainer import Safe
from utils import launch
from utils.models import load as models_load
from utils.results import report
from utils.runtime import secrets
from utils.runtime.errors import Failed, Refused
from utils.survival import bad_steps, memory
from utils.training.chapters import guard

BAD = 5  # the line whose row holds "~"


def rows_of(name, count=8):
    """Rows of a method, all unlike, "~" in the answer of one; where none is given, in its prompt."""
    for number in range(1, count + 1):
        asked, spoilt = f"Name number {number:02}.", "~" * (number == BAD)
        if name in ("DPO", "CPO", "Reward"):
            yield {"prompt": asked, "chosen": f"It is {number}{spoilt}.", "rejected": f"Not {number}."}
        elif name == "KTO":
            yield {"prompt": asked, "completion": f"It is {number}{spoilt}.", "label": number % 2 == 0}
        elif name in ("SFT", "GKD"):
            roles = ("user", asked), ("assistant", f"It is {number}{spoilt}.")
            yield {"messages": [{"role": role, "content": content} for role, content in roles]}
        else:
            yield {"prompt": asked + spoilt}


def words(model, out, data, name="DPO", **more):
    flags = {"model_name_or_path": model, "train_data_path": data, "output_dir": out, "learning_rate": 1e-3}
    flags |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
    flags |= {"save_strategy": "no", "eval_fraction": 0}
    if EVERY[name].entry == "rlhf":
        flags["rlhf_type"] = name
    if EVERY[name].sample_reward:
        flags |= {"max_completion_length": 8, "num_generations": 2, "max_steps": 8}
    given = [(f"--{flag}", value) for flag, value in (flags | more).items() if value is not None]
    return [str(word) for flag, value in given for word in ((flag, value) if value != "" else (flag,))]


def train(model, out, data, name="DPO", **more):
    main = train_gkd.main if name == "GKD" else train_rlhf.main
    return main(words(model, out, data, name, **more))


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def letters(completions, **kwargs):\n    return [float(len(str(c)) % 5) for c in completions]\n")
    return f"{path}:letters"


@pytest.fixture
def brittle(monkeypatch):
    """Every policy gives nan from where "~" stands in a row."""
    load = models_load.load_policy

    def spoil(module, inputs, output):
        return torch.where((inputs[0] == tilde)[..., None], torch.full_like(output, float("nan")), output)

    def load_brittle(**source):
        nonlocal tilde
        (tilde,) = source["tokenizer"]("~", add_special_tokens=False)["input_ids"]
        model = load(**source)
        model.get_input_embeddings().register_forward_hook(spoil)
        return model

    tilde = None
    monkeypatch.setattr(models_load, "load_policy", load_brittle)


# ── a step on numbers that are none ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["DPO", "RLOO", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Reward", "CPO", "KTO", "SFT", "GKD"))]
)
def test_the_row_that_broke_a_step_is_named(name, brittle, rewards, tiny_model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(name))
    more = {"reward_funcs": rewards} if EVERY[name].sample_reward else {}
    if name == "GKD":
        teacher = make_model(tmp_path / "teacher", seed=1)
        more = {"teacher_model_name_or_path": teacher, "max_completion_length": 8, "lmbda": 0}
    assert train(tiny_model, tmp_path / "out", data, name, **more) == 1
    said = last_line(capsys)
    assert said.startswith("failed: step ") and f" in {data}:{BAD}, first in " in said, said
    assert "embed_tokens (Embedding). " in said and "remove them" in said
    what = "the likelihood of the next token is nan" if name == "RLOO" else "the loss is nan"
    assert what in said and not (tmp_path / "out/run_card.json").exists()


def test_a_bad_step_is_left_out_and_the_second_one_ends_the_run(brittle, tiny_model, tmp_path, monkeypatch, capsys):
    """8 rows, 2 a step: each epoch of 4 steps has one bad step, and of two the first is left out."""
    data, sums = write_rows(tmp_path / "rows.jsonl", rows_of("DPO")), []
    end = report.Report.on_step_end

    def follow(self, args, state, control, **kwargs):
        trained = [p.detach().double().abs().sum().item() for p in self.trainer.model.parameters()]
        sums.append((state.global_step, sum(trained)))
        return end(self, args, state, control, **kwargs)

    monkeypatch.setattr(report.Report, "on_step_end", follow)
    more = {"max_bad_steps": 2, "train_mode": "full", "num_train_epochs": 2}
    assert train(tiny_model, tmp_path / "out", data, **more) == 1
    said = capsys.readouterr().err
    (warned,) = [line for line in said.splitlines() if "1 so far, --max_bad_steps" in line]
    assert f" in {data}:{BAD}, first in " in warned
    assert f" in {data}:{BAD}, first in " in said.strip().splitlines()[-1]
    skipped, stopped = (int(line.split("step ")[1].split(":")[0]) for line in (warned, said.strip().splitlines()[-1]))
    assert skipped <= 4 < stopped == len(sums) + 1
    values = [None, *(value for _, value in sums)]
    moved = {step for step in range(2, stopped) if values[step] != values[step - 1]}
    assert moved == set(range(2, stopped)) - {skipped} and len(moved) >= 2


@pytest.mark.parametrize("given", [0, -3])
def test_no_bad_step_at_all_cannot_be_asked_for(given, tiny_model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows_of("DPO"))
    assert train(tiny_model, tmp_path / "out", data, max_bad_steps=given) == 2
    assert f"--max_bad_steps {given}" in last_line(capsys)


def test_a_learning_rate_that_is_too_high_is_named(tiny_model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows_of("CPO", 4))
    assert train(tiny_model, tmp_path / "out", data, learning_rate=1e30, train_mode="full") == 1
    said = last_line(capsys)
    assert said.startswith("failed: step 2: ") and said.endswith("--learning_rate 1e+30 is too high"), said


def test_a_gradient_that_is_no_number_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    name, load = "model.layers.1.mlp.up_proj.weight", models_load.load_policy

    def spoil(gradient):
        spoilt = gradient.clone()
        spoilt[0, 0] = float("nan")
        return spoilt

    def load_planted(**source):
        model = load(**source)
        model.get_parameter(name).register_hook(spoil)
        return model

    monkeypatch.setattr(models_load, "load_policy", load_planted)
    data = write_rows(tmp_path / "rows.jsonl", rows_of("CPO", 4))
    assert train(tiny_model, tmp_path / "out", data, train_mode="full") == 1
    assert last_line(capsys).startswith("failed: step 1: the gradient is not finite (norm nan)")


def test_a_model_that_is_broken_before_any_training_is_named(tmp_path, capsys):
    folder = make_model(tmp_path / "model")
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    data = write_rows(tmp_path / "rows.jsonl", rows_of("DPO"))
    assert train(folder, tmp_path / "out", data) == 1
    said = last_line(capsys)
    assert said.startswith(f"failed: {folder}: ") and "layers.1.mlp.up_proj" in said
    assert said.endswith("holds nan or infinity before any training. Copy the model again")


def test_packed_weights_are_no_numbers_to_look_at():
    """Of qlora stored in the dtype of floats, where some bits read as nan."""
    packed = type("Params4bit", (torch.Tensor,), {})
    assert bad_steps.all_finite(torch.full((2,), float("nan")).as_subclass(packed))
    assert not bad_steps.all_finite(torch.full((2,), float("nan")))
    assert bad_steps.all_finite(torch.full((2,), 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("values", "text", "held"),
    [
        ({"prompt": "One", "chosen": "a", "rejected": "b"}, "user One assistant a", True),
        ({"prompt": "One", "chosen": "a", "rejected": "b"}, "user One assistant b", True),
        ({"prompt": "One", "completion": "xyz"}, "user One assistant b", False),
        ({"prompt": "Two", "chosen": "a", "rejected": "b"}, "user One assistant a", False),
        ({"prompt": [{"role": "user", "content": "One\n two"}]}, "user One two assistant", True),
        ({"prompt": "x" * 100 + "end"}, "end", False),
    ],
)
def test_a_row_is_found_by_its_words(values, text, held):
    assert bad_steps.holds(text, values) is held


# ── memory that runs out ─────────────────────────────────────────────────────────────────────────────────────────────


def fill_memory(monkeypatch, fits, at=2, which=1):
    """From step `at` on, the pass number `which` of a step with more than `fits` rows runs out of memory."""
    prepare, seen = Safe._prepare_inputs, []

    def prepare_in_little(self, inputs):
        if self.model.training and self.state.global_step >= at and self.args.per_device_train_batch_size > fits:
            seen.append(self.state.global_step)
            if len(seen) > which:
                seen.clear()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return prepare(self, inputs)

    monkeypatch.setattr(Safe, "_prepare_inputs", prepare_in_little)


@pytest.fixture
def restarts(monkeypatch):
    """Starts again within this process; a list of the flags it was started again with."""
    found = []

    def start(argv, more):
        found.append(more)
        return train_rlhf.main(memory.add_words(argv, more))

    monkeypatch.setattr(memory, "start_again", start)
    return found


def test_auto_batch_goes_on_in_smaller_passes_with_the_same_step(tiny_model, restarts, tmp_path, monkeypatch, capsys):
    """4 rows a pass and 2 passes become 2 and 4: 8 rows a step, whose losses stay but for the order of sums."""
    data = write_rows(tmp_path / "rows.jsonl", rows_of("DPO", 32))
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    assert train(tiny_model, tmp_path / "whole", data, **more) == 0
    fill_memory(monkeypatch, fits=2)
    assert train(tiny_model, tmp_path / "out", data, **more, auto_batch="") == 0
    assert restarts == [["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]]
    assert "out of memory in step 3 with 4 rows a pass: starts again with" in capsys.readouterr().err
    losses = [[row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("whole", "out")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)  # float32, a sum of 8
    card = json.loads((tmp_path / "out/run_card.json").read_text())["arguments"]
    assert (card["per_device_train_batch_size"], card["gradient_accumulation_steps"]) == (2, 4)


def test_without_auto_batch_it_is_one_line_with_what_would_help(tiny_model, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows_of("DPO"))
    fill_memory(monkeypatch, fits=1)
    assert train(tiny_model, tmp_path / "out", data) == 1
    said = last_line(capsys)
    assert said.startswith("failed: out of memory in step ") and "(2 rows a pass): peak " in said
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 (the same step; --auto_batch" in said
    assert "Tried to allocate 2.00 GiB" in (tmp_path / "out/error.log").read_text()


@pytest.mark.parametrize(
    ("name", "batch", "slices", "found"),
    [
        ("DPO", 4, None, "--per_device_train_batch_size 2 --gradient_accumulation_steps 6"),
        ("DPO", 1, None, ""),
        ("DPO", 3, None, ""),
        ("KTO", 4, None, "--per_device_train_batch_size 2 --gradient_accumulation_steps 6"),
        ("KTO", 2, None, ""),  # its pass needs two rows, one to compare with
        ("RLOO", 4, 2, "--per_device_train_batch_size 2 --gradient_accumulation_steps 6 --steps_per_generation 4"),
    ],
)
def test_a_pass_is_halved_as_far_as_a_method_can(name, batch, slices, found):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 3, "steps_per_generation": slices}
    run = SimpleNamespace(config=SimpleNamespace(**sizes), method=EVERY[name])
    assert " ".join(memory.halve(run)) == found


@pytest.mark.parametrize(
    ("argv", "more", "found"),
    [
        ("--overwrite_output_dir --beta 1", "--x 2", "--beta 1 --x 2"),
        ("--overwrite-output-dir --beta 1", "--x 2", "--beta 1 --x 2"),
        ("--overwrite_output_dir True --beta 1", "--x 2", "--beta 1 --x 2"),
        ("--generation_batch_size 16", "--x 2", "--generation_batch_size 16 --x 2"),
        ("--generation_batch_size 16", "--steps_per_generation 2", "--steps_per_generation 2"),
        ("--num_mini_batches 2 --beta 1", "--steps_per_generation 2", "--beta 1 --steps_per_generation 2"),
    ],
)
def test_a_new_start_does_not_delete_what_it_goes_on_from(argv, more, found):
    assert memory.add_words(argv.split(), more.split()) == [*found.split(), "--resume_from_checkpoint", "auto"]


def test_a_recipe_cannot_delete_it_either(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("overwrite_output_dir: true\nbeta: 0.3\n")
    found = memory.add_words(["--config", str(recipe)], ["--x", "2"])
    assert "--overwrite_output_dir" not in found and "0.3" in found and str(recipe) not in found


def test_a_launcher_starts_again_as_often_as_it_is_asked(monkeypatch):
    asked, jobs = [["--per_device_train_batch_size", "2"], ["--per_device_train_batch_size", "1"], []], []

    def run(plan, job):
        jobs.append(job)
        Path(os.environ[memory.HANDOVER]).write_text("\n".join(asked[len(jobs) - 1]))
        return 0 if len(jobs) == 3 else 1

    monkeypatch.setenv(memory.HANDOVER, "")
    monkeypatch.setattr(launch, "launch", run)
    assert launch.launch_until_it_fits(SimpleNamespace(world=2, nodes=1), ["train.py", "--beta", "1"]) == 0
    assert len(jobs) == 3 and jobs[0] == ["train.py", "--beta", "1"]
    assert jobs[1][3:] == ["--per_device_train_batch_size", "2", "--resume_from_checkpoint", "auto"]
    assert jobs[2][-4:] == ["--per_device_train_batch_size", "1", "--resume_from_checkpoint", "auto"]


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TOKEN = "hf_" + "A1b2" * 8
PLAIN = "zebra-9182-kite"


def files_with(folder, text):
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()
    ]


def test_no_key_is_in_what_a_run_leaves_or_says(tiny_model, tmp_path, monkeypatch, capfd):
    data, out = write_rows(tmp_path / "rows.jsonl", rows_of("DPO")), tmp_path / "out"
    monkeypatch.setenv("HF_TOKEN", PLAIN)
    more = {"max_steps": 1, "hub-token": TOKEN, "save_strategy": "steps", "save_steps": 1, "run_name": PLAIN}
    assert train(tiny_model, out, data, **more) == 0
    assert (out / "run_card.json").exists() and (out / "checkpoint-1/training_args.bin").exists()
    assert files_with(out, TOKEN.encode()) == []
    card = (out / "run_card.json").read_text()
    assert PLAIN not in card and card.count(secrets.HIDDEN) >= 2
    said = "".join(capfd.readouterr())
    assert "verified" in said and TOKEN not in said and PLAIN not in said


def test_no_key_is_in_the_reason_of_a_failure(tiny_model, tmp_path, monkeypatch, capfd):
    """Of a reward function that says one once it is trained with, not already when it is tried."""
    (tmp_path / "rewards.py").write_text(
        "calls = []\ndef leak(completions, **kwargs):\n    calls.append(1)\n    if len(calls) > 2:\n"
        f"        raise RuntimeError('no answer to {TOKEN} {PLAIN}')\n"
        "    return [0.0, 1.0] * (len(completions) // 2)\n"
    )
    data, out = write_rows(tmp_path / "rows.jsonl", rows_of("RLOO")), tmp_path / "out"
    monkeypatch.setenv("JUDGE_API_KEY", PLAIN)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train(tiny_model, out, data, "RLOO", reward_funcs=f"{tmp_path}/rewards.py:leak") == 1
    said = "".join(capfd.readouterr())
    assert "no answer to <hidden> <hidden>" in said and TOKEN not in said and PLAIN not in said
    for text in (TOKEN, PLAIN):
        assert files_with(out, text.encode()) == [] and text not in (tmp_path / "error.json").read_text()


@pytest.mark.parametrize("raised", [Failed, ValueError])
def test_what_a_launcher_is_told_holds_no_key(raised, tmp_path, monkeypatch):
    def fail(argv):
        raise raised(f"said {TOKEN}")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        guard(fail, [])
    except ValueError:
        assert raised is ValueError
    told = (tmp_path / "error.json").read_text()
    assert "said <hidden>" in told and TOKEN not in told


def test_no_key_is_in_a_refusal(capsys):
    def refuse(argv):
        raise Refused([f"leak raised RuntimeError: no answer to {TOKEN}"])

    assert guard(refuse, []) == 2
    assert capsys.readouterr().err == "refused: leak raised RuntimeError: no answer to <hidden>\n"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hub_token", PLAIN], ["--hub_token", "<hidden>"]),
        (["--hub-token", PLAIN], ["--hub-token", "<hidden>"]),
        ([f"--hub_token={PLAIN}"], ["--hub_token", "<hidden>"]),
        (["--judge_api_key", PLAIN, "--beta", "1"], ["--judge_api_key", "<hidden>", "--beta", "1"]),
        (["--pad_token_x", PLAIN], ["--pad_token_x", PLAIN]),
        (["--note", f"with {TOKEN}."], ["--note", "with <hidden>."]),
        (["--beta=1"], ["--beta", "1"]),
    ],
)
def test_a_command_line_keeps_the_names_of_flags_alone(given, kept):
    assert secrets.hide_words(given) == kept


@pytest.mark.parametrize("key", [TOKEN, "sk-proj-" + "a1B2_" * 5, "ghp_" + "a1B2" * 6, "AKIA" + "ABCD1234" * 2])
def test_the_shapes_of_keys_are_known(key):
    assert secrets.hide(f"key {key}, end") == "key <hidden>, end"
    assert secrets.hide("hf_hub, sk-learn, a token") == "hf_hub, sk-learn, a token"


# ── two processes ────────────────────────────────────────────────────────────────────────────────────────────────────

LITTLE = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
from trainers.safe_trainer import Safe
prepare = Safe._prepare_inputs
def prepare_in_little(self, inputs):
    late = self.model.training and self.state.global_step >= 2 and self.args.process_index == 1
    if late and self.args.per_device_train_batch_size > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return prepare(self, inputs)
Safe._prepare_inputs = prepare_in_little
import train_rlhf
sys.exit(train_rlhf.main())
"""


@pytest.mark.slow
def test_auto_batch_of_two_processes(tiny_model, warm, tmp_path):
    """Process 1 runs out in step 3: both start again, from the checkpoint of step 2."""
    script, out = tmp_path / "little.py", tmp_path / "out"
    script.write_text(LITTLE)
    data = write_rows(tmp_path / "rows.jsonl", rows_of("DPO", 16))
    env = {**os.environ, "LAUNCH": "cpu", "NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    job = [script, *words(tiny_model, out, data, save_strategy="steps", save_steps=1, auto_batch="", max_steps=4)]
    done = subprocess.run(
        [warm, "-m", "utils.launch", *map(str, job)], cwd=ROOT, env=env, text=True, capture_output=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory in step 3 with 2 rows a pass: starts again with" in done.stderr
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    card = json.loads((out / "run_card.json").read_text())
    assert card["world_size"] == 2 and card["arguments"]["per_device_train_batch_size"] == 1
    assert card["arguments"]["gradient_accumulation_steps"] == 2
    launch = [card[key] for key in ("LAUNCH", "NUM_PROCESSES", "NNODES", "engine", "device")]
    assert launch == ["cpu", 2, 1, "ddp", "cpu"]
    assert card["command"].startswith("LAUNCH=cpu NUM_PROCESSES=2 NNODES=1 python -m utils.launch train_rlhf.py")
