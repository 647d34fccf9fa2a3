"""Memory that ran out: one line with what filled it and what would help, and a new start in smaller passes."""

import os
import sys
from pathlib import Path

from utils.cli import recipes
from utils.runtime import environment
from utils.runtime.environment import GIB
from utils.runtime.errors import Again, Failed

# Names a file: there a process of several leaves what utils/launch.py is to start again with.
HANDOVER = "LAUNCH_AGAIN"


def run_out(trainer, run, error):
    """What to raise in place of an out-of-memory error: Again where --auto_batch can halve, else Failed."""
    words = halve(run)
    restarts = trainer.args.world_size == 1 or HANDOVER in os.environ
    if not run.common.auto_batch or not words or not restarts:
        said = explain(trainer, run)
        return Failed(said, f"{said}\n\n{error}")
    if trainer.in_pass and trainer.args.world_size == 1 and trainer.state.global_step:
        import gc

        import torch

        trainer.model.zero_grad(set_to_none=True)
        trainer._tr_loss = trainer.loss_before[1]  # without the passes that will be made again
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trainer._save_checkpoint(trainer.model_wrapped, None)  # weights and optimizer are those of the last step
        trainer.finish_hashing()
    rows = trainer.args.per_device_train_batch_size
    return Again(words, f"out of memory in step {trainer.state.global_step + 1} with {rows} rows a pass")


def halve(run):
    """Flags for half the rows a pass and twice the passes: the same rows a step. [] where a pass cannot be halved."""
    args = run.config
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch % 2 or batch // 2 < run.method.min_batch_size:
        return []
    words = ["--per_device_train_batch_size", str(batch // 2), "--gradient_accumulation_steps", str(2 * passes)]
    slices = args.steps_per_generation
    return words + (["--steps_per_generation", str(2 * slices)] if slices is not None else [])


def explain(trainer, run):
    args, step = trainer.args, trainer.state.global_step + 1
    where = "in forward or backward" if trainer.in_pass else "outside of forward and backward"
    said = f"out of memory in step {step}, {where} ({args.per_device_train_batch_size} rows a pass)"
    helps = "; ".join(ways_out(run))
    return f"{said}: {say_owners(trainer)}. Would help, the cheapest first: {helps}"


def say_owners(trainer):
    """What of the peak belongs to whom: weights, gradients and optimizer as counted, the rest is the passes'."""
    import torch

    from utils.runtime.environment import peak_memory

    model, optimizer = trainer.model, getattr(trainer, "optimizer", None)
    parts = {"weights": count(model.parameters())}
    states = optimizer.state.values() if hasattr(optimizer, "state") else ()
    parts["optimizer"] = count(t for state in states for t in state.values() if isinstance(t, torch.Tensor))
    parts["gradients"] = count(p.grad for p in model.parameters() if p.grad is not None)
    peak = peak_memory()
    parts["activations and the rest"] = max(peak - sum(parts.values()), 0)
    owners = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    device = f" of {torch.cuda.get_device_properties(0).total_memory / GIB:.1f}" if torch.cuda.is_available() else ""
    return f"peak {peak / GIB:.1f}{device} GiB ({owners})"


def count(tensors):
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def ways_out(run):
    args, train_mode = run.config, run.common.train_mode
    if words := halve(run):
        yield f"{' '.join(words)} (the same step; --auto_batch does it by itself)"
    if not args.gradient_checkpointing:
        yield "--gradient_checkpointing True"
    for flag in ("max_completion_length", "max_length"):
        if getattr(args, flag):
            yield f"--{flag} {getattr(args, flag) // 2}"
            break
    if train_mode == "full":
        yield "--train_mode lora"
    elif train_mode == "lora":
        yield "--train_mode qlora"
    yield "LAUNCH=zero3 on more GPUs, or LAUNCH=zero3_offload"


def start_again(argv, words):
    """Starts the script anew in place of this process; of several processes, leaves that to utils/launch.py."""
    if environment.world_size() > 1:
        if file := os.environ.get(HANDOVER):
            Path(file).write_text("\n".join(words), encoding="utf-8")
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, sys.argv[0], *add_words(argv, words)])


def add_words(argv, words):
    """The command line of the new start: it must not delete what there is, and goes on from it."""
    gone = {"overwrite_output_dir"}
    if "--steps_per_generation" in words:
        gone |= {"generation_batch_size", "num_mini_batches"}  # other words for the same
    kept, dropping = [], False
    for word in recipes.expand(argv):  # with what a recipe says
        if word.startswith("--"):
            dropping = word[2:].replace("-", "_") in gone
        kept += [] if dropping else [word]
    return [*kept, *words, "--resume_from_checkpoint", "auto"]
