"""Our PPO with each critic, RLOO, and PPO of TRL 1.12, on the toy tasks of bench/toy.py with the same budget.

    python bench/ppo.py [--rollouts 24] [--seeds 8] [--tasks ...] [--sides ...]

A policy of 0.3M parameters, one process on one thread, one run at a time. Tasks: share (beta 0.003), share at beta
0.05 (nothing to gain) and zigzag (beta 0.05; a longer answer gets more reward) with full weights; share and zigzag
with LoRA; zigzag with an offset or a scale on every reward, which must change nothing. TRL 1.12 is installed into a
temporary folder that only its own runs see.

The last line is JSON, for each task and side: reward minus beta x KL of an answer (mean of the last three rollouts,
offset and scale removed), its mean and standard error over the seeds; the explained variance of the same rollouts;
episodes per second of the fastest run, also divided by TRL 1.12's. KL: mean KL per token x mean length in our runs,
its own sum in TRL 1.12's. The curves go to docs/ppo_toy.png. `--keep FILE` appends each run to FILE, and skips the
runs that it holds already.
"""

import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness, toy
from bench.harness import ROOT

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
    parser = harness.make_parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=24, help="rollouts of 128 answers")
    parser.add_argument("--seeds", type=int, default=8)
    tasks = [*TASKS, *ADAPTED, *MOVED]
    parser.add_argument("--tasks", nargs="+", default=tasks, help=", ".join(tasks))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help=", ".join(SIDES))
    parser.add_argument("--keep", type=Path, help="file of single runs, one JSON line each")
    parser.add_argument("--draw", type=Path, default=ROOT / "docs" / "ppo_toy.png", help="file of the curves")
    asked = parser.parse_args()
    kept = asked.keep.read_text().splitlines() if asked.keep and asked.keep.exists() else []
    runs = {(run["task"], run["side"], run["seed"]): run for run in map(json.loads, kept)}
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        # an adapter cannot change the embedding: its policy starts from larger weights
        toys = {False: toy.make_toy(folder / "toy"), True: toy.make_toy(folder / "toy_for_adapters", spread=0.1)}
        if TRL in asked.sides:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "trl"]
            harness.run([*pip, "trl==1.12.0"])
        for seed in range(asked.seeds):
            for task in asked.tasks:
                for side in asked.sides:
                    key = task, side, seed
                    if key in runs or not is_run(side, task):
                        continue
                    found = run_one(side, task, seed, asked.rollouts, toys[task in ADAPTED], folder)
                    runs[key] = found | {"task": task, "side": side, "seed": seed}
                    print_run(runs[key])
                    if asked.keep:
                        with open(asked.keep, "a") as handle:
                            handle.write(json.dumps(runs[key]) + "\n")
    draw(runs, asked.draw)
    harness.finish("ppo", rollouts=asked.rollouts, seeds=asked.seeds, tasks=summarize(runs))


def is_run(side, task):
    """True if the table has this cell: bench/trl_ppo.py trains full weights only, where no critic is an adapter."""
    if task in MOVED:
        return side == "model"
    return side not in ((TRL, "model") if task in ADAPTED else ("lora",))


def run_one(side, task, seed, rollouts, folder_of_toy, folder):
    factor, offset = MOVED.get(task, (1, 0))
    reward = task.split()[0].strip(",")
    beta = (TASKS | ADAPTED).get(task, factor * TASKS["zigzag"])
    rollouts = rollouts if task != "share at 0.05" else rollouts // 3
    if side == TRL:
        words = [folder_of_toy, folder / "out", rollouts, seed, reward, beta]
        env = toy.ONE_THREAD | {"PYTHONPATH": str(folder / "trl"), "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [sys.executable, "bench/trl_ppo.py", *words]
        return harness.last_json(harness.run(command, HF_HUB_DISABLE_TELEMETRY="1", **env))
    method, *flags = SIDES[side] + (LORA if task in ADAPTED else ())
    found = toy.run_ours(method, folder_of_toy, folder / "out", rollouts, seed, *flags, reward=reward, beta=beta)
    for name in ("reward", "reward_minus_kl"):
        found[name] = (found[name] - offset) / factor
    return found | {"rewards": [(one - offset) / factor for one in found["rewards"]]}


def print_run(run):
    curve = " ".join(f"{reward:.2f}" for reward in run["rewards"][:: max(1, len(run["rewards"]) // 8)])
    print(
        f"{run['task']}, {run['side']}, seed {run['seed']}: {run['episodes_per_second']:.0f} episodes/s, "
        f"{run['reward_minus_kl']:.3f} reward - beta x KL, reward {curve}",
        flush=True,
    )


def summarize(runs):
    """{task: {side: numbers}}."""
    found = {}
    for task, side in dict.fromkeys((task, side) for task, side, _ in runs):
        tries = [run for (*cell, _), run in sorted(runs.items()) if cell == [task, side]]
        mean, error = harness.mean_and_error([run["reward_minus_kl"] for run in tries])
        explained = [run["explained_variance"][-3:] for run in tries if run.get("explained_variance")]
        found.setdefault(task, {})[side] = {
            "reward_minus_kl": round(mean, 3),
            "standard_error": error and round(error, 3),
            "each": [round(run["reward_minus_kl"], 3) for run in tries],
            "explained_variance": round(statistics.fmean(map(statistics.fmean, explained)), 2) if explained else None,
            "episodes_per_second": round(max(run["episodes_per_second"] for run in tries)),  # the least disturbed run
        }
    for sides in found.values():
        theirs = sides.get(TRL, {}).get("episodes_per_second")
        for numbers in sides.values():
            numbers["speed_ratio"] = theirs and round(numbers["episodes_per_second"] / theirs, 2)
    return found


def draw(runs, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in ("zigzag", "share", *ADAPTED) if any(task == other for other, _, _ in runs)]
    if not tasks:
        return
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
        axis.set_title(f"{task}, beta {(TASKS | ADAPTED)[task]}: reward (thin: single seeds)")
        axis.set_xlabel("rollout of 128 answers")
        axis.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
