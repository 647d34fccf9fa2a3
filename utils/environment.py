"""The machine and the process: what hardware there is, which rank this is, and libraries that keep quiet."""

import logging
import os
import warnings


def calm_libraries():
    """No ping at construction, no bars but ours, no warnings about what is pinned and tested here. Call it first."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported; a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for module in ("transformers", "torch.utils.data", "trl", "peft", "torch.utils.checkpoint"):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\."))


def is_main():
    """Whether this process is the one that speaks and writes, of those that accelerate launched."""
    return int(os.environ.get("RANK", 0)) == 0


def has_gpu():
    import torch

    return torch.cuda.is_available()


def has_bf16():
    import torch

    # a T4 or V100 emulates bfloat16, slowly
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device_defaults():
    """TrainingArguments that follow from the machine, not from the method."""
    return {} if has_gpu() else {"use_cpu": True, "dataloader_pin_memory": False}
