"""The chapters that the training scripts share: how a run ends, the text it trains on, the training, the save."""

import signal
import sys

from utils.checks import flags
from utils.models.folders import ModelFolder
from utils.runtime import environment, secrets
from utils.runtime.environment import is_out_of_memory
from utils.runtime.errors import Again, Failed, Refused, Stopped, refuse_if
from utils.survival import checkpoints, memory, resume


def guard(run, argv, onward="the same command with --resume_from_checkpoint auto goes on from there"):
    """Exit status of run(argv): 0 done, 2 refused, 1 failed in one line, 128+N stopped by signal N.

    Another error is raised. `onward`: how a run goes on that was stopped.
    """
    environment.calm_libraries()
    try:
        return run(argv)
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
            print("failed: out of memory outside of the training: a smaller model, --train_mode qlora or LAUNCH=zero3 "
                  f"would help ({secrets.hide(' '.join(str(error).split()))[:300]})", file=sys.stderr)  # fmt: skip
            return 1
        raise


def prepare_text(common, config, method, rows, **limits):
    """(tokenizer, rows to train on, held-out rows), as text of the model's own template. Raises Refused.

    What preflight.py finds, which the main process looks for, goes to rows.findings.
    """
    from utils.checks import findings
    from utils.data import cache, columns, prepare, template
    from utils.data.rows import check_dropped
    from utils.models import load
    from utils.training import pace

    refuse_if(ModelFolder.at(common.model_name_or_path).check("--model_name_or_path"))
    tokenizer = load.load_tokenizer(common.model_name_or_path, common.model_revision, config.trust_remote_code)
    rows.notes += template.fit_tokenizer(tokenizer, chat=columns.is_chat(rows.train[0][1]))
    limit = flags.length_limit(config, common.model_name_or_path)
    train = cache.prepare_rows(rows.train, tokenizer, method.columns, limit, **limits)
    held_out = cache.prepare_rows(rows.held_out, tokenizer, method.columns, limit, **limits)
    rows.dropped += train.dropped + held_out.dropped
    faster = pace.choose(common, config, method, train, held_out)
    if environment.is_main() and train.rows:
        rows.findings += [findings.Finding("pace", line) for line in faster]
        rows.findings += findings.findings(common, config, method, rows, tokenizer, train, held_out)
    check_dropped(rows, common.max_drop_fraction)
    prepare.check_first(train, tokenizer, method.columns)
    return tokenizer, train, held_out


def model_source(common, config, method, tokenizer):
    """What models.load_policy and its kin need to know, by keyword."""
    return {
        "path": common.model_name_or_path,
        "revision": common.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": common.attn_implementation,
        "task": method.task,
        "train_mode": common.train_mode,
        "dtype": common.dtype,
        "tokenizer": tokenizer,
        "seed": config.seed,
        "deepspeed": config.deepspeed_plugin is not None,
    }


def find_start(common, config, name, rows):
    """The checkpoints.Start of this run, said. Raises Refused where there is one of another run."""
    from utils.runtime import output

    start, said = resume.find_start(common, config, name, rows)
    for line in said:
        output.say(f"note      {line}")
    return start


def make_lora(common, method):
    """The LoraConfig to train; None for full weights, or an adapter that goes on being trained."""
    from utils.models import load

    if common.train_mode == "full" or ModelFolder.at(common.model_name_or_path).adapter:
        return None
    shape = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
    return load.make_lora(method.task, *shape, common.use_dora, common.model_revision)


def make_trainer(trainer_class, policy, config, tokenizer, train, held_out, lora, **others):
    """The trainer, of all the processes that were asked for. Raises Refused where TRL refuses these flags."""
    from trainers.safe_trainer import make_safe
    from utils.data import prepare
    from utils.runtime import output

    try:
        trainer = make_safe(trainer_class)(
            model=policy,
            args=config,
            processing_class=tokenizer,
            train_dataset=prepare.as_dataset(train),
            eval_dataset=prepare.as_dataset(held_out),
            peft_config=lora,
            **others,
        )
    except (ValueError, NotImplementedError) as error:  # TRL's own checks of flags against the model
        raise Refused([output.one_line(error)]) from error
    environment.check_world(trainer.accelerator)
    if config.deepspeed_plugin is not None:
        fit_bucket(trainer)
    return trainer


def fit_bucket(trainer):
    """Makes DeepSpeed's reduce bucket no larger than the gradients. Unset or "auto": at most its default, 5e8 numbers.

    An "auto" left in place would become hidden_size squared (transformers 5.23, integrations/deepspeed.py).
    """
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    asked = settings.get("reduce_bucket_size", "auto")
    settings["reduce_bucket_size"] = min(int(5e8 if asked == "auto" else float(asked)), trained)


def train_and_report(trainer, start, common, method, tokenizer, rows, train, held_out):
    """Trains from `start` on, evaluates, draws; returns the Report of it."""
    from utils.data import prepare
    from utils.models import load
    from utils.results import log, report, saves
    from utils.runtime import output
    from utils.survival import bad_steps, stops

    config = trainer.args
    start = resume.set_aside(config.output_dir, start)
    if environment.is_main():
        saves.prepare_output_dir(config.output_dir, common.overwrite_output_dir, rows.dropped)
    trainer.accelerator.wait_for_everyone()  # nobody looks for a checkpoint before the folder is what it will be
    prepare.check_none_lost(trainer, train, held_out)
    resume.load_adapter(trainer.model, start)
    bad_steps.refuse_broken(trainer.model, common.model_name_or_path)
    trainer.run, trainer.rows, trainer.max_bad_steps = start.run, rows.train, common.max_bad_steps
    trainer.sizes = train.sizes if common.deal_by_length else ()
    follow = report.Report(trainer, method, tokenizer, rows.held_out or rows.train)
    follow.watch.from_reference = not start.weights_only
    output.say(f"trains    {load.count_parameters(trainer.model)}")
    onward = None if start.weights_only else start.checkpoint
    config.eval_on_start = bool(held_out.rows) and onward is None
    try:
        with checkpoints.says_when_full(config.output_dir, "the newest line of the log"):
            stops.train(trainer, onward)
            evaluated = trainer.state.global_step in log.evaluated_at(trainer.state)
            if held_out.rows and (config.load_best_model_at_end or not evaluated):
                trainer.evaluate()
    except Exception as error:
        ran_out = is_out_of_memory(error)
        failure = memory.run_out(trainer, method, common, error) if ran_out else error
        if isinstance(failure, Failed):
            follow.write_error(failure.details)
        raise failure from (error if ran_out else error.__cause__)
    finally:
        follow.draw()
    return follow


def save_and_verify(trainer, follow, argv, name, common, method, tokenizer, rows, train, held_out, again):
    """Saves the result, has a fresh process reopen it, and says what came out. `again`: the run script's variables."""
    from utils.results import saves, summary
    from utils.results.proof import record, verify_in_fresh_process

    config, after = trainer.args, follow.sample()
    with checkpoints.says_when_full(config.output_dir, "the result"):
        expected = saves.save(trainer, tokenizer)
    kept = {"task": method.task, "four_bit": common.train_mode == "qlora", "accelerator": trainer.accelerator}
    record(trainer.model_wrapped, tokenizer, config.output_dir, **kept)
    if environment.is_main():
        start = ModelFolder.at(common.model_name_or_path, common.model_revision).starting_weights(common.train_mode)
        try:
            saves.check_trained(config.output_dir, start, expected)
        except saves.Unchanged:
            if not (reason := follow.nothing_learnt()):
                raise
            follow.write_run_card(argv, common, config, name, rows, train, held_out, after)
            raise Failed(reason) from None
        proof = verify_in_fresh_process(config.output_dir)
        follow.write_run_card(argv, common, config, name, rows, train, held_out, after)
        follow.say_end(after)
        summary.say_result(common, config, method, proof, again)
