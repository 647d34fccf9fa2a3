"""Steps, learning rate, checkpoints and disk space."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_args.methods import Method
from utils.cli.run import Run
from utils.models.folders import count_trained, gigabytes
from utils.runtime import environment
from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from transformers import TrainingArguments

USUAL = "AdamW usually takes 1e-6 to 5e-5 for full weights and 1e-5 to 5e-4 for adapters"
HIGHEST = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}  # learning rates above which AdamW usually diverges


def count_steps(config: TrainingArguments, method: Method, rows: int) -> int | None:
    """Optimizer steps of the run; None if the rows do not determine them (sampled answers, packing)."""
    if config.max_steps > 0:
        return config.max_steps
    if method.sample_reward or config.packing:
        return None
    passes = rows / count_batch(config)
    passes = math.floor(passes) if config.dataloader_drop_last else math.ceil(passes)
    return math.ceil(math.ceil(passes / max(config.gradient_accumulation_steps, 1)) * config.num_train_epochs)


def count_batch(config: TrainingArguments) -> int:
    """Rows of one pass over all processes. A batch of 0 counts as 1: flags.check_config refuses it."""
    return max(config.per_device_train_batch_size, 1) * environment.processes_asked()


def check_schedule(run: Run) -> Iterator[str]:
    """Warn of unusual learning rates, warm-ups and batch sizes. Raises Refused if the run would have no step."""
    common, config, method, rows = run.common, run.config, run.method, len(run.train.rows)
    steps, a_pass = count_steps(config, method, rows), count_batch(config)
    a_step = a_pass * config.gradient_accumulation_steps
    if config.dataloader_drop_last and rows < a_pass and not method.sample_reward:
        raise Refused(
            f"--dataloader_drop_last: would drop all {rows} rows, which do not fill a batch of {a_pass}. "
            "Remove it, or lower --per_device_train_batch_size"
        )
    highest = HIGHEST[common.train_mode]
    if "adam" in str(getattr(config.optim, "value", config.optim)) and config.learning_rate > highest:
        yield f"--learning_rate {config.learning_rate:g} is above {highest:g}. {USUAL}"
    warm_up = config.get_warmup_steps(steps) if steps else 0
    if steps and warm_up >= steps:
        way_out = f"Type --warmup_steps {steps // 10}"
        yield f"--warmup_steps {config.warmup_steps:g}: all {steps} steps would be warm-up. {way_out}"
    if not method.sample_reward and not config.packing and a_step > rows:
        way_out = "Lower --gradient_accumulation_steps or --per_device_train_batch_size"
        yield f"a step takes {a_step} rows, but the data have {rows}: an epoch is one step. {way_out}"


def check_disk(run: Run) -> tuple[tuple[str, str], list[str]]:
    """(("disk", space needed and free), warnings). Raises Refused if not even one checkpoint fits."""
    common, config = run.common, run.config
    trained = count_trained(common)
    if not trained:
        return ("disk", ""), []
    folder = str(common.model_name_or_path)
    small = sum(file.stat().st_size for file in Path(folder).glob("*.json"))
    # dtypes as in load.load_policy; DeepSpeed saves weights in --dtype and its own float32 copy
    sharded = environment.engine().startswith("zero") and common.train_mode == "full"
    weights = trained * (2 if sharded and common.dtype != "float32" else 4) + small
    optim = str(getattr(config.optim, "value", config.optim))
    moments = 8 if "adamw" in optim and "8bit" not in optim else 0
    state = 0 if config.save_only_model else trained * (moments + 4 * sharded)
    one, kept = weights + state, count_checkpoints(config, run.method, len(run.train.rows))
    needed = one * kept + weights
    output = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(above for above in (output, *output.parents) if above.exists())).free
    text = (
        f"{kept} checkpoint{'s' * (kept != 1)} of {gigabytes(one)} ({trained / 1e6:.1f}M trained parameters) and "
        f"{gigabytes(weights)} for the result (estimate); {gigabytes(free)} free"
    )
    fewer = "Free space, or type another --output_dir, --save_total_limit 1, --save_only_model or --save_strategy no"
    if (one if kept else weights) > free:
        raise Refused(f"--output_dir {config.output_dir}: too little space for one checkpoint: {text}. {fewer}")
    return ("disk", text), [f"the disk would fill up: {text}. {fewer}"] if needed > free else []


def count_checkpoints(config: TrainingArguments, method: Method, rows: int) -> float:
    """The highest number of checkpoints on disk: a new one is written before the oldest is deleted."""
    strategy, steps = config.save_strategy.value, count_steps(config, method, rows)
    if strategy == "no":
        return 0
    limit = config.save_total_limit + 1 if config.save_total_limit else math.inf
    if strategy == "steps" and steps:
        every = config.save_steps if config.save_steps >= 1 else max(1, math.ceil(steps * config.save_steps))
        return min(limit, math.ceil(steps / every))
    return min(limit, math.ceil(config.num_train_epochs)) if strategy == "epoch" else min(limit, 1)
