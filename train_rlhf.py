"""Train a model with one of the methods of rlhf_args/methods.py: preferences, reward models, online RL, supervised.

    bash rlhf_run.sh                                    the shipped job, through accelerate launch
    python train_rlhf.py --rlhf_type SimPO --help       every flag of a method
    python train_rlhf.py --model_name_or_path MODEL --train_data_path data/preference.jsonl --output_dir OUT

Exit status: 0 done, 2 refused before a model was loaded (one line a problem, nothing written), 1 failed while running,
130 interrupted.
"""

from __future__ import annotations

import sys

from utils.cli import recipes
from utils.runtime import environment
from utils.training import chapters


def main(argv: list[str] | None = None) -> int:
    return chapters.guard(train_from_words, sys.argv[1:] if argv is None else list(argv))


def train_from_words(argv: list[str]) -> int:
    if recipes.asks_plan(argv):
        from utils.plan import printout

        return printout.print_plan(argv)
    run = chapters.from_words(argv)

    from utils.models.load import load_other_models, load_policy, needs_reference
    from utils.plan import probe
    from utils.training import rewards

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    chapters.prepare_text(run)
    chapters.announce(run)
    judges = rewards.load_rewards(run)
    whole = probe.prepare_probe(run)
    start = chapters.say_start(run)
    if chapters.is_checked(run):
        return 0

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────
    others = judges.load_all(run)
    source = chapters.model_source(run)
    policy = load_policy(**source | {"path": start.policy_path(run.common)})
    if needs_reference(run.config, run.method):
        others |= load_other_models(run.method.models, **source)

    # ── train, save, and prove the save ──────────────────────────────────────────────────────────────────────────────
    trainer = chapters.make_trainer(run, policy, **others)
    if whole:
        return probe.run_probe(trainer, run, whole)
    report = chapters.train_and_report(trainer, start, run)
    judges.say_failures()
    chapters.save_and_verify(trainer, report, run, again={"RLHF_TYPE": run.name})
    return 0


if __name__ == "__main__":
    environment.leave(main())
