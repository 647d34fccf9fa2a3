"""The flags that every method shares. The method's own flags are those of its TRL config (rlhf_args/)."""

from dataclasses import dataclass

from rlhf_args.flag import flag


@dataclass
class SharedArgs:
    """The flags of every training script."""

    _argument_group_name = "the flags that every method shares"
    typed = frozenset[str]()  # not a flag: names of the flags on the command line and in recipes

    # ── what to train ────────────────────────────────────────────────────────────────────────────────────────────────
    model_name_or_path: str = flag(  # required: checks/flags.py refuses a run without it
        None, "The policy to start from: a model folder, a LoRA adapter's folder, or a Hub id. Required."
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of a Hub model.")
    train_mode: str = flag(
        "lora",
        "full: train all weights. lora: train an adapter on all linear layers except the head. qlora: lora on a base "
        "model quantised to 4 bits (NF4).",
        choices=["full", "lora", "qlora"],
    )
    dtype: str = flag(
        "bfloat16",
        "Precision of the computation and of frozen weights. Hardware without bfloat16 uses float32, with a message; "
        "a CPU with AMX uses bfloat16 only if this flag is given. Full training keeps float32 weights, as TRL does.",
        choices=["bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = flag(
        None,
        "sdpa, flash_attention_2, eager, ... Unset: flash_attention_2 if it is installed and changes results only by "
        "rounding, otherwise the default of transformers.",
    )

    # ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    lora_rank: int = flag(32, "Rank of the adapter.", range="at least 1")
    lora_alpha: int = flag(16, "Scale of the adapter: lora_alpha / lora_rank.", range="at least 1")
    lora_dropout: float = flag(
        0.05, "Dropout on the adapter's input. TRL's disable_dropout turns it off.", range="at least 0 and below 1"
    )
    lora_target_modules: list[str] | None = flag(None, "Layers to adapt. Unset: all linear layers except the head.")
    use_dora: bool = flag(False, "DoRA: also train the magnitude of the weights. Needs lora or qlora.")

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    train_data_path: list[str] = flag(
        None,
        "Files (jsonl, json, csv, parquet), folders, globs or Hub dataset ids (OWNER/NAME:split). Required.",
    )
    eval_data_path: list[str] | None = flag(None, "Held-out data to evaluate on, in the same forms.")
    eval_fraction: float = flag(
        0.0,
        "Fraction of the training data to hold out instead; 0: none, 0.1: a tenth.",
        range="at least 0 and below 1, like 0.1",
    )
    max_samples: int | None = flag(
        None, "Number of rows to use, from the start. Unset: all.", range="at least 1, like 1000"
    )
    max_drop_fraction: float = flag(
        0.1, "Refuse to train if a larger fraction of the rows is unusable.", range="at least 0 and at most 1"
    )

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────
    check: bool = flag(False, "Check the flags, the model folder and all rows, report, and exit.")
    plan: str | None = flag(
        None,
        "Print the memory per GPU and exit. Without a value: for the current launch; zero2, ...: for that launch; "
        "all: for every launch. Needs no GPU, weights or data; the model may be a size, like qwen2-7b.",
        nargs="?",
        const="launched",
    )
    num_processes: int | None = flag(
        None,
        "With --plan: number of GPUs, one process each. Unset: NUM_PROCESSES, or the visible GPUs, or 1.",
        range="at least 1",
    )
    gpu_memory: str | None = flag(
        None, "With --plan: nominal memory of each GPU, like 80GB. Unset: that of the visible GPUs, or 40GB."
    )
    probe: bool = flag(
        False,
        "Run two steps on the longest rows (online: two rollouts of the longest answers), print their memory and time "
        "and those of the full run, and exit.",
    )
    overwrite_output_dir: bool = flag(False, "Delete the contents of output_dir before the run.")
    resume: str = flag(
        "exact",
        "How --resume_from_checkpoint resumes. exact: continue as if the run had never stopped; refuse a checkpoint "
        "of a different run. weights_only: in that case start a new run from its weights.",
        choices=["exact", "weights_only"],
    )
    max_bad_steps: int = flag(
        1,
        "Stop after this many steps with a nan or infinite loss or gradient (1: at the first). Earlier bad steps are "
        "skipped.",
        range="at least 1",
    )
    auto_batch: bool = flag(
        False,
        "When memory runs out, halve the batch size, double the accumulation steps and continue from the newest "
        "checkpoint.",
    )
    plain: bool = flag(
        False,
        "Use TRL's defaults for all flags that are not given, instead of the faster defaults here, which change "
        "results only by rounding.",
    )
    # TRL batches rows in their order in the data; with mixed lengths a third of the tokens is then padding.
    deal_by_length: bool | None = flag(
        None,
        "Sort the rows of each step by length across its batches and processes: less padding, the same rows per step. "
        "Unset: on if it changes results only by rounding.",
    )


@dataclass
class RewardArgs(SharedArgs):
    """The flags of scripts that score answers."""

    reward_model_path: str | None = flag(
        None,
        "A trained reward model that scores the answers: a folder, a Hub id, or an adapter trained with --rlhf_type "
        "Reward. It may belong to another model family: it reads text, in its own chat template. An encoder (BERT, "
        "RoBERTa, DeBERTa) without a template reads prompt and answer as a text pair.",
    )
    reward_funcs: list[str] | None = flag(
        None,
        "One or more reward functions as FILE.py:FUNCTION, with TRL's signature; see data/rewards.py. The reward is "
        "their sum, weighted by --reward_weights.",
    )
    reward_timeout: float | None = flag(
        None,
        "Time limit in seconds for one call of a function in --reward_funcs; a longer call ends the run with status "
        "1. Each function then runs in its own thread. Unset: no limit.",
        range="above 0, like 60",
    )


@dataclass
class CommonArgs(RewardArgs):
    """The flags of train_rlhf.py."""

    rlhf_type: str = flag("DPO", "The method, a row of rlhf_args/methods.py; case does not matter.")
