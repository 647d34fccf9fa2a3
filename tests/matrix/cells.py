"""Runs cells of method x train mode x launch through the run scripts and judges what they saved."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from rlhf_args.methods import ANSWERED, DIALOGUE, DISTILLATION, METHODS, load

ROOT = Path(__file__).resolve().parents[2]
MODES = ("full", "lora", "qlora")
# what the table calls a launch -> LAUNCH and NUM_PROCESSES
LAUNCHES = {
    "one process": ("cpu", 1),
    "ddp": ("cpu", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero2_offload": ("zero2_offload", 2),
    "zero3": ("zero3", 2),
    "zero3_offload": ("zero3_offload", 2),
    "fsdp2": ("fsdp2", 2),
}
# the kinds of distillation, by gkd_run.sh's variables; of GKD's two steps one is of each sort
DISTILLED = {"KD": {"LMBDA": 0}, "SeqKD": {"SEQ_KD": True}, "GKD": {"LMBDA": 0.5}}
JOBS = METHODS | dict.fromkeys(DISTILLED, DISTILLATION["GKD"])
CELLS = [(name, mode, launch) for launch in LAUNCHES for name in JOBS for mode in MODES]


@dataclass
class Outcome:
    state: str  # works, refused or fails
    reason: str = ""


def run_script(python, *flags, script="rlhf_run.sh", timeout=300, **variables):
    """`bash rlhf_run.sh` (or another) with one thread a process; the finished process, output as text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": python, **{k: str(v) for k, v in variables.items()}}
    command = ["bash", script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout)


def width(mode, launch):
    """Of the test model's MLP, so that ZeRO-3 really takes it apart.

    It keeps whole what has less than 100,000 elements (stage3_param_persistence_threshold); the other side of these
    matrices is 64, and in bfloat16 a 4-bit matrix counts as a quarter of what it stands for.
    """
    if not launch.startswith("zero3"):
        return 64
    return 6400 if mode == "qlora" else 1600


def make_rows(columns, one_length):
    """Sixteen chats for a method with these columns; `one_length`: prompts and answers of one length each."""
    words = ["amber", "birch", "cedar", "delta", "eagle", "flint", "grape", "heron"]
    for number in range(16):
        word, other = words[number % 8], words[(number + 3) % 8]
        more = "" if one_length else " It took some time." * (number % 3)
        asked = [{"role": "user", "content": f"Name {word} {number:02}:"}]
        right = [{"role": "assistant", "content": f"A {word}, {number:02}.{more}"}]
        wrong = [{"role": "assistant", "content": f"No {other} {number:02}"}]
        if columns in (DIALOGUE, ANSWERED):
            yield {"messages": asked + right}
        else:
            yield {"prompt": asked, "chosen": right, "rejected": wrong}


def rollout_flags(name):
    """What a method that samples needs on top: a reward, short answers, and two to a prompt where it compares them."""
    if not JOBS[name].sample_reward:
        return []
    answers = next(f.default for f in fields(load(METHODS[name].config)) if f.name == "num_generations")
    reward = ["--reward_funcs", "tests/matrix/answers.py:spread"]
    return [*reward, "--max_completion_length", "8", "--num_generations", str(min(answers, 2)), "--beta", "0.05"]


def run_cell(python, model, out, name, mode, launch, *flags, steps=2, one_length=False, **variables):
    """Trains one cell; the finished process."""
    launch, processes = LAUNCHES[launch]
    data = out.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(JOBS[name].columns, one_length)))
    asked = {"TRAIN_MODE": mode, "LAUNCH": launch, "NUM_PROCESSES": processes}
    if name in DISTILLED:
        asked |= DISTILLED[name] | {"TEACHER": Path(model).with_name("teacher")}
        flags = ["--max_completion_length", "8", "--answers_dir", out.parent / "answers", *flags]
        flags += ["--teacher_load_in_4bit"] if mode == "qlora" else []
    else:
        asked["RLHF_TYPE"] = name
    asked |= {"MODEL": model, "OUTPUT_DIR": out, "MAX_STEPS": steps, "LEARNING_RATE": "1e-2"}
    asked |= {"TRAIN_DATA": data, "BATCH_SIZE": 2, "ACCUMULATION": 1, "EVAL_FRACTION": 0.25}
    flags = ["--save_strategy", "no", *rollout_flags(name), *flags]
    return run_script(python, *flags, script=f"{JOBS[name].entry}_run.sh", **{**asked, **variables})


def judge(python, model, out, name, mode, launch):
    """One cell of the matrix, in bfloat16 and with gradient checkpointing as on a GPU: its Outcome."""
    try:
        done = run_cell(python, model, out, name, mode, launch, "--bf16", "--gradient_checkpointing")
    except subprocess.TimeoutExpired as error:
        return Outcome("fails", f"no end within {error.timeout:g} s")
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    if done.returncode == 2:
        return Outcome("refused", next(line for line in said if line.startswith("refused:")))
    if done.returncode:
        return Outcome("fails", said[-1])
    card = json.loads((out / "run_card.json").read_text())
    if card["world_size"] != LAUNCHES[launch][1]:
        return Outcome("fails", f"{card['world_size']} processes trained together")
    if len((out / "metrics.jsonl").read_text().splitlines()) != 2:
        return Outcome("fails", "a step is missing in metrics.jsonl")
    if "of a fresh process equal those in memory" not in done.stdout:
        return Outcome("fails", "no fresh process has reopened it")
    from tests.matrix.verify import verify

    try:
        verify(out, JOBS[name].task, model)
    except Exception as error:  # noqa: BLE001  whatever the libraries say of a folder that is not sound
        return Outcome("fails", f"saved, but {type(error).__name__}: {error}")
    return Outcome("works")


def expected(name, mode):
    return "works" if mode in JOBS[name].train_modes else "refused"


if __name__ == "__main__":  # one cell by hand: python -m tests.matrix.cells MODEL OUT DPO qlora zero3
    print(judge(sys.executable, sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
