"""Signals during training: finish the step, save a checkpoint, end the run. A second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from utils.runtime import environment
from utils.runtime.errors import Stopped

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

SAVE_NOW = "SAVE_NOW"  # a file of this name in the output folder: save a checkpoint and continue


class Stops(TrainerCallback):
    """Watches for SIGTERM, SIGINT and SAVE_NOW while `trainer` trains, in a `with`."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.asked, self.ends = trainer, 0, False
        self.file = Path(trainer.args.output_dir) / SAVE_NOW
        trainer.add_callback(self)

    def __enter__(self) -> Stops:
        self.before: dict = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals there
            self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.asked or environment.other_failed():
            os._exit(128 + number)
        self.asked = number
        if environment.is_main():
            name = signal.Signals(number).name
            said = f"{name}: finishes this step and saves a checkpoint. A second signal ends the run at once"
            os.write(2, f"\n{said}\n".encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked, save = self.agree()
        if asked or save:
            control.should_save = True
        if asked:
            self.trainer.owed = control.should_evaluate
            control.should_evaluate, control.should_training_stop, self.ends = False, True, True

    def on_prediction_step(self, *call: Any, **kwargs: Any) -> None:
        """Stops in the middle of an evaluation, which is repeated on resume."""
        asked, _ = self.agree()
        if asked and self.trainer.is_in_train:
            raise Left

    def on_save(self, *call: Any, **kwargs: Any) -> None:
        if self.trainer.is_world_process_zero():
            self.file.unlink(missing_ok=True)
        if self.ends:  # before the trainer loads the best model and deletes files that it takes for leftovers
            raise Left

    def agree(self) -> list[int]:
        """[the signal that a process got or 0, 1 if SAVE_NOW is there], equal on all processes."""
        found = [self.asked, int(self.trainer.is_world_process_zero() and self.file.exists())]
        if self.trainer.args.world_size > 1:
            flags = torch.tensor(found, device=self.trainer.args.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            found = flags.tolist()
        self.asked = self.asked or found[0]  # a signal may have come in the meantime
        return found


class Left(Exception):
    """Ends Trainer.train() because of a signal: during an evaluation, or after the checkpoint."""


def train_until_signal(trainer: Trainer, checkpoint: Path | None = None) -> None:
    """Trains, resuming from the checkpoint if there is one. Raises Stopped if a signal ended the run."""
    with Stops(trainer) as stops:
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except Left:
            step = trainer.state.global_step
            if step and not Path(trainer.args.output_dir, f"checkpoint-{step}").exists():
                trainer._save_checkpoint(trainer.model_wrapped, None)
        trainer.finish_hashing()
    if stops.asked:
        raise Stopped(stops.asked, trainer.state.global_step)
