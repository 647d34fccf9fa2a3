"""What a person sees of a run: live bar, metrics.jsonl, two answers before and after, report.png, run_card.json."""

import contextlib
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from utils.data.rows import count_reasons, hash_rows
from utils.data.template import render, tokenize
from utils.results.log import append_line, evaluated_at, keep, read_lines
from utils.results.plots import draw_report
from utils.results.watch import Watch
from utils.runtime import environment, secrets
from utils.runtime.environment import peak_memory
from utils.runtime.output import say
from utils.runtime.paths import write_whole

SAMPLES = 2
SAMPLE_TOKENS = 48


class Report(TrainerCallback):
    """Follows one training. Its first held-out rows (else its first rows) are answered or scored before and after."""

    def __init__(self, trainer, run):
        self.trainer, self.run, self.method, self.tokenizer = trainer, run, run.method, run.tokenizer
        examples = run.rows.held_out or run.rows.train
        rendered = [(last_words(values), *render(self.tokenizer, values)[:2]) for _, values in examples[: 4 * SAMPLES]]
        # nothing can be answered where there is no prompt: plain text to be continued, a chat that we begin
        self.examples = [e for e in rendered if tokenize(self.tokenizer, e[1]) or self.method.task == "SEQ_CLS"][
            :SAMPLES
        ]
        self.folder = Path(trainer.args.output_dir)
        self.main = trainer.accelerator.is_main_process
        self.before, self.bar, self.seconds, self.steps = [], None, 0.0, 0
        self.watch = Watch(self.method, trainer.args)
        trainer.generating, trainer.scoring = self.show_generating, self.show_scoring
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    # ── while it trains ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_begin(self, args, state, control, **kwargs):
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        say(f"start     {state.max_steps} steps of {rows} rows, learning rate {args.learning_rate:g}; measured first")
        self.before = self.first_samples(state.global_step)
        if self.main:
            for name in ("metrics.jsonl", "completions.jsonl"):
                keep(self.folder / name, lambda step: 0 < step <= state.global_step)
            keep(self.folder / "eval.jsonl", evaluated_at(state).__contains__)  # the last is made behind the last step
            self.watch.replay(read_lines(self.folder / "eval.jsonl") + read_lines(self.folder / "metrics.jsonl"))
            self.tokens_before = self.count_tokens()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.main and self.bar is None:
            self.open_bar(state)
        self.step_began = time.perf_counter()

    def open_bar(self, state):
        from tqdm import tqdm

        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            mininterval=0.2 if live else 15,
            dynamic_ncols=live,
        )

    def show_generating(self, tokens, limit):
        if self.bar and sys.stderr.isatty():
            said = f"training, answer token {tokens} of {limit}" if tokens < limit else "training"
            self.bar.set_description(said, refresh=False)
            self.bar.update(0)  # draws no more often than mininterval

    def show_scoring(self, name, seconds):
        """Show the reward that is computed; seconds: None when it is done. In a log file: one line a minute."""
        if self.bar and sys.stderr.isatty():
            said = "training" if seconds is None else f"training, {name} has been scoring for {seconds:.0f} s"
            self.bar.set_description(said)
        elif self.bar and seconds is not None and round(seconds) % 60 == 0:
            self.bar.write(f"note      {name} has been scoring for {seconds:.0f} s", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_began
        self.steps += 1
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.main or not logs:
            return
        if "loss" in logs:
            append_line(self.folder / "metrics.jsonl", {"step": state.global_step, "epoch": state.epoch, **logs})
            if self.bar:
                shown = {"loss": logs["loss"]} | {label: logs.get(key) for label, key in self.method.metrics[:3]}
                self.bar.set_postfix({k: f"{float(v):.3f}" for k, v in shown.items() if v is not None})
            self.warn(state.global_step, logs)
            if state.global_step * 10 // state.max_steps > (state.global_step - 1) * 10 // state.max_steps:
                self.say_sampled(state.global_step)
        elif "eval_loss" in logs:
            line = {"step": state.global_step, "epoch": state.epoch, **logs}
            # Before its first step the policy is its own reference: every pair ties, which TRL counts as wrong.
            accuracy, margin = (f"eval_{dict(self.method.metrics).get(label)}" for label in ("accuracy", "margin"))
            if line.get(margin) == line.get(accuracy) == 0:
                line |= {accuracy: 0.5, "tied": True}
            append_line(self.folder / "eval.jsonl", line)
            self.warn(state.global_step, logs)

    def say_sampled(self, step):
        """The newest of the answers that the policy learns from, with its rewards, ten times a run."""
        logs = getattr(self.trainer, "_logs", None)
        if logs and logs["prompt"]:
            rewards = ", ".join(f"{name} {values[-1]:.3g}" for name, values in logs.get("rewards", {}).items())
            asked, answer = (last_words({"prompt": logs[name][-1]}) for name in ("prompt", "completion"))
            said = f"sampled   step {step}: {shorten(asked, 60)} -> {shorten(answer, 120)}" + f" [{rewards}]" * bool(
                rewards
            )
            (self.bar.write if self.bar else print)(said, file=sys.stdout)

    def warn(self, step, logs):
        """Says in plain words, once each, what the log shows when a run goes wrong."""
        for text in self.watch.see(step, logs):
            (self.bar.write if self.bar else print)(f"warning   step {step}: {text}", file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()

    def first_samples(self, step):
        """What the model said before its first step: said now, or read back where a run goes on."""
        file = self.folder / "samples.json"
        if step and file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        samples = self.sample()
        if self.main:
            write_whole(file, json.dumps(samples, ensure_ascii=False))
        return samples

    def sample(self):
        """[(question, answer)], of a reward model [(question, score)]; every process takes part."""
        import torch
        from trl.models.utils import unwrap_model_for_generation

        found = []
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        accelerator = self.trainer.accelerator
        # autocast: accelerate wraps forward alone in it, and generate goes around that
        # ZeRO-3 was chosen against the whole model on one GPU; on a CPU there is room, and gloo is slow
        gather = accelerator.device.type == "cpu"
        unwrapping = unwrap_model_for_generation(model, accelerator, gather_deepspeed3_params=gather)
        with unwrapping as unwrapped, torch.no_grad(), accelerator.autocast():
            for question, prompt, answers in self.examples:
                if self.method.task == "SEQ_CLS":
                    for answer in answers:
                        ids = torch.tensor([tokenize(self.tokenizer, prompt + answer)], device=unwrapped.device)
                        found.append((question, float(unwrapped(input_ids=ids).logits.float().item())))
                else:
                    ids = torch.tensor([tokenize(self.tokenizer, prompt)], device=unwrapped.device)
                    out = unwrapped.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=False,
                        use_cache=True,
                        max_new_tokens=SAMPLE_TOKENS,
                    )
                    answer = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                    found.append((question, answer.strip()))
        model.train(was_training)
        return found

    # ── when it is over ──────────────────────────────────────────────────────────────────────────────────────────────

    def draw(self):
        """report.png from what metrics.jsonl and eval.jsonl hold, also of a run that was interrupted."""
        if self.main:
            if self.bar:
                self.bar.close()
            with contextlib.suppress(OSError):  # of a full disk, which must not hide why the run ended
                draw_report(self.folder, self.method)

    def write_error(self, details):
        """error.log: the whole traceback of what ended the run in one line."""
        with contextlib.suppress(OSError):  # a full disk, which the one line says
            (self.folder / "error.log").write_text(secrets.hide(details), encoding="utf-8")

    def held_out(self):
        """The method's figures at the first and the last evaluation, or None where nothing is held out."""
        lines = read_lines(self.folder / "eval.jsonl")
        return [self.read_eval(lines[0]), self.read_eval(lines[-1])] if lines else None

    def read_eval(self, line):
        # the loss of a policy upon its own answers says nothing
        found = {} if self.method.sample_reward else {"loss": line["eval_loss"]}
        found |= {label: line[f"eval_{key}"] for label, key in self.method.metrics if f"eval_{key}" in line}
        return found | {"tied": True} if line.get("tied") else found

    def speed(self):
        """Steps, rows and tokens a second inside the optimizer steps: evaluation, samples and saving are left out."""
        args = self.trainer.args
        rows = self.steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found = {"train_seconds": round(self.seconds, 2), "steps": self.steps}
        if not self.steps:
            return found
        found["rows_per_second"] = round(rows / self.seconds, 3)
        if tokens := self.count_tokens() - self.tokens_before:
            found["tokens_per_second"] = round(tokens / self.seconds, 1)
        return found

    def count_tokens(self):
        """The tokens that the log says were seen so far; a run that goes on has those of before in it."""
        return max((line.get("num_tokens") or 0 for line in read_lines(self.folder / "metrics.jsonl")), default=0)

    def write_run_card(self, after):
        """run_card.json: everything needed to do this run again and to judge it."""
        run, config, rows = self.run, self.run.config, self.run.rows
        held, launch = self.held_out(), environment.describe_launch()
        variables = [f"{key}={launch[key]}" for key in ("LAUNCH", "NUM_PROCESSES", "NNODES")]
        start = [*variables, "python", "-m", "utils.launch"] if launch["LAUNCH"] else ["python"]
        card = {
            "method": run.name,
            "command": shlex.join([*start, f"train_{self.method.entry}.py", *secrets.hide_words(run.argv)]),
            **launch,
            "arguments": {**asdict(run.common), **config.to_dict()},
            "versions": versions(),
            "data_hash": hash_rows(rows.train + rows.held_out),
            "train_rows": len(run.train.rows),
            "eval_rows": len(run.held_out.rows),
            "dropped_rows": count_reasons(rows.dropped),
            "cut_answers": run.train.cut + run.held_out.cut,
            "world_size": config.world_size,
            "seed": config.seed,
            "peak_memory_bytes": peak_memory(),
            "throughput": self.speed(),
            "held_out": {"before": held[0], "after": held[1]} if held else None,
            "preflight": [asdict(finding) for finding in rows.findings],
            "warnings": self.watch.warnings,
            "samples": [
                {"question": question, "before": old, "after": new}
                for (question, old), (_, new) in zip(self.before, after, strict=True)
            ],
        }
        text = json.dumps(card, indent=2, ensure_ascii=False, default=str)
        write_whole(self.folder / "run_card.json", secrets.hide(text) + "\n")

    def nothing_learnt(self):
        """Why no weight moved: the rewards of each prompt were equal in every step. None if they were not.

        The reason joins the warnings of run_card.json.
        """
        step, lines = self.trainer.state.global_step, self.trainer.state.log_history
        rollouts = [line for line in lines if "frac_reward_zero_std" in line]  # a rollout may serve several steps
        if not rollouts or any(line["frac_reward_zero_std"] != 1 for line in rollouts):
            return None
        if self.trainer.args.num_generations == 1 and any(line["reward_std"] for line in rollouts):
            return None  # PPO: a group of one answer is always equal to itself
        if any(line.get("grad_norm") for line in lines):
            return None
        rewards = [line["reward"] for line in rollouts]
        mean = f"{min(rewards):.3g}" + f" to {max(rewards):.3g}" * (max(rewards) > min(rewards))
        reason = (
            f"nothing could be learnt: in each of {step} steps all answers to a prompt got the same "
            f"reward (mean {mean}), so every advantage was 0. The weights in {self.folder} are those of the start. "
            "Look at completions.jsonl; a reward that differs, a higher --temperature or more --num_generations helps"
        )
        self.watch.warnings.append({"step": step, "text": reason})
        return reason

    def say_end(self, after):
        """The two examples and the held-out numbers, before and after."""
        for number, ((question, old), (_, new)) in enumerate(zip(self.before, after, strict=True)):
            if self.method.task == "SEQ_CLS":
                side = ("chosen", "rejected")[number % 2]
                say(f"score     {old:6.2f} -> {new:5.2f}  {side:8} answer to: {shorten(question, 60)}")
            else:
                say(f"prompt    {shorten(question, 100)}")
                say(f"  before  {shorten(old, 240)}")
                say(f"  after   {shorten(new, 240)}")
        held = self.held_out()
        if held:
            before, after = held
            notes = {"accuracy": "  (before: policy = reference, every pair ties)"} if before.get("tied") else {}
            names = [name for name in after if name in before and name != "tied"]
            width = max(10, *(len(name) + 1 for name in names))
            say(f"\n{'held out':{width}}{'before':>10}{'after':>10}")
            for name in names:
                say(f"{name:{width}}{before[name]:10.4f}{after[name]:10.4f}{notes.get(name, '')}")


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ── jsonl files of one run ───────────────────────────────────────────────────────────────────────────────────────────


def last_words(values):
    """What is asked in a row: the last turn before the answer, or the end of a plain prompt."""
    asked = values.get("prompt", values.get("messages"))
    if isinstance(asked, str):
        return asked[-200:]
    users = [message["content"] for message in asked if message["role"] != "assistant"]
    return users[-1] if users else asked[-1]["content"] if asked else ""


def shorten(text, length):
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"
