"""What train_rlhf.py adds to TRL: the same model, rows and seed through it and through TRL's trainer called directly.

    python bench/overhead.py [--model FOLDER] [--steps 6] [--rounds 2] [--methods DPO KTO Reward]

Each run is a process of its own, the two kinds in turn. Prints a line a run and, last, one JSON object: per method the
ratios ours / TRL of the time of a step (wall clock and CPU) and of the peak memory at the last step, and whether the
losses are equal to the last digit (float32). A step does the same work in every run, so its fastest run counts: what
else the machine does only ever adds. Needs the demo model: python -m utils.demo_model
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
SHARED = {
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "seed": 42,
    "save_strategy": "no",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind and method")
    parser.add_argument("--methods", nargs="+", default=["DPO", "KTO", "Reward"])
    parser.add_argument("--side", choices=["ours", "trl"], help="(internal) run one side and print what it measured")
    parser.add_argument("--out")
    asked = parser.parse_args()
    if asked.side:
        return measure(asked.side, asked.methods[0], asked.model, asked.steps, asked.out)
    result = {}
    for name in asked.methods:
        runs = {"ours": [], "trl": []}
        for number in range(asked.rounds):
            for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
                runs[side].append(run(side, name, asked.model, asked.steps))
                print(name, side, {k: v for k, v in runs[side][-1].items() if k != "losses"}, flush=True)
        wall, cpu = ({side: fastest(runs[side], key) for side in runs} for key in ("wall", "cpu"))
        memory = {side: statistics.median(r["peak_bytes"] for r in runs[side]) for side in runs}
        result[name] = {
            "step_time_ratio": round(wall["ours"] / wall["trl"], 4),
            "step_cpu_ratio": round(cpu["ours"] / cpu["trl"], 4),
            "peak_memory_ratio": round(memory["ours"] / memory["trl"], 4),
            "losses_equal": all(r["losses"] == runs["trl"][0]["losses"] for side in runs.values() for r in side),
        }
    print(json.dumps({"bench": "overhead", "model": asked.model, "train_mode": "lora", "dtype": "float32", **result}))


def fastest(runs, key):
    """Seconds of all steps together, each as in its fastest run."""
    return sum(min(seconds) for seconds in zip(*(run[key] for run in runs), strict=True))


def run(side, name, model, steps):
    with TemporaryDirectory() as out:
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--methods",
            name,
            "--model",
            model,
            "--steps",
            str(steps),
            "--out",
            f"{out}/run",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ── one side, in a process of its own ────────────────────────────────────────────────────────────────────────────────


def measure(side, name, model, steps, out):
    sys.path.insert(0, str(ROOT))
    from utils.environment import calm_libraries

    calm_libraries()
    from transformers import Trainer

    ends, cpu_ends, peaks, losses = [], [], [], []
    step, log = Trainer.training_step, Trainer.log

    def timed_step(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        ends.append(time.perf_counter())
        cpu_ends.append(time.process_time())
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return loss

    def kept_log(self, logs, *args, **kwargs):
        losses.extend([logs["loss"]] if "loss" in logs else [])
        return log(self, logs, *args, **kwargs)

    Trainer.training_step, Trainer.log = timed_step, kept_log
    {"ours": run_ours, "trl": run_trl}[side](name, model, steps, out)
    print(json.dumps({"wall": steps_of(ends), "cpu": steps_of(cpu_ends), "peak_bytes": peaks[-1], "losses": losses}))


def steps_of(ends):
    return [round(after - before, 4) for before, after in zip(ends, ends[1:], strict=False)]


def run_ours(name, model, steps, out):
    import train_rlhf
    from rlhf_args.methods import METHODS

    flags = ["--dtype", "float32", "--use_cpu", "True"]
    flags += [word for key, value in SHARED.items() for word in (f"--{key}", str(value))]
    status = train_rlhf.main(
        [
            "--rlhf_type",
            name,
            "--model_name_or_path",
            model,
            "--train_data_path",
            METHODS[name].sample_data,
            "--output_dir",
            out,
            "--max_steps",
            str(steps),
            *flags,
        ]
    )
    assert status == 0


def run_trl(name, model, steps, out):
    """TRL as its documentation shows it, on the rows that ours is given."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_args.methods import METHODS, load
    from utils import data, models, text

    method = METHODS[name]
    tokenizer = models.load_tokenizer(model)
    text.fit_tokenizer(tokenizer, chat=True)
    rows = data.load_rows([method.sample_data], None, method.columns, name)
    prepared = text.prepare_rows(rows.train, tokenizer, method.columns, 1024)
    config = load(method.config)(
        output_dir=out,
        max_steps=steps,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs=None,
        **SHARED,
    )
    if method.task == "SEQ_CLS":
        torch.manual_seed(config.seed)
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    trainer = load(method.trainer)(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=text.as_dataset(prepared),
        peft_config=models.make_lora(method.task, 32, 16, 0.05, None, False),
    )
    trainer.train()


if __name__ == "__main__":
    main()
