"""Our PPO, RLOO and GRPO, and TRL 1.12's PPO, on the same toy with the same budget: python bench/ppo.py

bench/toy.py's task, one process on one thread, three seeds, the runs in turn. For TRL 1.12 the script installs that
version beside the libraries of this environment, into a folder of its own that only its runs see. It draws the curves
into docs/ppo_toy.png; the last line is JSON: episodes a second, also as a ratio to TRL 1.12, and how training ended,
the mean of the last three rollouts. Less KL: beta times the mean KL of a token times the mean length; of TRL 1.12 its
own sum.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=50, help="of 128 answers each")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    from bench.toy import make_toy, run_ours

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        toy = make_toy(folder / "toy")
        install_trl(folder / "trl")
        runs = {}
        for seed in range(asked.seeds):
            for method in ("PPO", "RLOO", "GRPO"):
                out = folder / f"{method}-{seed}"
                runs.setdefault(method, []).append(run_ours(method, toy, out, asked.rollouts, seed))
                say(method, seed, runs)
            runs.setdefault(TRL, []).append(run_trl(folder / "trl", toy, folder / "out", asked.rollouts, seed))
            say(TRL, seed, runs)
    draw(runs, ROOT / "docs" / "ppo_toy.png")
    print(json.dumps({"bench": "ppo", "rollouts": asked.rollouts, "seeds": asked.seeds, **compare(runs)}))


def install_trl(folder):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "trl==1.12.0"]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)


def run_trl(trl, toy, out, rollouts, seed):
    env = {**os.environ, "PYTHONPATH": str(trl), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "bench/trl_ppo.py", *map(str, (toy, out, rollouts, seed))]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def say(name, seed, runs):
    run = runs[name][-1]
    curve = " ".join(f"{reward:.2f}" for reward in run["rewards"][:: max(1, len(run["rewards"]) // 10)])
    print(f"{name}, seed {seed}: {run['episodes_per_second']:.0f} episodes/s, reward {curve}", flush=True)


def compare(runs):
    found = {}
    for name, tries in runs.items():
        means = {
            key: statistics.fmean(run[key] for run in tries) for key in tries[0] if key not in ("rewards", "held_out")
        }
        found[name] = {key: round(value, 3) for key, value in means.items()}
        found[name]["reward_minus_kl_each"] = [round(run["reward_minus_kl"], 3) for run in tries]
        held = [run["held_out"] for run in tries if "held_out" in run]
        found[name] |= {"held_out_each": [[round(value, 3) for value in pair] for pair in held]} if held else {}
    theirs = found[TRL]
    for name in (name for name in found if name != TRL):
        found[name]["speed_ratio"] = round(found[name]["episodes_per_second"] / theirs["episodes_per_second"], 2)
    return found


def draw(runs, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for colour, (name, tries) in enumerate(runs.items()):
        for number, run in enumerate(tries):
            axis.plot(run["rewards"], color=f"C{colour}", alpha=0.8, label=None if number else name)
    axis.set_xlabel("rollout of 128 answers")
    axis.set_title("share of the asked letter in an answer (1 is best), three seeds")
    axis.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
