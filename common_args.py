"""The flags that every method shares. Everything else is the method's TRL config, under TRL's names (rlhf_args/)."""

from dataclasses import dataclass, field


@dataclass
class SharedArgs:
    """What every training script takes."""

    _argument_group_name = "the flags that every method shares"
    typed = frozenset()  # the flags that were given, be it in a recipe; not one itself

    # ── what to train ────────────────────────────────────────────────────────────────────────────────────────────────
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The policy to start from: a model folder, a LoRA adapter's folder, or a Hub id. Required."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    train_mode: str = field(
        default="lora",
        metadata={
            "help": "full trains every weight, lora an adapter on all linear layers but the head, "
            "qlora the same on a base held in 4 bits (NF4).",
            "choices": ["full", "lora", "qlora"],
        },
    )
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "What is computed in, and what frozen weights are held in; float32 is used where the hardware has "
            "no bfloat16, and said; a CPU with AMX has it where it is typed. Fully trained weights stay float32 "
            "beside it, as in TRL.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, flash_attention_2, eager, ...; unset: flash_attention_2 where it is installed and changes "
            "no more than rounding, else what transformers picks."
        },
    )

    # ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter, 1 or more."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout before the adapter, 0 to 1; TRL's disable_dropout turns it off."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; unset: all linear layers but the head."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: also trains the weights' magnitude. Not with full."}
    )

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    train_data_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files (jsonl, json, csv, parquet), folders, globs or Hub dataset ids (OWNER/NAME:split), "
            "one or several. Required."
        },
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Held-out data, in the same forms. The result is measured on it."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training data to hold out instead, 0 (none) to below 1."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Use the first so many rows of the data only; unset: all."}
    )
    max_drop_fraction: float = field(
        default=0.1, metadata={"help": "Refuse to run when a larger share of the rows cannot be used, 0 to 1."}
    )

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────
    check: bool = field(
        default=False, metadata={"help": "Check flags, model folder and every data row, print the findings, and stop."}
    )
    plan: str | None = field(
        default=None,
        metadata={
            "help": "Print the memory that the run needs on each GPU, and stop. A value names another launch "
            "(zero2, ...), or is all. Needs no GPU, weights or data; the model may be a named size, such as qwen2-7b.",
            "nargs": "?",
            "const": "launched",
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "With --plan: number of GPUs. Unset: NUM_PROCESSES, or the GPUs of this machine, or 1."},
    )
    gpu_memory: str | None = field(
        default=None,
        metadata={"help": "With --plan: memory of each GPU, such as 80GB; unset: as here, or 40GB."},
    )
    probe: bool = field(
        default=False,
        metadata={
            "help": "Train two steps on the longest rows (or two rollouts of the longest answers), print their memory "
            "and time and the time of the whole run, and stop."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir, then start afresh."}
    )
    resume: str = field(
        default="exact",
        metadata={
            "help": "What --resume_from_checkpoint takes of a checkpoint: exact goes on as if the run had never "
            "stopped, and refuses one of another run; weights_only then starts anew from its weights.",
            "choices": ["exact", "weights_only"],
        },
    )
    max_bad_steps: int = field(
        default=1,
        metadata={
            "help": "Stop at the step whose loss or gradient is nan or infinite, if it is the so-manieth, 1 or more; "
            "those before it are left out."
        },
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "When memory runs out, go on from the newest checkpoint with half the rows a pass and twice the "
            "passes a step."
        },
    )
    plain: bool = field(
        default=False,
        metadata={
            "help": "Take none of the defaults that make a run faster and change its result by rounding alone: "
            "all as TRL has it, but for the flags that are typed."
        },
    )
    # TRL pads the rows of a pass as they come: where their lengths differ, a third is padding.
    deal_by_length: bool | None = field(
        default=None,
        metadata={
            "help": "Sort the rows of each step among its passes and processes, so that less is padded; the rows of a "
            "step stay the same. Unset: where that changes no more than rounding."
        },
    )


@dataclass
class RewardArgs(SharedArgs):
    """What a script takes in which answers are judged."""

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained reward model that scores the model's answers: a folder, a Hub id, or an adapter made "
            "by --rlhf_type Reward. It may be of another family than the model: it reads text, in its own template; "
            "an encoder (BERT, RoBERTa, DeBERTa) without one reads prompt and answer as a pair of texts."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that score answers, one or several, as FILE.py:FUNCTION, called as TRL calls them: "
            "data/rewards.py has one. Their sum is the reward, each by its --reward_weights."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one call of a function of --reward_funcs may take, above 0: after that the run ends "
            "with status 1. Each function then runs in a thread of its own. Unset: no limit."
        },
    )


@dataclass
class CommonArgs(RewardArgs):
    """What train_rlhf.py takes."""

    rlhf_type: str = field(
        default="DPO", metadata={"help": "The method, a row of rlhf_args/methods.py, in any letter case."}
    )
