"""Distil a teacher into a student: supervised KD, SeqKD, GKD, on-policy.

    bash gkd_run.sh                      the shipped job, through accelerate launch
    python train_gkd.py --help           every flag
    python train_gkd.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\
        --train_data_path data/sft.jsonl --output_dir OUT --lmbda 0.5 --beta 0.5

Exit status: as train_rlhf.py.
"""

from __future__ import annotations

import sys

from utils.cli import recipes
from utils.training import chapters

NAME = "GKD"


def main(argv: list[str] | None = None) -> int:
    return chapters.guard(train_from_words, sys.argv[1:] if argv is None else list(argv))


def train_from_words(argv: list[str]) -> int:
    if recipes.asks_plan(argv):
        from utils.plan import printout

        return printout.print_plan(argv, NAME)
    run = chapters.from_words(argv, NAME)

    from utils.checks.distillation import prompt_room
    from utils.models import teacher
    from utils.models.load import load_policy
    from utils.plan import probe

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    chapters.prepare_text(run, prompt_room)
    chapters.announce(run, teacher.describe_teacher)
    whole = probe.prepare_probe(run)
    start = chapters.say_start(run)
    if chapters.is_checked(run):
        return 0

    # ── the teacher's answers, then both models ──────────────────────────────────────────────────────────────────────
    teacher.write_answers(run)
    student = load_policy(**chapters.model_source(run) | {"path": start.policy_path(run.common)})
    teaching = teacher.load_beside(run)

    # ── train, save, and prove the save ──────────────────────────────────────────────────────────────────────────────
    trainer = chapters.make_trainer(run, student, teacher_model=teaching)
    if whole:
        return probe.run_probe(trainer, run, whole)
    report = chapters.train_and_report(trainer, start, run)
    chapters.save_and_verify(trainer, report, run, again=run.config.variables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
