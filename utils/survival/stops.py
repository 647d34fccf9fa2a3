"""Signals while a run trains: the step is finished, a checkpoint saved, the run ended; a second signal ends it now."""

import os
import signal
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback

from utils.runtime import environment
from utils.runtime.errors import Stopped

SAVE_NOW = "SAVE_NOW"  # a file of this name in the output folder: save a checkpoint and go on


class Stops(TrainerCallback):
    """Watches for SIGTERM, SIGINT and SAVE_NOW while `trainer` trains, in a `with`."""

    def __init__(self, trainer):
        self.trainer, self.asked, self.ends = trainer, 0, False
        self.file = Path(trainer.args.output_dir) / SAVE_NOW
        trainer.add_callback(self)

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals there
            self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.asked or environment.other_failed():
            os._exit(128 + number)
        self.asked = number
        if environment.is_main():
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishes this step and saves a checkpoint. Once more ends at once\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        asked, save = self.agree()
        if asked or save:
            control.should_save = True
        if asked:
            self.trainer.owed = control.should_evaluate
            control.should_evaluate, control.should_training_stop, self.ends = False, True, True

    def on_prediction_step(self, args, state, control, **kwargs):
        """An evaluation may take long, and changes nothing: it is left."""
        asked, _ = self.agree()
        if asked and self.trainer.is_in_train:
            raise Left

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.is_world_process_zero():
            self.file.unlink(missing_ok=True)
        if self.ends:  # before the trainer would load the best model, and delete what it takes for left over
            raise Left

    def agree(self):
        """(the signal that some process got or 0, whether a checkpoint is asked for), the same on all processes."""
        found = [self.asked, int(self.trainer.is_world_process_zero() and self.file.exists())]
        if self.trainer.args.world_size > 1:
            flags = torch.tensor(found, device=self.trainer.args.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            found = flags.tolist()
        self.asked = self.asked or found[0]  # another may have come meanwhile
        return found


class Left(Exception):
    """Training was left because of a signal: in an evaluation, or once the checkpoint was there."""


def train(trainer, checkpoint=None):
    """Trains, from a checkpoint on if there is one. Raises Stopped where a signal ended it."""
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
