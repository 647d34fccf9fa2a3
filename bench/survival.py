"""What it costs to be told and to survive: the check of the data, and checkpoints with a manifest.

    python bench/survival.py [--rows 10000] [--steps 50] [--skip check|checkpoint]

check: `train_rlhf.py --check` on so many chat pairs, made of data/preference.jsonl with a number put into each, the
first time and again (its texts are cached), and the time until a training with the same data would load its model.
checkpoint: SmolLM2, full weights, so many steps and one save: how long the save took, how long its hashing, of which
the run waits for none, and what share of the steps' time the two would be. Seconds of one run; ratios within it.
The last line is one JSON object. Needs the demo model: python -m utils.demo_model
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = "models/SmolLM2-135M-Instruct"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=50, help="steps, and the one of them that saves")
    parser.add_argument("--skip", choices=["check", "checkpoint"])
    asked = parser.parse_args()
    os.chdir(ROOT)
    result = {"bench": "survival", "model": MODEL}
    with TemporaryDirectory() as folder:
        if asked.skip != "check":
            result["check"] = time_check(Path(folder), asked.rows)
            print(result["check"], flush=True)
        if asked.skip != "checkpoint":
            result["checkpoint"] = time_checkpoint(Path(folder), asked.steps)
    print(json.dumps(result))


def time_check(folder, rows):
    data = folder / "pairs.jsonl"
    write_pairs(data, rows)
    words = [sys.executable, "train_rlhf.py", "--model_name_or_path", MODEL, "--train_data_path", str(data), "--check"]
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([*words, "--output_dir", str(folder / "out")], check=True, env=env, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    few = folder / "few.jsonl"
    write_pairs(few, 10)
    words[words.index(str(data))] = str(few)
    began = time.perf_counter()
    subprocess.run([*words, "--output_dir", str(folder / "out")], check=True, env=env, stdout=subprocess.DEVNULL)
    start = time.perf_counter() - began
    first, again = (round(one, 1) for one in seconds)
    return {
        "rows": rows,
        "first_seconds": first,
        "again_seconds": again,
        "of_10_rows_seconds": round(start, 1),  # what the imports take
        "share_of_ten_minutes": round((seconds[0] - start) / 600, 4),
        "again_to_first": round(max(seconds[1] - start, 0) / max(seconds[0] - start, 1e-9), 3),
    }


def write_pairs(file, count):
    rows = [json.loads(line) for line in open("data/preference.jsonl", encoding="utf-8")]
    with open(file, "w", encoding="utf-8") as handle:
        for number in range(count):
            row = json.loads(json.dumps(rows[number % len(rows)]))
            row["prompt"][-1]["content"] += f" ({number})"
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def time_checkpoint(folder, steps):
    import train_rlhf
    from trainers.safe_trainer import Safe
    from utils.results import report
    from utils.survival import checkpoints

    taken = {"save": 0.0, "hash": 0.0, "steps": 0.0}

    def timed(name, function):
        def run(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken[name] += time.perf_counter() - began

        return run

    Safe._save_checkpoint = timed("save", Safe._save_checkpoint)
    checkpoints.add_hashes = timed("hash", checkpoints.add_hashes)
    Safe.training_step = timed("steps", Safe.training_step)
    report.SAMPLES = 0
    out = folder / "run"
    words = ["--model_name_or_path", MODEL, "--train_data_path", "data/preference.jsonl", "--output_dir", str(out)]
    words += ["--train_mode", "full", "--max_steps", str(steps), "--save_steps", str(steps), "--logging_steps", "10"]
    words += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-6"]
    status = train_rlhf.main(words)
    assert status == 0, status
    size = sum(file.stat().st_size for file in checkpoints.list_files(out / f"checkpoint-{steps}"))
    return {
        "steps": steps,
        "megabytes": round(size / 1e6),
        "steps_seconds": round(taken["steps"], 1),
        "save_seconds": round(taken["save"], 2),
        "hash_seconds": round(taken["hash"], 2),
        "hash_share_of_steps": round(taken["hash"] / taken["steps"], 4),
        "save_share_of_steps": round(taken["save"] / taken["steps"], 4),
    }


if __name__ == "__main__":
    main()
