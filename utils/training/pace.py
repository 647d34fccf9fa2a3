"""Defaults that make a run faster and change nothing in its result but rounding: one function each, with its reason.

A flag that was typed is left as it is, and --plain leaves all of them as TRL has them. What each was measured to save,
and what was left out: docs/speed.md.
"""

import random

from utils.checks.schedule import count_batch
from utils.data.deal import deal
from utils.models import folders
from utils.runtime import environment
from utils.runtime.errors import Refused

ESTIMATED = 10_000  # rows of which padding is told
GAIN = 0.005  # of all that is computed; a smaller one is not worth another order
# (flag, values) under which a step's rows may change places, beside those of the method (Method.by_row)
PLACED_FREELY = (
    ("train_sampling_strategy", ("random", "sequential")),
    ("packing", (False,)),
    ("padding_free", (False,)),
    ("shuffle_dataset", (False,)),
    ("average_tokens_across_devices", (True,)),
)


def choose(run):
    """Sets the flags that make this run faster, and returns a line to say of each. Raises Refused."""
    common = run.common
    if common.deal_by_length and (fixed := fixed_by(run)):
        raise Refused(
            [f"--deal_by_length with {fixed}: there a step's rows cannot change places. Leave --deal_by_length out"]
        )
    if not run.train.rows or common.plain and not common.deal_by_length:
        return ["--plain: no faster default, all as TRL has it"] if common.plain else []
    lines = [choice(run) for choice in ([deal_rows] if common.plain else CHOICES)]
    return [line for line in lines if line]


# ── the choices: each sets a flag and returns what is said of it, or returns None ────────────────────────────────────


def take_flash_attention(run):
    """It skips padding, and never holds the scores of all tokens against all."""
    common = run.common
    held_in_half = common.train_mode != "full" or run.config.deepspeed_plugin is not None
    # a model held in float32 would fail wherever there is no autocast, as where answers are shown
    if common.attn_implementation or common.dtype == "float32" or not held_in_half or not has_flash_attention(run):
        return None
    common.attn_implementation = "flash_attention_2"
    return "--attn_implementation flash_attention_2: it is installed, and the model takes it"


def drop_padding(run):
    """The rows of a pass as one, where the attention kernel keeps them apart."""
    common, config = run.common, run.config
    if not may_choose(run, "padding_free") or common.attn_implementation != "flash_attention_2" or config.packing:
        return None
    limit = config.max_length
    if limit and max(run.train.longest, run.held_out.longest) > limit:  # TRL cuts no row then
        return None
    config.padding_free, config.max_length = True, None
    return "--padding_free: flash attention keeps the rows of a pass apart (no row is longer than --max_length)"


def take_liger(run):
    """Its kernels for norms, rotary positions and MLPs; TRL leaves its loss out, which would take the metrics away."""
    if not may_choose(run, "use_liger_kernel") or not environment.has_gpu() or not has_liger(run):
        return None
    run.config.use_liger_kernel = True
    return "--use_liger_kernel: it is installed, and has kernels for this model"


def compute_reference_once(run):
    """The reference stays as it is: asked once for all epochs, it is not asked again in each."""
    common, config, flag = run.common, run.config, "precompute_ref_log_probs"
    if not may_choose(run, flag) or environment.processes_asked() > 1 or draws_at_random(run):
        return None
    # the policy, which is asked in place of a copy, is another model than the reference then
    if config.sync_ref_model or common.resume == "weights_only" and common.train_mode == "full":
        return None
    times = times_seen(run)
    if times < 2:
        return None
    config.precompute_ref_log_probs = True
    return f"--precompute_ref_log_probs: each row is seen {times:g} times, the reference computed once"


def deal_rows(run):
    """The same rows in each step, and so the same mean, but those of a length in one pass: less is padded."""
    common, asked = run.common, run.common.deal_by_length
    common.deal_by_length = False
    if asked is False or fixed_by(run):
        return None
    before, after = padding(run, dealt=False), padding(run, dealt=True)
    idle = "padding and waiting" if environment.processes_asked() > 1 else "padding"
    gain = f"{idle} {before:.0%} -> {after:.0%}"
    if not asked and before - after < GAIN:
        return None
    if not asked and draws_at_random(run):
        return f"rows are not dealt by length, as dropout draws by pass; --deal_by_length would: {gain}"
    common.deal_by_length = True
    return f"--deal_by_length: a step's rows are dealt to its passes by length, {gain}"


def trust_ddp(run):
    """DDP walks through all of a pass to find what was not used; here every trained weight is."""
    config, flag = run.config, "ddp_find_unused_parameters"
    if environment.processes_asked() == 1 or environment.engine() or flag in run.common.typed or has_experts(run):
        return None
    config.ddp_find_unused_parameters = False
    return "--ddp_find_unused_parameters False: every trained weight is used in every pass"


CHOICES = (take_flash_attention, drop_padding, take_liger, compute_reference_once, deal_rows, trust_ddp)


# ── what they ask ────────────────────────────────────────────────────────────────────────────────────────────────────


def may_choose(run, flag):
    """True if the method takes the flag, and nobody typed it."""
    return flag in run.method.faster and flag not in run.common.typed


def base_config(run):
    """The base model's config.json, with the entries of its text model."""
    described = folders.read_base_config(run.common.model_name_or_path, run.common.model_revision)
    return described | described.get("text_config", {})


def has_flash_attention(run):
    """Whether flash attention is installed for this GPU, and the model's class takes it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    known = base_config(run).get("model_type")
    if not is_flash_attn_2_available() or not known or run.config.trust_remote_code:
        return False
    kind = AutoModelForCausalLM._model_mapping.get(type(AutoConfig.for_model(known)), None)
    return bool(getattr(kind, "_supports_flash_attn", False))


def has_liger(run):
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return base_config(run).get("model_type") in MODEL_TYPE_TO_APPLY_LIGER_FN


def has_experts(run):
    """Whether the model is a mixture of experts: some may not be used, and they are balanced over a pass."""
    return any("expert" in name for name in base_config(run))


def draws_at_random(run):
    """Whether dropout or noise is drawn in training: in a pass of another shape it is other, as with another seed."""
    common, config = run.common, run.config
    if config.neftune_noise_alpha:
        return True
    if config.disable_dropout:
        return False
    adapter = folders.read_adapter(common.model_name_or_path)
    lora = adapter.get("lora_dropout", 0) if adapter else common.lora_dropout
    base = [value for name, value in base_config(run).items() if "drop" in name and isinstance(value, (int, float))]
    return any(rate > 0 for rate in [*base, lora if common.train_mode != "full" else 0])


def times_seen(run):
    """How often each row is trained on."""
    config = run.config
    if config.max_steps < 1:
        return config.num_train_epochs
    return config.max_steps * count_batch(config) * config.gradient_accumulation_steps / len(run.train.rows)


def fixed_by(run):
    """The flag, or what else of this run, for which the rows of a step cannot change places; None where they can."""
    if run.method.by_row is None:
        return f"this method ({run.method.title})"
    for flag, values in (*PLACED_FREELY, *run.method.by_row):
        asked = vars(run.config).get(flag, values[0])
        if not all(value in values for value in (asked if isinstance(asked, list) else [asked])):
            return f"--{flag} {asked}"
    loader = run.config.accelerator_config
    if loader.split_batches or loader.dispatch_batches or not (loader.even_batches and loader.use_seedable_sampler):
        return "this --accelerator_config"
    return "a mixture of experts" if has_experts(run) else None


def padding(run, dealt):
    """Share of what is computed that is no token of any row, of a sample of the rows in some order.

    Processes wait for the one with the longest rows of a pass, and so count as if they had padded theirs to it.
    """
    config, sizes = run.config, run.train.sizes
    order = list(range(len(sizes)))
    if config.train_sampling_strategy == "random":
        random.Random(config.seed).shuffle(order)
    order, width = order[:ESTIMATED], count_batch(config)
    if dealt:
        lengths = [max(row) for row in sizes]
        order = deal(order, lengths, width, max(config.gradient_accumulation_steps, 1))
    computed = 0
    for start in range(0, len(order), width):
        held = [sizes[row] for row in order[start : start + width]]
        computed += max(map(max, held)) * sum(map(len, held))
    return 1 - sum(sum(sizes[row]) for row in order) / computed
