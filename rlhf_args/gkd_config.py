from dataclasses import dataclass

import trl

from rlhf_args.flag import flag
from rlhf_args.method_config import MethodConfig


@dataclass
class GKDConfig(trl.DistillationConfig, MethodConfig):
    """Distillation with TRL's stable trainer: its sampling, vLLM and chunked loss, also on answers from the data."""

    teacher_load_in_4bit: bool = flag(False, "Load the teacher in 4 bits (NF4): a quarter of the memory of bfloat16.")
    # TRL 1.16's GKDConfig has 0.5, also with seq_kd; the SeqKD of the paper trains on the teacher's answers only.
    lmbda: float = flag(
        None,
        "Fraction of the steps that train on the student's own answers; 0: supervised, 1: on-policy. Unset: 0.5, or 0 "
        "with --seq_kd.",
        range="at least 0 and at most 1, like 0.5",
    )
    # The symmetric divergence, as in TRL 1.16's GKDConfig; DistillationConfig has 1.
    beta: float = flag(
        0.5,
        "Divergence. 0: forward KL(teacher || student); 1: reverse KL(student || teacher); between: generalized "
        "Jensen-Shannon divergence, symmetric at 0.5.",
        range="at least 0 and at most 1",
    )
    seq_kd: bool = flag(False, "Train on the teacher's answers, sampled once before training, instead of the data's.")
    max_length: int = flag(1024, "Maximum tokens of a row: longer answers are truncated, longer prompts dropped.")
    # Sampling takes the most time. As in TRL 1.16's GKDConfig, which calls this flag max_new_tokens.
    max_completion_length: int = flag(128, "Maximum tokens of a sampled answer, of the student or the teacher.")
    # Supervised steps resemble SFT, where 1e-6 (TRL's default for on-policy distillation) is too low.
    learning_rate: float = flag(2e-5, "The highest learning rate of the schedule.")
    # Dropout would add noise to the sampled answers and to the divergence. As in TRL 1.16's GKDConfig.
    disable_dropout: bool = flag(True, "Turn off dropout in the student.")
    answers_dir: str = flag("output/teacher_answers", "Folder that caches the teacher's answers across runs.")
    answers_batch_size: int = flag(16, "Prompts per device that the teacher answers at once.", range="at least 1")

    def __post_init__(self) -> None:
        if self.lmbda is None:
            self.lmbda = 0.0 if self.seq_kd else 0.5
        if str(self.metric_for_best_model).endswith("_kl") and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = False  # transformers assumes True for every metric but the loss
        super().__post_init__()

    def samples_answers(self) -> bool:
        """True if some steps train on the student's own answers."""
        return self.lmbda > 0

    def learns_from_data(self) -> bool:
        """True if some steps train on the answers in the data."""
        return self.lmbda < 1 and not self.seq_kd

    def variables(self) -> dict[str, str]:
        """The variables of gkd_run.sh that select this kind of distillation."""
        own = {"TEACHER": str(self.teacher_model_name_or_path), "LMBDA": f"{self.lmbda:g}", "BETA": f"{self.beta:g}"}
        return own | ({"SEQ_KD": "True"} if self.seq_kd else {})

    def describe(self) -> str:
        """One line: the answers to train on, and the divergence."""
        own, given = "the student's own answers", "the teacher's answers" if self.seq_kd else "the answers in the data"
        mixed = f"{own} in {self.lmbda:.0%} of the steps, {given} in the others"
        answers = given if self.lmbda == 0 else own if self.lmbda == 1 else mixed
        named = {0: "forward KL", 1: "reverse KL", 0.5: "Jensen-Shannon divergence"}
        divergence = named.get(self.beta, "generalized Jensen-Shannon divergence")
        return f"on {answers}; {divergence} (beta {self.beta:g}), temperature {self.temperature:g}"
