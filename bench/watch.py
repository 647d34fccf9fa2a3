"""Logs the steps of transformers.Trainer: the sitecustomize.py of each training process of bench/speed.py.

The process may be a peer's, with other packages: only the standard library is imported here.
"""

import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
import time
from pathlib import Path

STARTED, RESULT = "SPEED_STARTED", "SPEED_RESULT"  # start of the command (seconds), file of the result


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Wraps transformers.Trainer when it is imported: every side trains with it."""

    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run, loader = spec.loader.exec_module, spec.loader
        loader.exec_module = lambda module: (run(module), wrap(module.Trainer))
        return spec


def wrap(trainer_class):
    import torch

    step, log = trainer_class.training_step, trainer_class.log
    seen = {"start": None, "ends": [], "tokens": [], "losses": []}

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time() - float(os.environ[STARTED])

    def timed_step(self, model, inputs, *args, **kwargs):
        seen["start"] = seen["start"] or now()
        seen["tokens"].append(count_tokens(inputs))
        loss = step(self, model, inputs, *args, **kwargs)
        seen["ends"].append(now())
        gpu = torch.cuda.is_available()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seen["peak_bytes"] = torch.cuda.max_memory_allocated() if gpu else resident
        return loss

    def kept_log(self, logs, *args, **kwargs):
        if "loss" in logs:
            seen["losses"].append(float(logs["loss"]))
        if "train_runtime" in logs:  # training has ended; saving is not measured
            Path(os.environ[RESULT]).write_text(json.dumps(seen))
            os._exit(0)
        return log(self, logs, *args, **kwargs)

    trainer_class.training_step, trainer_class.log = timed_step, kept_log


def count_tokens(inputs):
    """Tokens of a pass without padding, without the rows of KTO's KL estimate and without separate prompts."""
    masks = {name.lower(): value for name, value in inputs.items() if name.endswith("attention_mask")}
    return sum(int(mask.sum()) for name, mask in masks.items() if not name.startswith(("kl", "prompt")))


if RESULT in os.environ:
    sys.meta_path.insert(0, TrainerFinder())
