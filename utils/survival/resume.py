"""The checkpoint that a run resumes from, and the settings that must be equal for that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common_args import SharedArgs
from utils.cli.run import Run
from utils.data.rows import hash_rows
from utils.runtime import environment
from utils.runtime.errors import Refused, refuse_if
from utils.survival.checkpoints import list_checkpoints, newest_whole, problems_of, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

EARLIER = "earlier"  # in the output folder: the run whose weights --resume weights_only started from
# Flags that decide the final weights, beside the method's own. The length of the run may change.
SHARED_FLAGS = ("model_revision", "train_mode", "dtype", "reward_funcs", "reward_model_path")
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
TRAINER_FLAGS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "seed", "data_seed",
    "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
LENGTH_FLAGS = ("max_steps", "num_train_epochs")
# The method's flags that do not decide them: logging, serving, memory, and the size of a pass.
NO_MATTER = re.compile(
    "log_|vllm_|dataset_num_proc|num_completions_to_print|answers_|steps_per_generation|num_mini_batches|"
    "total_episodes|num_generations_eval|trust_remote_code|ds3_|local_rollout|save_critic|generate_during_eval|"
    "activation_offloading|precompute_ref_|model_init_kwargs|teacher_model_init_kwargs|api_|judge_base_url|"
    "judge_key_variable|max_failed_fraction"
)


@dataclass
class Start:
    """The checkpoint that a run starts from (None: from the beginning). `run`: from describe_run()."""

    checkpoint: Path | None = None
    weights_only: bool = False
    run: dict = field(default_factory=dict)

    def policy_path(self, common: SharedArgs) -> str | None:
        """The folder of the policy's weights. load_adapter() puts an adapter into the new trainer's model."""
        whole = self.weights_only and common.train_mode == "full"
        return str(self.checkpoint) if whole else common.model_name_or_path


def describe_run(run: Run) -> dict:
    """{setting: value} of everything that must be equal for an exact resume, and the length of the run."""
    from transformers import TrainingArguments

    common, config, rows = run.common, run.config, run.rows
    flags = asdict(common)
    chosen = [*SHARED_FLAGS, *(LORA_FLAGS if common.train_mode != "full" else ())]
    described = {"--rlhf_type": run.name} | {f"--{flag}": flags[flag] for flag in chosen if flag in flags}
    of_every_trainer = {f.name for f in fields(TrainingArguments)}
    own = [f.name for f in fields(config) if f.name not in of_every_trainer and not NO_MATTER.match(f.name)]
    described |= {f"--{flag}": getattr(config, flag) for flag in (*TRAINER_FLAGS, *own, *LENGTH_FLAGS)}
    passes = config.per_device_train_batch_size * config.gradient_accumulation_steps
    described |= {
        "model": describe_model(common.model_name_or_path or ""),
        "data": f"{len(rows.train)} rows {hash_rows(rows.train, in_order=True)[:12]}",
        "processes": environment.processes_asked(),
        "engine": environment.engine() or "none",
        "rows a step": passes * environment.processes_asked(),
    }
    return json.loads(json.dumps(described, default=str))


def describe_model(path: str) -> str:
    """The folder's name and a hash of its configs and of the names and sizes of its weights; a Hub id as it is."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    described = [f"{file.name} {file.stat().st_size}" for file in sorted(folder.glob("*.safetensors"))]
    described += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*config.json"))]
    return f"{folder.resolve().name} {hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"


def differences(there: dict, here: dict) -> list[str]:
    """ "--learning_rate 1e-05 there, 2e-05 here": the settings, without the length, in which two runs differ."""
    length = {f"--{flag}" for flag in LENGTH_FLAGS}
    names = [name for name in here | there if name not in length and here.get(name) != there.get(name)]
    return [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names]


def find_start(run: Run) -> tuple[Start, list[str]]:
    """(the Start, lines to print); rank 0 decides for all. Raises Refused if the checkpoint does not fit."""
    found: Any = None
    problems: list[str] = []
    if environment.is_main():
        try:
            if run.problems:  # a refused run cannot be compared with the checkpoint's
                asked = str(run.config.resume_from_checkpoint)
                refuse_if(check_named(asked, hashes=False) if Path(asked).is_dir() else [])
                found = Start(), []
            else:
                described = describe_run(run)
                start, said = choose_start(run.common, run.config, described)
                found = replace(start, run=described), said
        except Refused as refusal:
            problems = refusal.problems
    if environment.world_size() > 1:
        from accelerate.utils import broadcast_object_list

        found, problems = broadcast_object_list([found, problems])
    refuse_if(problems)
    return found


def choose_start(common: SharedArgs, config: TrainingArguments, run: dict) -> tuple[Start, list[str]]:
    """(the Start, lines to print). `run`: from describe_run(). Raises Refused."""
    if not config.resume_from_checkpoint or common.overwrite_output_dir:
        return Start(), []
    checkpoint, said = find_checkpoint(common, config, run)
    if checkpoint is None:
        return Start(), said
    there = read_manifest(checkpoint)["run"]
    different, lacks = "; ".join(differences(there, run)), lacking(checkpoint, config)
    if not different and not lacks:
        flags = [f"--{flag}" for flag in LENGTH_FLAGS if run[f"--{flag}"] != there.get(f"--{flag}")]
        longer = "; ".join(f"{flag} {run[flag]}, not {there.get(flag)}" for flag in flags)
        if longer:
            said.append(f"the learning rate follows the schedule of the new length ({longer})")
        return Start(checkpoint), [*said, f"resumes from {checkpoint}"]
    if common.resume == "weights_only":
        refuse_if([*misfits(checkpoint, common, there, run)])
        said.append(f"starts at step 0 with the weights of {checkpoint}")
        if (checkpoint / "critic.safetensors").exists():
            said.append(f"the critic starts untrained. To keep it, add --critic_path {checkpoint}/critic.safetensors")
        return Start(checkpoint, weights_only=True), said
    way_out = "--resume weights_only to start at step 0 with its weights, or --overwrite_output_dir to delete it"
    if different:
        raise Refused([f"{checkpoint} is from another run: {different}. Type its values to resume it, {way_out}"])
    raise Refused([f"{checkpoint}: {lacks}. Type {way_out}"])


def find_checkpoint(common: SharedArgs, config: TrainingArguments, run: dict) -> tuple[Path | None, list[str]]:
    """(the checkpoint asked for or None, lines to print). Raises Refused if a named checkpoint is damaged."""
    asked, folder = config.resume_from_checkpoint, Path(config.output_dir)
    read_all = not common.check  # --check compares the sizes of files; the run itself reads them
    weights_only = common.resume == "weights_only"
    named = str(asked).lower() not in ("auto", "true")
    checkpoint, said = (None, []) if named and not weights_only else newest_whole(folder, read_all)
    if named:
        if checkpoint and weights_only and not differences(read_manifest(checkpoint)["run"], run):
            return checkpoint, said  # the run that started from the named checkpoint resumes
        refuse_if(check_named(asked, read_all))
        return Path(asked), []
    if checkpoint is None and weights_only:
        checkpoint, further = newest_whole(folder / EARLIER, read_all)
        said += further
    if checkpoint is None and (folder / "metrics.jsonl").exists():
        said.append(f"no checkpoint in {folder} to resume from: starts at step 0")
    return checkpoint, said


def check_named(checkpoint: str, hashes: bool) -> list[str]:
    """Problems of the files of a checkpoint that --resume_from_checkpoint names."""
    return [f"--resume_from_checkpoint {checkpoint}: {line}" for line in problems_of(checkpoint, hashes)]


def lacking(checkpoint: Path, config: TrainingArguments) -> str | None:
    """The reason why a run cannot resume exactly from its own checkpoint, or None."""
    if checkpoint.parent.name == EARLIER:
        return "its run was set aside when another run started from its weights"
    if not any(checkpoint.glob("rng_state*")):
        return "it holds only weights (saved with --save_only_model)"
    if config.sync_ref_model:
        return "it lacks the reference model, which --sync_ref_model has changed"
    return None


def misfits(checkpoint: Path, common: SharedArgs, there: dict, here: dict) -> Iterator[str]:
    """Problems of starting this run with a checkpoint's weights: sharded weights, an adapter of another shape."""
    if not any(checkpoint.glob("*.safetensors")):
        yield f"{checkpoint}: its weights are sharded by its engine. Type the same LAUNCH as that run"
    if common.train_mode == "full":
        return
    shape = ("--lora_rank", "--lora_target_modules", "--use_dora")
    other = [line for line in differences(there, here) if line.split()[0] in shape]
    if there["--train_mode"] == "full":
        other = [f"--train_mode full there, {common.train_mode} here"]
    if other:
        yield (
            f"{checkpoint}: its weights do not fit: {'; '.join(other)}. Type its values, or a new --output_dir "
            f"with --model_name_or_path {checkpoint}"
        )


def set_aside(output_dir: str, start: Start) -> Start:
    """Moves an earlier run into EARLIER if this run starts from its weights. Returns the Start with the new path."""
    folder, earlier = Path(output_dir), Path(output_dir, EARLIER)
    if not start.weights_only or not start.checkpoint or start.checkpoint.parent.resolve() != folder.resolve():
        return start
    if environment.is_main():
        if earlier.exists():  # an even earlier run: kept apart from the run that is moved now
            os.replace(earlier, folder / "before")
        earlier.mkdir()
        if (folder / "before").exists():
            os.replace(folder / "before", earlier / EARLIER)
        # the newest checkpoint is moved last: after a kill in between, the same command still finds it
        for path in [*folder.glob("*.json*"), *folder.glob("report.png"), *reversed(list_checkpoints(folder))]:
            os.replace(path, earlier / path.name)
    return replace(start, checkpoint=earlier / start.checkpoint.name)


def load_adapter(model: PreTrainedModel, start: Start) -> None:
    """With --resume weights_only, copies the checkpoint's adapter into the model to train."""
    from peft import load_peft_weights, set_peft_model_state_dict

    if start.weights_only and hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_peft_weights(str(start.checkpoint), device="cpu"))
