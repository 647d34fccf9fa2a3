"""Load the tokenizer, policy, reference and adapter, for every train mode."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.models.folders import ModelFolder
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.output import first_line

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rlhf_args.methods import Method


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False, flag: str = "--model_name_or_path"
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model or adapter, padding on the right."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, padding_side="right"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a broken file raises any of them
        raise not_loaded(flag, path, f"its tokenizer cannot be loaded ({first_line(error)})") from None


def not_loaded(flag: str, path: str | Path, reason: str) -> Refused:
    """The refusal of a model that transformers could not load."""
    if not Path(path).exists():
        reason += ". Not a local folder either: type a folder, or a Hub id that is reachable or cached"
    return Refused(f"{flag} {path}: {reason}")


def load_policy(
    path: str, *, train_mode: str, dtype: str, deepspeed: bool, **source: Any
) -> "PreTrainedModel | PeftModel":
    """The model to train. A PeftModel if `path` is an adapter whose training continues.

    Fully trained weights are float32, as in TRL; `dtype` under DeepSpeed, which keeps its own float32 copy.
    """
    if train_mode == "full":
        return load_model(path, dtype=held_in(dtype, deepspeed), adapter="merge", **source)
    return load_model(path, dtype=dtype, adapter="train", four_bit=train_mode == "qlora", **source)


def load_other_models(
    names: Iterable[str], path: str, *, train_mode: str, dtype: str, deepspeed: bool, **source: Any
) -> dict[str, "PreTrainedModel"]:
    """The frozen models that the trainer takes by keyword: {} or {"ref_model": ...}.

    With an adapter, the reference is the policy with the adapter off (or a frozen copy of the adapter).
    A separate reference uses the policy's dtype: with another one it would differ from the policy at step 0.
    """
    if train_mode != "full":
        return {}
    held = held_in(dtype, deepspeed)
    loaded = {name: load_model(path, dtype=held, adapter="merge", **source) for name in names}
    for model in loaded.values():
        model.eval().requires_grad_(False)
        if environment.engine() == "fsdp2":
            shard_layers(model, environment.fsdp_precision(dtype)["mixed_precision_policy"])
    return loaded


def shard_layers(model: "PreTrainedModel", precision: "MixedPrecisionPolicy") -> None:
    """Shard a frozen model by layer under FSDP2: TRL would make one shard of it, gathered as a whole.

    The shards and their precision match the policy's, because other rounding would change the outputs.
    TRL's own shard then has the rest: the head, and a tied embedding.
    Source: trl 1.16.0, models/utils.py, prepare_fsdp; accelerate 1.15.0, utils/fsdp_utils.py, fsdp2_prepare_model.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn import Embedding

    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    layers = [module for module in reversed([*model.modules()]) if type(module).__name__ in model._no_split_modules]
    ends = [one for one in decoder.children() if isinstance(one, Embedding) or "Norm" in type(one).__name__]
    for piece in layers + [end for end in ends if getattr(end, "weight", None) is not head]:
        fully_shard(piece, mp_policy=precision)


def needs_reference(config: "TrainingArguments", method: "Method") -> bool:
    """True if a reference model must be kept in memory: not with precomputed log-probabilities, nor with beta 0."""
    if method.sample_reward:
        return config.beta != 0
    return not config.precompute_ref_log_probs


def held_in(dtype: str, deepspeed: bool) -> str:
    return dtype if deepspeed else "float32"


def describe_reference(method: "Method", path: str, train_mode: str, config: "TrainingArguments") -> str:
    needed = needs_reference(config, method)
    if not method.models or method.sample_reward and not needed:
        return "none needed"
    if not needed:
        return f"{path} before training, its log-probabilities computed once (no second copy)"
    if train_mode == "full":
        return f"a frozen copy of {path}"
    if ModelFolder.at(path).adapter:
        return f"the adapter {path} as it was (its LoRA weights kept twice, the base once)"
    return "the same model with the adapter off (no second copy)"


def load_model(
    path: str | Path,
    task: str,
    dtype: str,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    adapter: str = "keep",
    flag: str = "--model_name_or_path",
) -> "PreTrainedModel | PeftModel":
    """A folder or Hub id as a causal language model, or as a classifier with one label (task SEQ_CLS).

    adapter: "train" it, "keep" it on its base, or "merge" it into its base. flag: the flag that named `path`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = ModelFolder.at(path, revision)
    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    kwargs = {"num_labels": 1} if task == "SEQ_CLS" else {}
    if four_bit:
        kwargs["quantization_config"] = four_bit_config(getattr(torch, dtype))
    torch.manual_seed(seed)  # a new score head is random
    try:
        model = kind.from_pretrained(
            folder.base.path,
            revision=folder.base.revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        raise not_loaded(flag, path, f"cannot be loaded ({first_line(error)})") from None
    fit_config(model, tokenizer)
    if four_bit:
        keep_trainable(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Refused(f"{flag} {path}: an adapter on the Hub. Download it and name its folder")
    if task == "SEQ_CLS" and not hasattr(model, "score"):
        raise Refused(f"{flag} {path}: a {model.config.model_type} has no score head. Use a decoder model")
    if task == "SEQ_CLS":
        model.score.float()  # all of it is trained: bfloat16 would lose small updates
        cast_before_score(model)
    if folder.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path, is_trainable=adapter == "train")
        if adapter == "merge":
            model = model.merge_and_unload().requires_grad_(True)  # PEFT froze the base below the adapter
    return model


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Context in which models load unsharded under ZeRO-3, for use before the engine exists."""
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    holder = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(holder())


def four_bit_config(dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """NF4 with double quantisation, as in QLoRA; stored as `dtype`, so that ZeRO-3 and FSDP can shard it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
    )


def keep_trainable(model: "PreTrainedModel") -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU in evaluations.

    The repacked kernel has no backward: after an evaluation, training would silently lose its gradients.
    Source: bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward, and autograd/_functions.py, matmul_4bit.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_lora(
    task: str,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | None,
    use_dora: bool,
    revision: str | None = None,
) -> "LoraConfig":
    """The LoraConfig of the policy."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        use_dora=use_dora,
        revision=revision,  # of the base, needed to load the adapter later
        # a reward model without its trained head scores at random
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def fit_config(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Copy the tokenizer's pad and end of turn to the model's configs, so that training and generation agree."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        ends = [tokenizer.eos_token_id, *(end for end in ends if end not in (None, tokenizer.eos_token_id))]
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = tokenizer.pad_token_id


def cast_before_score(model: "PreTrainedModel") -> None:
    """Cast the input of the score head to the head's dtype, which differs from the dtype of a 4-bit base."""
    model.score.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype), *inputs[1:]))


def count_parameters(model: "torch.nn.Module") -> str:
    """ "4.9M of 139.4M parameters (3.5 %)"; sharded and 4-bit weights count in full."""
    total = trained = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            count = parameter.numel() * 2 * parameter.element_size()
        total, trained = total + count, trained + count * parameter.requires_grad
    return f"{trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters ({trained / total:.1%})"
