"""The range of a number flag, stated once: --help shows it, and values outside are refused.

Our own flags state it in their field (rlhf_args/flag.py), as "at least 0 and below 1", "above 0, like 1e-5" or
"finite"; UPSTREAM has the ranges of TRL's and transformers' flags. nan and infinity are outside every range.
"""

import copy
import math
import operator
import re
from dataclasses import Field, fields
from types import MappingProxyType

BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}

# Ranges of TRL's and transformers' flags. A field of ours with the same name may state another one.
UPSTREAM = {
    "per_device_train_batch_size": "at least 1",
    "per_device_eval_batch_size": "at least 1",
    "gradient_accumulation_steps": "at least 1",
    "learning_rate": "above 0, like 1e-5",
    "weight_decay": "at least 0",
    "max_grad_norm": "at least 0",
    "num_train_epochs": "above 0, like 1",
    "max_length": "at least 2, like 1024",  # a prompt and an answer
    "max_completion_length": "at least 1, like 256",
    "beta": "at least 0",
    "cpo_alpha": "at least 0",
    "desirable_weight": "at least 0",
    "undesirable_weight": "at least 0",
    "center_rewards_coefficient": "at least 0, like 0.01",
    # the sampling of answers
    "num_generations": "at least 2",  # an advantage is the difference from the other answers
    "temperature": "above 0",
    "top_p": "above 0 and at most 1",
    "top_k": "at least 0",
    "min_p": "at least 0 and at most 1",
    "repetition_penalty": "above 0",
    "vllm_gpu_memory_utilization": "above 0 and at most 1",
    # rollouts, and learning from them
    "num_iterations": "at least 1",
    "steps_per_generation": "at least 1",
    "generation_batch_size": "at least 1",
    "epsilon": "at least 0",
    "epsilon_high": "at least 0",
    "reward_weights": "finite, like 1",
}


def find_range(field: Field) -> str | None:
    return field.metadata.get("range") or UPSTREAM.get(field.name)


def is_within(range: str, value: float) -> bool:
    bounds = re.findall(rf"({'|'.join(BOUNDS)}) ([^\s,]+)", range)
    return math.isfinite(value) and all(BOUNDS[word](value, float(bound)) for word, bound in bounds)


def check_ranges(kind: type, values: object) -> list[str]:
    """Problems of the flags of the dataclass `kind`: its ranges against the attributes of `values`."""
    problems = []
    for field in fields(kind):
        given = getattr(values, field.name)
        numbers = given if isinstance(given, list) else [given]
        range, _, like = (find_range(field) or "").partition(", like ")
        if range and not all(is_within(range, number) for number in numbers if number is not None):
            shown = " ".join(repr(number).removesuffix(".0") for number in numbers)
            like = like or (f"{field.default:g}" if field.default is not None else range.split()[2])
            problems.append(f"--{field.name} {shown}: must be {range}. Type --{field.name} {like}")
    return problems


def explain_range(field: Field) -> Field:
    """The field as argparse takes it: its range is part of its help."""
    explained, metadata = copy.copy(field), dict(field.metadata)
    if range := find_range(field):
        metadata |= {"help": f"{metadata['help'].rstrip('. ')}. {range[0].upper()}{range[1:]}."}
    explained.metadata = MappingProxyType({key: value for key, value in metadata.items() if key != "range"})
    return explained
