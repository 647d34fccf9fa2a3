"""Train a model with one of the methods of rlhf_args/methods.py: preferences, reward models, supervised.

    bash rlhf_run.sh                                    the shipped job, through accelerate launch
    python train_rlhf.py --rlhf_type SimPO --help       every flag of a method
    python train_rlhf.py --model_name_or_path MODEL --train_data_path data/preference.jsonl --output_dir OUT

Exit status: 0 done, 2 refused before a model was loaded (one line a problem, nothing written), 1 failed while running.
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
        if environment.is_main():
            print("\n".join(f"refused: {problem}" for problem in refusal.problems), file=sys.stderr)
        return 2


def run(argv):
    # ── what needs no library is refused within a second: flags, folders, every data row ─────────────────────────────
    words = arguments.expand(argv)
    common, name = arguments.parse_common(words)
    method = METHODS[name]
    if not arguments.asks_help(words):
        problems = checks.check_common(common, name, method)
        try:
            rows = data.load_rows(
                common.train_data_path, common.eval_data_path, method.columns, name, common.max_samples
            )
        except checks.Refused as refusal:
            problems += refusal.problems
        checks.refuse_if(problems)

    # ── the method's own flags ───────────────────────────────────────────────────────────────────────────────────────
    common, config = arguments.parse(words, name)
    checks.refuse_if(checks.check_config(common, config, name, method))

    # ── the text that will be trained on ─────────────────────────────────────────────────────────────────────────────
    from utils import models, text

    data.hold_out(rows, common.eval_fraction, config.seed)
    data.check_labels(rows.train, name)
    tokenizer = models.load_tokenizer(common.model_name_or_path, common.model_revision, config.trust_remote_code)
    rows.notes += text.fit_tokenizer(tokenizer, chat=data.is_chat(rows.train[0][1]))
    train = text.prepare_rows(rows.train, tokenizer, method.columns, config.max_length)
    held_out = text.prepare_rows(rows.held_out, tokenizer, method.columns, config.max_length)
    rows.dropped += train.dropped + held_out.dropped
    data.check_dropped(rows, common.max_drop_fraction)
    text.check_first(train, tokenizer, method.columns)
    say_plan(common, config, name, method, rows, train, held_out)
    if common.check:
        say("checked   nothing stands in the way; nothing was loaded or written")
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
    policy = models.load_policy(**source)
    others = (
        {} if getattr(config, "precompute_ref_log_probs", False) else models.load_other_models(method.models, **source)
    )
    lora = None
    if common.train_mode != "full" and not models.read_adapter(common.model_name_or_path):
        lora = models.make_lora(
            method.task,
            common.lora_rank,
            common.lora_alpha,
            common.lora_dropout,
            common.lora_target_modules,
            common.use_dora,
        )

    # ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────
    from utils import report, saves

    if environment.is_main():
        saves.prepare_output_dir(config.output_dir, common.overwrite_output_dir, rows.dropped)
    config.eval_on_start = bool(held_out.rows)
    trainer = load(method.trainer)(
        model=policy,
        args=config,
        processing_class=tokenizer,
        train_dataset=text.as_dataset(train),
        eval_dataset=text.as_dataset(held_out),
        peft_config=lora,
        **others,
    )
    text.check_none_lost(trainer, train, held_out)
    follow = report.Report(trainer, method, tokenizer, rows.held_out or rows.train)
    say(f"trains    {models.count_parameters(trainer.model)}\n")
    try:
        trainer.train(resume_from_checkpoint=saves.find_checkpoint(config.output_dir, config.resume_from_checkpoint))
        if held_out.rows:
            trainer.evaluate()
    finally:
        follow.draw()

    # ── save, and prove the save ─────────────────────────────────────────────────────────────────────────────────────
    after = follow.sample()
    expected = saves.save(trainer, tokenizer)
    if environment.is_main():
        start = models.starting_weights(common.model_name_or_path, common.model_revision, common.train_mode)
        tensors, size = saves.verify_save(config.output_dir, start, expected)
        follow.write_run_card(argv, common, config, name, rows, train, held_out, after)
        follow.print_end(say, after)
        say_result(common, config, method, tensors, size)
    return 0


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def say_plan(common, config, name, method, rows, train, held_out):
    from utils import models, text

    rank, alpha, dora = common.lora_rank, common.lora_alpha, common.use_dora
    adapter = models.read_adapter(common.model_name_or_path)
    if adapter and common.train_mode != "full":
        rank, alpha, dora = adapter["r"], adapter["lora_alpha"], adapter.get("use_dora")
        if (rank, alpha) != (common.lora_rank, common.lora_alpha):
            rows.notes.append(
                f"goes on with the adapter as it is, rank {rank}: --lora_rank and its kin have no effect"
            )
    lora = f", {'DoRA' if dora else 'LoRA'} rank {rank}, alpha {alpha}" if common.train_mode != "full" else ""
    refused = ", ".join(f"{count} {reason}" for reason, count in data.count_reasons(rows.dropped).items()) or "none"
    held = (
        f"{len(held_out.rows)} held out"
        if held_out.rows
        else "nothing held out (--eval_fraction 0.1 measures the result)"
    )
    devices = f"{config.world_size} process{'es' * (config.world_size > 1)} on {config.device.type}"
    say(f"method    {name}: {method.title} ({method.source})")
    say(f"model     {common.model_name_or_path}")
    say(f"mode      {common.train_mode}{lora}; {common.dtype}, {devices}")
    say(f"reference {models.describe_reference(method.models, common.model_name_or_path, common.train_mode)}")
    say(f"data      {len(train.rows)} rows to train on, {held}; refused: {refused}")
    if train.cut + held_out.cut:
        say(f"          {train.cut + held_out.cut} answers are cut at --max_length {config.max_length}")
    if train.reshaped:
        say(f"          in {train.reshaped} rows the template writes the prompt differently once an answer follows")
    for note in rows.notes:
        say(f"note      {note}")
    say(f"first row {text.mark(train.first, sys.stdout.isatty())}")


def say_result(common, config, method, tensors, size):
    out, model = config.output_dir, common.model_name_or_path
    say(f"\nresult    {out}: {tensors} tensors, {size / 1e6:.1f} MB, reopened and verified; report.png, run_card.json")
    if method.task == "CAUSAL_LM":
        say(f"chat      python -m utils.chat {out}")
    if common.train_mode != "full":
        say(f"merge     python -m utils.merge_lora {out} {out}-merged")
    say(f"continue  MODEL={out} OUTPUT_DIR={out}-2 bash rlhf_run.sh" if model else "")


def say(line):
    if environment.is_main():
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
