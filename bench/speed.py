"""Ours and its peers side by side: TRL called directly, TRL's command line, ms-swift, LLaMA-Factory.

    python bench/speed.py [--methods DPO SimPO KTO Reward] [--modes lora full] [--sides ours trl ...] [--write]

Same machine, model, rows in the same order, tokens, batch, steps and optimizer; all else is each side's default. A
peer gets an environment of its own, made here once (--envs, 5 GB). Each run is a process of its own, the sides in
turn, and prints a line: start-up until the first step, passes, peak memory, losses. The tokens are those of the rows,
so that nobody gains by padding. Of all rounds each step's fastest counts, and the fastest start-up. The last line is
one JSON object, of which --write makes docs/benchmarks.md; of several machines' kept outputs it makes one page:

    python bench/speed.py --from cpu.txt gpu.txt --write

Needs the demo model (python -m utils.demo_model), another --model, or --random SHAPE (of bench/memory.py), which needs
no download. On a GPU without the internet:

    python bench/speed.py --random qwen2-1.5b --sides ours ours-plain trl trl-cli
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
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
# trl and the other libraries under a peer are what its own requirements lead to
PEERS = {"ms-swift": ("ms-swift==4.6.0", "torch==2.13.0"), "llamafactory": ("llamafactory==0.9.5", "torch==2.13.0")}
# no build of them on PyPI loads beside a CPU's torch, and text needs neither; LLaMA-Factory imports the second
UNUSED = {"torchvision": False, "torchaudio": True}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
SAME = {"learning_rate": 5e-5, "seed": 42, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
LORA = {"lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0.0}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5}  # no likelihood term beside it
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a loss, for kernels that sum in another order
STARTED, RESULT = "SPEED_STARTED", "SPEED_RESULT"  # what watch() is told by


@dataclass(frozen=True)
class Job:
    """One run: what is trained, on what, and where its files are."""

    method: str
    mode: str
    model: str
    folder: str  # of the rows, in a file for each side that needs a form of its own
    steps: int
    batch: int
    accumulation: int
    max_length: int  # tokens; no row is longer
    envs: str
    gpu: bool
    out: str = ""  # where it writes

    def flags(self, max_length="max_length"):
        """What every side calls by the same name, `max_length` aside."""
        return SAME | {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "output_dir": self.out,
            max_length: self.max_length,
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
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each cell")
    parser.add_argument("--batch", type=int, default=2, help="rows a pass")
    parser.add_argument("--accumulation", type=int, default=2, help="passes a step")
    parser.add_argument("--envs", default="~/.cache/rlhf_bench", help="folder of the peers' environments")
    parser.add_argument(
        "--random", help="in place of --model: a shape of bench/memory.py, or a config's fields as JSON"
    )
    parser.add_argument("--from", dest="kept", nargs="+", help="what earlier runs printed; nothing is measured")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--trl", help=argparse.SUPPRESS)  # a Job as JSON: the side trl, in a process of its own
    asked = parser.parse_args()
    if asked.trl:
        return run_trl(Job(**json.loads(asked.trl)))
    results = [json.loads(Path(file).read_text().splitlines()[-1]) for file in asked.kept or ()] or [run_all(asked)]
    if asked.write:
        PAGE.write_text(make_page(results), encoding="utf-8")
    print(json.dumps(results[-1]))


def run_all(asked):
    """Every cell, and what came of it: the last line."""
    sys.path.insert(0, str(ROOT))
    from utils.runtime.environment import has_gpu

    gpu, envs, cells = has_gpu(), Path(asked.envs).expanduser(), {}
    absent = {side: make_environment(envs / side, PEERS[side]) for side in PEERS if side in asked.sides}
    shape = asked.steps, asked.batch, asked.accumulation
    with TemporaryDirectory() as folder:
        model = make_random(folder, asked.random) if asked.random else asked.model
        tokens, longest = write_rows(Path(folder), model, asked.methods, asked.steps, asked.batch * asked.accumulation)
        max_length = -(-(longest + 1) // 512) * 512  # nothing is cut
        for number, method, mode in product(range(asked.rounds), asked.methods, asked.modes):
            for side in asked.sides[:: -1 if number % 2 else 1]:
                job = Job(method, mode, model, folder, *shape, max_length, str(envs), gpu)
                run = {"failed": absent[side]} if absent.get(side) else measure(side, job)
                cells.setdefault(f"{method} {mode}", {}).setdefault(side, []).append(run)
                print(method, mode, side, run, flush=True)
    return {
        "bench": "speed",
        **{name: getattr(asked, name) for name in ("steps", "rounds", "batch", "accumulation")},
        "command": " ".join(["python bench/speed.py", *sys.argv[1:]]),
        "model": f"random weights, {asked.random}" if asked.random else asked.model,
        "gpu": gpu,
        "device": describe_device(gpu),
        "dtype": job.dtype,
        "versions": {side: versions(side, envs) for side in asked.sides},
        "cells": {
            cell: {side: summarize(runs, tokens[cell.split()[0]], asked.accumulation) for side, runs in found.items()}
            for cell, found in cells.items()
        },
    }


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

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

        # loaded here, as the trainer seeds it, so that the adapter begins with the numbers that ours begins with
        set_seed(SAME["seed"])
        load = AutoModelForSequenceClassification.from_pretrained
        kwargs["model"] = load(job.model, num_labels=1, dtype=torch.float32)
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
    flags |= {"dataset_shuffle": False, "weight_decay": 0, "adam_beta2": 0.999}
    # DPO's trainer obeys the one, the others the other; KTO's rows are shuffled all the same, by data_seed
    flags |= {"train_dataloader_shuffle": False, "train_sampling_strategy": "sequential", "data_seed": SAME["seed"]}
    flags |= job.flags() | {"warmup_ratio": 0, "report_to": "none", "target_modules": "all-linear", **LORA}
    flags |= SIMPO | {"cpo_alpha": 0} if job.method == "SimPO" else {}
    return [job.program("ms-swift", "swift"), "rlhf", "--rlhf_type", kind, *as_flags(flags)]


def llamafactory(job):
    kind = {"DPO": {"stage": "dpo"}, "KTO": {"stage": "kto"}, "Reward": {"stage": "rm"}}
    beta, gamma = SIMPO.values()
    kind["SimPO"] = {"stage": "dpo", "pref_loss": "simpo", "pref_beta": beta, "simpo_gamma": gamma}
    flags = {"do_train": True, "model_name_or_path": in_dtype(job), "finetuning_type": job.mode, "template": "empty"}
    flags |= {"dataset_dir": job.folder, "dataset": job.method, "disable_shuffling": True, "report_to": "none"}
    flags |= job.flags("cutoff_len") | {"lora_target": "all", **LORA} | ({"bf16": True} if job.gpu else {})
    return [job.program("llamafactory", "llamafactory-cli"), "train", *as_flags(kind[job.method] | flags)]


def in_dtype(job):
    """The model's folder with the run's dtype in its config.json: LLaMA-Factory holds what is frozen in that one."""
    folder, source = Path(job.folder, f"model-{job.dtype}"), Path(job.model).resolve()
    if not folder.exists():
        config = json.loads((source / "config.json").read_text())
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"dtype": job.dtype}))
        for file in source.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
    return str(folder)


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


def write_rows(folder, model, methods, steps, width):
    """Writes `width` rows a step; ({method: tokens of each step's rows, prompts included}, those of the longest)."""
    from utils.data import template
    from utils.models.load import load_tokenizer

    tokenizer, tokens, known, longest, count = load_tokenizer(model), {}, {}, 0, steps * width
    template.fit_tokenizer(tokenizer, chat=True)
    eos = tokenizer.eos_token
    for method in methods:
        file = ROOT / "data" / f"{METHODS[method]}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        if len(lines) < count:
            sys.exit(f"{file}: {len(lines)} rows, {count} are needed. Lower --steps, --batch or --accumulation")
        chats = [json.loads(line) for line in lines[:count]]
        texts, swifts, factories, sizes = [], [], [], []
        for chat in chats:
            prompt, answers, _ = template.render(tokenizer, {k: v for k, v in chat.items() if k != "label"})
            sizes.append([len(tokenizer(prompt + answer)["input_ids"]) for answer in answers])
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
        tokens[method] = [sum(map(sum, sizes[start : start + width])) for start in range(0, count, width)]
        longest = max(longest, *map(max, sizes))
        if METHODS[method] == "kto":
            swifts = unshuffled(swifts)
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
    return tokens, longest


def unshuffled(rows):
    """The rows in an order that Dataset.shuffle, with our seed, brings back into the one they are in."""
    from datasets import Dataset

    places = Dataset.from_dict({"place": range(len(rows))}).shuffle(SAME["seed"])["place"]
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


def make_random(folder, shape):
    """A model of random weights and its tokenizer of bytes, made in a process that the tests' settings may change."""
    code = "import sys, memory; memory.make_model(sys.argv[1], memory.read_shape(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, f"{folder}/model", shape], cwd=ROOT / "bench", check=True)
    return f"{folder}/model"


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(side, job):
    """What watch() saw of one run, or {"failed": why}."""
    with TemporaryDirectory() as folder:
        try:
            command = SIDES[side](replace(job, out=f"{folder}/run"))
        except LookupError as missing:
            return {"failed": str(missing)}
        hook, result = Path(folder, "sitecustomize.py"), Path(folder, "result.json")
        hook.write_text(f"import sys\nsys.path.append({str(ROOT / 'bench')!r})\nimport speed\nspeed.watch()\n")
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        job_env = os.environ | {"PYTHONPATH": paths, STARTED: str(time.time()), RESULT: str(result)}
        # nothing is found in a cache, and nothing fetched
        job_env |= {name: folder for name in ("XDG_CACHE_HOME", "HF_HOME", "MODELSCOPE_CACHE")}
        job_env |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
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
    for name, imported in UNUSED.items():
        there = subprocess.run(
            [str(folder / "bin" / "python"), "-c", f"import {name}"], capture_output=True, text=True
        )
        if there.returncode and "No module" not in there.stderr.strip().splitlines()[-1]:
            subprocess.run([*pip, "uninstall", "-y", name], capture_output=True)
            if imported:
                next(folder.glob("lib/python*/site-packages"), folder).joinpath(f"{name}.py").touch()
    made.write_text(" ".join(pins))
    return None


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────────────────────


def summarize(runs, tokens, accumulation):
    """What the runs of a cell came to. `tokens`: of each step's rows, which is what a step is divided by its time."""
    done = [run for run in runs if "failed" not in run]
    failures = [run["failed"] for run in runs if "failed" in run]
    passes = len(tokens) * accumulation
    failures += [f"{len(run['ends'])} passes in place of {passes}" for run in done if len(run["ends"]) != passes]
    done = [run for run in done if len(run["ends"]) == passes]
    if not done:
        return {"failed": failures[0]}
    fastest = map(min, zip(*(step_times(run["ends"], accumulation) for run in done), strict=True))
    seen = done[0]["tokens"]
    return {
        "tokens_per_s": sum(tokens[1:]) / sum(fastest),
        "start_s": min(run["start"] for run in done),
        "peak_bytes": max(run["peak_bytes"] for run in done),
        "final_loss": done[0]["losses"][-1],
        "losses": done[0]["losses"],
        "tokens": [sum(seen[place : place + accumulation]) for place in range(0, passes, accumulation)],
        "failures": failures,
    }


def step_times(ends, accumulation):
    """Seconds of each step but the first, from the end of the step's passes before it to the end of its own."""
    last = ends[accumulation - 1 :: accumulation]
    return [after - before for before, after in zip(last, last[1:], strict=False)]


def versions(side, envs):
    """{package: version}, from the side's own environment."""
    packages = (side, *LIBRARIES) if side in PEERS else LIBRARIES
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    python = str(envs / side / "bin" / "python") if side in PEERS else sys.executable
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return {} if done.returncode else json.loads(done.stdout)


def describe_device(gpu):
    import torch

    if gpu:
        return torch.cuda.get_device_name(0)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({kernels}), {os.cpu_count()} cores, {torch.get_num_threads()} threads a run, {memory:.0f} GiB"


# ── docs/benchmarks.md ───────────────────────────────────────────────────────────────────────────────────────────────

NOISE = 0.05  # of a step's time; README, "Measured", saw more
# (side, methods, modes) -> why it is faster than ours
REASONS = {
    (
        "ms-swift",
        ("DPO", "KTO"),
        ("lora", "full"),
    ): "TRL 1.16 projects prompts on the vocabulary too where there is no Triton, and all of it once more in the "
    "backward pass; ms-swift has TRL 0.29. With the answers alone DPO lora took 0.82 of the time, once, on a CPU",
}
# (side, method): what it does that the others do not
DIFFERENT = {
    ("ms-swift", "KTO"): "likely an older TRL's other pairs for the KL term",
    ("llamafactory", "KTO"): "likely an older TRL's other pairs for the KL term",
    ("llamafactory", "Reward"): "its score head begins with other random weights, has dropout before it, and stands "
    "beside the language model's, which is computed as well",
}
HEADER = """
## {device}

`{command}`: one run at a time, {model}, {dtype}, {batch} rows a pass, {accumulation} passes a step. {steps} steps a
run, the first not timed; rounds: {rounds}, of which each step's fastest counts.

| side | what it is | versions |
|---|---|---|
{sides}
"""
KINDS = {
    "ours": "`train_rlhf.py` as it comes",
    "ours-plain": "`train_rlhf.py --plain`",
    "trl": "TRL's trainer called from Python, as its documentation shows it",
    "trl-cli": "TRL's command line",
    "ms-swift": "`swift rlhf`",
    "llamafactory": "`llamafactory-cli train`",
}


INTRODUCTION = """# Benchmarks

Written by `bench/speed.py`. Tokens are those of the rows, without padding, as every side trains on the same ones;
start-up is what passes from the command until the first step.

Set by hand, so that all do the same work: batch, steps, the order of the rows, AdamW at a constant learning rate of
{learning_rate} without decay, LoRA on all linear layers (rank {lora_rank}, alpha {lora_alpha}, no dropout), SimPO
without a likelihood term. The text is rendered once, so that all train on the same tokens. Everything else, such as
whether activations are computed again, is each side's default. Ours looks at weights and rows and answers two
questions before its first step, to show them beside the answers after the last.
"""


def make_page(results):
    return INTRODUCTION.format(**SAME, **LORA) + "".join(map(make_chapter, results))


def make_chapter(result):
    """A result as Markdown: ratios to ours, a table a measure, and why where a ratio is below 1."""
    cells, sides = result["cells"], list(result["versions"])
    others = [side for side in sides if side != "ours"]
    listed = {side: ", ".join(map(" ".join, found.items())) for side, found in result["versions"].items()}
    described = [f"| {side} | {KINDS[side]} | {listed[side]} |" for side in sides]
    parts = [HEADER.format(**result, sides="\n".join(described))]
    parts += [
        "### Tokens a second: ours / the other's (above 1: ours is faster)\n",
        table(cells, others, "tokens_per_s", lambda mine: f"{mine:.1f} /s", lambda mine, its: f"{mine / its:.2f}"),
        *section("Ours is slower:\n", slower(cells, others)),
        "### Start-up until the first step: the other's / ours (above 1: ours starts sooner)\n",
        table(cells, others, "start_s", lambda mine: f"{mine:.1f} s", lambda mine, its: f"{its / mine:.2f}"),
        "### Peak memory: the other's / ours (above 1: ours needs less)\n",
        f"{'Allocated on the GPU.' if result['gpu'] else 'Resident memory of the process, libraries included.'}\n",
        table(cells, others, "peak_bytes", lambda mine: f"{mine / 1e9:.2f} GB", lambda mine, its: f"{its / mine:.2f}"),
        "### Loss of the last step\n",
        table(cells, others, "final_loss", lambda mine: f"{mine:.6f}", lambda mine, its: f"{its:.6f}"),
        *section("To the last digit:\n", to_the_digit(cells)),
        *section("Not equal:\n", unequal(cells, others, TOLERANCE[result["dtype"]])),
        *section("A dash:\n", missing(cells, sides)),
    ]
    return "\n".join(parts)


def section(heading, lines):
    return [heading, *(f"- {line}" for line in lines), ""] if lines else []


def table(cells, others, measure, say_mine, compare):
    """Ours as it is, each of the others as `compare(ours, its)`, a dash where either has not run."""
    lines = ["| method, mode | ours | " + " | ".join(others) + " |", "|---" * (len(others) + 2) + "|"]
    for cell, found in cells.items():
        mine = found.get("ours", {}).get(measure)
        shown = [found.get(side, {}).get(measure) for side in others]
        words = ["–" if mine is None or its is None else compare(mine, its) for its in shown]
        lines.append(f"| {cell} | " + " | ".join(["–" if mine is None else say_mine(mine), *words]) + " |")
    return "\n".join(lines) + "\n"


def slower(cells, others):
    """A line of reason for each ratio of tokens a second below 1."""
    lines = []
    for cell, side, mine, its in pairs(cells, "ours", others):
        ratio = mine["tokens_per_s"] / its["tokens_per_s"]
        if ratio < 1:
            lines.append(f"{cell}, {side} {ratio:.3f}: {find_reason(side, *cell.split(), 1 - ratio)}")
    return lines


def find_reason(side, method, mode, lost):
    for (its, methods, modes), why in REASONS.items():
        if its == side and method in methods and mode in modes:
            return why
    return "less than two runs of one side are apart" if lost < NOISE else "no reason found"


def unequal(cells, others, tolerance):
    """What shows that a side does other work: its tokens, or its losses where they differ by more than rounding."""
    lines = []
    for cell, side, mine, its in pairs(cells, "ours", others):
        apart = max(abs(a - b) for a, b in zip(mine["losses"], its["losses"], strict=True))
        found = [f"losses up to {apart:.1e} apart"] if apart > tolerance else []
        if its["tokens"] != mine["tokens"]:
            found.append(f"{its['tokens']} tokens a step where ours has {mine['tokens']}")
        if found:
            why = DIFFERENT.get((side, cell.split()[0]), "no reason found")
            lines.append(f"{cell}, {side}: {', '.join(found)}: {why}")
    return lines


def pairs(cells, one, others):
    """(cell, side, what `one` and the side came to) where both have run."""
    for cell, side in product(cells, others):
        mine, its = cells[cell].get(one, {}), cells[cell].get(side, {})
        if "losses" in mine and "losses" in its:
            yield cell, side, mine, its


def to_the_digit(cells):
    """Where --plain has TRL's losses to the last digit, and where not."""
    found = {True: [], False: []}
    for cell, _, mine, its in pairs(cells, "ours-plain", ["trl"]):
        found[mine["losses"] == its["losses"]].append(cell)
    said = {True: "ours-plain has trl's losses to the last digit", False: "ours-plain has other losses than trl"}
    return [f"{said[equal]}: {', '.join(named)}" for equal, named in found.items() if named]


def missing(cells, sides):
    """{what, why} of each dash, those of one reason in one line."""
    why = {}
    for cell, side in product(cells, sides):
        if "failed" in cells[cell].get(side, {}):
            why.setdefault((side, cells[cell][side]["failed"]), []).append(cell)
    return [f"{side}, {' and '.join(named)}: {reason}" for (side, reason), named in why.items()]


if __name__ == "__main__":
    main()
