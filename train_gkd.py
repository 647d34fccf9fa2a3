"""Distil a teacher into a student: supervised KD, SeqKD, GKD, on-policy.

    bash gkd_run.sh                      the shipped job, through accelerate launch
    python train_gkd.py --help           every flag
    python train_gkd.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\
        --train_data_path data/sft.jsonl --output_dir OUT --lmbda 0.5 --beta 0.5

Exit status: as train_rlhf.py.
"""

import sys

from rlhf_args.methods import DISTILLATION, load
from utils.checks import flags
from utils.cli import arguments, recipes
from utils.data.rows import hold_out, load_rows
from utils.runtime import environment
from utils.runtime.errors import Refused, collecting, refuse_if
from utils.training import run

NAME = "GKD"


def main(argv=None):
    return run.guard(train_from_words, sys.argv[1:] if argv is None else list(argv))


def train_from_words(argv):
    if recipes.asks_plan(argv):
        from utils.plan import planner

        return planner.run(argv, NAME)
    common, config, rows, problems = parse_and_check(argv)
    method = DISTILLATION[NAME]

    from utils.checks import distillation
    from utils.models import teacher
    from utils.models.load import load_policy
    from utils.plan import probe
    from utils.results import summary

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    with collecting(problems):
        room = distillation.prompt_room(common, config)
        tokenizer, train, held_out = run.prepare_text(common, config, method, rows, max_prompt=room)
        distillation.check_tokens(common, config, tokenizer, train, held_out)
    if not problems:
        about = teacher.describe(common, config, train, held_out)
        summary.say_plan(common, config, NAME, method, tokenizer, rows, train, held_out, about)
    elif common.check:
        summary.say_findings(rows)
    if common.probe and not problems:
        whole, train, held_out = probe.shorten(config, method, train)
    with collecting(problems):
        start = run.find_start(common, config, NAME, rows)
    refuse_if(problems)
    if common.check:
        summary.say_checked(rows)
        return 0

    # ── the teacher's answers, then both models ──────────────────────────────────────────────────────────────────────
    teacher.write_answers(common, config, tokenizer, train, held_out)
    source = run.model_source(common, config, method, tokenizer)
    student = load_policy(**source | {"path": start.policy_path(common)})
    teaching = None if teacher.shares_base(common, config) else teacher.load_teacher(common, config, tokenizer)
    lora = run.make_lora(common, method)

    # ── train, save, and prove the save ──────────────────────────────────────────────────────────────────────────────
    trainer = run.make_trainer(
        load(method.trainer), student, config, tokenizer, train, held_out, lora, teacher_model=teaching
    )
    if common.probe:
        return probe.run(trainer, whole, common, method)
    shown = common, method, tokenizer, rows, train, held_out
    follow = run.train_and_report(trainer, start, *shown)
    again = {"TEACHER": config.teacher_model_name_or_path, "LMBDA": f"{config.lmbda:g}", "BETA": f"{config.beta:g}"}
    again |= {"SEQ_KD": "True"} if config.seq_kd else {}
    run.save_and_verify(trainer, follow, argv, NAME, *shown, again=again)
    return 0


def parse_and_check(argv):
    """As train_rlhf.parse_and_check: refusals are collected with --check and in the one process of a launch."""
    method, config = DISTILLATION[NAME], None
    words = recipes.translate(recipes.expand(argv), dict(method.renamed))
    common, found = arguments.peek(words, load(method.arguments))
    problems = [] if common.check or environment.is_launched_alone() else None
    if not recipes.asks_help(words):
        found += flags.check_common(common, NAME, method)
        paths = common.train_data_path, common.eval_data_path
        rows = load_rows(*paths, method.columns, NAME, common.max_samples, found, problems)
    with collecting(problems):
        common, config = arguments.parse(words, NAME)
    if config is None:
        raise Refused(problems)
    from utils.checks import distillation, folders

    with collecting(problems):
        found = flags.check_config(common, config, NAME, method)
        found += [*distillation.check_distillation(common, config, rows), *folders.check_folders(common, config)]
        found += folders.check_recipes(common, config, argv)
        refuse_if(found)
    with collecting(problems):
        hold_out(rows, common.eval_fraction, config.seed)
    if not config.learns_from_data():
        rows.train = [(where, {"prompt": values["prompt"]}) for where, values in rows.train]
    return common, config, rows, problems


if __name__ == "__main__":
    sys.exit(main())
