"""Train a model with one of the methods of rlhf_args/methods.py: preferences, reward models, online RL, supervised.

    bash rlhf_run.sh                                    the shipped job, through accelerate launch
    python train_rlhf.py --rlhf_type SimPO --help       every flag of a method
    python train_rlhf.py --model_name_or_path MODEL --train_data_path data/preference.jsonl --output_dir OUT

Exit status: 0 done, 2 refused before a model was loaded (one line a problem, nothing written), 1 failed while running,
130 interrupted.
"""

import sys

from rlhf_args.methods import METHODS, load
from utils import arguments, checks, data, environment


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    environment.calm_libraries()
    try:
        return run(argv)
    except checks.Refused as refusal:
        if environment.has_the_word():
            refusal.say()
        return 2
    except KeyboardInterrupt:
        if environment.is_main():
            print("interrupted. --resume_from_checkpoint auto goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except checks.Failed as error:
        environment.record_failure(error)
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        environment.record_failure(error)
        raise


def run(argv):
    common, config, name, rows = parse_and_check(argv)
    method = METHODS[name]

    from utils import models, report, reward_models, rewards, saves, summary, text

    # ── the text that is trained on ──────────────────────────────────────────────────────────────────────────────────
    tokenizer = models.load_tokenizer(common.model_name_or_path, common.model_revision, config.trust_remote_code)
    rows.notes += text.fit_tokenizer(tokenizer, chat=data.is_chat(rows.train[0][1]))
    limit = checks.length_limit(config, common.model_name_or_path)
    train = text.prepare_rows(rows.train, tokenizer, method.columns, limit)
    held_out = text.prepare_rows(rows.held_out, tokenizer, method.columns, limit)
    rows.dropped += train.dropped + held_out.dropped
    data.check_dropped(rows, common.max_drop_fraction)
    text.check_first(train, tokenizer, method.columns)
    checks.check_rollout_fits(config, len(train.rows))
    summary.say_plan(common, config, name, method, tokenizer, rows, train, held_out)
    judges = rewards.load_functions(common.reward_funcs, rows.train, tokenizer)
    if common.check:
        summary.say("checked   nothing stands in the way; no model was loaded, nothing was written")
        return 0

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────
    source = {
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
    judged = {
        "policy_path": common.model_name_or_path,
        "policy_revision": common.model_revision,
        "train_mode": common.train_mode,
        "dtype": common.dtype,
        "device": config.device,
        "batch_size": max(8, config.per_device_train_batch_size),
        "trust_remote_code": config.trust_remote_code,
    }
    others = {}
    if method.sample_reward:
        others["reward_funcs"] = judges
        if common.reward_model_path:
            judges.append(reward_models.load_model(common.reward_model_path, rows.train, **judged))
    policy = models.load_policy(**source)
    if models.needs_reference(config, method):
        others |= models.load_other_models(method.models, **source)
    lora = None  # full weights, or an adapter that goes on being trained
    if common.train_mode != "full" and not models.read_adapter(common.model_name_or_path):
        shape = common.lora_rank, common.lora_alpha, common.lora_dropout, common.lora_target_modules
        lora = models.make_lora(method.task, *shape, common.use_dora, common.model_revision)

    # ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────
    config.eval_on_start = bool(held_out.rows)
    try:
        trainer = load(method.trainer)(
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
    after = follow.sample()

    # ── save, and prove the save ─────────────────────────────────────────────────────────────────────────────────────
    expected = saves.save(trainer, tokenizer)
    if environment.is_main():
        start = models.starting_weights(common.model_name_or_path, common.model_revision, common.train_mode)
        tensors, size = saves.verify_save(config.output_dir, start, expected)
        follow.write_run_card(argv, common, config, name, rows, train, held_out, after)
        follow.say_end(after)
        summary.say_result(common, config, name, method, tensors, size)
    return 0


def parse_and_check(argv):
    """Flags, folders and every data row. What needs no library is refused within a second, so that comes first."""
    words = arguments.expand(argv)
    common, name = arguments.parse_common(words)
    method = METHODS[name]
    words = arguments.translate(words, dict(method.renamed))
    if not arguments.asks_help(words):
        problems = checks.check_common(common, name, method)
        paths = common.train_data_path, common.eval_data_path
        rows = data.load_rows(*paths, method.columns, name, common.max_samples, problems)
    common, config = arguments.parse(words, name)
    checks.refuse_if(checks.check_config(common, config, name, method))
    data.hold_out(rows, common.eval_fraction, config.seed)
    data.check_labels(rows.train, name)
    return common, config, name, rows


if __name__ == "__main__":
    sys.exit(main())
