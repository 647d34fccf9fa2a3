"""Library versions, and flags and models that an engine cannot train."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common_args import SharedArgs
from utils.runtime import environment

# (package, its oldest version that works, the feature that needs it)
OLDEST = (
    ("transformers", "5.0", "train_sampling_strategy and warm-up as a share"),
    ("trl", "1.0", "trl.experimental as it is imported here"),
)


def check_oldest_versions() -> Iterator[str]:
    """Problems of libraries that are too old."""
    from packaging.version import Version

    for name, oldest, used in OLDEST:
        found = importlib.metadata.version(name)
        if Version(found) < Version(oldest):
            yield f"{name} {found}: too old, has no {used}. Type pip install -r requirements.txt"


def check_launch(common: SharedArgs, config: Any) -> list[str]:
    """Problems of these flags with the requested engine and processes."""
    engine, processes, mode = environment.engine(), environment.processes_asked(), common.train_mode
    problems = []
    if not common.check and config.world_size != processes:
        connected = f"{processes} processes were requested, but {config.world_size} connected"
        problems.append(f"{connected}. Type the same NUM_PROCESSES on every node")
    for flag in ("deepspeed", "fsdp", "fsdp_config"):
        if getattr(config, flag):
            problems.append(f"--{flag}: the launch chooses the engine. Type LAUNCH=zero3 (or zero2, fsdp2, ...)")
    if engine in ("zero3", "fsdp2") and mode == "qlora" and common.use_dora:
        problems.append(
            f"--use_dora with qlora under {engine}: DoRA needs unsharded 4-bit weights. Type LAUNCH=zero2, or "
            "--train_mode lora"
        )
    path = str(common.model_name_or_path)
    if engine == "zero3" and mode == "full" and (Path(path) / "adapter_config.json").exists():
        problems.append(
            f"{path}: an adapter, which cannot be merged into a base that {engine} shards. "
            f"Type python -m utils.merge_lora {path} {path}-merged and train that model, or type LAUNCH=zero2"
        )
    if processes > 1 and config.precompute_ref_log_probs:
        problems.append(
            f"--precompute_ref_log_probs with {processes} processes: each would use its own cache. Remove it "
            "(LAUNCH=zero3 shards the reference), or type NUM_PROCESSES=1"
        )
    if common.max_bad_steps > 1 and engine.startswith("zero"):
        problems.append(
            f"--max_bad_steps {common.max_bad_steps} under {engine}: DeepSpeed cannot skip a step. Remove the flag, "
            "or type LAUNCH=multi_gpu"
        )
    if environment.offloads() and config.optim not in ("adamw_torch", "adamw_torch_fused"):
        problems.append(
            f"--optim {config.optim.value} with the optimizer offloaded: DeepSpeed's CPU optimizer is AdamW. "
            f"Remove --optim, or type LAUNCH={engine}"
        )
    return problems
