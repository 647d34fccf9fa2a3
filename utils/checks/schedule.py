"""Steps, learning rate, checkpoints and disk space."""

import math
import shutil
from pathlib import Path

from utils.models.folders import count_trained, gigabytes
from utils.runtime import environment
from utils.runtime.errors import Refused

USUAL = "AdamW usually takes 1e-6 to 5e-5 for full weights and 1e-5 to 5e-4 for adapters"
HIGHEST = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}  # learning rates; above them AdamW hardly learns


def count_steps(config, method, rows):
    """Optimizer steps of the run; None where the rows do not tell (sampled answers, packing)."""
    if config.max_steps > 0:
        return config.max_steps
    if method.sample_reward or config.packing:
        return None
    passes = rows / count_batch(config)
    passes = math.floor(passes) if config.dataloader_drop_last else math.ceil(passes)
    return math.ceil(math.ceil(passes / max(config.gradient_accumulation_steps, 1)) * config.num_train_epochs)


def count_batch(config):
    """Rows that all processes take at once; 1 of a batch of 0, which is refused elsewhere."""
    return max(config.per_device_train_batch_size, 1) * environment.processes_asked()


def check_schedule(run):
    """Warnings of a learning rate, warm-up or batch that hardly trains. Raises Refused where nothing would."""
    common, config, method, rows = run.common, run.config, run.method, len(run.train.rows)
    steps, a_pass = count_steps(config, method, rows), count_batch(config)
    a_step = a_pass * config.gradient_accumulation_steps
    if config.dataloader_drop_last and rows < a_pass and not method.sample_reward:
        raise Refused(
            [
                f"--dataloader_drop_last: {rows} rows do not fill one batch of {a_pass}, and would all be dropped. "
                "Leave it out, or type --per_device_train_batch_size smaller"
            ]
        )
    highest = HIGHEST[common.train_mode]
    if "adam" in str(getattr(config.optim, "value", config.optim)) and config.learning_rate > highest:
        yield f"--learning_rate {config.learning_rate:g} is above {highest:g}. {USUAL}"
    warm_up = config.get_warmup_steps(steps) if steps else 0
    if steps and warm_up >= steps:
        yield (
            f"--warmup_steps {config.warmup_steps:g}: all {steps} steps would warm up, and the learning rate never be "
            f"reached. Type --warmup_steps {steps // 10}"
        )
    if not method.sample_reward and not config.packing and a_step > rows:
        yield (
            f"a step takes {a_step} rows and there are {rows}: each pass over the data is one step. Type "
            "--gradient_accumulation_steps or --per_device_train_batch_size smaller"
        )


def check_disk(run):
    """(("disk", what the run will take), warnings). Raises Refused where not even one checkpoint fits."""
    common, config = run.common, run.config
    trained = count_trained(common)
    if not trained:
        return ("disk", ""), []
    small = sum(file.stat().st_size for file in Path(common.model_name_or_path).glob("*.json"))
    # as models.load_policy holds them; DeepSpeed saves those of --dtype and its own float32 copy
    sharded = environment.engine().startswith("zero") and common.train_mode == "full"
    weights = trained * (2 if sharded and common.dtype != "float32" else 4) + small
    optim = str(getattr(config.optim, "value", config.optim))
    moments = 8 if "adamw" in optim and "8bit" not in optim else 0
    state = 0 if config.save_only_model else trained * (moments + 4 * sharded)
    one, kept = weights + state, count_checkpoints(config, run.method, len(run.train.rows))
    needed = one * kept + weights
    above = next(
        parent
        for parent in (Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents)
        if parent.exists()
    )
    free = shutil.disk_usage(above).free
    text = (
        f"{kept} checkpoint{'s' * (kept != 1)} of {gigabytes(one)} ({trained / 1e6:.1f}M trained numbers) and "
        f"{gigabytes(weights)} at the end, about; {gigabytes(free)} free"
    )
    fewer = (
        "Free some, name another --output_dir, or type --save_total_limit 1, --save_only_model or --save_strategy no"
    )
    if (one if kept else weights) > free:
        raise Refused([f"--output_dir {config.output_dir}: has no room for one checkpoint: {text}. {fewer}"])
    return ("disk", text), [f"the disk would run full: {text}. {fewer}"] if needed > free else []


def count_checkpoints(config, method, rows):
    """The most checkpoints that are on the disk at once; a new one is written before the oldest is deleted."""
    strategy, steps = config.save_strategy.value, count_steps(config, method, rows)
    if strategy == "no":
        return 0
    limit = config.save_total_limit + 1 if config.save_total_limit else math.inf
    if strategy == "steps" and steps:
        every = config.save_steps if config.save_steps >= 1 else max(1, math.ceil(steps * config.save_steps))
        return min(limit, math.ceil(steps / every))
    return min(limit, math.ceil(config.num_train_epochs)) if strategy == "epoch" else min(limit, 1)
