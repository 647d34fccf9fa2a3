"""Models without data: built from a config on fake tensors, in the dtypes and 4-bit layers that loading gives."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from utils.models import shapes

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def hollow_model(
    shape: "PretrainedConfig", task: str, dtype: torch.dtype, attention: str | None, in_4bit: bool
) -> "PreTrainedModel":
    """The model of a config, as utils/models/load.py loads it. `attention`: None for the library's choice."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from utils.models.load import cast_before_score, four_bit_config

    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    shape.num_labels = 1 if task == "SEQ_CLS" else shape.num_labels
    model = kind.from_config(shape, dtype=dtype, **({"attn_implementation": attention} if attention else {}))
    if in_4bit:
        quantize(model, four_bit_config(dtype))
    if task == "SEQ_CLS" and hasattr(model, "score"):  # an encoder's head has another name, and stays frozen
        model.score.float()
        cast_before_score(model)
    return model


@torch.no_grad()
def quantize(model: "PreTrainedModel", quantization: "BitsAndBytesConfig") -> None:
    """Replaces the linear layers by bitsandbytes' 4-bit layers, as loading does."""
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    stored = quantization.bnb_4bit_quant_storage
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with _disable_current_modes():  # the new layers are on the meta device, which is not counted
        replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            kinds = {"quant_type": "nf4", "quant_storage": stored}
            packed, state = bitsandbytes.functional.quantize_4bit(weights[name], compress_statistics=True, **kinds)
            weight = torch.nn.Parameter(packed, requires_grad=False)
            vars(weight).update(kinds, quant_state=state, compress_statistics=True, bnb_quantized=True)
            module.weight, module.quant_state, module.support_avx512bf16_for_cpu = weight, state, False
            if module.bias is not None:
                module.bias = torch.nn.Parameter(torch.empty(module.out_features, dtype=stored), requires_grad=False)
    model.is_loaded_in_4bit, model.is_quantized, model.quantization_method = True, True, "bitsandbytes"
    model.config.quantization_config, model.hf_quantizer = quantization, AutoHfQuantizer.from_config(quantization)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.dtype != stored or parameter.dim() < 2)


@contextlib.contextmanager
def without_loading(find: Callable[[str], "PretrainedConfig"]) -> Iterator[None]:
    """Inside, a model that the trainer loads itself (PPO's own critic) is hollow. `find`: path -> config."""
    from transformers import AutoModel

    from trainers import critics

    check_tokens = critics.check_value_tokens

    def hollow(path: str, dtype: torch.dtype, attn_implementation: str, **kwargs: Any) -> "PreTrainedModel":
        model = AutoModel.from_config(find(path), dtype=dtype, attn_implementation=attn_implementation)
        if kwargs.get("quantization_config"):
            quantize(model, kwargs["quantization_config"])
        return model

    def check_known(path: str, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
        if tokenizer.name_or_path and shapes.find_shape(path) is None:  # a named shape has no tokenizer
            check_tokens(path, tokenizer, rows)

    checks = mock.patch.object(critics, "check_value_tokens", check_known)
    with mock.patch.object(AutoModel, "from_pretrained", hollow), checks:
        yield


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def size_of(*parameters: torch.nn.Parameter) -> int:
    """Bytes of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def count_stored(model: torch.nn.Module, trained: bool) -> tuple[int, int]:
    """(stored numbers, bytes) of the trained or of the frozen parameters. 4-bit weights are packed."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad == trained]
    return sum(parameter.numel() for parameter in chosen), size_of(*chosen)


def count_unpacked(model: torch.nn.Module) -> int:
    """The number of parameters, each packed 4-bit weight counted."""
    return sum(p.numel() * (2 * p.element_size() if hasattr(p, "quant_state") else 1) for p in model.parameters())


def split_critic(model: torch.nn.Module) -> tuple[int, int]:
    """(bytes of parameters that only the critic has, bytes of those that critic and policy share)."""
    named = list(model.named_parameters(remove_duplicate=False))
    policy = {id(parameter) for name, parameter in named if "critic." not in name}
    critic = {id(parameter): parameter for name, parameter in named if "critic." in name}
    own = [parameter for key, parameter in critic.items() if key not in policy]
    return size_of(*own), size_of(*critic.values()) - size_of(*own)
