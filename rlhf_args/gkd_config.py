from dataclasses import dataclass, field

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class GKDConfig(trl.DistillationConfig, MethodConfig):
    """Distillation on TRL's stable trainer: its sampling, vLLM and chunked loss, for answers of any origin."""

    teacher_load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the teacher in 4 bits (NF4), a quarter of bfloat16's memory."}
    )
    # TRL 1.16's GKDConfig: 0.5, of which SeqKD as its paper has it would be half only.
    lmbda: float | None = field(
        default=None,
        metadata={
            "help": "Share of the steps that learn from the student's own answers, 0 (supervised) to 1 (on-policy); "
            "unset: 0.5, with --seq_kd 0."
        },
    )
    # The symmetric one, as in TRL 1.16's GKDConfig; DistillationConfig has 1.
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Divergence: 0 forward KL(teacher || student), 1 reverse KL(student || teacher), between them the "
            "generalized Jensen-Shannon divergence, 0.5 the symmetric one."
        },
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "The teacher answers every prompt once, before training; the data's answers are not used."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of prompt and answer in the data; longer answers are cut, longer prompts dropped."},
    )
    # The longest answer that is sampled costs the most: TRL 1.16's GKDConfig, which calls it max_new_tokens.
    max_completion_length: int = field(
        default=128, metadata={"help": "Tokens that the student or the teacher may answer with, 1 or more."}
    )
    # Supervised steps are as those of SFT, for which 1e-6 (TRL's for on-policy distillation) is too little.
    learning_rate: float = field(default=2e-5, metadata={"help": "The first learning rate of the schedule."})
    # The teacher's opinion of a noisy student is noise: as in TRL 1.16's GKDConfig.
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout in the student."})
    answers_dir: str = field(
        default="output/teacher_answers",
        metadata={"help": "Where the teacher's answers are kept; the same ones are never asked for twice."},
    )
    answers_batch_size: int = field(
        default=16, metadata={"help": "Prompts a device that the teacher answers at once."}
    )

    def __post_init__(self):
        if self.lmbda is None:
            self.lmbda = 0.0 if self.seq_kd else 0.5
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("_kl"):
            self.greater_is_better = False  # transformers: True for all that is not called loss
        shares = {"lmbda": self.lmbda, "beta": self.beta}
        wrong = [f"--{flag} {value:g}: from 0 to 1" for flag, value in shares.items() if not 0 <= value <= 1]
        if wrong:
            raise ValueError("; ".join(wrong))
        super().__post_init__()

    def learns_from_data(self):
        """Whether some steps train on the answers in the data."""
        return self.lmbda < 1 and not self.seq_kd

    def variables(self):
        """The variables of gkd_run.sh that make this kind of distillation."""
        own = {"TEACHER": self.teacher_model_name_or_path, "LMBDA": f"{self.lmbda:g}", "BETA": f"{self.beta:g}"}
        return own | ({"SEQ_KD": "True"} if self.seq_kd else {})

    def describe(self):
        """What is learnt from, in one line."""
        own = {0: "no step", 1: "every step"}.get(self.lmbda, f"{self.lmbda:.0%} of the steps")
        others = "the teacher's answers, given once" if self.seq_kd else "the answers in the data"
        divergence = {0: "forward KL", 1: "reverse KL", 0.5: "Jensen-Shannon divergence"}
        named = divergence.get(self.beta, "generalized Jensen-Shannon divergence")
        rest = f", the others on {others}" if self.lmbda < 1 else ""
        return (
            f"{own} on the student's own answers{rest}; {named} (beta {self.beta:g}), temperature {self.temperature:g}"
        )
