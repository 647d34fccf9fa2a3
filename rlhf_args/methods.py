"""The table of methods. Methods differ in its columns, in their configs and in their trainers, nowhere else.

A new method is one row, one config file in this folder, and one sample file if its data columns are new.
`python -m rlhf_args.methods` prints the table of README.md and README_zh.md.
Standard library only: rows hold import paths, so DPO never imports PPO.
"""

import importlib
from dataclasses import dataclass
from typing import Any

PAIR = ("prompt", "chosen", "rejected")
UNPAIRED = ("prompt", "completion", "label")
RANKED = ("chosen", "rejected")
DIALOGUE = ("messages",)
PROMPT = ("prompt",)
ANSWERED = ("prompt", "completion")  # no completion is needed if the student or the teacher answers

# The metrics that a run prints: (label, name in the log).
PAIRWISE = (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))
ROLLOUT = (
    ("reward", "reward"),
    ("kl", "kl"),
    ("entropy", "entropy"),
    ("tokens", "completions/mean_length"),
    ("not ended", "completions/clipped_ratio"),
)
PAIR_BEGINS = (("rewards/chosen", 0.0), ("rewards/rejected", 0.0))
DIVERGENCE = (
    ("forward KL", "forward_kl"),
    ("reverse KL", "reverse_kl"),
    ("agreement", "token_agreement"),
    ("student loss", "student_loss"),
    ("teacher loss", "teacher_loss"),
)
CRITIC = (("value loss", "value_loss"), ("explained variance", "explained_variance"))
CLIPPED = (("clipped", "clip_ratio/region_mean"),)

# The metrics of an evaluation besides its loss, for --metric_for_best_model; * stands for names from the run.
SIDES = tuple(f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected"))
COUNTED = ("num_tokens", "entropy", "aux_loss")
LIKE_CPO = (*SIDES, "rewards/accuracies", "rewards/margins", "nll_loss")
ROLLED_OUT = (
    "reward", "reward_std", "rewards/*", "kl", "completions/*", "clip_ratio/*", "frac_reward_zero_std", "sampling/*",
)  # fmt: skip

# Flags of older PPO and RLOO trainers -> their names in current TRL.
OLD_NAMES = {
    "num_ppo_epochs": "num_iterations",
    "response_length": "max_completion_length",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "rloo_k": "num_generations",
}


@dataclass(frozen=True)
class Method:
    title: str  # one line, for --help and the table
    source: str  # where the method is described
    config: str  # "module:Class", the dataclass with its flags
    trainer: str  # "module:Class"
    columns: tuple[str, ...]  # its data columns; utils/data/columns.py converts other columns into them
    sample_data: str  # a file with such rows in this repository
    entry: str = "rlhf"  # train_ENTRY.py and ENTRY_run.sh run it,
    arguments: str = "common_args:CommonArgs"  # with these shared flags
    models: tuple[str, ...] = ()  # frozen models that the trainer needs, by its keyword arguments
    task: str = "CAUSAL_LM"  # or SEQ_CLS: one score per sequence (PEFT's names)
    train_modes: tuple[str, ...] = ("full", "lora", "qlora")
    precisions: tuple[str, ...] = ("bfloat16", "float16", "float32")
    losses: tuple[str, ...] = ()  # the values of --loss_type; empty without that flag
    min_batch_size: int = 1  # minimum --per_device_train_batch_size of the loss
    batch: tuple[int, int] = (2, 2)  # defaults of rlhf_run.sh: rows per device, gradient accumulation steps
    metrics: tuple[tuple[str, str], ...] = PAIRWISE  # (label, name in the log) that a run prints,
    curves: tuple[tuple[str, str], ...] = ()  # and further ones in report.png
    evaluated: tuple[str, ...] = LIKE_CPO  # metrics of an evaluation besides its loss
    # (name in the log, its value while the policy equals the reference, or the "module:function" of the config that
    # computes it); empty without a reference
    begins: tuple[tuple[str, float | str], ...] = ()
    sample_reward: str | None = None  # a reward function in this repository; None: needs no reward
    sample_flags: tuple[str, ...] = ("--max_steps", "12")  # rlhf_run.sh adds them for the sample data: takes minutes
    check: str | None = None  # "module:function": problems of flags that only this method has
    check_text: str | None = None  # "module:function" that refuses prepared text that this method cannot train on
    renamed: tuple[tuple[str, str], ...] = ()  # flags of older trainers -> their names here
    # (flag, values) with which a row's loss does not depend on the other rows of its batch; None: it always does
    by_row: tuple[tuple[str, tuple], ...] | None = None
    faster: tuple[str, ...] = ()  # flags that utils/training/pace.py may turn on without losing a metric


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")
NO_LIKELIHOOD = (("cpo_alpha", (0.0,)),)  # the likelihood term is a mean over the tokens of a batch

# float16 makes summed log-probabilities overflow (trl#878)
NO_FLOAT16 = ("bfloat16", "float32")

# Shared by the methods of TRL's CPO trainer: pairs, without a reference model.
WITHOUT_REFERENCE: dict[str, Any] = {
    "trainer": "trainers.cpo_trainer:CPOTrainer",
    "columns": PAIR,
    "sample_data": "data/preference.jsonl",
    "losses": CPO_LOSSES,
    "by_row": NO_LIKELIHOOD,
    "precisions": NO_FLOAT16,
}

# Shared by the online methods: the policy answers prompts, and a reward scores the answers.
ONLINE: dict[str, Any] = {
    "columns": PROMPT,
    "sample_data": "data/prompts.jsonl",
    "sample_reward": "data/rewards.py:brevity",
    "models": ("ref_model",),
    "precisions": NO_FLOAT16,
    "batch": (8, 1),
    "sample_flags": ("--max_steps", "12", "--num_iterations", "2", "--max_completion_length", "32"),
    "metrics": ROLLOUT,
    "curves": CLIPPED,
    "evaluated": (*ROLLED_OUT, *COUNTED),
    "begins": (("kl", 0.0),),
    "renamed": tuple(OLD_NAMES.items()),
    "check_text": "utils.checks.flags:check_rollout_fits",
}

METHODS = {
    "DPO": Method(
        title="Direct Preference Optimization",
        source="arXiv 2305.18290",
        config="rlhf_args.dpo_config:DPOConfig",
        trainer="trl:DPOTrainer",
        columns=PAIR,
        sample_data="data/preference.jsonl",
        models=("ref_model",),
        losses=DPO_LOSSES,
        evaluated=(*SIDES, "rewards/accuracies", "rewards/margins", "mean_token_accuracy", *COUNTED),
        by_row=(("loss_type", tuple(loss for loss in DPO_LOSSES if loss not in ("aot", "aot_unpaired", "sft"))),),
        faster=("precompute_ref_log_probs", "use_liger_kernel"),
        begins=(*PAIR_BEGINS, ("loss", "utils.results.watch:dpo_loss")),
    ),
    "CPO": Method(
        title="Contrastive Preference Optimization",
        source="arXiv 2401.08417",
        config="rlhf_args.cpo_config:CPOConfig",
        **WITHOUT_REFERENCE,
    ),
    "SimPO": Method(
        title="Simple Preference Optimization, length-normalised and without a reference",
        source="arXiv 2405.14734",
        config="rlhf_args.simpo_config:SimPOConfig",
        **WITHOUT_REFERENCE,
    ),
    "CPOSimPO": Method(
        title="SimPO with CPO's likelihood term on the chosen answer",
        source="github.com/fe1ixxu/CPO_SIMPO",
        config="rlhf_args.cposimpo_config:CPOSimPOConfig",
        **WITHOUT_REFERENCE,
    ),
    "ORPO": Method(
        title="Odds Ratio Preference Optimization, SFT and preference in one loss",
        source="arXiv 2403.07691",
        config="rlhf_args.orpo_config:ORPOConfig",
        trainer="trainers.orpo_trainer:ORPOTrainer",
        evaluated=(*LIKE_CPO, "log_odds_chosen", "log_odds_ratio"),
        columns=PAIR,
        sample_data="data/preference.jsonl",
        precisions=NO_FLOAT16,
    ),
    "KTO": Method(
        title="Kahneman-Tversky Optimization, from single answers with a thumb up or down",
        source="arXiv 2402.01306",
        config="rlhf_args.kto_config:KTOConfig",
        trainer="trl:KTOTrainer",
        columns=UNPAIRED,
        sample_data="data/kto.jsonl",
        models=("ref_model",),
        losses=("kto", "apo_zero_unpaired"),
        by_row=(("loss_type", ("apo_zero_unpaired",)),),  # the KL of the other loss is a mean over a batch
        faster=("precompute_ref_log_probs", "use_liger_kernel"),
        min_batch_size=2,  # its KL term pairs each prompt with another row's answer (trl#2554)
        metrics=(("margin", "rewards/margins"),),
        evaluated=(*SIDES, "rewards/margins", "kl", *COUNTED),
        begins=(*PAIR_BEGINS, ("loss", "utils.results.watch:kto_loss")),
    ),
    "Reward": Method(
        title="Bradley-Terry reward model",
        source="arXiv 2203.02155",
        config="rlhf_args.reward_config:RewardConfig",
        trainer="trl:RewardTrainer",
        columns=RANKED,
        sample_data="data/reward.jsonl",
        task="SEQ_CLS",
        by_row=(),
        metrics=(("accuracy", "accuracy"), ("margin", "margin")),
        evaluated=("accuracy", "margin", "max_reward", "mean_reward", "min_reward", *COUNTED),
    ),
    "SFT": Method(
        title="Supervised fine-tuning on the assistant's turns",
        source="arXiv 2203.02155",
        config="rlhf_args.sft_config:SFTConfig",
        trainer="trl:SFTTrainer",
        columns=DIALOGUE,
        sample_data="data/sft.jsonl",
        losses=("nll", "dft"),
        by_row=(),  # a mean over all tokens of a step
        faster=("padding_free", "use_liger_kernel"),
        metrics=(("accuracy", "mean_token_accuracy"),),
        evaluated=("mean_token_accuracy", *COUNTED),
    ),
    "RLOO": Method(
        title="REINFORCE Leave-One-Out, online: each answer against the others to its prompt",
        source="arXiv 2402.14740",
        config="rlhf_args.rloo_config:RLOOConfig",
        trainer="trainers.online_trainer:RLOOTrainer",
        faster=("use_liger_kernel",),
        **ONLINE,
    ),
    "GRPO": Method(
        title="Group Relative Policy Optimization, online: as RLOO, with rewards scaled within each group",
        source="arXiv 2402.03300",
        config="rlhf_args.grpo_config:GRPOConfig",
        trainer="trainers.online_trainer:GRPOTrainer",
        losses=("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        faster=("use_liger_kernel",),
        **ONLINE,
    ),
    "PPO": Method(
        title="Proximal Policy Optimization, online, with a critic that values each token",
        source="arXiv 1707.06347, 2403.17031",
        config="rlhf_args.ppo_config:PPOConfig",
        trainer="trainers.ppo_trainer:PPOTrainer",
        losses=("dapo",),  # a mean over a step's tokens, however they are batched; the other losses are GRPO's
        **{
            **ONLINE,
            "curves": (*CLIPPED, *CRITIC),
            "evaluated": (*ROLLED_OUT, *COUNTED, "rlhf_reward", "value", "value_loss", "explained_variance"),
        },
    ),
}


# The method of train_gkd.py.
DISTILLATION = {
    "GKD": Method(
        title="Knowledge distillation: supervised, SeqKD, GKD, on-policy",
        source="arXiv 1503.02531, 1606.07947, 2306.13649",
        entry="gkd",
        arguments="common_args:SharedArgs",
        config="rlhf_args.gkd_config:GKDConfig",
        trainer="trainers.gkd_trainer:GKDTrainer",
        columns=ANSWERED,
        sample_data="data/sft.jsonl",
        precisions=NO_FLOAT16,
        metrics=DIVERGENCE,
        curves=(("entropy", "entropy"), ("tokens", "completions/mean_length"), ("on-policy", "on_policy")),
        evaluated=(*(log for _, log in DIVERGENCE), "completions/*", *COUNTED),
        check="utils.checks.distillation:check_distillation",
        check_text="utils.checks.distillation:check_teacher_tokens",
        renamed=(("teacher_model", "teacher_model_name_or_path"), ("max_new_tokens", "max_completion_length")),
    ),
}
EVERY = METHODS | DISTILLATION

# rejection_sampling.py; its --then trains with a row of METHODS.
REJECTION = Method(
    title="Rejection sampling: sample, score, select",
    source="arXiv 2304.06767, 2309.06657",
    entry="rejection",
    arguments="common_args:RewardArgs",
    config="rlhf_args.rejection_config:RejectionConfig",
    trainer="",
    columns=PROMPT,
    sample_data="data/prompts.jsonl",
    sample_reward="data/rewards.py:brevity",
)


def find_method(name: str | None) -> str | None:
    """The method's name as the table spells it, for `name` in any letter case; None if there is no such method."""
    return next((known for known in METHODS if known.lower() == str(name).lower()), None)


def load(path: str) -> Any:
    """The object of "module:name", imported on demand."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def method_table() -> str:
    """The table in Markdown, for README.md and README_zh.md."""
    lines = ["| `--rlhf_type` | what it is | data columns | sample | `--train_mode` | reference model | source |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        reference = "frozen copy (full), adapter off (lora, qlora)" if "ref_model" in method.models else "none"
        reward = ", and a reward" if method.sample_reward else ""
        cells = (
            f"`{name}`",
            method.title,
            ", ".join(method.columns) + reward,
            f"`{method.sample_data}`",
            ", ".join(method.train_modes),
            reference,
            method.source,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(method_table())
