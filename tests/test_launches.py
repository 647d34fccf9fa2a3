"""Launches through rlhf_run.sh: a few cells of the matrix, several nodes, and what is refused before anything starts.

Everything here runs without a GPU, in processes that talk over gloo; the whole matrix is tests/matrix.
"""

import ast
import json
import math
import os
import re
import signal
import socket
import subprocess
import time
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_args.methods import METHODS
from tests.conftest import ROOT, read_rows
from tests.matrix.cells import JOBS, LAUNCHES, MODES, expected, judge, run_cell, run_script
from utils import launch
from utils.runtime.errors import Refused
from utils.training import chapters

# Each launch once, with the modes and every other method in turn; tests/matrix has all cells. Offload is left to it:
# DeepSpeed compiles its CPU optimizer for a minute.
KINDS = [kind for kind in LAUNCHES if "offload" not in kind]
FEW = [(name, mode, kind) for kind, mode, name in zip(KINDS, cycle(MODES), cycle([*JOBS][1::2]), strict=False)]


@pytest.mark.parametrize(("name", "mode", "kind"), FEW)
def test_a_few_cells_of_the_matrix(name, mode, kind, warm, model_for, tmp_path):
    outcome = judge(warm, model_for(mode, kind), tmp_path / "out", name, mode, kind)
    assert outcome.state == expected(name, mode), outcome


@pytest.mark.parametrize(
    ("asked", "numbers", "fitted"),
    [
        ({}, 7, 7),  # numbers to train, all of them fit into 5e8
        ({"reduce_bucket_size": "auto"}, 7, 7),
        ({"reduce_bucket_size": "auto"}, 6 * 10**8, 5 * 10**8),
        ({"reduce_bucket_size": 5}, 7, 5),
        ({"reduce_bucket_size": 2e8}, 7, 7),
        ({"reduce_bucket_size": "5e8"}, 7, 7),
    ],
)
def test_the_reduce_bucket_is_no_larger_than_the_gradients_or_than_what_was_asked(asked, numbers, fitted):
    model = torch.nn.Module()
    model.trained = torch.nn.Parameter(torch.empty(numbers, device="meta"))
    model.frozen = torch.nn.Parameter(torch.empty(9, device="meta"), requires_grad=False)
    settings = {"stage": 2, **asked}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": settings})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    chapters.fit_bucket(SimpleNamespace(model=model, accelerator=accelerator))
    assert settings == {"stage": 2, "reduce_bucket_size": fitted}


@pytest.mark.parametrize("name", ["DPO", pytest.param("CPO", marks=pytest.mark.slow)])
def test_bfloat16_losses_are_the_same_under_every_engine(name, warm, tiny_model, tmp_path):
    """Log-probabilities summed in bfloat16 come in steps of 4 at -580: CPO's first loss was 8.8125 instead of 8.7820.

    The tolerance is between that (3e-3) and what bfloat16 weights under DeepSpeed make of float32 ones (4e-5).
    """
    first = {}
    for kind in ("ddp", "zero2", "fsdp2"):
        rows = {"TRAIN_DATA": METHODS[name].sample_data, "EVAL_FRACTION": 0}
        done = run_cell(
            warm, tiny_model, tmp_path / kind, name, "full", kind, "--bf16", "--max_samples", 16, steps=1, **rows
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first[kind] = read_rows(tmp_path / kind / "metrics.jsonl")[0]["loss"]
    assert first["zero2"] == pytest.approx(first["ddp"], rel=5e-4)
    assert first["fsdp2"] == pytest.approx(first["ddp"], rel=5e-4)
    if METHODS[name].models:  # the policy is its reference as yet, to the last rounding
        assert first == pytest.approx(dict.fromkeys(first, math.log(2)), abs=1e-7)


# ── what a launch is asked for ───────────────────────────────────────────────────────────────────────────────────────


def plan(gpus=8, **env):
    return launch.read_plan(env, gpus)


@pytest.mark.parametrize(
    ("gpus", "env", "name", "processes"),
    [
        (0, {}, "cpu", 1),
        (0, {"NUM_PROCESSES": "2"}, "cpu", 2),
        (1, {}, "single_gpu", 1),
        (4, {}, "multi_gpu", 4),
        (4, {"LAUNCH": "zero3"}, "zero3", 4),
        (4, {"LAUNCH": "zero3", "NUM_PROCESSES": "2"}, "zero3", 2),
        (4, {"LAUNCH": "single_gpu"}, "single_gpu", 1),
        (4, {"NUM_PROCESSES": "1"}, "single_gpu", 1),
        (0, {"LAUNCH": "zero3"}, "zero3", 1),
        (1, {"NNODES": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29511", "NODE_RANK": "1"}, "multi_gpu", 1),
    ],
)
def test_the_devices_decide_unless_told(gpus, env, name, processes):
    found = plan(gpus, **env)
    assert (found.name, found.processes) == (name, processes)


@pytest.mark.parametrize(
    ("gpus", "env", "said"),
    [
        (1, {"NUM_PROCESSES": "2"}, "1 are visible. Type NUM_PROCESSES=1"),
        (8, {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be a whole number from 0 to 65535"),
        (8, {"NNODES": "a", "NODE_RANK": "b"}, "NODE_RANK=b: "),
        (2, {"LAUNCH": "zero3", "NUM_PROCESSES": "8"}, "2 are visible. Type NUM_PROCESSES=2"),
        (8, {"LAUNCH": "zero33"}, "LAUNCH=zero33: no such file in accelerate_configs/"),
        (8, {"LAUNCH": "zero33"}, "Did you mean zero3?"),
        (8, {"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two: must be a whole number from 1"),
        (8, {"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: must be a whole number from 1"),
        (0, {"LAUNCH": "multi_gpu"}, "no GPU is visible. Type LAUNCH=cpu"),
        (0, {"LAUNCH": "single_gpu"}, "no GPU is visible. Type LAUNCH=cpu"),
        (2, {"LAUNCH": "single_gpu", "NUM_PROCESSES": "2"}, "Type LAUNCH=multi_gpu"),
        (2, {"LAUNCH": "multi_gpu", "NUM_PROCESSES": "1"}, "Type LAUNCH=single_gpu"),
        (8, {"NNODES": "2"}, "Type MASTER_ADDR=HOST MASTER_PORT=29500"),
        (8, {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "ranks count from 0 to 1"),
    ],
)
def test_what_cannot_start_is_refused(gpus, env, said):
    with pytest.raises(Refused) as refusal:
        plan(gpus, **env)
    assert said in str(refusal.value)


def test_offload_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(launch, "search_path", lambda: "")
    with pytest.raises(Refused) as refusal:
        plan(8, LAUNCH="zero3_offload")
    assert "c++ and ninja" in str(refusal.value) and "LAUNCH=zero3" in str(refusal.value)
    assert plan(8, LAUNCH="zero3").name == "zero3"  # on GPUs nothing is compiled without offload


def test_a_lock_that_a_killed_compilation_left_is_named(monkeypatch, tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert plan(8, LAUNCH="zero3_offload")  # just now: another run is at it
    os.utime(lock, (0, 0))
    with pytest.raises(Refused, match=f"Type rm {lock}"):
        plan(8, LAUNCH="zero3_offload")


@pytest.mark.parametrize(
    ("launched", "gpus", "visible", "seen"),
    [("single_gpu", 2, "2,3", "2"), ("multi_gpu", 2, "2,3", "2,3"), ("zero3", 2, "2,3", "2,3"), ("cpu", 0, "2,3", "")],
)
def test_each_launch_sees_its_gpus(launched, gpus, visible, seen, monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    launch.set_environment(plan(gpus or 8, LAUNCH=launched))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert os.environ.get("DS_ACCELERATOR") == (None if gpus else "cpu")


def test_a_busy_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=f"MASTER_PORT={port}: in use here"):
            plan(8, MASTER_PORT=str(port))


# ── what is refused before it is launched ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mode", "kind", "flags", "said"),
    [
        ("qlora", "zero3", ["--use_dora"], "--use_dora with qlora under zero3"),
        ("qlora", "fsdp2", ["--use_dora"], "--use_dora with qlora under fsdp2"),
        ("full", "ddp", ["--precompute_ref_log_probs"], "--precompute_ref_log_probs with 2 processes"),
        ("full", "zero2_offload", ["--optim", "adafactor"], "--optim adafactor with the optimizer offloaded"),
        ("full", "zero3", ["--model_init_kwargs", '{"load_in_8bit": true}'], "8-bit weights are not supported"),
        ("full", "zero3", ["--load_in_8bit", "True"], "8-bit weights are not supported"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_once(mode, kind, flags, said, warm, tiny_model, tmp_path):
    done = run_cell(warm, tiny_model, tmp_path / "out", "DPO", mode, kind, *flags)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_merged_into_a_sharded_base(warm, tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    assert run_cell(warm, tiny_model, adapter, "SFT", "lora", "one process", steps=1).returncode == 0
    done = run_cell(warm, adapter, tmp_path / "out", "DPO", "full", "zero3")
    assert done.returncode == 2 and f"python -m utils.merge_lora {adapter}" in done.stderr


# ── several processes, several nodes ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "kind"),
    [("DPO", "zero3"), ("GKD", "ddp")]
    + [pytest.param(*cell, marks=pytest.mark.slow) for cell in product(("DPO", "PPO"), ("ddp", "fsdp2"))],
)
def test_a_resumed_run_ends_as_an_unbroken_one(method, kind, warm, model_for, tmp_path):
    out = tmp_path / "out"
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    if JOBS[method].sample_reward:
        saving += ["--num_iterations", "2"]  # the checkpoint lies in the middle of a rollout's use
    assert run_cell(warm, model_for("lora", kind), out, method, "lora", kind, *saving).returncode == 0
    unbroken, lines = load_file(out / "adapter_model.safetensors"), read_rows(out / "metrics.jsonl")
    for gone in ("run_card.json", "adapter_model.safetensors"):
        (out / gone).unlink()
    subprocess.run(["rm", "-r", str(out / "checkpoint-2")], check=True)

    done = run_cell(warm, model_for("lora", kind), out, method, "lora", kind, *saving)
    assert done.returncode == 0, done.stderr
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in unbroken.items())
    assert [line["loss"] for line in read_rows(out / "metrics.jsonl")] == [line["loss"] for line in lines]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("launched", ["cpu", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_nodes_train_what_one_does(launched, warm, tiny_model, tmp_path):
    """Two launchers of one process each, as on two machines, against one launcher of two."""
    asked = {"OMP_NUM_THREADS": "1", "PYTHON": warm, "LAUNCH": launched, "RLHF_TYPE": "DPO", "MODEL": tiny_model}
    asked |= {"MAX_STEPS": "2", "EVAL_FRACTION": "0", "LEARNING_RATE": "1e-2"}
    one = run_script(warm, "--max_samples", 16, **asked, NUM_PROCESSES=2, OUTPUT_DIR=tmp_path / "one")
    assert one.returncode == 0, one.stderr
    nodes = {"NNODES": "2", "NUM_PROCESSES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    both = [
        subprocess.Popen(
            ["bash", "rlhf_run.sh", "--max_samples", "16"],
            cwd=ROOT,
            env={**os.environ, **asked, **nodes, "NODE_RANK": rank, "OUTPUT_DIR": str(tmp_path / "two")},
            stdout=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    try:
        assert [process.wait(timeout=300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert json.loads((tmp_path / "two" / "run_card.json").read_text())["world_size"] == 2
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_node_that_nobody_joins_ends_with_its_reason(rank, warm, tiny_model, tmp_path):
    nodes = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    began = time.monotonic()
    done = run_cell(
        warm, tiny_model, tmp_path / "out", "DPO", "lora", "ddp", **nodes, NUM_PROCESSES=1, NODE_TIMEOUT=3
    )  # fmt: skip
    assert time.monotonic() - began < 60
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("failed: the nodes did not find each other within 3 s"), last
    assert not (tmp_path / "out").exists()


LOADER = """
import os, sys
sys.path.insert(0, os.getcwd())
if "--check" in sys.argv:
    sys.exit()
from utils.cli import arguments
from utils.models import load
from utils.runtime import environment
environment.calm_libraries()
name = arguments.peek_shared(sys.argv[1:])[1]
common, config = arguments.parse(sys.argv[1:], name)
path = common.model_name_or_path
policy = load.load_policy(
    path, task="CAUSAL_LM", train_mode=common.train_mode, dtype="float32", tokenizer=load.load_tokenizer(path),
    seed=0, deepspeed=config.deepspeed_plugin is not None
)
held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in policy.parameters())
print("HELD", held / sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters()), flush=True)
"""


@pytest.mark.parametrize(("launched", "share"), [("cpu", 1.0), ("zero3", 0.5)])
def test_zero3_holds_a_share_of_a_model_from_its_loading_on(launched, share, warm, tiny_model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOADER)
    job = ["--rlhf_type", "SFT", "--train_mode", "full", "--model_name_or_path", tiny_model, "--output_dir", tmp_path]
    env = {**os.environ, "LAUNCH": launched, "NUM_PROCESSES": "2"}
    command = [warm, "-m", "utils.launch", str(script), *map(str, job)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=120)
    shares = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("HELD")]
    assert shares == pytest.approx([share, share], abs=0.01), done.stderr


def test_a_failure_in_training_is_the_last_line(warm, tiny_model, tmp_path):
    out = tmp_path / "out"
    done = run_cell(warm, tiny_model, out, "DPO", "full", "ddp", LEARNING_RATE="1e30")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert re.match("failed: process [01] of 2: step 2: the loss is nan in ", last), done.stderr
    assert last.endswith("has grown to 1e+30: --learning_rate 1e+30 is too high"), done.stderr


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        ("raise ValueError('rank one is ill')", 1, "failed: process 1 of 2: ValueError: rank one is ill"),
        ("os._exit(7)", 7, "failed: process 1 of 2: exit status 7"),
        ("os.kill(os.getpid(), 9)", 137, "failed: process 1 of 2: killed by signal 9"),
    ],
)
def test_a_process_that_dies_is_named_last(action, status, said, warm, tmp_path):
    """Not after forty lines of launcher output: nothing but the process's own words, and then that line."""
    script = tmp_path / "script.py"
    body = "import os, sys, time\nsys.path.insert(0, os.getcwd())\n"
    body += "from utils.runtime.environment import record_failure\n"
    body += "if '--check' in sys.argv: sys.exit(0)\n"
    body += f"try:\n    if os.environ['RANK'] == '1': {action}\n    time.sleep(60)\n"
    body += "except ValueError as error:\n    record_failure(error)\n    raise\n"
    script.write_text(body)
    env = {**os.environ, "LAUNCH": "cpu", "NUM_PROCESSES": "2", "PYTHON": warm}
    done = subprocess.run(
        [warm, "-m", "utils.launch", str(script)], cwd=ROOT, env=env, text=True, capture_output=True, timeout=60
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status and lines[-1].startswith(said), done.stderr
    assert all("torch/distributed" not in line and "ChildFailed" not in line for line in lines), done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_every_process(processes, warm, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time\nif '--check' not in sys.argv: print('started', flush=True), time.sleep(99)\n")
    env = {**os.environ, "LAUNCH": "cpu", "NUM_PROCESSES": str(processes)}
    command = [warm, "-m", "utils.launch", str(script)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(processes)] == ["started\n"] * processes
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=40) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    began = time.monotonic()
    assert process.stdout.read() == "" and time.monotonic() - began < 10  # nobody holds the other end any more


OFF = ["--check=no", "--plan", "False"]


@pytest.mark.parametrize(
    ("flags", "recipe", "starts"),
    [
        ("", "", [["--check"], [], []]),
        ("--check False", "", [["--check", "False", "--check"], *[["--check", "False"]] * 2]),
        ("--check=no --plan False", "", [[*OFF, "--check"], OFF, OFF]),
        ("--check True", "", [["--check", "True"]]),
        ("--plan", "", [["--plan"]]),
        ("", "check: true", [[]]),
    ],
)
def test_a_switch_that_is_typed_as_off_is_off_for_the_launcher_too(flags, recipe, starts, warm, tmp_path):
    """What the script is started with: checked first, then twice; once and alone with --check and --plan."""
    (tmp_path / "script.py").write_text(f"import sys\nprint(sys.argv[1:], file=open('{tmp_path}/starts', 'a'))\n")
    if recipe:
        (tmp_path / "recipe.yaml").write_text(recipe)
        flags = f"{flags} --config {tmp_path}/recipe.yaml"
        starts = [[*start, "--config", f"{tmp_path}/recipe.yaml"] for start in starts]
    command = [warm, "-m", "utils.launch", str(tmp_path / "script.py"), *flags.split()]
    env = {**os.environ, "LAUNCH": "cpu", "NUM_PROCESSES": "2"}
    assert subprocess.run(command, cwd=ROOT, env=env, timeout=120).returncode == 0
    assert [ast.literal_eval(line) for line in (tmp_path / "starts").read_text().splitlines()] == starts
