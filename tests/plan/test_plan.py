"""What a run would take, and what it takes: `pytest tests/plan/test_plan.py`; `-m slow` plans what was measured."""

import copy
import json
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import train_rlhf
from tests.conftest import ROOT, command, make_model, write_rows
from utils.models import shapes
from utils.plan import engines, printout
from utils.plan.engines import Case
from utils.plan.ledger import Ledger, without_data
from utils.plan.planner import Planner
from utils.runtime.errors import Refused

# as their makers say
NUMBERS = {
    "0.5b": 494_032_768,
    "1.5b": 1_543_714_304,
    "3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "14b": 14_770_033_664,
    "32b": 32_763_876_352,
    "70b": 70_553_706_496,
}
PAIR = {"prompt": "Say yes.", "chosen": "Yes, " * 20, "rejected": "No, " * 20}


@pytest.fixture(autouse=True)
def launched_alone(monkeypatch):
    for name in ("LAUNCH", "NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAUNCH_PROCESSES", "1")  # a planner sets it


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("deep"), layers=5)


def planner_of(model, flags):
    return Planner(["--model_name_or_path", str(model), "--max_length", "64", "--plan", *flags.split()])


@pytest.mark.parametrize("name", NUMBERS)
def test_a_named_shape_has_as_many_numbers_as_its_model(name):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.find_shape(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == NUMBERS[name]
    assert set(NUMBERS) == set(shapes.SHAPES)


@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_the_plan_of_an_online_method_has_its_rollout(method, deep):
    flags = f"--rlhf_type {method} --reward_funcs data/rewards.py:brevity --max_completion_length 8"
    planner = Planner(["--model_name_or_path", str(deep), "--plan", *flags.split()])
    assert "rollout" in planner.estimate(planner.case).phases


@pytest.mark.parametrize(
    "flags",
    ["--train_mode full", "--rlhf_type KTO --train_mode qlora", "--rlhf_type SimPO --gradient_checkpointing False"],
)
def test_what_two_and_three_layers_take_tells_what_five_do(deep, flags):
    planner = planner_of(deep, f"--rlhf_type DPO {flags}")
    words = planner.case.words
    extended, whole = planner.rehearse(words, False), planner.rehearse_layers(words, False, 5)
    for name in ("trained", "frozen", "weights", "numbers"):
        # a tiny model's absmax is rounded
        assert getattr(extended, name) == pytest.approx(getattr(whole, name), rel=1e-2)
    for phase in ("forward", "backward", "update"):
        found, real = (
            max(sum(owners.values()) for (when, _), owners in one.peaks.items() if when == phase)
            for one in (extended, whole)
        )
        assert found == pytest.approx(real, rel=5e-3), phase
    if "qlora" in flags:  # a later real model must not get a code table without data
        from bitsandbytes import functional
        from bitsandbytes.backends import utils

        assert not functional.name2qmap and not utils._code_4bit_cache


def test_parameters_optimizer_and_gradients_are_counted_to_the_byte(tiny_model):
    planner = planner_of(tiny_model, "--rlhf_type SFT --train_mode full --dtype float32")
    alone = planner.estimate(planner.case)
    trained = alone.trained
    assert alone.phases["update"]["weights"] == pytest.approx(4 * trained, rel=0.01)  # and rotary frequencies
    assert alone.phases["update"]["optimizer"] == pytest.approx(8 * trained, rel=0.03)  # and what one update takes
    assert alone.phases["update"]["gradients"] == 4 * trained
    for engine, processes in ("zero1", 2), ("zero2", 2), ("zero3", 8):
        shared = planner.estimate(Case(planner.case.words, engine, processes))
        assert shared.phases["update"]["optimizer"] == 12 * trained / processes
    assert planner.estimate(Case(planner.case.words, "zero3_offload", 2)).host > 16 * trained


def test_a_run_that_fits_and_one_that_does_not(tiny_model, capsys):
    words = ["--rlhf_type", "DPO", "--train_mode", "full", "--model_name_or_path", tiny_model, "--plan"]
    assert train_rlhf.main(words) == 0
    fits, faster = capsys.readouterr().out.splitlines()[-2:]
    assert fits.startswith("fits ") and faster.startswith("faster    --gradient_checkpointing False would fit too: ")

    planner = Planner(words)
    needed = planner.estimate(planner.case).peak
    planner.room = 0.8 * needed
    assert printout.print_case(planner) == 2
    said = capsys.readouterr().out.splitlines()
    ways = said[said.index("would fit, the least loss of speed first:") + 1 :]
    assert 1 <= len(ways) <= 4 and len({way.split()[0].split("=")[0] for way in ways}) == len(ways)
    flags = next(re.match(r" +(--.+?) {2,}", way)[1] for way in ways if way.startswith("  --"))
    typed = planner.estimate(Case((*planner.case.words, *flags.split()), "single_gpu", 1))
    assert typed.peak <= planner.room


def test_the_memory_of_a_gpu_is_what_is_visible_of_its_size(tiny_model):
    planner = planner_of(tiny_model, "--gpu_memory 40GB")
    assert planner.memory == 40 * 2**30 and planner.room == pytest.approx(
        38.4 * 2**30, rel=1e-3
    )  # 39.4 less 1 of CUDA


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--plan zero9", "--plan zero9: no such launch"),
        ("--plan --gpu_memory much", "--gpu_memory much: not a memory size"),
        ("--plan --num_processes 0", "--num_processes 0: must be at least 1"),
        ("--plan --train_mode half", "half"),
        ("--plan --model_name_or_path no/such", "no/such: cannot read its config.json"),
        ("--plan --use_dora True --train_mode full", "--use_dora with --train_mode full"),
        ("--plan --rlhf_type PPO --train_mode full --value_model_path 1.5b", "1.5b: 28 layers, and the policy has 24"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_in_one_line(flags, says, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train_rlhf.main(["--model_name_or_path", "0.5b", *flags.split()]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out


def test_a_flag_of_plans_alone_is_refused_without_a_plan(tiny_model, capsys):
    assert train_rlhf.main(["--model_name_or_path", tiny_model, "--gpu_memory", "40GB"]) == 2
    said = capsys.readouterr().err
    assert "--gpu_memory 40GB" in said and "Add --plan" in said


def test_the_rows_are_the_longest_of_the_data(tiny_model, tmp_path):
    rows = [PAIR, PAIR | {"chosen": "Certainly. " * 30}, PAIR]
    words = ["--model_name_or_path", tiny_model, "--train_data_path", write_rows(tmp_path / "rows.jsonl", rows)]
    longest = Planner([*words, "--plan"]).longest
    assert "of the data" in longest.said
    assert longest.lengths == (len("Say yes."), len("Certainly. " * 30) + 1)  # a character is a token, and the end one
    assert sum(Planner([*words, "--max_length", "99", "--plan"]).longest.lengths) == 99
    prompts = Planner(
        [*words, "--rlhf_type", "PPO", "--reward_funcs", "length", "--max_completion_length", "7", "--plan"]
    )
    assert prompts.longest.lengths == (len("Say yes."), 7)


@pytest.mark.parametrize("flags", ["--rlhf_type Reward", "--rlhf_type SFT --packing True", "--rlhf_type KTO"])
def test_made_up_rows_are_as_long_as_the_flags_allow(tiny_model, flags):
    longest = planner_of(tiny_model, flags).longest
    assert sum(longest.lengths) == 64 and "the data" not in longest.said


def test_a_reference_that_the_run_would_not_hold_is_not_planned(tiny_model):
    several = planner_of(tiny_model, "--rlhf_type DPO --train_mode full --num_train_epochs 3")
    assert not several.estimate(several.case).phases["update"]["ref_model"]  # asked once, before the first step
    once = planner_of(tiny_model, "--rlhf_type DPO --train_mode full --num_train_epochs 1")
    found = once.estimate(once.case).phases["update"]
    assert found["ref_model"] == pytest.approx(found["weights"], rel=0.01)


def test_a_teacher_that_answers_first_is_whole_on_every_gpu(deep, tiny_model):
    words = ["--model_name_or_path", tiny_model, "--teacher_model_name_or_path", str(deep), "--max_length", "64"]
    planner = Planner([*words, "--seq_kd", "True", "--plan", "zero3", "--num_processes", "4"], "GKD")
    phases = planner.estimate(planner.case).phases
    assert phases["answers"]["teacher_model"] == pytest.approx(4 * phases["forward"]["teacher_model"], rel=0.01)
    assert phases["answers"]["KV cache"] > 0
    given = Planner([*words, "--plan"], "GKD")
    assert "answers" not in given.estimate(given.case).phases


def test_a_critic_of_its_own_model_is_held_in_4_bits_as_the_policy_is(tiny_model):
    """Half a byte a weight in linear layers, else bfloat16. The critic has the policy's size, without the head."""
    words = f"--model_name_or_path {tiny_model} --rlhf_type PPO --train_mode qlora --max_completion_length 8 --plan"
    planner = Planner([*words.split(), "--critic", "model", "--value_model_path", tiny_model])
    weights = load_file(f"{tiny_model}/model.safetensors")
    each = sum(weight.numel() * (0.5 if "_proj.weight" in name else 2) for name, weight in weights.items())
    found = planner.rehearse(planner.case.words, False)
    head = 2 * weights["lm_head.weight"].numel()
    assert found.frozen[1] == pytest.approx(2 * each - head, rel=0.05)  # and the scales of the 4-bit blocks


def test_a_critic_of_a_named_shape_is_planned():
    words = ["--rlhf_type", "PPO", "--model_name_or_path", "0.5b", "--critic", "model", "--value_model_path", "0.5b"]
    planner = Planner([*words, "--plan"])
    assert planner.rehearse_layers(planner.case.words, False, 2).critic[0] > 2 * 136_134_656  # its embedding, bfloat16


def test_a_copy_of_what_has_no_data_frees_nothing_twice():
    """PEFT copies the head of a model that scores."""
    import torch

    ledger = Ledger()
    with without_data(ledger):
        head = torch.nn.Linear(4, 1)
        copied = copy.deepcopy(head)
    assert copied.weight is not head.weight and copied.weight.fake_mode is head.weight.fake_mode is ledger.fake


def test_a_table_has_a_row_for_each_engine(tiny_model, capsys):
    assert train_rlhf.main(["--model_name_or_path", tiny_model, "--plan", "all", "--num_processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(engines.ENGINES[1:])
    assert all(len(line.split()) == 4 for line in lines[2:-1])


def test_no_model_is_refused():
    with pytest.raises(Refused, match="missing. A model folder, a Hub id, or one of"):
        Planner(["--plan", "--model_name_or_path", ""])


def probe(words, capsys):
    assert train_rlhf.main([*words, "--probe"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe ")]


def test_a_probe_makes_the_longest_step_and_leaves_nothing(tiny_model, tmp_path, capsys):
    rows = [PAIR] * 15 + [PAIR | {"chosen": "Yes, " * 50}]
    words = ["--model_name_or_path", tiny_model, "--train_data_path", write_rows(tmp_path / "rows.jsonl", rows)]
    words += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--num_train_epochs", "2"]
    first, second = probe([*words, "--gradient_accumulation_steps", "2"], capsys)
    assert re.search(r"a step of 4 rows of \d+ tokens.*tokens a second; peak \d+\.\d GiB a process", first)
    assert " 8 steps: " in second and "with rows of average length" in second  # 16 rows twice, 4 a step
    assert not (tmp_path / "out").exists()


def test_a_probe_of_sampled_answers_makes_them_as_long_as_they_may_be(tiny_model, tmp_path, capsys):
    rows = [{"prompt": "Say yes."}] * 16
    words = ["--rlhf_type", "PPO", "--model_name_or_path", tiny_model, "--reward_funcs", "data/rewards.py:brevity"]
    words += ["--train_data_path", write_rows(tmp_path / "rows.jsonl", rows), "--max_completion_length", "12"]
    words += ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "out")]
    first, second = probe(words, capsys)
    prompt, answer = len("Say yes."), 12
    assert f"a step of 4 rows of {prompt + answer} tokens" in first
    assert " 48 steps: " in second and "average" not in second  # 4 rollouts, each learnt from 4 times, 3 epochs
    assert not (tmp_path / "out").exists()


# ── beside what was measured ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_plan_is_within_a_tenth_of_what_a_gpu_measured():
    done = command("bench/memory.py", "--again", "bench/memory_h100.jsonl", env={"OMP_NUM_THREADS": "1"})
    errors = json.loads(done.stdout.splitlines()[-1])["errors"]
    assert len(errors) >= 12 and max(map(abs, errors.values())) <= 0.1


@pytest.mark.slow
def test_a_plan_is_within_a_tenth_of_what_the_allocator_counts():
    words = "--methods DPO --modes full --launches zero2:2 zero3:2 fsdp2:2 --batch 2 --length 128 --jobs 2".split()
    done = command("bench/memory.py", *words, env={"OMP_NUM_THREADS": "1"})
    cells = json.loads(done.stdout.splitlines()[-1])["cells"]
    assert len(cells) == 3
    assert all(abs(cell["error"]) <= 0.1 for cell in cells.values()), done.stdout


@pytest.mark.slow
def test_a_run_script_plans_what_it_would_launch():
    env = {
        "MODEL": "qwen2-7b",
        "LAUNCH": "zero3",
        "NUM_PROCESSES": "2",
        "PYTHON": sys.executable,
        "PATH": "/usr/bin:/bin",
    }
    words = ["bash", "rlhf_run.sh", "--plan", "--gpu_memory", "40GB"]
    done = subprocess.run(words, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and "2 x 40 GiB, zero3" in done.stdout
