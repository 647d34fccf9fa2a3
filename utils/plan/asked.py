"""The questions that a plan answers: which launch, which GPU, which models."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common_args import SharedArgs
from rlhf_args.methods import ANSWERED
from utils.cli.run import Run
from utils.models import shapes, teacher
from utils.models.folders import ModelFolder
from utils.models.load import make_lora, needs_reference
from utils.plan.engines import ENGINES
from utils.rewards import models
from utils.runtime import output
from utils.runtime.environment import GIB
from utils.runtime.errors import Refused, refuse_if

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig

VISIBLE = 0.985  # of the memory that a GPU is sold with: a 40 GB A100 has 39.4 GiB
Frozen = tuple[str, "PretrainedConfig", bool]  # a frozen model: the trainer's keyword, its config, True if in 4 bits


def read_launch(shared: SharedArgs, env: Mapping[str, str]) -> tuple[str, int]:
    """(engine, processes on all nodes) from --plan, --num_processes and the variables of a launch. Raises Refused."""
    import torch

    launch, nodes = env.get("LAUNCH") or "auto", env.get("NNODES") or 1
    here = env.get("NUM_PROCESSES") or (launch not in ("cpu", "single_gpu") and torch.cuda.device_count()) or 1
    given = {"--num_processes ": shared.num_processes, "NUM_PROCESSES=": here, "NNODES=": nodes}
    said = {name: str(value) for name, value in given.items() if value is not None}
    wrong = [f"{name}{value}" for name, value in said.items() if not value.isdecimal() or value == "0"]
    refuse_if([f"{text}: must be at least 1, a whole number" for text in wrong])
    processes = shared.num_processes or int(here) * int(nodes)
    engine = launch if shared.plan in (None, "launched", "all") else shared.plan
    engine = "single_gpu" if engine in ("auto", "cpu") else engine
    if engine not in ENGINES:
        raise Refused([f"--plan {engine}: no such launch. Type one of: all, {', '.join(ENGINES)}"])
    return ("multi_gpu" if engine == "single_gpu" and processes > 1 else engine), processes


def read_memory(given: str | None) -> tuple[float, float]:
    """(bytes a GPU is sold with, bytes it has) from "40GB", "80GiB" or "24"; None: this machine's GPU, or 40 GB."""
    if given is None:
        import torch

        if torch.cuda.is_available():
            return (torch.cuda.get_device_properties(0).total_memory,) * 2
        given = "40GB"
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|G)?", given, re.IGNORECASE)
    if not found or not float(found[1]):
        raise Refused([f"--gpu_memory {given}: not a memory size. Type the size the GPU is sold with: 40GB"])
    return float(found[1]) * GIB, float(found[1]) * GIB * VISIBLE


def missing_models(run: Run) -> Iterator[str]:
    """A problem for each model path that the plan needs and the flags lack."""
    needed = {"model_name_or_path": run.common.model_name_or_path}
    if run.method.columns == ANSWERED:
        needed["teacher_model_name_or_path"] = run.config.teacher_model_name_or_path
    for flag in (flag for flag, path in needed.items() if not path):
        yield f"--{flag}: missing. A model folder, a Hub id, or one of {', '.join(shapes.SHAPES)}"


def find_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of a named shape, a folder, an adapter's base, or a Hub id. Raises Refused."""
    from transformers import AutoConfig

    shape = shapes.find_shape(path)
    if shape is not None:
        return shape
    adapter = ModelFolder.at(path).adapter
    path = adapter["base_model_name_or_path"] if adapter else path
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        known = f"a model folder, a Hub id, or one of {', '.join(shapes.SHAPES)}"
        raise Refused([f"{path}: cannot read its config.json ({output.first_line(error)}). Type {known}"]) from None


def count_layers(shape: "PretrainedConfig") -> int:
    return shape.get_text_config().num_hidden_layers


def with_layers(shape: "PretrainedConfig", layers: int) -> "PretrainedConfig":
    """A copy of a config with at most this many layers."""
    shape = copy.deepcopy(shape)
    text, whole = shape.get_text_config(), count_layers(shape)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer, such as layer_types
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(layers, whole)
    return shape


@dataclass
class Models:
    """The configs of a run's models. `find`: path -> config of a model that the trainer loads itself."""

    policy: "PretrainedConfig"
    lora: "LoraConfig | None"
    frozen: list[Frozen]
    find: Callable[[str], "PretrainedConfig"]


def find_models(run: Run, layers: int = 10**9) -> Models:
    """The models of a run, with at most this many layers. Raises Refused."""
    common, config = run.common, run.config
    path, trusts = common.model_name_or_path or "", config.trust_remote_code
    policy, lora = find_config(path, common.model_revision, trusts), None
    if common.train_mode != "full" and ModelFolder.at(path).adapter:
        from peft import LoraConfig

        lora = LoraConfig.from_pretrained(path, inference_mode=False)
    elif common.train_mode != "full":
        size = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
        lora = make_lora(run.method.task, *size, common.use_dora)
    frozen = []
    if common.train_mode == "full" and needs_reference(config, run.method):
        frozen += [(name, policy, False) for name in run.method.models]
    judge, taught = getattr(common, "reward_model_path", None), config.teacher_model_name_or_path
    if judge and not models.on_policy_base(judge, path, common.train_mode, common.model_revision):
        frozen.append(("reward_model", find_config(judge, None, trusts), False))
    if taught and not teacher.shares_base(common, config):
        shape = find_config(taught, config.teacher_model_revision, trusts)
        frozen.append(("teacher_model", shape, bool(teacher.in_4bit(common, config))))
    frozen = [(name, with_layers(shape, layers), in_4bit) for name, shape, in_4bit in frozen]
    return Models(
        with_layers(policy, layers), lora, frozen, lambda own: with_layers(find_config(own, None, trusts), layers)
    )
