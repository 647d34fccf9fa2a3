"""Speed, start-up, memory and losses: ours, TRL called from Python, TRL's command line, ms-swift, LLaMA-Factory.

    python bench/speed.py [--methods DPO SimPO KTO Reward] [--modes lora full] [--sides ours trl ...] [--write]
    python bench/speed.py --from cpu.txt gpu.txt --write     # one page of the saved outputs of several machines
    python bench/speed.py --random qwen2-1.5b --sides ours ours-plain trl trl-cli     # without a download

All sides have the same machine, model, rows in the same order, tokens, batch, steps and optimizer; everything else is
each side's default. A peer gets a virtual environment of its own, made once (--envs, 5 GB). Each run is a new process;
the order of the sides is reversed in every other round. Tokens are counted in the rows, without padding. The fastest
time of each step over all rounds counts, and the fastest start-up. Prints a line for each run; the last line is one
JSON object, from which --write makes docs/benchmarks.md.

Needs the demo model (python -m utils.demo_model), another --model, or --random.
"""

import json
import os
import platform
import sys
import time
import venv
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness, memory
from bench.harness import MODEL, ROOT, as_flags
from bench.watch import RESULT, STARTED

PAGE = ROOT / "docs" / "benchmarks.md"
# the versions of TRL and of the other libraries follow from the peer's own requirements
PEERS = {"ms-swift": ("ms-swift==4.6.0", "torch==2.13.0"), "llamafactory": ("llamafactory==0.9.5", "torch==2.13.0")}
# their PyPI builds do not load beside a CPU build of torch, and text needs neither; True: LLaMA-Factory imports it
UNUSED = {"torchvision": False, "torchaudio": True}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
SAME = {"learning_rate": 5e-5, "seed": 42, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
LORA = {"lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0.0}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5}  # without a likelihood term
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a loss: kernels sum in different orders


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    mode: str
    model: str
    folder: str  # of the rows, in the format of each side
    steps: int
    batch: int
    accumulation: int
    max_length: int  # tokens; every row is shorter
    envs: str
    gpu: bool
    out: str = ""  # output folder

    def flags(self, max_length="max_length"):
        """Flags with the same name on every side; `max_length`: the name that differs."""
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
    parser = harness.make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each cell")
    parser.add_argument("--batch", type=int, default=2, help="rows per forward pass")
    parser.add_argument("--accumulation", type=int, default=2, help="forward passes per step")
    parser.add_argument("--envs", default="~/.cache/rlhf_bench", help="folder of the peers' virtual environments")
    parser.add_argument("--random", metavar="SHAPE", help="random weights, not --model: a --shape of bench/memory.py")
    parser.add_argument("--from", dest="kept", nargs="+", help="saved outputs of earlier runs; nothing is measured")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    asked = parser.parse_args()
    results = [harness.last_json(Path(file).read_text()) for file in asked.kept or ()] or [run_all(asked)]
    if asked.write:
        PAGE.write_text(make_page(results), encoding="utf-8")
    harness.finish("speed", **results[-1])


def run_all(asked):
    from utils.runtime.environment import has_gpu

    gpu, envs, cells = has_gpu(), Path(asked.envs).expanduser(), {}
    absent = {side: make_environment(envs / side, PEERS[side]) for side in PEERS if side in asked.sides}
    shape = asked.steps, asked.batch, asked.accumulation
    with TemporaryDirectory() as folder:
        if asked.random:
            harness.call(memory.make_model, folder, asked.random)
        model = f"{folder}/model" if asked.random else asked.model
        tokens, longest = write_rows(Path(folder), model, asked.methods, asked.steps, asked.batch * asked.accumulation)
        max_length = -(-(longest + 1) // 512) * 512  # no row is cut
        for number, method, mode in product(range(asked.rounds), asked.methods, asked.modes):
            for side in harness.order_of(asked.sides, number):
                job = Job(method, mode, model, folder, *shape, max_length, str(envs), gpu)
                run = {"failed": absent[side]} if absent.get(side) else measure(side, job)
                cells.setdefault(f"{method} {mode}", {}).setdefault(side, []).append(run)
                print(method, mode, side, run, flush=True)
    return {
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


# ── the sides: the command of a job; LookupError if the side lacks the method ────────────────────────────────────────


def ours(job, *more):
    words = ["--rlhf_type", job.method, "--train_data_path", f"{job.folder}/{job.method}-chat.jsonl"]
    shared = {"model_name_or_path": job.model, "train_mode": job.mode, "dtype": job.dtype, **LORA, **job.flags()}
    shared |= {"train_sampling_strategy": "sequential"} | (SIMPO if job.method == "SimPO" else {})
    return [sys.executable, str(ROOT / "train_rlhf.py"), *words, *as_flags(shared), *more]


def ours_plain(job):
    return ours(job, "--plain")


def trl(job):
    code = "import json, sys; from bench.speed import Job, run_trl; run_trl(Job(**json.loads(sys.argv[1])))"
    return [sys.executable, "-c", code, json.dumps(vars(job))]


def run_trl(job):
    """TRL's trainers as in its documentation."""
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

        # load it with the trainer's seed, so that the score head and the adapter start with the same weights as ours
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
    # DPO's trainer reads the first flag, the others the second; KTO's rows are shuffled anyway, with data_seed
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
    """The model's folder with the run's dtype in config.json: LLaMA-Factory stores frozen weights in that dtype."""
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


# ── the rows, in the format of each side: the same text and tokens ───────────────────────────────────────────────────


def write_rows(folder, model, methods, steps, width):
    """Write `width` rows per step. Returns ({method: tokens of each step with prompts}, tokens of the longest)."""
    from utils.data import template
    from utils.models.load import load_tokenizer

    tokenizer, tokens, known, longest, count = load_tokenizer(model), {}, {}, 0, steps * width
    template.fit_tokenizer(tokenizer, chat=True)
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
            bare = [answer.removesuffix(tokenizer.eos_token) for answer in answers]  # ms-swift adds the end of turn
            user = {"role": "user", "content": prompt}
            said = [{"role": "assistant", "content": answer} for answer in answers]
            swift = {"messages": [user, {"role": "assistant", "content": bare[0]}]}
            if "label" in chat:
                label = {"label": chat["label"]}
                texts.append({"prompt": prompt, "completion": answers[0], **label})
                swifts.append(swift | label)
                factories.append({"messages": [user, said[0]], **label})
            else:
                chosen, rejected = (prompt + answer if method == "Reward" else answer for answer in answers)
                pair = {"chosen": chosen, "rejected": rejected}
                texts.append(pair if method == "Reward" else {"prompt": prompt, **pair})
                swifts.append(swift | {"rejected_response": bare[1]})
                factories.append({"messages": [user], "chosen": said[0], "rejected": said[1]})
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
    """The rows in the order that Dataset.shuffle with our seed turns into the given order."""
    from datasets import Dataset

    places = Dataset.from_dict({"place": range(len(rows))}).shuffle(SAME["seed"])["place"]
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(side, job):
    """The result of bench/watch.py in one run, or {"failed": reason}."""
    with TemporaryDirectory() as folder:
        try:
            command = SIDES[side](replace(job, out=f"{folder}/run"))
        except LookupError as missing:
            return {"failed": str(missing)}
        Path(folder, "sitecustomize.py").symlink_to(ROOT / "bench" / "watch.py")
        result = Path(folder, "result.json")
        env = {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
        env |= dict.fromkeys(("XDG_CACHE_HOME", "HF_HOME", "MODELSCOPE_CACHE"), folder)  # empty caches
        env |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", STARTED: str(time.time()), RESULT: str(result)}
        try:
            harness.run(command, **env)
        except RuntimeError as failure:
            if not result.exists():
                lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
                return {"failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])}
        return json.loads(result.read_text()) if result.exists() else {"failed": "no training"}


def make_environment(folder, pins):
    """None if the peer's virtual environment is ready, else the reason."""
    made, python = folder / "made.txt", folder / "bin" / "python"
    if made.exists() and made.read_text() == " ".join(pins):
        return None
    venv.create(folder, with_pip=True)
    try:
        harness.run([python, "-m", "pip", "install", *pins])
    except RuntimeError as failure:
        return f"not installed: {str(failure).splitlines()[-1]}"
    for name, imported in UNUSED.items():
        try:
            harness.run([python, "-c", f"import {name}"])
        except RuntimeError as failure:
            if "No module" in str(failure).splitlines()[-1]:
                continue
            harness.run([python, "-m", "pip", "uninstall", "-y", name])
            if imported:
                next(folder.glob("lib/python*/site-packages")).joinpath(f"{name}.py").touch()
    made.write_text(" ".join(pins))
    return None


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def summarize(runs, tokens, accumulation):
    """Numbers of a cell from its runs. tokens: of each step's rows."""
    done = [run for run in runs if "failed" not in run]
    failures = [run["failed"] for run in runs if "failed" in run]
    passes = len(tokens) * accumulation
    failures += [f"{len(run['ends'])} passes instead of {passes}" for run in done if len(run["ends"]) != passes]
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
    """Seconds of each step except the first, from the end of one step's last pass to the next."""
    last = ends[accumulation - 1 :: accumulation]
    return [after - before for before, after in zip(last, last[1:], strict=False)]


def versions(side, envs):
    """{package: version} in the side's environment; empty for a peer that is not installed."""
    packages = (side, *LIBRARIES) if side in PEERS else LIBRARIES
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    python = envs / side / "bin" / "python" if side in PEERS else Path(sys.executable)
    return harness.last_json(harness.run([python, "-c", code, *packages])) if python.exists() else {}


def describe_device(gpu):
    import torch

    if gpu:
        return torch.cuda.get_device_name(0)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({kernels}), {os.cpu_count()} cores, {torch.get_num_threads()} threads per run, {size:.0f} GiB"


# ── docs/benchmarks.md ───────────────────────────────────────────────────────────────────────────────────────────────

NOISE = 0.05  # of a step's time; docs/measurements.md has larger differences between equal runs
PROMPTS = (
    "without Triton TRL 1.16 computes the logits of prompts too, twice with the backward pass; ms-swift has TRL 0.29. "
    "With the answers' logits alone DPO lora took 0.82 of the time, once, on a CPU"
)
REASONS = {("ms-swift", "DPO"): PROMPTS, ("ms-swift", "KTO"): PROMPTS}  # why a side is faster than ours
OLDER = "likely the pairs of an older TRL for the KL term"
DIFFERENT = {  # why losses differ
    ("ms-swift", "KTO"): OLDER,
    ("llamafactory", "KTO"): OLDER,
    ("llamafactory", "Reward"): "its score head has other random initial weights and dropout before it, and the head "
    "of the language model is computed as well",
}
MEASURES = (  # title, key, format of our numbers, exponent of the ratio ours / other (0: the other's number)
    ("Tokens per second: ours / the other's (above 1: ours is faster)", "tokens_per_s", "{:.1f} /s", 1),
    ("Start-up: the other's / ours (above 1: ours starts sooner)", "start_s", "{:.1f} s", -1),
    ("Peak memory ({resident}): the other's / ours (above 1: ours needs less)", "peak_bytes", "{:.2f} GB", -1),
    ("Loss of the last step", "final_loss", "{:.6f}", 0),
)
INTRODUCTION = """# Benchmarks

Written by `bench/speed.py`. Tokens are those of the rows, without padding: every side trains on the same tokens.
Start-up is the time from the command to the first step.

Set by hand, so that all sides do the same work: batch, steps, the order of the rows, AdamW at a constant learning rate
of {learning_rate} without decay, LoRA on all linear layers (rank {lora_rank}, alpha {lora_alpha}, no dropout), SimPO
without a likelihood term. The text is rendered once. Everything else is each side's default, for example gradient
checkpointing. Before its first step ours also checks weights and rows, and answers two questions (it shows them beside
the answers after training).
"""
HEADER = """
## {device}

`{command}`: one run at a time, {model}, {dtype}, {batch} rows per pass, {accumulation} passes per step, {steps} steps
per run, the first not timed. Rounds: {rounds}; the fastest time of each step counts.
"""
KINDS = {
    "ours": "`train_rlhf.py` with its defaults",
    "ours-plain": "`train_rlhf.py --plain`",
    "trl": "TRL's trainer called from Python, as in its documentation",
    "trl-cli": "TRL's command line",
    "ms-swift": "`swift rlhf`",
    "llamafactory": "`llamafactory-cli train`",
}


def make_page(results):
    return INTRODUCTION.format(**SAME, **LORA) + "".join(map(make_chapter, results))


def make_chapter(result):
    """A result as Markdown: a table for each measure, and notes."""
    cells, sides = result["cells"], list(result["versions"])
    others = [side for side in sides if side != "ours"]
    versions = {side: ", ".join(map(" ".join, found.items())) for side, found in result["versions"].items()}
    resident = "allocated on the GPU" if result["gpu"] else "resident, libraries included"
    described = [[side, KINDS[side], versions[side]] for side in sides]
    parts = [HEADER.format(**result), harness.table(["side", "what it is", "versions"], described)]
    for title, measure, unit, exponent in MEASURES:
        parts += [f"### {title.format(resident=resident)}\n", table(cells, others, measure, unit, exponent)]
    notes = {"Ours is slower": slower(cells, others), "Not equal": unequal(cells, others, TOLERANCE[result["dtype"]])}
    notes["A dash"] = missing(cells, sides)
    parts += [f"{title}:\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in notes.items() if lines]
    return "\n".join(parts)


def table(cells, others, measure, unit, exponent):
    """A row per cell: our number, the others' as ratios. A dash: one of the two has not run."""
    rows, scale = [], 1e9 if measure == "peak_bytes" else 1
    for cell, found in cells.items():
        mine, *theirs = (found.get(side, {}).get(measure) for side in ("ours", *others))
        row = [cell, "–" if mine is None else unit.format(mine / scale)]
        for its in theirs:
            if mine is None or its is None:
                row.append("–")
            else:
                row.append(f"{(mine / its) ** exponent:.2f}" if exponent else unit.format(its))
        rows.append(row)
    return harness.table(["method, mode", "ours", *others], rows)


def slower(cells, others):
    """A line with the reason for each ratio of tokens per second below 1."""
    lines = []
    for cell, side, mine, its in pairs(cells, others):
        ratio = mine["tokens_per_s"] / its["tokens_per_s"]
        noise = "within the noise of two equal runs" if 1 - ratio < NOISE else "no reason found"
        if ratio < 1:
            lines.append(f"{cell}, {side} {ratio:.3f}: {REASONS.get((side, cell.split()[0]), noise)}")
    return lines


def unequal(cells, others, tolerance):
    """A line for each side whose tokens differ, or whose losses differ by more than rounding."""
    lines = []
    for cell, side, mine, its in pairs(cells, others):
        apart = max(abs(a - b) for a, b in zip(mine["losses"], its["losses"], strict=True))
        found = [f"losses up to {apart:.1e} apart"] if apart > tolerance else []
        if its["tokens"] != mine["tokens"]:
            found.append(f"{its['tokens']} tokens per step, ours {mine['tokens']}")
        if found:
            why = DIFFERENT.get((side, cell.split()[0]), "no reason found")
            lines.append(f"{cell}, {side}: {', '.join(found)}: {why}")
    return lines


def pairs(cells, others):
    """(cell, side, our numbers, the side's numbers) where both have run."""
    for cell, side in product(cells, others):
        mine, its = cells[cell].get("ours", {}), cells[cell].get(side, {})
        if "losses" in mine and "losses" in its:
            yield cell, side, mine, its


def missing(cells, sides):
    """A line for each reason of a dash."""
    why = {}
    for cell, side in product(cells, sides):
        if "failed" in cells[cell].get(side, {}):
            why.setdefault((side, cells[cell][side]["failed"]), []).append(cell)
    return [f"{side}, {' and '.join(named)}: {reason}" for (side, reason), named in why.items()]


if __name__ == "__main__":
    main()
