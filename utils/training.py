"""The chapters that the training scripts share: how a run ends, the text it trains on, the training, the save."""

import sys

from utils import checks, environment


def guard(run, argv, onward="--resume_from_checkpoint auto goes on from the newest checkpoint"):
    """Exit status of run(argv): 0 done, 2 refused, 1 failed in one line, 130 interrupted; another error is raised."""
    environment.calm_libraries()
    try:
        return run(argv)
    except checks.Refused as refusal:
        if environment.has_the_word():
            refusal.say()
        return 2
    except KeyboardInterrupt:
        if environment.is_main():
            print(f"interrupted. {onward}", file=sys.stderr)
        return 130
    except checks.Failed as error:
        environment.record_failure(error)
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        environment.record_failure(error)
        raise


def prepare_text(common, config, method, rows, **limits):
    """(tokenizer, rows to train on, held-out rows), as text of the model's own template. Raises Refused."""
    from utils import data, models, text

    tokenizer = models.load_tokenizer(common.model_name_or_path, common.model_revision, config.trust_remote_code)
    rows.notes += text.fit_tokenizer(tokenizer, chat=data.is_chat(rows.train[0][1]))
    limit = checks.length_limit(config, common.model_name_or_path)
    train = text.prepare_rows(rows.train, tokenizer, method.columns, limit, **limits)
    held_out = text.prepare_rows(rows.held_out, tokenizer, method.columns, limit, **limits)
    rows.dropped += train.dropped + held_out.dropped
    data.check_dropped(rows, common.max_drop_fraction)
    text.check_first(train, tokenizer, method.columns)
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


def make_lora(common, method):
    """The LoraConfig to train; None for full weights, or an adapter that goes on being trained."""
    from utils import models

    if common.train_mode == "full" or models.read_adapter(common.model_name_or_path):
        return None
    shape = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
    return models.make_lora(method.task, *shape, common.use_dora, common.model_revision)


def make_trainer(trainer_class, policy, config, tokenizer, train, held_out, lora, **others):
    """The trainer, of all the processes that were asked for. Raises Refused where TRL refuses these flags."""
    from utils import arguments, text

    config.eval_on_start = bool(held_out.rows)
    try:
        trainer = trainer_class(
            model=policy,
            args=config,
            processing_class=tokenizer,
            train_dataset=text.as_dataset(train),
            eval_dataset=text.as_dataset(held_out),
            peft_config=lora,
            **others,
        )
    except (ValueError, NotImplementedError) as error:  # TRL's own checks of flags against the model
        raise checks.Refused([arguments.one_line(error)]) from error
    environment.check_world(trainer.accelerator)
    return trainer


def train_and_report(trainer, common, method, tokenizer, rows, train, held_out):
    """Trains, evaluates, draws; returns the Report of it."""
    from utils import models, report, saves, summary, text

    config = trainer.args
    if environment.is_main():
        saves.prepare_output_dir(config.output_dir, common.overwrite_output_dir, rows.dropped)
    trainer.accelerator.wait_for_everyone()  # nobody looks for a checkpoint before the folder is what it will be
    text.check_none_lost(trainer, train, held_out)
    follow = report.Report(trainer, method, tokenizer, rows.held_out or rows.train)
    summary.say(f"trains    {models.count_parameters(trainer.model)}")
    try:
        trainer.train(resume_from_checkpoint=saves.find_checkpoint(config.output_dir, config.resume_from_checkpoint))
        if held_out.rows:
            trainer.evaluate()
    except checks.Failed as error:
        follow.write_error(error.details)
        raise
    finally:
        follow.draw()
    return follow


def save_and_verify(trainer, follow, argv, name, common, method, tokenizer, rows, train, held_out, again):
    """Saves the result, reopens it, and says what came out. `again`: the run script's variables of this run."""
    from utils import models, saves, summary

    config, after = trainer.args, follow.sample()
    expected = saves.save(trainer, tokenizer)
    if environment.is_main():
        start = models.starting_weights(common.model_name_or_path, common.model_revision, common.train_mode)
        tensors, size = saves.verify_save(config.output_dir, start, expected)
        follow.write_run_card(argv, common, config, name, rows, train, held_out, after)
        follow.say_end(after)
        summary.say_result(common, config, method, tensors, size, again)
