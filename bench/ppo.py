"""Our PPO with each critic, RLOO, and TRL 1.12's PPO, on the same tasks with the same budget: python bench/ppo.py

Tasks of bench/toy.py, a policy of 0.3M parameters with full weights, one process on one thread, the runs in turn:
share (beta 0.003), share (beta 0.05, at which there is nothing to gain) and zigzag (beta 0.05, where a longer answer
has more reward); both with LoRA instead of full weights; then zigzag with an offset or a scale on every reward, which
must change nothing. For TRL 1.12 the script installs that version into a folder of its own that only its runs see.

The last line is JSON: per task and side the reward less beta x KL of an answer, a mean of the last three rollouts
(offset and scale taken off again), its mean and standard error over the seeds; the explained variance there; episodes
a second of the fastest run, also as a ratio to TRL 1.12. Curves go to docs/ppo_toy.png. KL of our runs: mean KL of a
token x mean length; of TRL 1.12 its own sum. `--keep FILE` appends each run as a line and skips those in it already.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TRL = "TRL 1.12 PPO"
SIDES = {
    TRL: None,
    "RLOO": ("RLOO",),
    "head": ("PPO", "--critic", "head"),
    "mlp": ("PPO", "--critic", "mlp"),
    "lora": ("PPO", "--critic", "lora"),
    "model": ("PPO", "--critic", "model"),
}
TASKS = {"zigzag": 0.05, "share": 0.003, "share at 0.05": 0.05}
ADAPTED = {"zigzag, lora": 0.05, "share, lora": 0.003}
LORA = ("--train_mode", "lora", "--learning_rate", "3e-3")
MOVED = {"zigzag_plus_5": (1, 5), "zigzag_minus_5": (1, -5), "zigzag_times_10": (10, 0)}  # reward = factor x + offset


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=24, help="of 128 answers each")
    parser.add_argument("--seeds", type=int, default=8)
    tasks = [*TASKS, *ADAPTED, *MOVED]
    parser.add_argument("--tasks", nargs="+", default=tasks, help=", ".join(tasks))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help=", ".join(SIDES))
    parser.add_argument("--keep", type=Path, help="a file of the single runs")
    asked = parser.parse_args()
    from bench.toy import make_toy

    kept = asked.keep.read_text().splitlines() if asked.keep and asked.keep.exists() else []
    runs = {(run["task"], run["side"], run["seed"]): run for run in map(json.loads, kept)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        toys = {False: make_toy(folder / "toy"), True: make_toy(folder / "toy_for_adapters", spread=0.1)}
        if TRL in asked.sides:
            install_trl(folder / "trl")
        for seed in range(asked.seeds):
            for task in asked.tasks:
                for side in asked.sides:
                    if (task, side, seed) in runs or not is_run(side, task):
                        continue
                    toy = toys[task in ADAPTED]
                    found = run_one(side, task, seed, asked.rollouts, toy, folder) | {"task": task, "side": side}
                    runs[task, side, seed] = found | {"seed": seed}
                    say(runs[task, side, seed])
                    if asked.keep:
                        with open(asked.keep, "a") as handle:
                            handle.write(json.dumps(runs[task, side, seed]) + "\n")
    draw(runs, ROOT / "docs" / "ppo_toy.png")
    print(json.dumps({"bench": "ppo", "rollouts": asked.rollouts, "seeds": asked.seeds, "tasks": compare(runs)}))


def is_run(side, task):
    """True if the table has this cell: TRL's script here trains full weights, where the critic is not an adapter."""
    if task in MOVED:
        return side == "model"
    return side not in ((TRL, "model") if task in ADAPTED else ("lora",))


def run_one(side, task, seed, rollouts, toy, folder):
    from bench.toy import run_ours

    factor, offset = MOVED.get(task, (1, 0))
    reward = task.split()[0].strip(",")
    beta = (TASKS | ADAPTED).get(task, factor * TASKS["zigzag"])
    rollouts = rollouts if task != "share at 0.05" else rollouts // 3
    if side == TRL:
        return run_trl(folder / "trl", toy, folder / "out", rollouts, seed, reward, beta)
    method, *flags = SIDES[side] + (LORA if task in ADAPTED else ())
    found = run_ours(method, toy, folder / "out", rollouts, seed, *flags, reward=reward, beta=beta)
    for name in ("reward", "reward_minus_kl"):
        found[name] = (found[name] - offset) / factor
    return found | {"rewards": [(one - offset) / factor for one in found["rewards"]]}


def install_trl(folder):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "trl==1.12.0"]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)


def run_trl(trl, toy, out, rollouts, seed, reward, beta):
    env = {**os.environ, "PYTHONPATH": str(trl), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "bench/trl_ppo.py", *map(str, (toy, out, rollouts, seed, reward, beta))]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def say(run):
    curve = " ".join(f"{reward:.2f}" for reward in run["rewards"][:: max(1, len(run["rewards"]) // 8)])
    print(
        f"{run['task']}, {run['side']}, seed {run['seed']}: {run['episodes_per_second']:.0f} episodes/s, "
        f"{run['reward_minus_kl']:.3f} less KL, reward {curve}",
        flush=True,
    )


def compare(runs):
    """{task: {side: numbers}}."""
    found = {}
    for task in dict.fromkeys(task for task, _, _ in runs):
        sides = dict.fromkeys(side for other, side, _ in runs if other == task)
        found[task] = {}
        for side in sides:
            tries = [run for (other, one, _), run in sorted(runs.items()) if (other, one) == (task, side)]
            each = [run["reward_minus_kl"] for run in tries]
            error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
            speed = max(run["episodes_per_second"] for run in tries)  # the least disturbed run
            explained = [run["explained_variance"][-3:] for run in tries if run.get("explained_variance")]
            explained = [statistics.fmean(last) for last in explained]
            found[task][side] = {
                "reward_minus_kl": round(statistics.fmean(each), 3),
                "standard_error": error and round(error, 3),
                "each": [round(value, 3) for value in each],
                "explained_variance": round(statistics.fmean(explained), 2) if explained else None,
                "episodes_per_second": round(speed),
            }
        theirs = found[task].get(TRL, {}).get("episodes_per_second")
        for numbers in found[task].values():
            numbers["speed_ratio"] = theirs and round(numbers["episodes_per_second"] / theirs, 2)
    return found


def draw(runs, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {**TASKS, **ADAPTED}
    tasks = [task for task in ("zigzag", "share", *ADAPTED) if any(task == other for other, _, _ in runs)]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for colour, side in enumerate(SIDES):
            curves = [run["rewards"] for (other, one, _), run in runs.items() if (other, one) == (task, side)]
            if not curves:
                continue
            means = [statistics.fmean(column) for column in zip(*curves, strict=True)]
            axis.plot(means, color=f"C{colour}", label=side, linewidth=2)
            for curve in curves:
                axis.plot(curve, color=f"C{colour}", alpha=0.2, linewidth=0.8)
        axis.set_title(f"{task}, beta {drawn[task]}: reward (thin: single seeds)")
        axis.set_xlabel("rollout of 128 answers")
        axis.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
