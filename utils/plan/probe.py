"""--probe: measures two steps of the longest rows, extrapolates to the whole run, and leaves no files."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from utils.checks import schedule
from utils.cli.run import Run
from utils.data import prepare
from utils.runtime import environment, output
from utils.runtime.environment import GIB, peak_memory
from utils.runtime.errors import Failed, Refused
from utils.survival import memory

if TYPE_CHECKING:
    from transformers import Trainer


@dataclasses.dataclass
class Whole:
    """The full run that a probe extrapolates to. folder: the probe writes there; deleted after it."""

    steps: int
    tokens: float  # of a probed row
    share: float | None  # tokens of an average row / of a probed row; None if answers are sampled
    folder: tempfile.TemporaryDirectory


def prepare_probe(run: Run) -> Whole | None:
    """Cuts a run with --probe to two steps of the longest rows, and returns its Whole; None without --probe.

    If the policy samples the answers: two rollouts with all their steps, and answers of the full length.
    """
    config, method, train = run.config, run.method, run.train
    if not run.common.probe or run.problems or train is None:
        return None
    tokens, a_pass = [sum(row) for row in train.sizes], schedule.count_batch(config)
    longest = sorted(range(len(tokens)), key=tokens.__getitem__)[-a_pass:]
    probed, share = sum(tokens[at] for at in longest) / len(longest), None
    a_step, lmbda = a_pass * config.gradient_accumulation_steps, config.lmbda
    cycle, needed = 1, 2 * a_step  # steps of one period, rows of two periods
    if method.sample_reward:
        answers, size = config.num_generations, config.rollout_size()
        steps = config.num_train_epochs * (len(tokens) * answers // size) * size * config.num_iterations / a_step
        cycle, needed = math.ceil(size * config.num_iterations / a_step), 2 * size // answers
        probed += config.max_completion_length
    elif config.packing:
        steps = config.num_train_epochs * sum(tokens) / config.max_length / a_step
        needed = math.ceil(needed * config.max_length / probed) + 1
        probed = config.max_length
    elif config.seq_kd:
        raise Refused(["--probe with --seq_kd: no answers of the teacher yet. Type --lmbda 0 and data with answers"])
    else:
        steps, share = schedule.count_steps(config, method, len(tokens)), sum(tokens) / len(tokens) / probed
        if lmbda:
            mixed = lmbda < 1
            cycle, share = math.ceil(1 / min(lmbda, 1 - lmbda)) if mixed else 1, None
            probed += 0 if mixed else config.max_completion_length
            needed *= cycle
    if config.samples_answers():
        least = "min_tokens" if config.use_vllm else "min_new_tokens"
        config.generation_kwargs = (config.generation_kwargs or {}) | {least: config.max_completion_length}
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps)
    whole = Whole(steps, probed, share, tempfile.TemporaryDirectory(prefix="probe-"))
    config.output_dir, config.max_steps = whole.folder.name, 2 * cycle
    config.save_strategy, config.load_best_model_at_end = SaveStrategy.NO, False
    config.eval_strategy, config.eval_on_start = "no", False
    config.report_to, config.resume_from_checkpoint = [], None
    chosen = [longest[number % len(longest)] for number in range(needed)]
    run.train = dataclasses.replace(train, rows=[train.rows[at] for at in chosen], sizes=[])
    run.held_out = prepare.Prepared()
    return whole


def run_probe(trainer: Trainer, run: Run, whole: Whole) -> int:
    """Trains, prints the time and memory of the second half, and returns 0. Raises Failed if memory runs out."""
    clock, args = Clock(), trainer.args
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    try:
        trainer.train()
    except Exception as error:
        if not environment.is_out_of_memory(error):
            raise
        raise Failed(memory.describe_out_of_memory(trainer, run)) from error
    seconds = clock.seconds()
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = rows * whole.tokens
    output.say(
        f"probe     a step of {rows} rows of {whole.tokens:.0f} tokens, the longest: {seconds:.3g} s, "
        f"{tokens / seconds:,.0f} tokens a second; peak {describe_peak(trainer)}"
    )
    about = (
        f"; about {say_time(whole.steps * seconds * whole.share)} with rows of average length" if whole.share else ""
    )
    output.say(
        f"probe     {whole.steps} steps: {say_time(whole.steps * seconds)} if every row were the longest{about}. "
        "Not included: evaluation, saving, and the work before the first step"
    )
    return 0


class Clock(TrainerCallback):
    """Notes the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *call: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    on_train_begin = on_step_end

    def seconds(self) -> float:
        """Seconds a step in the second half, when kernels are compiled and the optimizer has its state."""
        half = len(self.ends) // 2
        return (self.ends[-1] - self.ends[half]) / (len(self.ends) - 1 - half)


def describe_peak(trainer: Trainer) -> str:
    """The largest peak of all processes: GPU memory, or on a CPU the memory of the process."""
    peaks = trainer.accelerator.gather(torch.tensor([peak_memory()], device=trainer.args.device, dtype=torch.int64))
    there = f" of {torch.cuda.get_device_properties(0).total_memory / GIB:.1f}" if torch.cuda.is_available() else ""
    return f"{peaks.max().item() / GIB:.1f}{there} GiB a {'GPU' if there else 'process'}"


def say_time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
