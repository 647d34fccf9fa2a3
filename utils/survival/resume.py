"""Which checkpoint a run may go on from, and what must be the same for that."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from utils.data.rows import hash_rows
from utils.runtime import environment
from utils.runtime.errors import Refused, refuse_if
from utils.survival.checkpoints import list_checkpoints, newest_whole, problems_of, read_manifest

EARLIER = "earlier"  # in the output folder: what --resume weights_only started from
# What decides the weights that a run ends with, beside the method's own flags. How long it runs may change.
SHARED_FLAGS = ("model_revision", "train_mode", "dtype", "reward_funcs", "reward_model_path")
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
TRAINER_FLAGS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "seed", "data_seed",
    "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
LENGTH_FLAGS = ("max_steps", "num_train_epochs")
# Flags of methods that do not: how it is logged, served, kept in memory, or cut into passes.
NO_MATTER = re.compile(
    "log_|vllm_|dataset_num_proc|num_completions_to_print|answers_|steps_per_generation|num_mini_batches|"
    "total_episodes|num_generations_eval|trust_remote_code|ds3_|local_rollout|save_critic|generate_during_eval|"
    "activation_offloading|precompute_ref_|model_init_kwargs|teacher_model_init_kwargs|api_|judge_base_url|"
    "judge_key_variable|max_failed_fraction"
)


@dataclass
class Start:
    """What a run goes on from: a checkpoint, or None; in full, or its weights alone. `run`: as of describe_run."""

    checkpoint: Path | None = None
    weights_only: bool = False
    run: dict = field(default_factory=dict)

    def policy_path(self, common):
        """Where the policy's weights are read. An adapter goes into the new trainer's model (load_adapter)."""
        whole = self.weights_only and common.train_mode == "full"
        return str(self.checkpoint) if whole else common.model_name_or_path


def describe_run(run):
    """{what: value} of all that must be the same for a run to go on as if it had never stopped, and its length."""
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
        "model": describe_model(common.model_name_or_path),
        "data": f"{len(rows.train)} rows {hash_rows(rows.train, in_order=True)[:12]}",
        "processes": environment.processes_asked(),
        "engine": environment.engine() or "none",
        "rows a step": passes * environment.processes_asked(),
    }
    return json.loads(json.dumps(described, default=str))


def describe_model(path):
    """Its name and a hash of what it is: config, and the names and sizes of its weights; of a Hub id the id."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    described = [f"{file.name} {file.stat().st_size}" for file in sorted(folder.glob("*.safetensors"))]
    described += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*config.json"))]
    return f"{folder.resolve().name} {hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"


def differences(there, here):
    """ "--learning_rate 1e-05 there, 2e-05 here": in what a run is not that of a checkpoint; its length may differ."""
    length = {f"--{flag}" for flag in LENGTH_FLAGS}
    names = [name for name in here | there if name not in length and here.get(name) != there.get(name)]
    return [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names]


def is_of(checkpoint, run):
    return not differences(read_manifest(checkpoint)["run"], run)


def find_start(run):
    """The Start of this run, and lines to say of it. Raises Refused where the checkpoint is not one of this run.

    Every process gets what the main one found.
    """
    found, problems = None, []
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


def choose_start(common, config, run):
    """(the Start, lines to say of it). Raises Refused."""
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
            said.append(f"the learning rate goes on by the schedule of the new length ({longer})")
        return Start(checkpoint), [*said, f"goes on from {checkpoint}"]
    if common.resume == "weights_only":
        refuse_if([*misfits(checkpoint, common, there, run)])
        said.append(f"starts anew from the weights of {checkpoint}")
        if (checkpoint / "critic.safetensors").exists():
            said.append(f"the critic starts anew too (--critic_path {checkpoint}/critic.safetensors would take it)")
        return Start(checkpoint, weights_only=True), said
    way_out = "--resume weights_only to start anew from its weights, or --overwrite_output_dir to start afresh"
    if different:
        raise Refused([f"{checkpoint} is of another run: {different}. Type what is there to go on with it, {way_out}"])
    raise Refused([f"{checkpoint}: {lacks}. Type {way_out}"])


def find_checkpoint(common, config, run):
    """(the checkpoint that is asked for or None, lines to say). Raises Refused where a named one is not whole."""
    asked, folder = config.resume_from_checkpoint, Path(config.output_dir)
    read_all = not common.check  # the run itself reads them all; a check before it looks at the sizes
    weights_only = common.resume == "weights_only"
    named = str(asked).lower() not in ("auto", "true")
    checkpoint, said = (None, []) if named and not weights_only else newest_whole(folder, read_all)
    if named:
        if checkpoint and weights_only and not differences(read_manifest(checkpoint)["run"], run):
            return checkpoint, said  # what has started from the named one goes on
        refuse_if(check_named(asked, read_all))
        return Path(asked), []
    if checkpoint is None and weights_only:
        checkpoint, further = newest_whole(folder / EARLIER, read_all)
        said += further
    if checkpoint is None and (folder / "metrics.jsonl").exists():
        said.append(f"no checkpoint in {folder} to go on from: starts from the beginning")
    return checkpoint, said


def check_named(checkpoint: str, hashes: bool) -> list[str]:
    """Problems of the files of a checkpoint that --resume_from_checkpoint names."""
    return [f"--resume_from_checkpoint {checkpoint}: {line}" for line in problems_of(checkpoint, hashes)]


def lacking(checkpoint, config):
    """Why a run cannot go on from a checkpoint of its own as if it had never stopped, or None."""
    if checkpoint.parent.name == EARLIER:
        return "its run was set aside when another began from its weights"
    if not any(checkpoint.glob("rng_state*")):
        return "it holds weights alone, as --save_only_model makes it"
    if config.sync_ref_model:
        return "the reference has moved with the policy (--sync_ref_model), and is not in it"
    return None


def misfits(checkpoint, common, there, here):
    """Problems of taking a checkpoint's weights for this run's: those in pieces, and an adapter of another shape."""
    if not any(checkpoint.glob("*.safetensors")):
        yield f"{checkpoint}: holds its weights in pieces, for its own engine. Type the same LAUNCH"
    if common.train_mode == "full":
        return
    shape = ("--lora_rank", "--lora_target_modules", "--use_dora")
    other = [line for line in differences(there, here) if line.split()[0] in shape]
    if there["--train_mode"] == "full":
        other = [f"--train_mode full there, {common.train_mode} here"]
    if other:
        yield (
            f"{checkpoint}: its weights do not fit: {'; '.join(other)}. Type what is there, or a new --output_dir "
            f"with --model_name_or_path {checkpoint}"
        )


def set_aside(folder, start):
    """Moves what an earlier run left out of the way of one that starts anew from its weights; returns the Start."""
    folder, earlier = Path(folder), Path(folder, EARLIER)
    if not start.weights_only or start.checkpoint.parent.resolve() != folder.resolve():
        return start
    if environment.is_main():
        if earlier.exists():  # of a start before this one: its checkpoints are not those of the run that ends now
            os.replace(earlier, folder / "before")
        earlier.mkdir()
        if (folder / "before").exists():
            os.replace(folder / "before", earlier / EARLIER)
        # the checkpoint that is started from comes last: a kill in between finds it where it was
        for path in [*folder.glob("*.json*"), *folder.glob("report.png"), *reversed(list_checkpoints(folder))]:
            os.replace(path, earlier / path.name)
    return replace(start, checkpoint=earlier / start.checkpoint.name)


def load_adapter(model, start):
    """Puts a checkpoint's adapter into the model that is to be trained, where only its weights are taken."""
    from peft import load_peft_weights, set_peft_model_state_dict

    if start.weights_only and hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_peft_weights(str(start.checkpoint), device="cpu"))
