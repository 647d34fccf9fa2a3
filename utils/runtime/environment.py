"""The machine and the process: hardware, ranks and launch, and quiet libraries."""

import contextlib
import io
import json
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from utils.runtime import secrets
from utils.runtime.errors import Again, Failed

if TYPE_CHECKING:
    from accelerate import Accelerator

abandoned: list[str] = []  # names of reward functions that did not return within --reward_timeout


def calm_libraries() -> None:
    """Turns off telemetry, progress bars and warnings of the libraries, whose versions are pinned. Call it first."""
    on = (
        "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS", "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRL_EXPERIMENTAL_SILENCE",
    )  # fmt: skip
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in (dict.fromkeys(on, "1") | quiet).items():
        os.environ.setdefault(name, value)
    # a failed download is reported once, after the last attempt
    for name in ("bitsandbytes", "accelerate", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported; a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # an answer without a reward is counted (judge) or ends the run (reward function)
    for name in ("grpo", "rloo"):
        logger = logging.getLogger(f"trl.trainer.{name}_trainer")
        logger.addFilter(lambda record: "reward functions returned None" not in record.getMessage())
    of_torch = ("torch.utils.data", "torch.utils.checkpoint", "torch.distributed.c10d_logger")
    for module in ("transformers", "trl", "peft", *of_torch):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\."))


def is_main() -> bool:
    """True in rank 0, the process that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def has_the_word() -> bool:
    """True if this process should print the refusal. Rank 0 prints; the others wait to be terminated.

    If rank 0 did not refuse, the first process of each node prints after the wait.
    """
    if not is_main():
        time.sleep(30)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave(status: int) -> None:
    """Exits with this status, also while an abandoned reward function still runs."""
    if abandoned:  # sys.exit would wait for its threads and pools
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def record_failure(error: BaseException) -> None:
    """Writes the error and its exact time to a file, from which utils/launch.py prints it last."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"timestamp": str(int(time.time())), "exactly": time.time()}
        said = str(error) if isinstance(error, Failed | Again) else f"{type(error).__name__}: {error}"
        message = {"message": secrets.hide(said), "extraInfo": extra}
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def other_failed() -> bool:
    """True if another process of this node recorded a failure: the launcher then terminates all of them."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return file is not None and any(Path(file).parent.parent.glob("*/error.json"))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_bf16() -> bool:
    import torch

    # a T4 or V100 emulates bfloat16, slowly
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx() -> bool:
    """True if this CPU has AMX: bfloat16 matrix products are several times as fast as float32."""
    import torch

    return not torch.cuda.is_available() and torch.cpu._is_amx_tile_supported()


def engine() -> str:
    """The engine of this launch: zero1, zero2, zero3, fsdp2, or "" (DDP, or one process)."""
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "zero" + os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")  # unset with a user's DeepSpeed file
    return "fsdp2" if "FSDP_VERSION" in os.environ else ""


def offloads() -> bool:
    """True if DeepSpeed keeps the optimizer state in host memory."""
    return os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"


def local_device() -> str:
    """The torch device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu() else "cpu"


def wait_for_everyone() -> None:
    """Barrier with a time-out of 7 days: ranks that share work may finish hours apart."""
    if world_size() > 1:
        import datetime

        from accelerate import PartialState

        cpu = {} if has_gpu() else {"cpu": True, "backend": "gloo"}
        PartialState(timeout=datetime.timedelta(days=7), **cpu).wait_for_everyone()


def world_size() -> int:
    """Number of processes on all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_asked() -> int:
    """Number of processes on all nodes that utils/launch.py or accelerate launch was asked for."""
    return int(os.environ.get("LAUNCH_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)


def is_launched_alone() -> bool:
    """True in the single process of utils/launch.py, which no separate check precedes."""
    return os.environ.get("LAUNCH_PROCESSES") == "1"


def describe_launch() -> dict[str, str | int | None]:
    """The settings to repeat this launch; LAUNCH is None if utils/launch.py did not start it."""
    import torch

    nodes = int(os.environ.get("NNODES") or 1) if "LAUNCH_NAME" in os.environ else 1
    return {
        "LAUNCH": os.environ.get("LAUNCH_NAME"),
        "NUM_PROCESSES": processes_asked() // nodes,  # on each node
        "NNODES": nodes,
        "engine": engine() or ("ddp" if processes_asked() > 1 else "none"),
        "device": torch.cuda.get_device_name() if has_gpu() else "cpu",
    }


def check_world(accelerator: "Accelerator") -> None:
    """Raises RuntimeError if the processes do not all train together under the requested engine."""
    wanted = {"zero": "DEEPSPEED", "fsdp": "FSDP"}.get(engine()[:4], "MULTI" if processes_asked() > 1 else "")
    seen, kind = accelerator.num_processes, accelerator.distributed_type.value
    if seen != processes_asked() or not kind.startswith(wanted):
        asked = f"{processes_asked()} processes ({engine() or 'DDP'})"
        raise RuntimeError(f"{asked} were requested, but the trainer sees {seen} ({kind}): each would train alone")


def device_defaults() -> dict[str, object]:
    """TrainingArguments that depend on the machine, not on the method."""
    if has_gpu():
        return {}
    # gradient checkpointing saves GPU memory at the cost of time; host memory suffices
    defaults: dict[str, object] = {"use_cpu": True, "dataloader_pin_memory": False, "gradient_checkpointing": False}
    if "LOCAL_RANK" in os.environ:
        join_processes()
        defaults |= {"ddp_backend": "gloo", "accelerator_config": {"use_configured_state": True}}
    return defaults


def join_processes() -> None:
    """Joins the launched processes over gloo on a CPU, also under DeepSpeed and FSDP.

    accelerate ignores the engine with use_cpu, and supports FSDP on accelerators only: without this each process
    would silently train alone. Source: accelerate 1.15.0, state.py, PartialState and AcceleratorState.
    """
    from accelerate import DistributedType, PartialState

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its compilation
        state = PartialState(cpu=not engine(), backend="gloo")
    if engine() == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU


def fsdp_precision(dtype: str) -> dict[str, object]:
    """The Trainer's FSDP arguments for mixed precision: computation in `dtype`, reduction and outputs in float32.

    By default accelerate returns logits in `dtype`: log-probabilities summed in bfloat16 are multiples of 4, and with
    KTO ranks disagree on a tensor's type.
    Source: accelerate 1.15.0, FullyShardedDataParallelPlugin.set_mixed_precision.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    precision = {"reduce_dtype": torch.float32, "output_dtype": torch.float32}
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), **precision)
    return {"fsdp_version": 2, "mixed_precision_policy": policy}


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU, or of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


GIB = 1024**3


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in said
