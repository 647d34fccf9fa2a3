"""Out of memory: one line that says what filled the memory and what helps, or a restart with smaller passes."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import recipes
from utils.cli.run import Run
from utils.runtime import environment
from utils.runtime.environment import GIB
from utils.runtime.errors import Again, Failed

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

# Names a file in which one of several processes leaves the flags that utils/launch.py is to restart with.
HANDOVER = "LAUNCH_AGAIN"


def run_out(trainer: "Trainer", run: Run, error: Exception) -> Again | Failed:
    """The exception to raise for an out-of-memory error: Again if --auto_batch can halve the pass, else Failed."""
    words = halve(run)
    restarts = trainer.args.world_size == 1 or HANDOVER in os.environ
    if not run.common.auto_batch or not words or not restarts:
        said = describe_out_of_memory(trainer, run)
        return Failed(said, f"{said}\n\n{error}")
    if trainer.in_pass and trainer.args.world_size == 1 and trainer.state.global_step:
        import gc

        import torch

        trainer.model.zero_grad(set_to_none=True)
        trainer._tr_loss = trainer.loss_before[1]  # without the passes that will be repeated
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trainer._save_checkpoint(trainer.model_wrapped, None)  # weights and optimizer are those of the last step
        trainer.finish_hashing()
    rows = trainer.args.per_device_train_batch_size
    return Again(words, f"out of memory in step {trainer.state.global_step + 1} with {rows} rows a pass")


def halve(run: Run) -> list[str]:
    """Flags for half the rows a pass and twice the passes: the same rows a step. [] if a pass cannot be halved."""
    args = run.config
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch % 2 or batch // 2 < run.method.min_batch_size:
        return []
    words = ["--per_device_train_batch_size", str(batch // 2), "--gradient_accumulation_steps", str(2 * passes)]
    slices = args.steps_per_generation
    return words + (["--steps_per_generation", str(2 * slices)] if slices is not None else [])


def describe_out_of_memory(trainer: "Trainer", run: Run) -> str:
    step, rows = trainer.state.global_step + 1, trainer.args.per_device_train_batch_size
    where = "in" if trainer.in_pass else "outside"
    helps = "; ".join(smaller_flags(run))
    said = f"out of memory in step {step}, {where} the forward and backward pass ({rows} rows a pass)"
    return f"{said}: {describe_owners(trainer)}. To use less, type one of these, the cheapest first: {helps}"


def describe_owners(trainer: "Trainer") -> str:
    """The peak, with the bytes of weights, gradients and optimizer; the passes took the rest."""
    import torch

    model, optimizer = trainer.model, trainer.optimizer
    states = optimizer.state.values() if optimizer and hasattr(optimizer, "state") else ()
    parts = {
        "weights": bytes_of(model.parameters()),
        "optimizer": bytes_of(t for state in states for t in state.values() if isinstance(t, torch.Tensor)),
        "gradients": bytes_of(p.grad for p in model.parameters() if p.grad is not None),
    }
    peak = environment.peak_memory()
    parts["activations and the rest"] = max(peak - sum(parts.values()), 0)
    owners = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    device = f" of {torch.cuda.get_device_properties(0).total_memory / GIB:.1f}" if torch.cuda.is_available() else ""
    return f"peak {peak / GIB:.1f}{device} GiB ({owners})"


def bytes_of(tensors: "Iterable[torch.Tensor]") -> int:
    """Bytes of the storages behind tensors, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def smaller_flags(run: Run) -> Iterator[str]:
    """Flags under which the run needs less memory, the cheapest first."""
    args, mode = run.config, run.common.train_mode
    if words := halve(run):
        yield f"{' '.join(words)} (the same step; --auto_batch does this by itself)"
    if not args.gradient_checkpointing:
        yield "--gradient_checkpointing True"
    flag = "max_completion_length" if args.max_completion_length else "max_length"
    if limit := getattr(args, flag):
        yield f"--{flag} {limit // 2}"
    if mode != "qlora":
        yield f"--train_mode {'lora' if mode == 'full' else 'qlora'}"
    yield "LAUNCH=zero3 on more GPUs, or LAUNCH=zero3_offload"


def start_again(argv: list[str], words: list[str]) -> int:
    """Restarts the script in place of this process; with several processes, leaves that to utils/launch.py."""
    if environment.world_size() > 1:
        if file := os.environ.get(HANDOVER):
            Path(file).write_text("\n".join(words), encoding="utf-8")
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, sys.argv[0], *add_words(argv, words)])


def add_words(argv: list[str], words: list[str]) -> list[str]:
    """The command line of the restart: it resumes, and does not delete the output folder."""
    gone = {"overwrite_output_dir"}
    if "--steps_per_generation" in words:
        gone |= {"generation_batch_size", "num_mini_batches"}  # other ways to set the same
    kept = recipes.drop_flags(recipes.expand(argv), gone)  # with the flags of a recipe
    return [*kept, *words, "--resume_from_checkpoint", "auto"]
