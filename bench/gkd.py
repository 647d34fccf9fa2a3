"""Our distillation and TRL 1.16's GKDTrainer: the same models, rows, seed and batches, in one run: python bench/gkd.py

Each measurement is a process of its own, on all cores, in float32, both trainers called directly.

    on_policy    lmbda 1, answers of exactly --new_tokens tokens, gradient checkpointing on, as is TRL's default:
                 completions a second of a whole step (sampling, both forward passes, backward), and how far apart the
                 gradients of the two are for the same fixed completions
    seq_kd       --seq_epochs epochs on the teacher's answers, which TRL samples anew at every step: seconds in all
    memory       one step of batch 4, length 512, with a vocabulary of 151936 on small hidden sizes: the peak of the
                 process above what it held before the step
    kinds        the shipped job of gkd_run.sh once for each kind, --kind_steps steps of 4 rows from the same start:
                 the held-out figures before and after, and the seconds of the steps

Prints a line a measurement and, last, one JSON object with the ratios. Needs the demo pair:
python -m utils.demo_model --student
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TEACHER, STUDENT = "models/SmolLM2-135M-Instruct", "models/SmolLM2-106M-student"
SHARED = {
    "per_device_train_batch_size": 8,  # as is transformers' default
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "seed": 42,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": True,
    "lmbda": 1.0,
    "beta": 0.5,
    "temperature": 1.0,
    "disable_dropout": True,
}
SIDES = ("ours", "trl")
KINDS = {
    "KD (lmbda 0)": {"LMBDA": "0"},
    "GKD (lmbda 0.5)": {"LMBDA": "0.5"},
    "on-policy (lmbda 1)": {"LMBDA": "1"},
    "SeqKD": {"SEQ_KD": "True"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--seq_tokens", type=int, default=32)
    parser.add_argument("--seq_epochs", type=int, default=3)
    parser.add_argument("--kind_steps", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["on_policy", "seq_kd", "memory", "kinds"])
    parser.add_argument("--side", choices=SIDES, help="(internal) one measurement")
    asked = parser.parse_args()
    if asked.side:
        from utils.runtime import environment

        environment.calm_libraries()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(globals()[f"measure_{asked.parts[0]}"](asked.side, asked, Path(folder))))
        return
    compared = [part for part in asked.parts if part != "kinds"]
    found = {part: {side: run(side, part, sys.argv[1:]) for side in SIDES} for part in compared}
    result = {"bench": "gkd", "student": STUDENT, "teacher": TEACHER, "new_tokens": asked.new_tokens}
    if "on_policy" in found:
        ours, trl = (found["on_policy"][side] for side in SIDES)
        result["on_policy"] = {
            "completions_per_second_ratio": round(ours["completions_per_second"] / trl["completions_per_second"], 2),
            "gradients_apart": ours["gradients_apart"],
        }
    if "seq_kd" in found:
        ours, trl = (found["seq_kd"][side]["seconds"] for side in SIDES)
        result["seq_kd"] = {"epochs": asked.seq_epochs, "speed_ratio": round(trl / ours, 2)}
    if "memory" in found:
        ours, trl = (found["memory"][side]["step_bytes"] for side in SIDES)
        result["memory"] = {"peak_of_a_step_ratio": round(ours / trl, 3)}
    if "kinds" in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            kinds = {name: train_kind(Path(folder), flags, asked.kind_steps) for name, flags in KINDS.items()}
        print_kinds(kinds)
        result["kinds"] = {"steps": asked.kind_steps, **kinds}
    print(json.dumps(result))


def train_kind(folder, variables, steps):
    """gkd_run.sh as shipped but for the kind: its held-out figures before and after, and the seconds of its steps."""
    out = folder / "-".join(variables.values())
    env = {**os.environ, **variables, "MAX_STEPS": str(steps), "OUTPUT_DIR": str(out), "PYTHON": sys.executable}
    command = ["bash", "gkd_run.sh", "--answers_dir", str(folder / "answers"), "--save_strategy", "no"]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    card = json.loads((out / "run_card.json").read_text(encoding="utf-8"))
    print(variables, card["held_out"], flush=True)
    return {**card["held_out"], "train_seconds": card["throughput"]["train_seconds"]}


def print_kinds(kinds):
    """The table of docs/methods/gkd.md."""
    names = [name for name in next(iter(kinds.values()))["after"] if name != "loss"]
    print(f"| | {' | '.join(names)} | seconds |\n|---|{'---|' * (len(names) + 1)}")
    rows = {"before": next(iter(kinds.values()))["before"], **{name: kind["after"] for name, kind in kinds.items()}}
    for name, row in rows.items():
        seconds = f"{kinds[name]['train_seconds']:.0f}" if name in kinds else ""
        print(f"| {name} | {' | '.join(f'{row[figure]:.3f}' for figure in names)} | {seconds} |")


def run(side, part, words):
    command = [sys.executable, "bench/gkd.py", *words, "--side", side, "--parts", part]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{part} {side}: status {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(part, side, found, flush=True)
    return found


# ── the two trainers ─────────────────────────────────────────────────────────────────────────────────────────────────


def load(path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokenizer_of(path):
    from utils.data import template
    from utils.models.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    template.fit_tokenizer(tokenizer, chat=True)
    return tokenizer


def dialogues(count):
    lines = (ROOT / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [{"messages": json.loads(line)["messages"]} for line in lines]


def make_ours(student, teacher, tokenizer, rows, folder, tokens, **flags):
    """GKDTrainer of this project on chats, and the rows that it is given."""
    from rlhf_args.gkd_config import GKDConfig
    from trainers.gkd_trainer import GKDTrainer
    from utils.data import columns, prepare

    config = GKDConfig(output_dir=str(folder), max_completion_length=tokens, **{**SHARED, **flags})
    split = [("row", columns.split_answer(row)) for row in rows]
    prepared = prepare.prepare_rows(split, tokenizer, ("prompt", "completion"), 1024)
    dataset = prepare.as_dataset(prepared)
    trainer = GKDTrainer(student, config, teacher, processing_class=tokenizer, train_dataset=dataset)
    trainer.generation_config.min_new_tokens = tokens
    return trainer, prepared.rows


def make_trl(student, teacher, tokenizer, rows, folder, tokens, **flags):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(output_dir=str(folder), max_new_tokens=tokens, **{**SHARED, **flags})
    trainer = GKDTrainer(student, teacher, config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    trainer.generation_config.min_new_tokens = tokens
    return trainer


def make(side, *args, **flags):
    return make_ours(*args, **flags)[0] if side == "ours" else make_trl(*args, **flags)


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure_on_policy(side, asked, folder):
    tokenizer, rows = tokenizer_of(TEACHER), dialogues(SHARED["per_device_train_batch_size"])
    trainer = make(side, load(STUDENT), load(TEACHER), tokenizer, rows, folder, asked.new_tokens, num_train_epochs=1)
    seconds = time_training(trainer)
    found = {"completions_per_second": round(len(rows) / seconds, 4), "step_seconds": round(seconds, 1)}
    return found | ({"gradients_apart": compare_gradients(folder)} if side == "ours" else {})


def compare_gradients(folder):
    """Largest difference of the two trainers' gradients for the same completions, in the size of the largest one."""
    import torch

    tokenizer, rows = tokenizer_of(TEACHER), dialogues(4)
    teacher, gradients = load(TEACHER), {}
    ours, made = make_ours(load(STUDENT), teacher, tokenizer, rows, folder, 8)
    theirs = make_trl(load(STUDENT), teacher, tokenizer, rows, folder, 8)

    def padded(name, left, fill):
        width = max(len(row[name]) for row in made)
        spare = [[fill] * (width - len(row[name])) for row in made]
        pairs = zip(spare, [row[name] for row in made], strict=True)
        return torch.tensor([s + ids if left else ids + s for s, ids in pairs])

    prompts, answers = padded("prompt_ids", True, -1), padded("completion_ids", False, -1)
    both = torch.cat([prompts, answers], 1)
    labels = torch.cat([torch.full_like(prompts, -100), answers.masked_fill(answers < 0, -100)], 1)
    count = (answers >= 0).sum()
    filled = {name: ids.clamp(min=0) for name, ids in (("prompt_ids", prompts), ("completion_ids", answers))}
    masks = {"prompt_mask": (prompts >= 0).long(), "completion_mask": (answers >= 0).long()}
    batches = {
        ours: {**filled, **masks, "num_items_in_batch": count},
        theirs: {"input_ids": both.clamp(min=0), "attention_mask": (both >= 0).long(), "labels": labels},
    }
    for trainer, batch in batches.items():
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
        gradients[trainer] = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert gradients[ours].keys() == gradients[theirs].keys()
    largest = max(grad.abs().max() for grad in gradients[theirs].values())
    apart = max((gradients[ours][name] - grad).abs().max() for name, grad in gradients[theirs].items())
    return float(f"{apart / largest:.2g}")


def measure_seq_kd(side, asked, folder):
    tokenizer, rows = tokenizer_of(TEACHER), dialogues(8)
    student, teacher = load(STUDENT), load(TEACHER)
    flags = {"lmbda": 0.0, "seq_kd": True, "num_train_epochs": asked.seq_epochs}
    began = time.perf_counter()
    if side == "trl":
        trainer = make_trl(student, teacher, tokenizer, rows, folder, asked.seq_tokens, **flags)
        return {"seconds": round(time_training(trainer), 1)}
    from utils.models import sampling

    _, made = make_ours(student, teacher, tokenizer, rows, folder, asked.seq_tokens, **flags)
    prompts = [row["prompt_ids"] for row in made]
    drawn = sampling.Sampling(asked.seq_tokens)
    teacher.generation_config.eos_token_id = -1  # answers of exactly seq_tokens
    kept = sampling.answers_folder(folder / "answers", "teacher", drawn)
    began = time.perf_counter()
    sampling.answer_prompts(teacher, tokenizer, sampling.missing_prompts(kept, prompts), drawn, kept, 16)
    answers = sampling.read_answers(kept)
    for row, prompt in zip(made, prompts, strict=True):
        row["completion_ids"] = answers[sampling.prompt_key(prompt)]
    sampled = time.perf_counter() - began
    trainer, _ = make_ours(student, teacher, tokenizer, rows, folder, asked.seq_tokens, **flags)
    from datasets import Dataset

    trainer.train_dataset = Dataset.from_list(made)
    return {"seconds": round(sampled + time_training(trainer), 1)}


def time_training(trainer):
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def measure_memory(side, asked, folder):
    """Peak of the process in one supervised step above what it held before; a row of 512 tokens, half of it answer."""
    import psutil
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer_of(TEACHER)
    shape = {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    student, teacher = (Qwen2ForCausalLM(Qwen2Config(**shape, **heads)) for _ in range(2))
    asks, says = "ask " * 180, "say " * 280
    rows = [{"messages": [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]}] * 4
    cut = {"max_length": 512, "lmbda": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    trainer = make(side, student, teacher, tokenizer, rows, folder, 8, **cut)
    before = psutil.Process().memory_info().rss
    trainer.train()
    return {"step_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


if __name__ == "__main__":
    main()
