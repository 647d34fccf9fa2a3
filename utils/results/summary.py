"""What a run prints before and after the training: the plan, and where the result is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common_args import CommonArgs, SharedArgs
from utils.cli.run import Run
from utils.data import prepare
from utils.data.rows import Rows, count_reasons
from utils.models import load
from utils.models.folders import ModelFolder
from utils.models.sampling import describe_sampling
from utils.rewards import models
from utils.runtime import environment
from utils.runtime.output import say

if TYPE_CHECKING:
    from transformers import TrainingArguments


def say_plan(run: Run, further: Sequence[str] = ()) -> None:
    """Print the plan, before a model is loaded. further: lines that only one script has."""
    common, config, method, rows, train, held_out = (
        run.common, run.config, run.method, run.rows, run.train, run.held_out,
    )  # fmt: skip
    path, mode, dropped = common.model_name_or_path, common.train_mode, count_reasons(rows.dropped)
    refused = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    held = f"{len(held_out.rows)} held out" if held_out.rows else "none held out (--eval_fraction 0.1 would)"
    count, engine = environment.processes_asked(), environment.engine()
    devices = f"{count} process{'es' * (count > 1)} on {config.device.type}{', ' * bool(engine)}{engine}"
    say(f"method    {run.name}: {method.title} ({method.source})")
    say(f"model     {path}")
    say(f"mode      {mode}{describe_lora(common, rows.notes)}; {common.dtype}, {devices}")
    say(f"reference {load.describe_reference(method, path, mode, config)}")
    if method.sample_reward:
        say(f"reward    {describe_reward(common, config)}")
        say(f"rollouts  {config.describe_rollouts(len(train.rows))}")
        if config.describe_critic(mode):
            say(f"critic    {config.describe_critic(mode)}")
        say(describe_sampling(common, config))
    for line in further:
        say(line)
    say(f"data      {len(train.rows)} rows to train on, {held}; refused: {refused}")
    if train.cut + held_out.cut:
        say(f"          {train.cut + held_out.cut} answers are cut at --max_length {config.max_length}")
    if train.reshaped:
        say(f"          in {train.reshaped} rows the template writes the prompt differently once an answer follows")
    if config.load_best_model_at_end:
        which = "highest" if config.greater_is_better else "lowest"
        best = f"eval_{config.metric_for_best_model.removeprefix('eval_')}"
        say(f"best      of the evaluated checkpoints the one with the {which} {best}")
    unseen = describe_cut(common, config) if method.sample_reward else ()
    for note in [*rows.notes, *config.notes, *unseen]:
        say(f"note      {note}")
    say_findings(rows)
    say(f"first row {prepare.mark(train, run.tokenizer, sys.stdout.isatty())}")


def say_findings(rows: Rows) -> None:
    for finding in rows.findings:
        say(f"{finding.kind:<9} {finding.text}")


def say_checked(rows: Rows) -> None:
    warnings = sum(finding.kind == "warning" for finding in rows.findings)
    counted = f"; {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
    say(f"checked   nothing stands in the way; no model was loaded, nothing was written{counted}")


def describe_reward(common: CommonArgs, config: TrainingArguments) -> str:
    judges = [*(common.reward_funcs or ()), *([common.reward_model_path] if common.reward_model_path else [])]
    if common.reward_model_path and models.on_policy_base(
        common.reward_model_path, common.model_name_or_path, common.train_mode, common.model_revision
    ):
        judges[-1] += " (an adapter on the policy's own base: no second copy)"
    if config.judge_model:
        judges.append(f"{config.judge_model} (a judge, --judge_mode {config.judge_mode}, at {config.judge_base_url})")
    weights = config.reward_weights or [1.0] * len(judges)
    said = " + ".join(
        f"{weight:g} x {one}" if weight != 1 else one for weight, one in zip(weights, judges, strict=True)
    )
    penalty = config.missing_eos_penalty
    return said + (f" - {penalty:g} for an answer that is cut" if penalty else "")


def describe_cut(common: CommonArgs, config: TrainingArguments) -> Iterator[str]:
    """Note that a reward model does not see that an answer is cut."""
    if common.reward_model_path and config.missing_eos_penalty is None:
        yield (
            f"an answer that is cut at --max_completion_length {config.max_completion_length} is scored by "
            "--reward_model_path as if it had ended there. --missing_eos_penalty 1 takes 1 off its reward"
        )


def describe_lora(common: SharedArgs, notes: list[str]) -> str:
    if common.train_mode == "full":
        return ""
    rank, alpha, dora = common.lora_rank, common.lora_alpha, common.use_dora
    adapter = ModelFolder.at(common.model_name_or_path).adapter
    if adapter:
        if (rank, alpha) != (adapter["r"], adapter["lora_alpha"]):
            notes.append(f"the adapter keeps its own rank {adapter['r']}: --lora_rank and its kin have no effect")
        rank, alpha, dora = adapter["r"], adapter["lora_alpha"], bool(adapter.get("use_dora"))
    return f", {'DoRA' if dora else 'LoRA'} rank {rank}, alpha {alpha}"


def say_result(run: Run, proof: str, again: dict[str, str]) -> None:
    """Print where the result is, and what to type next. proof: the line of the process that reopened the result.

    again: variables of the run script that only this script has.
    """
    common, config, method = run.common, run.config, run.method
    out = config.output_dir
    say(f"\nresult    {out}, with report.png and run_card.json")
    say(proof)
    if method.task == "CAUSAL_LM":
        say(f"chat      python -m utils.chat {out}")
    if common.train_mode != "full":
        say(f"merge     python -m utils.merge_lora {out} {out}-merged")
    again = {**again, "TRAIN_MODE": common.train_mode, "MODEL": out, "OUTPUT_DIR": f"{out}-2"}
    files = common.train_data_path or []
    again |= {"TRAIN_DATA": files[0]} if len(files) == 1 else {}
    again |= {"MAX_STEPS": str(config.max_steps)} if config.max_steps > 0 else {}
    launch = {key: os.environ.get(key, "") for key in ("LAUNCH", "NUM_PROCESSES")}
    again |= {key: value for key, value in launch.items() if value not in ("", "auto")}
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in again.items())
    say(f"continue  {variables} bash {method.entry}_run.sh")
