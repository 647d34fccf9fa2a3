"""The chapters of both training scripts, in their order: the command line, the text, the training, the save."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from common_args import RewardArgs
from rlhf_args.judge_config import JudgeConfig
from rlhf_args.methods import EVERY, load
from utils.checks import flags
from utils.cli import arguments, recipes
from utils.cli.run import Run
from utils.data.rows import check_labels, hold_out, load_rows
from utils.models.folders import ModelFolder
from utils.runtime import environment, secrets
from utils.runtime.environment import is_out_of_memory
from utils.runtime.errors import Again, Failed, Refused, Stopped, collecting, refuse_if
from utils.survival import checkpoints, memory, resume

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, Trainer

    from utils.data import prepare
    from utils.results.report import Report


def guard(
    story: Callable[[list[str]], int],
    argv: list[str],
    onward: str = "the same command with --resume_from_checkpoint auto goes on from there",
) -> int:
    """Exit status of story(argv): 0 done, 2 refused, 1 failed with one line, 128+N stopped by signal N.

    Any other error is raised. onward: how to continue a stopped run.
    """
    environment.calm_libraries()
    try:
        return story(argv)
    except Refused as refusal:
        if environment.has_the_word():
            refusal.say()
        return 2
    except (KeyboardInterrupt, Stopped) as stop:
        if environment.is_main():
            print(f"{str(stop) or 'interrupted'}. {onward[0].upper()}{onward[1:]}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except Again as again:
        environment.record_failure(again)
        print(f"note      {again}: starts again with {' '.join(again.words)}", file=sys.stderr, flush=True)
        return memory.start_again(argv, again.words)
    except Failed as error:
        environment.record_failure(error)
        print(f"failed: {secrets.hide(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        environment.record_failure(error)
        if is_out_of_memory(error):
            print("failed: out of memory outside training. Take a smaller model, --train_mode qlora or LAUNCH=zero3 "
                  f"({secrets.hide(' '.join(str(error).split()))[:300]})", file=sys.stderr)  # fmt: skip
            return 1
        raise


def from_words(argv: list[str], name: str | None = None) -> Run:
    """Parse the command line, and check the flags, the folders and every data row. Raises Refused.

    name: the method, for a script with a single one. Checks that import no library come first: they take a second.
    With --check, and in the process that checks for utils/launch.py, refusals are collected in Run.problems and
    printed together; a check whose input is refused does not run.
    """
    words = recipes.expand(argv)
    common, name, found = arguments.peek_shared(words, name)
    method, config = EVERY[name], None
    problems: list[str] | None = [] if common.check or environment.is_launched_alone() else None
    words = recipes.translate(words, dict(method.renamed))
    if not recipes.asks_help(words):
        found += flags.check_common(common, name, method)
        if isinstance(common, RewardArgs):
            found += flags.check_rewards(common, name, method, arguments.peek(words, JudgeConfig)[0])
        paths = common.train_data_path, common.eval_data_path
        rows = load_rows(*paths, method.columns, name, common.max_samples, found, problems)
        all_read = not problems or problems == found
    with collecting(problems):
        common, config = arguments.parse(words, name, collected=problems)
    if config is None:
        raise Refused(problems or [])
    from utils.checks.folders import check_folders, check_recipes

    with collecting(problems):
        found = check_folders(common, config)
        with collecting(found):  # these read the model's config.json, which may be refused above
            found += flags.check_config(common, config, name, method)
        with collecting(found):
            found += load(method.check)(common, config, rows) if method.check else []
        refuse_if([*found, *check_recipes(common, config, argv)])
    with collecting(problems):
        if all_read:  # a file without its refused rows may have one label, or one row
            hold_out(rows, common.eval_fraction, config.seed)
            check_labels(rows.train, name)
    if not config.learns_from_data():
        rows.train = [(where, {"prompt": values["prompt"]}) for where, values in rows.train]
    return Run(argv, name, common, config, rows, problems)


def prepare_text(run: Run, room: Callable[[Run], prepare.Room] | None = None) -> None:
    """Set run.tokenizer, run.train and run.held_out: the rows in the model's chat template. Raises Refused.

    room: makes the limit of a row's prompt tokens (max_prompt of prepare.prepare_rows). Rank 0 also appends the
    findings of utils/checks/findings.py to run.rows.findings.
    """
    from utils.checks import findings
    from utils.data import cache, columns, prepare, template
    from utils.data.rows import check_dropped
    from utils.models.load import load_tokenizer
    from utils.training import pace

    common, config, rows, method = run.common, run.config, run.rows, run.method
    if not rows.train:
        return
    with run.collecting():
        refuse_if(ModelFolder.at(common.model_name_or_path).check("--model_name_or_path"))
        run.tokenizer = load_tokenizer(common.model_name_or_path, common.model_revision, config.trust_remote_code)
        rows.notes += template.fit_tokenizer(run.tokenizer, chat=columns.is_chat(rows.train[0][1]))
        limits = flags.length_limit(config, common.model_name_or_path), room(run) if room else prepare.no_limit
        run.train = cache.prepare_once(rows.train, run.tokenizer, method.columns, *limits)
        run.held_out = cache.prepare_once(rows.held_out, run.tokenizer, method.columns, *limits)
        rows.dropped += run.train.dropped + run.held_out.dropped
        faster = pace.choose(run)
        if environment.is_main() and run.train.rows:
            rows.findings += [findings.Finding("pace", line) for line in faster]
            rows.findings += findings.find(run)
        check_dropped(rows, common.max_drop_fraction)
        prepare.check_first(run.train, run.tokenizer, method.columns)
        if method.check_text:
            load(method.check_text)(run)


def announce(run: Run, describe: Callable[[Run], list[str]] = lambda run: []) -> None:
    """Print the plan. For a run with refusals: only the findings in its data, and only with --check.

    describe: further lines of the plan.
    """
    from utils.results import summary

    if not run.problems:
        summary.say_plan(run, describe(run))
    elif run.common.check:
        summary.say_findings(run.rows)


def is_checked(run: Run) -> bool:
    """True if the run ends here (--check). Raises Refused with all collected problems."""
    from utils.results import summary

    refuse_if(run.problems)
    if run.common.check:
        summary.say_checked(run.rows)
    return run.common.check


def model_source(run: Run) -> dict:
    """Keyword arguments of load.load_policy and load.load_other_models."""
    return {
        "path": run.common.model_name_or_path,
        "revision": run.common.model_revision,
        "trust_remote_code": run.config.trust_remote_code,
        "attn_implementation": run.common.attn_implementation,
        "task": run.method.task,
        "train_mode": run.common.train_mode,
        "dtype": run.common.dtype,
        "tokenizer": run.tokenizer,
        "seed": run.config.seed,
        "deepspeed": run.config.deepspeed_plugin is not None,
    }


def say_start(run: Run) -> resume.Start:
    """Find the checkpoint to resume from, and print it. Raises Refused if it belongs to another run."""
    from utils.runtime import output

    start = resume.Start()
    with run.collecting():
        start, said = resume.find_start(run)
        for line in said:
            output.say(f"note      {line}")
    return start


def new_lora(run: Run) -> LoraConfig | None:
    """The LoraConfig of a new adapter; None for full weights, or if the model is an adapter already."""
    from utils.models import load

    common = run.common
    if common.train_mode == "full" or ModelFolder.at(common.model_name_or_path).adapter:
        return None
    shape = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
    return load.make_lora(run.method.task, *shape, common.use_dora, common.model_revision)


def make_trainer(run: Run, policy: PreTrainedModel, **others: object) -> Trainer:
    """Build the trainer, and check that all processes take part. Raises Refused if TRL refuses the flags.

    others: the other models, by the trainer's keywords.
    """
    from trainers.safe_trainer import make_safe
    from utils.data import prepare
    from utils.runtime import output

    try:
        trainer = make_safe(load(run.method.trainer))(
            model=policy,
            args=run.config,
            processing_class=run.tokenizer,
            train_dataset=prepare.as_dataset(run.train),
            eval_dataset=prepare.as_dataset(run.held_out),
            peft_config=new_lora(run),
            **others,
        )
        run.config = trainer.args
    except (ValueError, NotImplementedError) as error:  # TRL's own checks of flags against the model
        raise Refused([output.one_line(error)]) from error
    environment.check_world(trainer.accelerator)
    if run.config.deepspeed_plugin is not None:
        fit_bucket(trainer)
    return trainer


def fit_bucket(trainer: Trainer) -> None:
    """Make DeepSpeed's reduce bucket no larger than the gradients. Unset or "auto": at most its default, 5e8 numbers.

    An "auto" left in place would become hidden_size squared (transformers 5.23, integrations/deepspeed.py).
    """
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    asked = settings.get("reduce_bucket_size", "auto")
    settings["reduce_bucket_size"] = min(int(5e8 if asked == "auto" else float(asked)), trained)


def train_and_report(trainer: Trainer, start: resume.Start, run: Run) -> Report:
    """Train from `start`, evaluate, and draw the report."""
    from utils.data import prepare
    from utils.models import load
    from utils.results import log, report, saves
    from utils.runtime import output
    from utils.survival import bad_steps, stops

    common, config, rows, train, held_out = run.common, run.config, run.rows, run.train, run.held_out
    start = resume.set_aside(config.output_dir, start)
    if environment.is_main():
        saves.prepare_output_dir(config.output_dir, common.overwrite_output_dir, rows.dropped)
    trainer.accelerator.wait_for_everyone()  # no rank looks for a checkpoint while rank 0 moves files
    prepare.check_none_lost(trainer, train, held_out)
    resume.load_adapter(trainer.model, start)
    bad_steps.refuse_broken(trainer.model, common.model_name_or_path)
    trainer.run, trainer.rows, trainer.max_bad_steps = start.run, rows.train, common.max_bad_steps
    trainer.sizes = train.sizes if common.deal_by_length else ()
    follow = report.Report(trainer, run)
    follow.watch.from_reference = not start.weights_only
    output.say(f"trains    {load.count_parameters(trainer.model)}")
    onward = None if start.weights_only else start.checkpoint
    config.eval_on_start = bool(held_out.rows) and onward is None
    try:
        with checkpoints.says_when_full(config.output_dir, "the newest line of the log"):
            stops.train_until_signal(trainer, onward)
            evaluated = trainer.state.global_step in log.evaluated_at(trainer.state)
            if held_out.rows and (config.load_best_model_at_end or not evaluated):
                trainer.evaluate()
    except Exception as error:
        ran_out = is_out_of_memory(error)
        failure = memory.run_out(trainer, run, error) if ran_out else error
        if isinstance(failure, Failed):
            follow.write_error(failure.details)
        raise failure from (error if ran_out else error.__cause__)
    finally:
        follow.draw()
    return follow


def save_and_verify(trainer: Trainer, follow: Report, run: Run, again: dict[str, str]) -> None:
    """Save the result, reopen it in a fresh process, and print the outcome.

    again: variables of the run script to train the result further, in addition to the shared ones.
    """
    from utils.results import saves, summary
    from utils.results.proof import record, verify_in_fresh_process

    common, config, method, after = run.common, run.config, run.method, follow.sample()
    with checkpoints.says_when_full(config.output_dir, "the result"):
        expected = saves.save(trainer, run.tokenizer)
    kept = {"task": method.task, "four_bit": common.train_mode == "qlora", "accelerator": trainer.accelerator}
    record(trainer.model_wrapped, run.tokenizer, config.output_dir, **kept)
    if environment.is_main():
        start = ModelFolder.at(common.model_name_or_path, common.model_revision).starting_weights(common.train_mode)
        try:
            saves.check_trained(config.output_dir, start, expected)
        except saves.Unchanged:
            if not (reason := follow.nothing_learnt()):
                raise
            follow.write_run_card(after)
            raise Failed(reason) from None
        proof = verify_in_fresh_process(config.output_dir)
        follow.write_run_card(after)
        follow.say_end(after)
        summary.say_result(run, proof, again)
