"""Train a model with one of the methods of rlhf_args/methods.py: preferences, reward models, online RL, supervised.

    bash rlhf_run.sh                                    the shipped job, through accelerate launch
    python train_rlhf.py --rlhf_type SimPO --help       every flag of a method
    python train_rlhf.py --model_name_or_path MODEL --train_data_path data/preference.jsonl --output_dir OUT

Exit status: 0 done, 2 refused before a model was loaded (one line a problem, nothing written), 1 failed while running,
130 interrupted.
"""

import sys

from rlhf_args.judge_config import JudgeConfig
from rlhf_args.methods import METHODS, load
from utils.checks import flags
from utils.cli import arguments, recipes
from utils.data.rows import check_labels, hold_out, load_rows
from utils.runtime import environment
from utils.runtime.errors import Refused, collecting, refuse_if
from utils.training import run


def main(argv=None):
    return run.guard(train_from_words, sys.argv[1:] if argv is None else list(argv))


def train_from_words(argv):
    if recipes.asks_plan(argv):
        from utils.plan import planner

        return planner.run(argv)
    common, config, name, rows, problems = parse_and_check(argv)
    method = METHODS[name]

    from utils.models.load import load_other_models, load_policy, needs_reference
    from utils.plan import probe
    from utils.results import summary
    from utils.rewards import functions, judge_reward, models

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    with collecting(problems):
        tokenizer, train, held_out = run.prepare_text(common, config, method, rows)
        flags.check_rollout_fits(config, len(train.rows))
    if not problems:
        summary.say_plan(common, config, name, method, tokenizer, rows, train, held_out)
    elif common.check:
        summary.say_findings(rows)
    with collecting(problems):
        judges = functions.load_functions(common.reward_funcs, rows.train, tokenizer, common.reward_timeout)
    with collecting(problems):
        judge = judge_reward.load_judge(config, rows.train) if method.sample_reward and not problems else None
    if common.probe and not problems:
        whole, train, held_out = probe.shorten(config, method, train)
    with collecting(problems):
        start = run.find_start(common, config, name, rows)
    refuse_if(problems)
    if common.check:
        summary.say_checked(rows)
        return 0

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────
    others = {}
    if method.sample_reward:
        others["reward_funcs"] = judges
        if common.reward_model_path:
            judges.append(
                models.load_reward(
                    common.reward_model_path,
                    rows.train,
                    policy_path=common.model_name_or_path,
                    policy_revision=common.model_revision,
                    train_mode=common.train_mode,
                    dtype=common.dtype,
                    device=config.device,
                    batch_size=max(8, config.per_device_train_batch_size),
                    trust_remote_code=config.trust_remote_code,
                )
            )
        if judge:
            config.reward_weights = judge.spread_weights(config.reward_weights, len(judges))
            judges += judge.rewards()
    source = run.model_source(common, config, method, tokenizer)
    policy = load_policy(**source | {"path": start.policy_path(common)})
    if needs_reference(config, method):
        others |= load_other_models(method.models, **source)
    lora = run.make_lora(common, method)

    # ── train, save, and prove the save ──────────────────────────────────────────────────────────────────────────────
    trainer = run.make_trainer(load(method.trainer), policy, config, tokenizer, train, held_out, lora, **others)
    if common.probe:
        return probe.run(trainer, whole, common, method)
    shown = common, method, tokenizer, rows, train, held_out
    follow = run.train_and_report(trainer, start, *shown)
    if judge:
        judge.say_failures()
    run.save_and_verify(trainer, follow, argv, name, *shown, again={"RLHF_TYPE": name})
    return 0


def parse_and_check(argv):
    """Flags, folders and every data row. What needs no library is refused within a second, so that comes first.

    With --check, and in the one process of utils/launch.py, refusals are collected in the last value returned, as far
    as the checks can go on without what is refused, so that all are said at once. Otherwise it is None.
    """
    words = recipes.expand(argv)
    common, name = arguments.parse_common(words)
    method, problems, config = METHODS[name], [] if common.check or environment.is_launched_alone() else None, None
    words = recipes.translate(words, dict(method.renamed))
    if not recipes.asks_help(words):
        judged, _ = arguments.peek(words, JudgeConfig)
        found = flags.check_common(common, name, method) + flags.check_rewards(common, name, method, judged)
        paths = common.train_data_path, common.eval_data_path
        rows = load_rows(*paths, method.columns, name, common.max_samples, found, problems)
    with collecting(problems):
        common, config = arguments.parse(words, name)
    if config is None:
        raise Refused(problems)
    from utils.checks import folders

    with collecting(problems):
        found = flags.check_config(common, config, name, method)
        found += [*folders.check_folders(common, config), *folders.check_recipes(common, config, argv)]
        refuse_if(found)
    with collecting(problems):
        hold_out(rows, common.eval_fraction, config.seed)
        check_labels(rows.train, name)
    return common, config, name, rows, problems


if __name__ == "__main__":
    environment.leave(main())
