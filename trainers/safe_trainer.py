"""What every trainer here does beside training: whole checkpoints, exact resumes, no step on numbers that are none."""

import contextlib
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path

import numpy
import torch

from utils.data import deal
from utils.runtime import output
from utils.runtime.errors import Failed
from utils.survival import checkpoints
from utils.survival.bad_steps import diagnose, explain_bad_step
from utils.survival.stops import Left

# What TRL's trainers count from log to log and from rollout to rollout, which transformers' checkpoints leave out.
PROGRESS = (
    "_step", "_buffered_inputs", "_metrics", "_stored_metrics", "_total_train_tokens", "_tr_loss",
    "_globalstep_last_logged", "_total_loss_scalar", "bad_steps", "owed",
)  # fmt: skip


class Safe:
    """Mixin before any trainer of transformers.

    `run`: what the manifest of each checkpoint says of it (checkpoints.describe_run). `rows`: (where, values) of what
    is trained on, to name the row that broke a step. `sizes`: of each row, the tokens of its sequences, where a step's
    rows are dealt to its passes by their length (utils/data/deal.py).
    """

    run, rows, max_bad_steps, sizes = {}, (), 1, ()
    aside = None  # where a checkpoint is being written
    hashing = None  # the thread that hashes the newest one
    broken = None  # the first pass of this step that came out as no number: (its inputs, what is none)
    bad_steps = 0
    owed = False  # whether this step's evaluation is still to be made: a signal came before it was over
    loss_before = None, None  # the step under way, and the sum of the losses that were not logged before it
    in_pass = False  # whether forward or backward is under way: then weights and optimizer are those of the last step

    def get_train_dataloader(self):
        loader, args = super().get_train_dataloader(), self.args
        if self.sizes:
            step = self._train_batch_size, args.gradient_accumulation_steps, args.world_size
            whole = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # before it is shared out
            lengths = [max(row) for row in self.sizes]
            loader.set_sampler(deal.Dealt(whole.sampler, lengths, *step, args.dataloader_drop_last))
        return loader

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _get_output_dir(self, trial):
        return str(self.aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        """Written aside, sealed, then renamed: a kill or a full disk in between leaves the earlier ones alone."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.aside = folder / checkpoints.ASIDE
        self.remove_aside()
        try:
            with checkpoints.says_when_full(folder, name):
                super()._save_checkpoint(model, trial)
                self.save_progress(self.aside / name)
                self.accelerator.wait_for_everyone()
                self.seal(folder, self.aside / name)
        except Failed:
            self.remove_aside(wait=False)
            raise
        finally:
            self.aside = None
        self.accelerator.wait_for_everyone()

    def remove_aside(self, wait=True):
        if self.is_local_process_zero():
            shutil.rmtree(self.aside, ignore_errors=True)
        if wait:
            self.accelerator.wait_for_everyone()

    def seal(self, folder, written):
        """The main process names the checkpoint; then each other node, where its files lie on a disk of its own."""
        if self.is_world_process_zero():
            best = self.state.best_global_step
            if best:  # transformers has looked for it beside the one being written
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                self.state.save_to_json(str(written / "trainer_state.json"))
            self.finish_hashing()
            checkpoints.seal(written, self.run)
            checkpoints.move_into_place(written, folder / written.name)
            self.hashing = checkpoints.add_hashes_meanwhile(folder / written.name)
            best = self.state.best_model_checkpoint
            checkpoints.rotate(folder, self.args.save_total_limit, best, folder / written.name)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and written.exists():
            checkpoints.move_into_place(written, folder / written.name)
        self.remove_aside(wait=False)

    def _save(self, *args, **kwargs):
        """Without the token, which training_args.bin would hold as it is."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token

    def finish_hashing(self):
        if self.hashing:
            self.hashing.join()

    # ── a resume ends as the run would have that was never stopped ───────────────────────────────────────────────────

    def save_progress(self, folder):
        found = {name: getattr(self, name) for name in PROGRESS if hasattr(self, name)}
        found["passes"] = self.args.gradient_accumulation_steps
        os.makedirs(folder, exist_ok=True)
        torch.save(to_plain(found), folder / f"progress_{self.args.process_index}.pt")

    def _load_from_checkpoint(self, *args, **kwargs):
        with kept_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self):
        with kept_dtypes(self.model):
            super()._load_best_model()

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.to_restore = resume_from_checkpoint
        return super().train(resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """Nothing where the checkpoint is that of the last step: transformers would train one more."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _finalize_training(self, *args, **kwargs):
        if self.to_restore:
            self._load_rng_state(self.to_restore)
        return super()._finalize_training(*args, **kwargs)

    def _load_rng_state(self, checkpoint):
        """Called when a run goes on, after the rows before have been skipped; what was counted comes back as well."""
        super()._load_rng_state(checkpoint)
        self.to_restore = None
        found = torch.load(Path(checkpoint, f"progress_{self.args.process_index}.pt"), weights_only=True)
        if found.pop("passes") != self.args.gradient_accumulation_steps:  # --auto_batch: begin with a new rollout
            found |= {
                "_buffered_inputs": None,
                "_step": self.state.global_step * self.args.gradient_accumulation_steps,
            }
        for name, value in found.items():
            if hasattr(self, name):
                setattr(self, name, like(getattr(self, name), value, self.args.device))
        if self.owed:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self.owed = False

    def _evaluate(self, *args, **kwargs):
        """One that is left is made again when the run goes on, from where it began."""
        before = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), get_cuda_states()
        try:
            return self.check_best(super()._evaluate(*args, **kwargs))
        except Left:
            random.setstate(before[0]), numpy.random.set_state(before[1]), torch.set_rng_state(before[2])
            torch.cuda.set_rng_state_all(before[3])
            for counted in (getattr(self, name, {}) for name in ("_metrics", "_stored_metrics")):
                counted.get("eval", {}).clear()
            self.owed = True
            raise

    def check_best(self, metrics):
        """The metrics of an evaluation, the number in them that the best checkpoint is chosen by. Raises Failed."""
        asked = self.args.metric_for_best_model
        name = asked and f"eval_{asked.removeprefix('eval_')}"
        if name and metrics.get(name) is None:
            there = ", ".join(sorted(key for key, value in metrics.items() if value is not None))
            raise Failed(f"--metric_for_best_model {asked}: this evaluation has no such number. It has {there}")
        return metrics

    # ── no step on a loss or a gradient that is no number ────────────────────────────────────────────────────────────

    def _prepare_inputs(self, inputs):
        self.prepared = super()._prepare_inputs(inputs)
        return self.prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.in_pass = True
        if self.loss_before[0] != self.state.global_step:
            self.loss_before = self.state.global_step, self._tr_loss.clone()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            prompts = self._tokenize_prompts([row.get("prompt", row.get("prompt_ids")) for row in inputs])[0]
            self.broken = prompts, "the likelihood of the next token is nan"
            raise Failed(diagnose(self)[1]) from error
        self.in_pass = False
        if self.broken is None and not torch.isfinite(loss):
            self.broken = self.prepared, f"the loss is {float(loss):g}"
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm, looked at before the optimizer's step (DeepSpeed's own step is done by then)."""
        norm = super()._get_grad_norm(model, grad_norm)
        bad = self.broken is not None or norm is not None and not bool(torch.isfinite(torch.as_tensor(norm)))
        if not self.of_any_process(bad):
            return norm
        if self.args.fp16 and not self.of_any_process(self.broken is not None):
            return norm  # its loss scaler leaves such a step out and goes on with a smaller scale
        self.bad_steps += 1
        said = explain_bad_step(self, norm)
        if self.bad_steps >= self.max_bad_steps:
            raise Failed(said)
        output.warn(f"{said}. The step is left out, {self.bad_steps} of fewer than --max_bad_steps")
        for parameter in self.model.parameters():
            parameter.grad = None
        self.broken = None
        return None

    def of_any_process(self, flag):
        """Whether it holds for any process."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), reduction="sum"))


def make_safe(trainer_class):
    """The trainer's class with Safe before it."""
    return type(trainer_class.__name__, (Safe, trainer_class), {})


def get_cuda_states():
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def to_plain(value):
    """With builtin containers alone, as torch.load takes them without running code."""
    if isinstance(value, dict):
        return {key: to_plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(held) for held in value]
    return value


def like(old, value, device):
    """What to_plain made of a value, in the containers of the one that it replaces, on this process's device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [like(None, held, device) for held in value]
    if not isinstance(value, dict):
        return value
    into = old if isinstance(old, dict) else {}
    held = {k: like(into[k] if isinstance(into, defaultdict) else into.get(k), v, device) for k, v in value.items()}
    into.clear()
    into.update(held)
    return into


@contextlib.contextmanager
def kept_dtypes(model):
    """PEFT loads adapters in float32: QLoRA's, which are trained in bfloat16, would go on in another precision."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])
