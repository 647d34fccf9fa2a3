"""Tokenizer, policy, reference and adapter, built right in every train mode."""

import contextlib
from pathlib import Path

from utils.models.folders import read_adapter
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.output import first_line


def load_tokenizer(path, revision=None, trust_remote_code=False, flag="--model_name_or_path"):
    """The tokenizer in a model's or adapter's folder, right-padding."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, padding_side="right"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # files of other things raise any
        raise not_loaded(flag, path, f"its tokenizer cannot be loaded ({first_line(error)})") from None


def not_loaded(flag: str, path: str, reason: str) -> Refused:
    """The refusal of a model that transformers could not load: of a folder, or of what is no folder here."""
    if not Path(path).exists():
        reason += ". There is no such folder here either: name one, or a Hub id that can be reached or is in the cache"
    return Refused([f"{flag} {path}: {reason}"])


def load_policy(path, *, train_mode, dtype, deepspeed, **source):
    """The model to train. A PeftModel where `path` is an adapter that goes on being trained.

    Fully trained weights are float32, as in TRL (DeepSpeed keeps such a copy by itself: there, and frozen, `dtype`).
    """
    if train_mode == "full":
        return load_model(path, dtype=held_in(dtype, deepspeed), adapter="merge", **source)
    return load_model(path, dtype=dtype, adapter="train", four_bit=train_mode == "qlora", **source)


def load_other_models(names, path, *, train_mode, dtype, deepspeed, **source):
    """The frozen models that the trainer takes by keyword: {} or {"ref_model": ...}.

    With an adapter the reference is the same model with the adapter off (or its frozen twin), never a second base.
    A whole one is held as the policy is, as in TRL: rounded otherwise it would not be what training starts from.
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


def shard_layers(model, precision):
    """Makes each layer of a frozen model a piece under FSDP2: TRL makes all of it one, which is fetched as a whole.

    The pieces are as the policy's, and hand out what `precision` says: with other roundings it would be another model.
    TRL's is then what is left: the head, and the embedding where that is the head too.
    Source: trl 1.16.0, models/utils.py, prepare_fsdp; accelerate 1.15.0, utils/fsdp_utils.py, fsdp2_prepare_model.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn import Embedding

    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    layers = [module for module in reversed([*model.modules()]) if type(module).__name__ in model._no_split_modules]
    ends = [one for one in decoder.children() if isinstance(one, Embedding) or "Norm" in type(one).__name__]
    for piece in layers + [end for end in ends if getattr(end, "weight", None) is not head]:
        fully_shard(piece, mp_policy=precision)


def needs_reference(config, method):
    """Whether a model of the start is held: not where its part was computed before, or has no weight in the reward."""
    if method.sample_reward:
        return config.beta != 0
    return not config.precompute_ref_log_probs


def held_in(dtype, deepspeed):
    return dtype if deepspeed else "float32"


def describe_reference(method, path, train_mode, config):
    needed = needs_reference(config, method)
    if not method.models or method.sample_reward and not needed:
        return "none needed"
    if not needed:
        return f"{path} before training, its log-probabilities computed once (no second copy)"
    if train_mode == "full":
        return f"a frozen copy of {path}"
    if read_adapter(path):
        return f"the adapter {path} as it was (its LoRA weights kept twice, the base once)"
    return "the same model with the adapter off (no second copy)"


def load_model(
    path,
    task,
    dtype,
    *,
    tokenizer,
    seed,
    revision=None,
    attn_implementation=None,
    trust_remote_code=False,
    four_bit=False,
    adapter="keep",
    flag="--model_name_or_path",
):
    """A model or adapter folder or Hub id as a causal language model, or as a scorer of one label (task SEQ_CLS).

    `adapter`: what becomes of one in `path`: train it, keep it beside its base, or merge it into its base.
    `flag`: what named it, for the refusals.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    found = read_adapter(path)
    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    kwargs = {"num_labels": 1} if task == "SEQ_CLS" else {}
    if four_bit:
        kwargs["quantization_config"] = four_bit_config(getattr(torch, dtype))
    torch.manual_seed(seed)  # a new score head is random
    try:
        model = kind.from_pretrained(
            found["base_model_name_or_path"] if found else path,
            revision=found.get("revision") if found else revision,
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
        raise Refused([f"{flag} {path}: an adapter on the Hub. Download it and name its folder"])
    if task == "SEQ_CLS" and not hasattr(model, "score"):
        raise Refused([f"{flag} {path}: a {model.config.model_type} has no score head. Take a decoder model"])
    if task == "SEQ_CLS":
        model.score.float()  # trained in full: bfloat16 would round small updates away
        cast_before_score(model)
    if found:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path, is_trainable=adapter == "train")
        if adapter == "merge":
            model = model.merge_and_unload().requires_grad_(True)  # PEFT froze the base below the adapter
    return model


@contextlib.contextmanager
def unsharded():
    """Loads a model whole although ZeRO-3 loads in pieces: for one that is used before there is an engine."""
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    holder = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(holder())


def four_bit_config(dtype):
    """QLoRA's NF4 with double quantisation; stored as `dtype`, so that ZeRO-3 and FSDP can shard it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
    )


def keep_trainable(model):
    """Stops bitsandbytes from repacking 4-bit weights on a CPU for inference whenever the model is evaluated.

    The repacked kernel has no backward: after an evaluation in mid-training the gradients would silently be lost.
    Source: bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward, and autograd/_functions.py, matmul_4bit.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_lora(task, rank, alpha, dropout, target_modules, use_dora, revision=None):
    """The LoraConfig that the trainer wraps the policy in."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        use_dora=use_dora,
        revision=revision,  # of the base, for whoever loads the adapter later
        # a reward model without its trained head scores at random
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def fit_config(model, tokenizer):
    """Pad and end of turn of the tokenizer on every config of the model, so that training and generation agree."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        ends = [tokenizer.eos_token_id, *(end for end in ends if end not in (None, tokenizer.eos_token_id))]
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = tokenizer.pad_token_id


def cast_before_score(model):
    """Casts what comes into the score head to the head's dtype, which over a 4-bit base is another one."""
    model.score.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype), *inputs[1:]))


def count_parameters(model):
    """ "4.9M of 139.4M parameters (3.5 %)"; sharded and 4-bit weights count as what they stand for."""
    total = trained = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            count = parameter.numel() * 2 * parameter.element_size()
        total, trained = total + count, trained + count * parameter.requires_grad
    return f"{trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters ({trained / total:.1%})"
