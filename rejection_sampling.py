"""Sample answers, score them, select the good ones: files that train_rlhf.py reads, and with --then a better model.

    bash rejection_run.sh                        the shipped job, through accelerate launch
    bash rejection_run.sh --then DPO             and train on what comes of it
    python rejection_sampling.py --help          every flag
    python rejection_sampling.py --model_name_or_path MODEL --train_data_path data/prompts.jsonl \\
        --reward_funcs data/rewards.py:brevity --num_completions 8 --output_dir OUT

Exit status: as train_rlhf.py; 1 also where more than --max_failed_fraction of the answers or scores failed.
"""

import sys
from pathlib import Path

from utils.cli import arguments, recipes
from utils.runtime import environment
from utils.runtime.errors import refuse_if
from utils.training.chapters import guard


def main(argv=None):
    return guard(run, sys.argv[1:] if argv is None else list(argv), "The same command goes on from here")


def run(argv):
    common, config, words = parse_and_check(argv)
    from utils.rejection import rounds, stages

    if config.then:
        return rounds.run(common, config, words)
    if common.check:
        return stages.check(common, config)

    # ── the folder: prompts, and what earlier runs of the same settings left ─────────────────────────────────────────
    folder = Path(config.output_dir)
    with stages.opened(folder, common):
        tokenizer = stages.load_tokenizer(common, config)
        if environment.is_main():
            stages.prepare(common, config, folder, tokenizer)
        environment.wait_for_everyone()
        work = stages.Work(common, config, folder, tokenizer)

        # ── sample, score, select ────────────────────────────────────────────────────────────────────────────────────
        if "generate" in config.stages:
            work.generate()
        if "score" in config.stages:
            work.score()
        if "select" in config.stages and environment.is_main():
            work.select()
        environment.wait_for_everyone()
        return work.end()


def parse_and_check(argv):
    """Flags, folders and templates. What needs no library is refused within a second, so that comes first."""
    words = recipes.expand(argv)
    common, config, left = arguments.parse_rejection(words)
    from utils.checks import folders
    from utils.rejection import checks

    refuse_if(checks.check_flags(common, config, words) + folders.check_recipes(common, config, argv))
    return common, config, left


if __name__ == "__main__":
    environment.leave(main())
