"""Faster defaults that change a result by rounding only: one function each, with the reason.

A typed flag is never changed, and --plain keeps TRL's defaults. Measured gains, and what was left out: docs/speed.md.
"""

import random

from utils.checks.schedule import count_batch
from utils.cli.run import Run
from utils.data.deal import deal
from utils.models.folders import ModelFolder
from utils.runtime import environment
from utils.runtime.errors import Refused

ESTIMATED = 10_000  # rows of the sample that padding is estimated from
GAIN = 0.005  # share of the computed tokens; a smaller gain is not worth another order of rows
# (flag, values) with which a step's rows may change places, in addition to the method's (Method.by_row)
PLACED_FREELY = (
    ("train_sampling_strategy", ("random", "sequential")),
    ("packing", (False,)),
    ("padding_free", (False,)),
    ("shuffle_dataset", (False,)),
    ("average_tokens_across_devices", (True,)),
)


def choose(run: Run) -> list[str]:
    """Set the flags that make this run faster; one line of the plan for each. Raises Refused."""
    common = run.common
    if common.deal_by_length and (fixed := fixed_by(run)):
        raise Refused(
            [f"--deal_by_length with {fixed}: there a step's rows cannot change places. Leave --deal_by_length out"]
        )
    if not run.train.rows or common.plain and not common.deal_by_length:
        return ["--plain: no faster default, all as TRL has it"] if common.plain else []
    lines = [choice(run) for choice in ([deal_rows] if common.plain else CHOICES)]
    return [line for line in lines if line]


# ── the choices: each sets a flag and returns its line, or returns None ──────────────────────────────────────────────


def take_flash_attention(run: Run) -> str | None:
    """Flash attention skips padding, and never stores the (T, T) attention scores."""
    common = run.common
    held_in_half = common.train_mode != "full" or run.config.deepspeed_plugin is not None
    # flash attention fails with float32 weights outside autocast
    if common.attn_implementation or common.dtype == "float32" or not held_in_half or not has_flash_attention(run):
        return None
    common.attn_implementation = "flash_attention_2"
    return "--attn_implementation flash_attention_2: it is installed, and the model takes it"


def drop_padding(run: Run) -> str | None:
    """Join the rows of a pass into one: flash attention keeps them apart without padding."""
    common, config = run.common, run.config
    if not may_choose(run, "padding_free") or common.attn_implementation != "flash_attention_2" or config.packing:
        return None
    limit = config.max_length
    if limit and max(run.train.longest, run.held_out.longest) > limit:  # TRL cuts no row then
        return None
    config.padding_free, config.max_length = True, None
    return "--padding_free: flash attention keeps the rows of a pass apart (no row is longer than --max_length)"


def take_liger(run: Run) -> str | None:
    """Liger's kernels for norms, rotary positions and MLPs; not its loss, which would remove metrics from the log."""
    if not may_choose(run, "use_liger_kernel") or not environment.has_gpu() or not has_liger(run):
        return None
    run.config.use_liger_kernel = True
    return "--use_liger_kernel: it is installed, and has kernels for this model"


def compute_reference_once(run: Run) -> str | None:
    """The reference never changes, so its log-probabilities are computed once for all epochs."""
    common, config, flag = run.common, run.config, "precompute_ref_log_probs"
    if not may_choose(run, flag) or environment.processes_asked() > 1 or draws_at_random(run):
        return None
    # precomputing uses the policy, which here is not the reference
    if config.sync_ref_model or common.resume == "weights_only" and common.train_mode == "full":
        return None
    times = times_seen(run)
    if times < 2:
        return None
    config.precompute_ref_log_probs = True
    return f"--precompute_ref_log_probs: each row is seen {times:g} times, the reference computed once"


def deal_rows(run: Run) -> str | None:
    """Sort the rows of each step into passes by length: the same rows and mean per step, with less padding."""
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


def trust_ddp(run: Run) -> str | None:
    """DDP searches each pass for unused weights; here every trained weight is used."""
    config, flag = run.config, "ddp_find_unused_parameters"
    if environment.processes_asked() == 1 or environment.engine() or flag in run.common.typed or has_experts(run):
        return None
    config.ddp_find_unused_parameters = False
    return "--ddp_find_unused_parameters False: every trained weight is used in every pass"


CHOICES = (take_flash_attention, drop_padding, take_liger, compute_reference_once, deal_rows, trust_ddp)


# ── facts for the choices ────────────────────────────────────────────────────────────────────────────────────────────


def may_choose(run: Run, flag: str) -> bool:
    """True if the method takes the flag, and the user did not type it."""
    return flag in run.method.faster and flag not in run.common.typed


def base_config(run: Run) -> dict:
    """The base model's config.json, with the entries of its text model."""
    described = ModelFolder.at(run.common.model_name_or_path, run.common.model_revision).config
    return described | described.get("text_config", {})


def has_flash_attention(run: Run) -> bool:
    """True if flash attention is installed for this GPU, and the model's class supports it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    known = base_config(run).get("model_type")
    if not is_flash_attn_2_available() or not known or run.config.trust_remote_code:
        return False
    kind = AutoModelForCausalLM._model_mapping.get(type(AutoConfig.for_model(known)), None)
    return bool(getattr(kind, "_supports_flash_attn", False))


def has_liger(run: Run) -> bool:
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return base_config(run).get("model_type") in MODEL_TYPE_TO_APPLY_LIGER_FN


def has_experts(run: Run) -> bool:
    """True for a mixture of experts: some may be unused, and their load is balanced over a pass."""
    return any("expert" in name for name in base_config(run))


def draws_at_random(run: Run) -> bool:
    """True if training draws dropout or noise: a pass of another shape draws others, as with another seed."""
    common, config = run.common, run.config
    if config.neftune_noise_alpha:
        return True
    if config.disable_dropout:
        return False
    adapter = ModelFolder.at(common.model_name_or_path).adapter
    lora = adapter.get("lora_dropout", 0) if adapter else common.lora_dropout
    base = [value for name, value in base_config(run).items() if "drop" in name and isinstance(value, (int, float))]
    return any(rate > 0 for rate in [*base, lora if common.train_mode != "full" else 0])


def times_seen(run: Run) -> float:
    """How often the run trains on each row."""
    config = run.config
    if config.max_steps < 1:
        return config.num_train_epochs
    return config.max_steps * count_batch(config) * config.gradient_accumulation_steps / len(run.train.rows)


def fixed_by(run: Run) -> str | None:
    """Why the rows of a step cannot change places, a flag for example; None if they can."""
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


def padding(run: Run, dealt: bool) -> float:
    """Share of the computed tokens that is padding, estimated on a sample of the rows.

    All processes wait for the longest row of a pass, so each counts as padded to it.
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
