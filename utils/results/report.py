"""The report of a run: progress bar, metrics.jsonl, two answers before and after, report.png, run_card.json."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from utils.cli.run import Run
from utils.data.rows import count_reasons, hash_rows
from utils.data.template import render, tokenize
from utils.results.log import append_line, evaluated_at, keep, read_lines
from utils.results.plots import draw_report
from utils.results.watch import Watch
from utils.runtime import environment, secrets
from utils.runtime.environment import peak_memory
from utils.runtime.output import say
from utils.runtime.paths import write_whole

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

SAMPLES = 2
SAMPLE_TOKENS = 48
Sample = tuple[str, str | float]  # (question, answer), or (question, score) for a reward model


class Report(TrainerCallback):
    """Follows one training. The first held-out rows (or training rows) are answered or scored before and after it."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer, self.run, self.method, self.tokenizer = trainer, run, run.method, run.tokenizer
        examples = run.rows.held_out or run.rows.train
        rendered = [(last_words(values), *render(self.tokenizer, values)[:2]) for _, values in examples[: 4 * SAMPLES]]
        # a row without a prompt cannot be answered: plain text, or a chat that the assistant opens
        self.examples = [e for e in rendered if tokenize(self.tokenizer, e[1]) or self.method.task == "SEQ_CLS"][
            :SAMPLES
        ]
        self.folder = Path(trainer.args.output_dir)
        self.main = trainer.accelerator.is_main_process
        self.before: list[Sample] = []
        self.bar, self.seconds, self.steps = None, 0.0, 0
        self.watch = Watch(self.method, trainer.args)
        trainer.generating, trainer.scoring = self.show_generating, self.show_scoring
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    # ── while it trains ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        say(f"start     {state.max_steps} steps of {rows} rows, learning rate {args.learning_rate:g}")
        say("          the model is measured before the first step")
        self.before = self.first_samples(state.global_step)
        if self.main:
            for name in ("metrics.jsonl", "completions.jsonl"):
                keep(self.folder / name, lambda step: 0 < step <= state.global_step)
            keep(self.folder / "eval.jsonl", evaluated_at(state).__contains__)  # the last one follows the last step
            self.watch.replay(read_lines(self.folder / "eval.jsonl") + read_lines(self.folder / "metrics.jsonl"))
            self.tokens_before = self.count_tokens()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.main and self.bar is None:
            self.open_bar(state)
        self.step_began = time.perf_counter()

    def open_bar(self, state: TrainerState) -> None:
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

    def show_generating(self, tokens: int, limit: int) -> None:
        if self.bar and sys.stderr.isatty():
            said = f"training, answer token {tokens} of {limit}" if tokens < limit else "training"
            self.bar.set_description(said, refresh=False)
            self.bar.update(0)  # draws no more often than mininterval

    def show_scoring(self, name: str, seconds: float | None) -> None:
        """Show the reward that is computed; seconds: None when it is done. In a log file: one line a minute."""
        if self.bar and sys.stderr.isatty():
            said = "training" if seconds is None else f"training, {name} has been scoring for {seconds:.0f} s"
            self.bar.set_description(said)
        elif self.bar and seconds is not None and round(seconds) % 60 == 0:
            self.bar.write(f"note      {name} has been scoring for {seconds:.0f} s", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.seconds += time.perf_counter() - self.step_began
        self.steps += 1
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
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

    def say_sampled(self, step: int) -> None:
        """Print the newest sampled answer with its rewards, ten times a run."""
        logs = getattr(self.trainer, "_logs", None)
        if logs and logs["prompt"]:
            rewards = ", ".join(f"{name} {values[-1]:.3g}" for name, values in logs.get("rewards", {}).items())
            asked, answer = (last_words({"prompt": logs[name][-1]}) for name in ("prompt", "completion"))
            said = f"sampled   step {step}: {shorten(asked, 60)} -> {shorten(answer, 120)}" + f" [{rewards}]" * bool(
                rewards
            )
            (self.bar.write if self.bar else print)(said, file=sys.stdout)

    def warn(self, step: int, logs: dict[str, float]) -> None:
        """Print the new warnings of this line of the log (watch.py)."""
        for text in self.watch.see(step, logs):
            (self.bar.write if self.bar else print)(f"warning   step {step}: {text}", file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar:
            self.bar.close()

    def first_samples(self, step: int) -> list[Sample]:
        """The samples from before the first step: made now, or read from samples.json on resume."""
        file = self.folder / "samples.json"
        if step and file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        samples = self.sample()
        if self.main:
            write_whole(file, json.dumps(samples, ensure_ascii=False))
        return samples

    def sample(self) -> list[Sample]:
        """[(question, answer)], or [(question, score)] for a reward model. Collective: every rank calls it."""
        import torch
        from trl.models.utils import unwrap_model_for_generation

        found: list[Sample] = []
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        accelerator = self.trainer.accelerator
        # accelerate autocasts forward only, and generate does not call that wrapper
        # ZeRO-3: do not gather the whole model on one GPU; a CPU has the memory, and gloo is slow
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

    def draw(self) -> None:
        """Draw report.png from metrics.jsonl and eval.jsonl, also after an interruption."""
        if self.main:
            if self.bar:
                self.bar.close()
            with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
                draw_report(self.folder, self.method)

    def write_error(self, details: str) -> None:
        """Write the whole traceback to error.log."""
        with contextlib.suppress(OSError):  # a full disk: the printed line says why the run ended
            (self.folder / "error.log").write_text(secrets.hide(details), encoding="utf-8")

    def held_out(self) -> list[dict] | None:
        """[first, last] evaluation as {label: value}; None without held-out rows."""
        lines = read_lines(self.folder / "eval.jsonl")
        return [self.read_eval(lines[0]), self.read_eval(lines[-1])] if lines else None

    def read_eval(self, line: dict) -> dict:
        # the loss of a policy on its own answers says nothing
        found = {} if self.method.sample_reward else {"loss": line["eval_loss"]}
        found |= {label: line[f"eval_{key}"] for label, key in self.method.metrics if f"eval_{key}" in line}
        return found | {"tied": True} if line.get("tied") else found

    def speed(self) -> dict[str, float]:
        """Rows and tokens per second of the optimizer steps, without evaluation, samples and saving."""
        args = self.trainer.args
        rows = self.steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found = {"train_seconds": round(self.seconds, 2), "steps": self.steps}
        if not self.steps:
            return found
        found["rows_per_second"] = round(rows / self.seconds, 3)
        if tokens := self.count_tokens() - self.tokens_before:
            found["tokens_per_second"] = round(tokens / self.seconds, 1)
        return found

    def count_tokens(self) -> int:
        """Tokens seen so far, from the log; on resume it includes the earlier part."""
        return max((line.get("num_tokens") or 0 for line in read_lines(self.folder / "metrics.jsonl")), default=0)

    def write_run_card(self, after: list[Sample]) -> None:
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

    def nothing_learnt(self) -> str | None:
        """Why no weight moved: all answers to each prompt got equal rewards in every step. None if some differed.

        The reason is added to the warnings of run_card.json.
        """
        step, lines = self.trainer.state.global_step, self.trainer.state.log_history
        rollouts = [line for line in lines if "frac_reward_zero_std" in line]  # a rollout may serve several steps
        if not rollouts or any(line["frac_reward_zero_std"] != 1 for line in rollouts):
            return None
        if self.trainer.args.num_generations == 1 and any(line["reward_std"] for line in rollouts):
            return None  # PPO: a group of one answer has no spread
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

    def say_end(self, after: list[Sample]) -> None:
        """Print the two examples and the held-out metrics, before and after."""
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
            first, last = held
            notes = {"accuracy": "  (before: policy = reference, every pair ties)"} if first.get("tied") else {}
            names = [name for name in last if name in first and name != "tied"]
            width = max(10, *(len(name) + 1 for name in names))
            say(f"\n{'held out':{width}}{'before':>10}{'after':>10}")
            for name in names:
                say(f"{name:{width}}{first[name]:10.4f}{last[name]:10.4f}{notes.get(name, '')}")


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def last_words(values: dict) -> str:
    """The question of a row: the last turn before the answer, or the last 200 characters of a plain prompt."""
    asked = values["prompt"] if "prompt" in values else values["messages"]
    if isinstance(asked, str):
        return asked[-200:]
    users = [message["content"] for message in asked if message["role"] != "assistant"]
    return users[-1] if users else asked[-1]["content"] if asked else ""


def shorten(text: object, length: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"
