"""Ours and its peers side by side: TRL called directly, TRL's command line, ms-swift, LLaMA-Factory.

    python bench/speed.py [--methods DPO SimPO KTO Reward] [--modes lora full] [--sides ours trl ...] [--write]

Same machine, model, rows in the same order, tokens, batch, steps and optimizer; everything else is each side's default.
A peer gets an environment of its own, made here once (--envs, 5 GB). Each run is a process of its own, the sides in
turn, and prints a line: start-up until the first step, tokens a second, peak memory, losses. The tokens are those of
the rows, so that nobody gains by padding. Of all rounds each step's fastest counts, and the fastest start-up. The last
line is one JSON object, of which --write makes docs/benchmarks.md. Needs the demo model: python -m utils.demo_model
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import platform
import resource
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
# trl and the other libraries under a peer are what its own requirements lead to
PEERS = {"ms-swift": ("ms-swift==4.6.0", "torch==2.13.0"), "llamafactory": ("llamafactory==0.9.5", "torch==2.13.0")}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
SAME = {"learning_rate": 5e-5, "seed": 42, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
LORA = {"lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0.0}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5}  # no likelihood term beside it
MAX_LENGTH = 512  # no row is longer
STARTED, RESULT = "SPEED_STARTED", "SPEED_RESULT"  # what watch() is told by


@dataclass(frozen=True)
class Job:
    """One run: what is trained, on what, and where its files are."""

    method: str
    mode: str
    model: str
    folder: str  # of the rows, in a file for each side that needs a form of its own
    out: str
    steps: int
    batch: int
    accumulation: int
    envs: str
    gpu: bool

    def flags(self, max_length="max_length"):
        """What every side calls by the same name, `max_length` aside."""
        return SAME | {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "output_dir": self.out,
            max_length: MAX_LENGTH,
            **({} if self.gpu else {"use_cpu": True}),
        }

    @property
    def dtype(self):
        return "bfloat16" if self.gpu else "float32"

    def program(self, peer, name):
        return str(Path(self.envs, peer, "bin", name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each cell")
    parser.add_argument("--batch", type=int, default=2, help="rows a pass")
    parser.add_argument("--accumulation", type=int, default=2, help="passes a step")
    parser.add_argument("--envs", default="~/.cache/rlhf_bench", help="folder of the peers' environments")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--trl", help=argparse.SUPPRESS)  # a Job as JSON: the side trl, in a process of its own
    asked = parser.parse_args()
    if asked.trl:
        return run_trl(Job(**json.loads(asked.trl)))
    sys.path.insert(0, str(ROOT))
    from utils.environment import has_gpu

    envs = Path(asked.envs).expanduser()
    missing = {side: make_environment(envs / side, PEERS[side]) for side in PEERS if side in asked.sides}
    cells = {}
    with TemporaryDirectory() as folder:
        tokens = write_rows(Path(folder), asked.model, asked.methods, asked.steps * asked.batch * asked.accumulation)
        for number in range(asked.rounds):
            for method in asked.methods:
                for mode in asked.modes:
                    for side in asked.sides[:: -1 if number % 2 else 1]:
                        out = f"{folder}/run"
                        shape = asked.steps, asked.batch, asked.accumulation
                        job = Job(method, mode, asked.model, folder, out, *shape, str(envs), has_gpu())
                        run = {"failed": missing[side]} if missing.get(side) else measure(side, job)
                        cells.setdefault(f"{method} {mode}", {}).setdefault(side, []).append(run)
                        print(method, mode, side, run, flush=True)
    result = {
        "bench": "speed",
        **{name: getattr(asked, name) for name in ("model", "steps", "rounds", "batch", "accumulation")},
        "device": describe_device(),
        "dtype": job.dtype,
        "versions": {side: versions(envs, side) for side in asked.sides},
        "cells": {cell: {side: summarize(runs, tokens[cell.split()[0]], asked.accumulation)
                         for side, runs in found.items()} for cell, found in cells.items()},
    }
    if asked.write:
        PAGE.write_text(make_page(result), encoding="utf-8")
    print(json.dumps(result))


# ── the sides: each the command that does a job, or raises LookupError where it has no such method ───────────────────


def ours(job, *more):
    words = ["--rlhf_type", job.method, "--train_data_path", f"{job.folder}/{job.method}-chat.jsonl"]
    shared = {"model_name_or_path": job.model, "train_mode": job.mode, "dtype": job.dtype, **LORA, **job.flags()}
    shared |= {"train_sampling_strategy": "sequential"} | (SIMPO if job.method == "SimPO" else {})
    return [sys.executable, str(ROOT / "train_rlhf.py"), *words, *as_flags(shared), *more]


def ours_plain(job):
    return ours(job, "--plain")


def trl(job):
    return [sys.executable, __file__, "--trl", json.dumps(vars(job))]


def run_trl(job):
    """TRL's trainers as its documentation shows them, in this process."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {"args": {}, "model": job.model}
    if job.method == "SimPO":
        from trl.experimental.cpo import CPOConfig as Config, CPOTrainer as Trainer

        kwargs["args"] = {"loss_type": "simpo", "cpo_alpha": 0.0, **SIMPO}
        kwargs["model"] = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        kwargs["processing_class"] = AutoTokenizer.from_pretrained(job.model)
    elif job.method == "DPO":
        from trl import DPOConfig as Config, DPOTrainer as Trainer
    elif job.method == "KTO":
        from trl import KTOConfig as Config, KTOTrainer as Trainer
    else:
        from trl import RewardConfig as Config, RewardTrainer as Trainer
    kwargs["args"] |= {} if job.gpu else {"bf16": False}
    kwargs["args"] |= {"train_sampling_strategy": "sequential", "report_to": "none"}
    if job.mode == "lora":
        task = "SEQ_CLS" if job.method == "Reward" else "CAUSAL_LM"
        rank, alpha, dropout = LORA.values()
        kwargs["peft_config"] = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type=task
        )
    kwargs["args"] = Config(**job.flags(), **kwargs["args"])
    rows = load_dataset("json", data_files=f"{job.folder}/{job.method}-text/train.jsonl", split="train")
    Trainer(train_dataset=rows, **kwargs).train()


def trl_cli(job):
    command = {"DPO": "dpo", "KTO": "kto", "Reward": "reward"}.get(job.method)
    if command is None:
        raise LookupError(f"trl has no command for {job.method}")
    flags = {"model_name_or_path": job.model, "dtype": "float32", "dataset_name": f"{job.folder}/{job.method}-text"}
    flags |= job.flags() | {"train_sampling_strategy": "sequential", "report_to": "none"}
    flags |= {} if job.gpu else {"bf16": False}
    if job.mode == "lora":
        rank, alpha, dropout = LORA.values()
        flags |= {"use_peft": True, "lora_r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        flags |= {"lora_target_modules": "all-linear"}
        flags |= {"lora_task_type": "SEQ_CLS"} if job.method == "Reward" else {}
    return [str(Path(sys.executable).with_name("trl")), command, *as_flags(flags)]


def ms_swift(job):
    kind = {"DPO": "dpo", "SimPO": "simpo", "KTO": "kto", "Reward": "rm"}[job.method]
    flags = {"model": job.model, "model_type": "llama", "template": "dummy", "tuner_type": job.mode}
    flags |= {"torch_dtype": job.dtype, "dataset": f"{job.folder}/{job.method}-swift.jsonl", "split_dataset_ratio": 0}
    flags |= {"dataset_shuffle": False, "train_dataloader_shuffle": False, "weight_decay": 0, "adam_beta2": 0.999}
    flags |= job.flags() | {"warmup_ratio": 0, "report_to": "none", "target_modules": "all-linear", **LORA}
    flags |= SIMPO | {"cpo_alpha": 0} if job.method == "SimPO" else {}
    return [job.program("ms-swift", "swift"), "rlhf", "--rlhf_type", kind, *as_flags(flags)]


def llamafactory(job):
    kind = {"DPO": {"stage": "dpo"}, "KTO": {"stage": "kto"}, "Reward": {"stage": "rm"}}
    kind["SimPO"] = {"stage": "dpo", "pref_loss": "simpo", "pref_beta": SIMPO["beta"], "simpo_gamma": SIMPO["simpo_gamma"]}
    flags = {"do_train": True, "model_name_or_path": job.model, "finetuning_type": job.mode, "template": "empty"}
    flags |= {"dataset_dir": job.folder, "dataset": job.method, "disable_shuffling": True, "report_to": "none"}
    flags |= job.flags("cutoff_len") | {"lora_target": "all", **LORA} | ({"bf16": True} if job.gpu else {})
    return [job.program("llamafactory", "llamafactory-cli"), "train", *as_flags(kind[job.method] | flags)]


SIDES = {
    "ours": ours,
    "ours-plain": ours_plain,
    "trl": trl,
    "trl-cli": trl_cli,
    "ms-swift": ms_swift,
    "llamafactory": llamafactory,
}
METHODS = {"DPO": "preference", "SimPO": "preference", "KTO": "kto", "Reward": "preference"}  # -> the file in data/


def as_flags(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# ── the rows, in the form that each side takes: the same text, and so the same tokens ────────────────────────────────


def write_rows(folder, model, methods, count):
    """Writes `count` rows a method, and returns {method: tokens of each row, prompt and answers}."""
    from rlhf_args.methods import METHODS as TABLE
    from utils import data, models, text

    tokenizer, tokens, known = models.load_tokenizer(model), {}, {}
    text.fit_tokenizer(tokenizer, chat=True)
    eos = tokenizer.eos_token
    for method in methods:
        file = ROOT / "data" / f"{METHODS[method]}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        if len(lines) < count:
            sys.exit(f"{file}: {len(lines)} rows, but {count} are needed. Take fewer --steps, --batch or --accumulation")
        chats = [json.loads(line) for line in lines[:count]]
        texts, swifts, factories, tokens[method] = [], [], [], []
        for chat in chats:
            prompt, answers, _ = text.render(tokenizer, {k: v for k, v in chat.items() if k != "label"})
            tokens[method].append(sum(len(tokenizer(prompt + answer)["input_ids"]) for answer in answers))
            bare = [answer.removesuffix(eos) for answer in answers]  # ms-swift ends the turn itself
            asked = [{"role": "user", "content": prompt}]
            swift = {"messages": [*asked, {"role": "assistant", "content": bare[0]}]}
            factory = {"messages": asked}
            if "label" in chat:
                texts.append({"prompt": prompt, "completion": answers[0], "label": chat["label"]})
                swifts.append(swift | {"label": chat["label"]})
                said = {"role": "assistant", "content": answers[0]}
                factories.append({"messages": [*asked, said], "label": chat["label"]})
            else:
                pair = dict(zip(("chosen", "rejected"), answers, strict=True))
                ranked = {name: prompt + answer for name, answer in pair.items()}
                texts.append(ranked if method == "Reward" else {"prompt": prompt, **pair})
                swifts.append(swift | {"rejected_response": bare[1]})
                said = {name: {"role": "assistant", "content": answer} for name, answer in pair.items()}
                factories.append(factory | said)
        (folder / f"{method}-text").mkdir()
        for name, rows in {"chat": chats, "text/train": texts, "swift": swifts, "factory": factories}.items():
            written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{method}-{name}.jsonl").write_text(written, encoding="utf-8")
        columns = {"kto_tag": "label"} if METHODS[method] == "kto" else {"chosen": "chosen", "rejected": "rejected"}
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        known[method] = {"file_name": f"{method}-factory.jsonl", "formatting": "sharegpt", "tags": tags}
        known[method] |= {"columns": {"messages": "messages", **columns}}
        known[method] |= {} if METHODS[method] == "kto" else {"ranking": True}
    (folder / "dataset_info.json").write_text(json.dumps(known), encoding="utf-8")
    return tokens


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(side, job):
    """What watch() saw of one run, or {"failed": why}."""
    try:
        command = SIDES[side](job)
    except LookupError as missing:
        return {"failed": str(missing)}
    with TemporaryDirectory() as folder:
        hook, result = Path(folder, "sitecustomize.py"), Path(folder, "result.json")
        hook.write_text(f"import sys\nsys.path.append({str(ROOT / 'bench')!r})\nimport speed\nspeed.watch()\n")
        job_env = os.environ | {"PYTHONPATH": folder, STARTED: str(time.time()), RESULT: str(result)}
        # nothing is found in a cache, and nothing fetched
        job_env |= {name: folder for name in ("XDG_CACHE_HOME", "HF_HOME", "MODELSCOPE_CACHE")}
        job_env |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        job = job.out
        done = subprocess.run(command, cwd=ROOT, env=job_env, capture_output=True, text=True)
        if result.exists():
            return json.loads(result.read_text())
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"failed": next((line for line in reversed(said) if "Error" in line), (said or ["no message"])[-1])}


# ── in the process that trains, be it ours or a peer's ───────────────────────────────────────────────────────────────


def watch():
    """Has transformers.Trainer, which is under every side, write down what it does, from whenever it is imported."""
    if RESULT in os.environ:
        sys.meta_path.insert(0, TrainerFinder())


class TrainerFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run, loader = spec.loader.exec_module, spec.loader
        loader.exec_module = lambda module: (run(module), wrap(module.Trainer))
        return spec


def wrap(trainer_class):
    import torch

    step, log = trainer_class.training_step, trainer_class.log
    seen = {"start": None, "ends": [], "cpu": [], "tokens": [], "losses": []}

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time() - float(os.environ[STARTED])

    def timed_step(self, model, inputs, *args, **kwargs):
        seen["start"] = seen["start"] or now()
        seen["tokens"].append(count_tokens(inputs))
        loss = step(self, model, inputs, *args, **kwargs)
        seen["ends"].append(now())
        seen["cpu"].append(time.process_time())
        seen["peak_bytes"] = peak_bytes(torch)
        return loss

    def kept_log(self, logs, *args, **kwargs):
        if "loss" in logs:
            seen["losses"].append(float(logs["loss"]))
        if "train_runtime" in logs:  # the end; what each side saves is not measured
            Path(os.environ[RESULT]).write_text(json.dumps(seen))
            os._exit(0)
        return log(self, logs, *args, **kwargs)

    trainer_class.training_step, trainer_class.log = timed_step, kept_log


def count_tokens(inputs):
    """Tokens of a pass that are no padding, those of KTO's KL estimate and of prompts that stand alone left out."""
    masks = {name.lower(): value for name, value in inputs.items() if name.endswith("attention_mask")}
    return sum(int(mask.sum()) for name, mask in masks.items() if not name.startswith(("kl", "prompt")))


def peak_bytes(torch):
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_environment(folder, pins):
    """None when the peer's environment is there, else why it could not be made."""
    made = folder / "made.txt"
    if made.exists() and made.read_text() == " ".join(pins):
        return None
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip")]
    done = subprocess.run([*pip, "install", *pins], capture_output=True, text=True)
    if done.returncode:
        return f"not installed: {done.stderr.strip().splitlines()[-1]}"
    made.write_text(" ".join(pins))
    return None


def versions(envs, side):
    return {}


def describe_device():
    return {}


def summarize(runs, tokens, accumulation):
    return runs[0]


if __name__ == "__main__":
    main()
