"""A mixin for every trainer: complete checkpoints, exact resumes, no optimizer step on nan or infinity."""

import contextlib
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from utils.data import deal
from utils.runtime import output
from utils.runtime.errors import Failed
from utils.survival import checkpoints
from utils.survival.bad_steps import diagnose, explain_bad_step
from utils.survival.stops import Left

# Attributes that TRL's trainers keep between logs and rollouts, and that transformers' checkpoints leave out.
PROGRESS = (
    "_step", "_buffered_inputs", "_metrics", "_stored_metrics", "_total_train_tokens", "_tr_loss",
    "_globalstep_last_logged", "_total_loss_scalar", "bad_steps", "owed",
)  # fmt: skip


class Safe(Trainer):
    """Mixin before any trainer derived from transformers' Trainer.

    `run`: the description of the run in each checkpoint's manifest (checkpoints.describe_run).
    `rows`: the training rows as (where, values), to name the row that broke a step.
    `sizes`: the token counts of each row's sequences; not empty: deal the rows of a step to its passes by length
    (utils/data/deal.py).
    """

    run: dict[str, Any] = {}
    rows: Sequence[tuple[str, dict[str, Any]]] = ()
    max_bad_steps = 1
    sizes: Sequence[Sequence[int]] = ()
    aside: Path | None = None  # the folder of the checkpoint that is being written
    hashing: Thread | None = None  # computes the hashes of the newest checkpoint
    broken: tuple[Any, str] | None = (
        None  # the first pass of this step with nan or infinity: (its inputs, the symptom)
    )
    bad_steps = 0
    owed = False  # True if a signal interrupted this step's evaluation, which must be repeated
    loss_before: tuple[int | None, Any] = (None, None)  # (current step, sum of the unlogged losses before that step)
    in_pass = False  # True during forward or backward: weights and optimizer are those of the last step

    def get_train_dataloader(self) -> DataLoader:
        loader, args = super().get_train_dataloader(), self.args
        if self.sizes:
            step = self._train_batch_size, args.gradient_accumulation_steps, args.world_size
            whole = getattr(
                loader.batch_sampler, "batch_sampler", loader.batch_sampler
            )  # without accelerate's sharding
            lengths = [max(row) for row in self.sizes]
            loader.set_sampler(deal.Dealt(whole.sampler, lengths, *step, args.dataloader_drop_last))
        return loader

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write to a side folder, then rename: a kill or a full disk leaves the earlier checkpoints intact."""
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

    def remove_aside(self, wait: bool = True) -> None:
        if self.is_local_process_zero():
            shutil.rmtree(str(self.aside), ignore_errors=True)
        if wait:
            self.accelerator.wait_for_everyone()

    def seal(self, folder: Path, written: Path) -> None:
        """Rename the finished checkpoint: first rank 0, then each node that wrote to a disk of its own."""
        if self.is_world_process_zero():
            best = self.state.best_global_step
            if best:  # transformers looked for the best one in the side folder
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

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Save without the Hub token, which training_args.bin would contain in plain text."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token

    def finish_hashing(self) -> None:
        if self.hashing:
            self.hashing.join()

    # ── a resumed run ends like an uninterrupted run ─────────────────────────────────────────────────────────────────

    def save_progress(self, folder: Path) -> None:
        found = {name: getattr(self, name) for name in PROGRESS if hasattr(self, name)}
        found["passes"] = self.args.gradient_accumulation_steps
        os.makedirs(folder, exist_ok=True)
        torch.save(to_plain(found), folder / f"progress_{self.args.process_index}.pt")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with kept_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with kept_dtypes(self.model):
            super()._load_best_model()

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self.to_restore = resume_from_checkpoint
        return super().train(resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Train nothing after a resume from the last step: transformers would train one step more."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.to_restore:
            self._load_rng_state(self.to_restore)
        return super()._finalize_training(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str) -> None:
        """Also restore the PROGRESS attributes. Called on resume, after the used rows were skipped."""
        super()._load_rng_state(checkpoint)
        self.to_restore = None
        found = torch.load(Path(checkpoint, f"progress_{self.args.process_index}.pt"), weights_only=True)
        if (
            found.pop("passes") != self.args.gradient_accumulation_steps
        ):  # changed by --auto_batch: start with a new rollout
            step = self.state.global_step * self.args.gradient_accumulation_steps
            found |= {"_buffered_inputs": None, "_step": step}
        for name, value in found.items():
            if hasattr(self, name):
                setattr(self, name, like(getattr(self, name), value, self.args.device))
        if self.owed:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self.owed = False

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An interrupted evaluation is repeated on resume, with the random state from its beginning."""
        before = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
        try:
            return self.check_best(super()._evaluate(*args, **kwargs))
        except Left:
            random.setstate(before[0]), numpy.random.set_state(before[1]), torch.set_rng_state(before[2])
            torch.cuda.set_rng_state_all(before[3])
            for counted in (getattr(self, name, {}) for name in ("_metrics", "_stored_metrics")):
                counted.get("eval", {}).clear()
            self.owed = True
            raise

    def check_best(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics. Raises Failed if --metric_for_best_model is not among them."""
        asked = self.args.metric_for_best_model
        name = asked and f"eval_{asked.removeprefix('eval_')}"
        if name and metrics.get(name) is None:
            there = ", ".join(sorted(key for key, value in metrics.items() if value is not None))
            raise Failed(f"--metric_for_best_model {asked}: this evaluation has no such number. It has {there}")
        return metrics

    # ── no step on a nan or infinite loss or gradient ────────────────────────────────────────────────────────────────

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        self.prepared = super()._prepare_inputs(inputs)
        return self.prepared

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
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

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, checked before the optimizer's step (DeepSpeed has already made its own step)."""
        norm = super()._get_grad_norm(model, grad_norm)
        bad = self.broken is not None or norm is not None and not bool(torch.isfinite(torch.as_tensor(norm)))
        if not self.of_any_process(bad):
            return norm
        if self.args.fp16 and not self.of_any_process(self.broken is not None):
            return norm  # the loss scaler skips this step and lowers its scale
        self.bad_steps += 1
        said = explain_bad_step(self, norm)
        if self.bad_steps >= self.max_bad_steps:
            raise Failed(said)
        output.warn(f"{said}. Step skipped: {self.bad_steps} so far, --max_bad_steps {self.max_bad_steps} stops")
        for parameter in self.model.parameters():
            parameter.grad = None
        self.broken = None
        return None

    def of_any_process(self, flag: bool) -> bool:
        """True if `flag` is True on any process."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), reduction="sum"))


def make_safe(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of the trainer with Safe as its mixin."""
    return type(trainer_class.__name__, (Safe, trainer_class), {})


def to_plain(value: Any) -> Any:
    """Replace containers by builtin ones, which torch.load(weights_only=True) accepts."""
    if isinstance(value, dict):
        return {key: to_plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(held) for held in value]
    return value


def like(old: Any, value: Any, device: torch.device) -> Any:
    """Undo to_plain: move tensors to the device and fill the containers of `old`, the value to replace."""
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
def kept_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Keep the dtypes of trained parameters: PEFT loads adapters in float32, but QLoRA trains them in bfloat16."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])
