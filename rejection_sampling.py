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

from common_args import CommonArgs
from rlhf_args.rejection_config import RejectionConfig
from utils.cli import arguments, recipes
from utils.runtime import environment
from utils.runtime.errors import refuse_if
from utils.training.chapters import guard


def main(argv: list[str] | None = None) -> int:
    return guard(sample_from_words, sys.argv[1:] if argv is None else list(argv), "The same command goes on from here")


def sample_from_words(argv: list[str]) -> int:
    common, config, words = parse_and_check(argv)
    from utils.rejection import rounds, stages

    if config.then:
        return rounds.run_rounds(common, config, words)
    if common.check:
        return stages.check_rejection(common, config)

    # ── the folder: prompts, and what earlier runs of the same settings left ─────────────────────────────────────────
    folder = Path(config.output_dir or "")
    with stages.open_folder(folder, common):
        tokenizer = stages.load_answering_tokenizer(common, config)
        if environment.is_main():
            stages.prepare_folder(common, config, folder, tokenizer)
        environment.wait_for_everyone()
        sampling = stages.RejectionRun(common, config, folder, tokenizer)

        # ── sample, score, select ────────────────────────────────────────────────────────────────────────────────────
        if "generate" in config.stages:
            sampling.generate()
        if "score" in config.stages:
            sampling.score()
        if "select" in config.stages and environment.is_main():
            sampling.select()
        environment.wait_for_everyone()
        return sampling.end()


def parse_and_check(argv: list[str]) -> tuple[CommonArgs, RejectionConfig, list[str]]:
    """Flags, folders and templates. What needs no library is refused within a second, so that comes first."""
    words = recipes.expand(argv)
    common, config, left, problems = arguments.parse_rejection(words)
    refuse_if([] if common.check else problems)
    from utils.checks import folders
    from utils.rejection import checks

    refuse_if([*problems, *checks.check_flags(common, config, words), *folders.check_recipes(common, config, argv)])
    return common, config, left


if __name__ == "__main__":
    environment.leave(main())
