"""Distil a teacher into a student: supervised KD, SeqKD, GKD, on-policy.

    bash gkd_run.sh                      the shipped job, through accelerate launch
    python train_gkd.py --help           every flag
    python train_gkd.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\
        --train_data_path data/sft.jsonl --output_dir OUT --lmbda 0.5 --beta 0.5

Exit status: as train_rlhf.py.
"""

import sys

from rlhf_args.methods import DISTILLATION, load
from utils import arguments, checks, data, training

NAME = "GKD"


def main(argv=None):
    return training.guard(run, sys.argv[1:] if argv is None else list(argv))


def run(argv):
    common, config, rows = parse_and_check(argv)
    method = DISTILLATION[NAME]

    from utils import models, summary, teacher

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    room = teacher.prompt_room(common, config)
    tokenizer, train, held_out = training.prepare_text(common, config, method, rows, max_prompt=room)
    teacher.check_tokens(common, config, tokenizer, train, held_out)
    plan = teacher.describe(common, config, train, held_out)
    summary.say_plan(common, config, NAME, method, tokenizer, rows, train, held_out, plan)
    start = training.find_start(common, config, NAME, rows)
    if common.check:
        summary.say("checked   nothing stands in the way; no model was loaded, nothing was written")
        return 0

    # ── the teacher's answers, then both models ──────────────────────────────────────────────────────────────────────
    teacher.write_answers(common, config, tokenizer, train, held_out)
    source = training.model_source(common, config, method, tokenizer)
    student = models.load_policy(**source | {"path": start.policy_path(common)})
    teaching = None if teacher.shares_base(common, config) else teacher.load_teacher(common, config, tokenizer)
    lora = training.make_lora(common, method)

    # ── train, save, and prove the save ──────────────────────────────────────────────────────────────────────────────
    trainer = training.make_trainer(
        load(method.trainer), student, config, tokenizer, train, held_out, lora, teacher_model=teaching
    )
    shown = common, method, tokenizer, rows, train, held_out
    follow = training.train_and_report(trainer, start, *shown)
    again = {"TEACHER": config.teacher_model_name_or_path, "LMBDA": f"{config.lmbda:g}", "BETA": f"{config.beta:g}"}
    again |= {"SEQ_KD": "True"} if config.seq_kd else {}
    training.save_and_verify(trainer, follow, argv, NAME, *shown, again=again)
    return 0


def parse_and_check(argv):
    """Flags, folders and every data row. What needs no library is refused within a second, so that comes first."""
    method = DISTILLATION[NAME]
    words = arguments.translate(arguments.expand(argv), dict(method.renamed))
    common, problems = arguments.peek(words, load(method.arguments))
    if not arguments.asks_help(words):
        problems += checks.check_common(common, NAME, method)
        paths = common.train_data_path, common.eval_data_path
        rows = data.load_rows(*paths, method.columns, NAME, common.max_samples, problems)
    common, config = arguments.parse(words, NAME)
    from utils import teacher

    problems = checks.check_config(common, config, NAME, method)
    checks.refuse_if([*problems, *teacher.check_distillation(common, config, rows)])
    data.hold_out(rows, common.eval_fraction, config.seed)
    if not config.learns_from_data():
        rows.train = [(where, {"prompt": values["prompt"]}) for where, values in rows.train]
    return common, config, rows


if __name__ == "__main__":
    sys.exit(main())
