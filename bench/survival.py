"""Cost of the data check and of a checkpoint with its manifest.

    python bench/survival.py [--rows 10000] [--steps 50] [--skip check|checkpoint]

check: `train_rlhf.py --check` on --rows chat pairs (data/preference.jsonl, with a number added to each prompt), the
first time and again with the cached text, and on 10 pairs, where nearly all of the time is imports.
checkpoint: SmolLM2-135M, full weights, --steps steps and one save: seconds of saving and of hashing, as shares of the
time of the steps. Hashing overlaps with training. One run each. Needs the demo model: python -m utils.demo_model
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness
from bench.harness import MODEL, ROOT


def main():
    parser = harness.make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="pairs to check")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps; the last one saves")
    parser.add_argument("--skip", choices=["check", "checkpoint"])
    asked = parser.parse_args()
    result = {}
    if asked.skip != "check":
        result["check"] = time_check(asked.rows)
        print(result["check"], flush=True)
    if asked.skip != "checkpoint":
        result["checkpoint"] = harness.call(time_checkpoint, asked.steps)
    harness.finish("survival", model=MODEL, **result)


def time_check(rows):
    with TemporaryDirectory() as folder:
        files = {count: write_pairs(Path(folder, f"{count}.jsonl"), count) for count in {rows, 10}}
        command = [sys.executable, "train_rlhf.py", "--model_name_or_path", MODEL, "--output_dir", f"{folder}/out"]

        def check(count):
            words = [*command, "--train_data_path", files[count], "--check"]
            return harness.seconds_of(harness.run, words, XDG_CACHE_HOME=f"{folder}/cache")

        first, again, imports = check(rows), check(rows), check(10)
    return {
        "rows": rows,
        "first_seconds": round(first, 1),
        "again_seconds": round(again, 1),
        "of_10_rows_seconds": round(imports, 1),
        "share_of_ten_minutes": round((first - imports) / 600, 4),
        "again_to_first": round(max(again - imports, 0) / max(first - imports, 1e-9), 3),
    }


def write_pairs(file, count):
    rows = (ROOT / "data/preference.jsonl").read_text(encoding="utf-8").splitlines()
    with file.open("w", encoding="utf-8") as handle:
        for number in range(count):
            row = json.loads(rows[number % len(rows)])
            row["prompt"][-1]["content"] += f" ({number})"
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def time_checkpoint(steps):
    import train_rlhf
    from trainers.safe_trainer import Safe
    from utils.results import report
    from utils.survival import checkpoints

    seconds = {"save": 0.0, "hash": 0.0, "steps": 0.0}

    def timed(name, function):
        def run(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - begun

        return run

    Safe._save_checkpoint = timed("save", Safe._save_checkpoint)
    Safe.training_step = timed("steps", Safe.training_step)
    checkpoints.add_hashes = timed("hash", checkpoints.add_hashes)
    report.SAMPLES = 0
    flags = {"model_name_or_path": MODEL, "train_data_path": "data/preference.jsonl", "train_mode": "full"}
    flags |= {"max_steps": steps, "save_steps": steps, "logging_steps": 10, "learning_rate": 1e-6}
    with TemporaryDirectory() as folder:
        flags |= {"output_dir": f"{folder}/run", "per_device_train_batch_size": 2}
        status = train_rlhf.main(harness.as_flags(flags))
        if status:
            raise RuntimeError(f"the training ended with status {status}")
        files = checkpoints.list_files(Path(folder, "run", f"checkpoint-{steps}"))
        size = sum(file.stat().st_size for file in files)
    return {
        "steps": steps,
        "megabytes": round(size / 1e6),
        "steps_seconds": round(seconds["steps"], 1),
        "save_seconds": round(seconds["save"], 2),
        "hash_seconds": round(seconds["hash"], 2),
        "hash_share_of_steps": round(seconds["hash"] / seconds["steps"], 4),
        "save_share_of_steps": round(seconds["save"] / seconds["steps"], 4),
    }


if __name__ == "__main__":
    main()
