"""Rounds of sampling, selecting and training, each from the last round's model: RAFT (--then SFT), iterative DPO.

Each part is a separate command, started by utils/launch.py. A part resumes where it was stopped, as do the rounds.
"""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from common_args import CommonArgs
from rlhf_args.methods import PROMPT, find_method
from rlhf_args.rejection_config import RejectionConfig
from utils.data import files
from utils.data.rows import make_rows
from utils.rejection import selection
from utils.rejection.checks import TRAINING
from utils.rejection.folder import compare_settings, keep_settings, locked
from utils.rejection.stages import check_rejection
from utils.runtime.errors import Failed, Refused, refuse_if
from utils.runtime.output import say
from utils.runtime.paths import empty

Part = tuple[list[str], dict[str, str]]  # command, what it adds to the environment
PLAIN = ("auto", "cpu", "single_gpu", "multi_gpu")  # launches with a whole model in each process


def run_rounds(common: CommonArgs, config: RejectionConfig, words: list[str]) -> int:
    """Exit status of all rounds. words: the flags of the training method."""
    method, folder = find_method(config.then) or "", Path(config.output_dir or "")
    file = selection.file_for(method) or ""
    config.write = [*config.write, *({file} - {*config.write})]
    check_training(common, config, method, file, words)
    if common.check:
        return check_rejection(common, config)
    anew = "Type another --output_dir, or add --overwrite_output_dir to start again"
    wanted = round_settings(common, config, method, words)
    if not common.overwrite_output_dir:
        refuse_if([*compare_settings(folder, "rounds", wanted, anew)])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if common.overwrite_output_dir:
            empty(folder, keep=(".lock",))
        keep_settings(folder, "rounds", wanted)
        model = common.model_name_or_path or ""
        rows: list[dict[str, Any]] = [{"round": 0, "model": model}]
        measured = bool(common.eval_fraction or common.eval_data_path)
        if measured:
            rows[0]["held_out_reward"] = held_out_reward(common, config, model, folder / "held-out-0")
        for number in range(1, config.rounds + 1):
            here = folder / f"round-{number}"
            say(f"\nround     {number} of {config.rounds}: sample from {model}, then {method}")
            run_sampling(common, config, here, model_name_or_path=model)
            path = selection.path_of(here, file, config.chunk_size)
            found = json.loads((here / "report.json").read_text(encoding="utf-8"))
            if not found["written"][file]:
                raise Failed(f"{path}: no row was selected to train on; {here}/report.json has the reasons")
            trained = here / "trained"
            if not (trained / "run_card.json").exists():
                run_part(
                    training_command(common, config, method, model, path, trained, words),
                    f"{method} of round {number}",
                )
            model = str(trained)
            row: dict[str, Any] = {"round": number, "model": model, "sampled_reward": found["mean_reward"]}
            row |= {"best_reward": found["best_of_n"][-1]["reward"]} if found["best_of_n"] else {}
            row |= {"rows": found["written"][file]}
            if measured:
                row["held_out_reward"] = held_out_reward(common, config, model, folder / f"held-out-{number}")
            rows.append(row)
            (folder / "rounds.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        say_rounds(rows, config.num_completions)
        say(f"\nresult    {model}")
        say(f"chat      python -m utils.chat {model}")
    return 0


def round_settings(common: CommonArgs, config: RejectionConfig, method: str, words: list[str]) -> dict[str, Any]:
    """Settings of the selection and the training. Those of the answers are in the folder of each round."""
    selected = ("select", "select_k", "threshold", "min_margin", "keep_cut")
    return {
        "then": method,
        **{name: getattr(config, name) for name in selected},
        **{name: getattr(common, name) for name in TRAINING},
        "flags of the training": " ".join(words),
    }


def say_rounds(rows: list[dict[str, Any]], samples: int) -> None:
    titles = {
        "round": "round",
        "sampled_reward": "sampled",
        "best_reward": f"best of {samples}",
        "rows": "rows",
        "held_out_reward": "held out",
        "model": "model",
    }
    titles = {name: title for name, title in titles.items() if any(name in row for row in rows)}
    say("\n" + "  ".join(f"{title:>9}" for title in titles.values()))
    for row in rows:
        cells = (row.get(name, "") for name in titles)
        say("  ".join(f"{cell:>9.4f}" if isinstance(cell, float) else f"{cell:>9}" for cell in cells))
    say(
        "          (mean rewards: of what the round sampled from its model before training; of the new model's answers"
    )
    say(
        "          to held-out prompts)"
        if "held_out_reward" in titles
        else "          --eval_fraction 0.1 would measure)"
    )


# ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_sampling(common: CommonArgs, config: RejectionConfig, folder: Path, **changed: Any) -> None:
    """One rejection sampling into `folder`, with this run's flags except for `changed`."""
    given = {name: value for args in (common, config) for name, value in changed_fields(args).items()}
    own = {"then", "rounds", "eval_data_path", "overwrite_output_dir", "check", *TRAINING}
    flags = {name: value for name, value in given.items() if name not in own}
    flags |= {"output_dir": str(folder), **changed}
    launch = os.environ.get("LAUNCH", "auto")
    env = {"LAUNCH": launch if launch in PLAIN else "auto"}
    command = [sys.executable, "-m", "utils.launch", "rejection_sampling.py", *as_words(flags)]
    run_part((command, env), f"the sampling into {folder}")


def held_out_reward(common: CommonArgs, config: RejectionConfig, model: str, folder: Path) -> float:
    """The mean reward of a model's answers to the held-out prompts."""
    where: dict[str, Any]
    if common.eval_data_path:
        where = {"train_data_path": common.eval_data_path, "max_samples": None}
    else:
        where = {"held_out_prompts": True}
    where["reference_column"] = None  # the data's answers are not the model's
    if config.engine == "openai":
        where |= {"engine": "transformers", "api_model": None, "api_base_url": None}
        where |= {"judge_base_url": config.judge_base_url or config.api_base_url} if config.judge_model else {}
    say(f"\nheld out  {model} answers the held-out prompts")
    run_sampling(common, config, folder, model_name_or_path=model, stages=["generate,score"], **where)
    with open(folder / "scores.jsonl", encoding="utf-8") as lines:
        scores = [line["score"] for line in map(json.loads, lines) if "score" in line]
    if not scores:
        raise Failed(f"{folder}: no held-out answer has a score")
    return statistics.fmean(scores)


def training_command(
    common: CommonArgs,
    config: RejectionConfig,
    method: str,
    model: str,
    path: str,
    output_dir: str | Path,
    words: list[str],
) -> Part:
    """rlhf_run.sh on a file, with this run's training flags."""
    env = {
        "RLHF_TYPE": method,
        "TRAIN_MODE": common.train_mode,
        "MODEL": model,
        "TRAIN_DATA": path,
        "OUTPUT_DIR": str(output_dir),
        "EVAL_FRACTION": "0",
        "PYTHON": sys.executable,
    }
    given = changed_fields(common)
    kept = (*TRAINING[1:], "dtype", "attn_implementation", "max_drop_fraction")
    flags = {name: given[name] for name in kept if name in given}
    flags |= {"seed": config.seed} | ({"trust_remote_code": True} if config.trust_remote_code else {})
    if common.model_revision and model == common.model_name_or_path:
        flags["model_revision"] = common.model_revision
    return ["bash", "rlhf_run.sh", *as_words(flags), *words], env


def check_training(common: CommonArgs, config: RejectionConfig, method: str, file: str, words: list[str]) -> None:
    """Run the training's --check on a few rows of the kind it will get, before anything is sampled."""
    rows = files.FileRows(common.train_data_path, "--train_data_path", 8)
    made, _ = make_rows(list(rows), PROMPT, [])
    good, bad = (
        [{"completion": word, "sample": 0, "score": score, "scores": {}}] for word, score in (("a", 1), ("b", 0))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as handle:
            for _, values in made:
                for row, _ in selection.rows_of(file, values["prompt"], good, bad, config):
                    handle.write(json.dumps(row) + "\n")
        command, env = training_command(
            common, config, method, common.model_name_or_path or "", str(path), f"{folder}/out", words
        )
        done = subprocess.run(
            [*command, "--check"],
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        said = [line.removeprefix("refused: ") for line in done.stderr.splitlines() if line.startswith("refused: ")]
        raise Refused([f"--then {method}: {line}" for line in said or [done.stderr.strip()]])


def run_part(part: Part, what: str) -> None:
    """Run a part to its end. Raises Failed if it fails."""
    command, env = part
    status = subprocess.call(command, env={**os.environ, **env}, preexec_fn=end_with_parent)
    if status == 2:
        raise Refused([f"{what} did not start, for the reason above"])
    if status:
        raise Failed(f"{what} ended with status {status}. The same command resumes there")


def end_with_parent() -> None:
    """End this process when its parent is killed: the next run would meet it in the folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def changed_fields(args: CommonArgs | RejectionConfig) -> dict[str, Any]:
    """{name: value} of the fields that differ from their defaults."""
    found = {}
    for one in fields(args):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if getattr(args, one.name) != default:
            found[one.name] = getattr(args, one.name)
    return found


def as_words(flags: dict[str, Any]) -> list[str]:
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
