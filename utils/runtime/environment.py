"""The machine and the process: what hardware there is, which rank this is, and libraries that keep quiet."""

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

from utils.runtime import secrets

abandoned = []  # names of reward functions that did not return within --reward_timeout


def calm_libraries():
    """No ping at construction, no bars but ours, no warnings about what is pinned and tested here. Call it first."""
    for asked in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(asked, "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # what cannot be downloaded is said once, when the attempts are over
    for name in ("bitsandbytes", "accelerate", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported; a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # an answer without a judge's verdict is counted and said here; without a judge such an answer ends the run
    for name in ("grpo", "rloo"):
        logger = logging.getLogger(f"trl.trainer.{name}_trainer")
        logger.addFilter(lambda record: "reward functions returned None" not in record.getMessage())
    noisy = (
        "transformers",
        "torch.utils.data",
        "torch.utils.checkpoint",
        "torch.distributed.c10d_logger",
        "trl",
        "peft",
    )
    for module in noisy:
        warnings.filterwarnings("ignore", module=module.replace(".", r"\."))


def is_main():
    """Whether this process is the one that speaks and writes, of those that accelerate launched."""
    return int(os.environ.get("RANK", 0)) == 0


def has_the_word():
    """Whether this process says why it refuses. The main one does; another waits to be ended with it.

    Where the main one did not refuse the same, the first process of a node speaks after all.
    """
    if not is_main():
        time.sleep(30)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave(status: int):
    """Ends the process with this exit status, whatever a reward function that was given up still does."""
    if abandoned:  # Python itself would wait for the threads and pools of such a function
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def record_failure(error):
    """Leaves what went wrong, and exactly when, for utils/launch.py to say last."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"timestamp": str(int(time.time())), "exactly": time.time()}
        said = (
            str(error) if hasattr(error, "details") else f"{type(error).__name__}: {error}"
        )  # checks.Failed says all
        message = {"message": secrets.hide(said), "extraInfo": extra}
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def other_failed():
    """Whether another process of this node has left what went wrong: the launcher then ends all of them."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return bool(file) and any(Path(file).parent.parent.glob("*/error.json"))


def has_gpu():
    import torch

    return torch.cuda.is_available()


def has_bf16():
    import torch

    # a T4 or V100 emulates bfloat16, slowly
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx():
    """Whether this CPU multiplies bfloat16 in tiles, several times as fast as float32."""
    import torch

    return not torch.cuda.is_available() and torch.cpu._is_amx_tile_supported()


def engine():
    """What this process runs under, or is checked for: zero1, zero2, zero3, fsdp2, or "" (DDP, or one process)."""
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "zero" + os.environ.get(
            "ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"
        )  # unsaid in a DeepSpeed file of one's own
    return "fsdp2" if "FSDP_VERSION" in os.environ else ""


def offloads():
    """Whether DeepSpeed is to keep the optimizer in host memory."""
    return os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"


def local_device():
    """The torch device of this process, of those on its node."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu() else "cpu"


def wait_for_everyone():
    """Until every process is here, be it days: they share the work, and only then look at what came of it."""
    if world_size() > 1:
        import datetime

        from accelerate import PartialState

        cpu = {} if has_gpu() else {"cpu": True, "backend": "gloo"}
        PartialState(timeout=datetime.timedelta(days=7), **cpu).wait_for_everyone()


def world_size():
    """How many processes there are, on all nodes together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_asked():
    """How many processes utils/launch.py, or accelerate launch itself, was asked for, on all nodes together."""
    return int(os.environ.get("LAUNCH_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)


def is_launched_alone():
    """True in the one process of utils/launch.py, which nothing has checked before."""
    return os.environ.get("LAUNCH_PROCESSES") == "1"


def describe_launch() -> dict[str, str | int | None]:
    """What it takes to start such a run again; LAUNCH is None where utils/launch.py did not start it."""
    import torch

    nodes = int(os.environ.get("NNODES") or 1) if "LAUNCH_NAME" in os.environ else 1
    return {
        "LAUNCH": os.environ.get("LAUNCH_NAME"),
        "NUM_PROCESSES": processes_asked() // nodes,  # on each node
        "NNODES": nodes,
        "engine": engine() or ("ddp" if processes_asked() > 1 else "none"),
        "device": torch.cuda.get_device_name() if has_gpu() else "cpu",
    }


def check_world(accelerator):
    """Raises RuntimeError where not all the processes asked for train together, under the engine asked for."""
    wanted = {"zero": "DEEPSPEED", "fsdp": "FSDP"}.get(engine()[:4], "MULTI" if processes_asked() > 1 else "")
    seen, kind = accelerator.num_processes, accelerator.distributed_type.value
    if seen != processes_asked() or not kind.startswith(wanted):
        asked = f"{processes_asked()} processes ({engine() or 'DDP'})"
        raise RuntimeError(f"{asked} were asked for, but the trainer sees {seen} ({kind}): each would train alone")


def device_defaults():
    """TrainingArguments that follow from the machine, not from the method."""
    if has_gpu():
        return {}
    # checkpointing buys GPU memory with time; here there is memory enough
    defaults = {"use_cpu": True, "dataloader_pin_memory": False, "gradient_checkpointing": False}
    if "LOCAL_RANK" in os.environ:
        join_processes()
        defaults |= {"ddp_backend": "gloo", "accelerator_config": {"use_configured_state": True}}
    return defaults


def join_processes():
    """Joins the launched processes over gloo, under DeepSpeed and FSDP as well, which need a GPU as accelerate has it.

    It takes use_cpu for "no engine", and knows FSDP on accelerators only: left alone each process would train by
    itself and say nothing. Source: accelerate 1.15.0, state.py, PartialState and AcceleratorState.
    """
    from accelerate import DistributedType, PartialState

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it compiled
        state = PartialState(cpu=not engine(), backend="gloo")
    if engine() == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU


def fsdp_precision(dtype):
    """The Trainer's FSDP arguments for mixed precision: computed in `dtype`, reduced and handed out in float32.

    accelerate hands out logits in `dtype`: log-probabilities summed in bfloat16 come in steps of 4, and under KTO
    ranks disagree on a tensor's type. Source: accelerate 1.15.0, FullyShardedDataParallelPlugin.set_mixed_precision.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    precision = {"reduce_dtype": torch.float32, "output_dtype": torch.float32}
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), **precision)
    return {"fsdp_version": 2, "mixed_precision_policy": policy}


def peak_memory():
    """Bytes: the GPU's peak where there is one, otherwise the process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


GIB = 1024**3


def is_out_of_memory(error):
    import torch

    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in said
