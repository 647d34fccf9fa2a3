"""Explains a step with nan or infinity: the rows, the first tensor, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from utils.runtime.errors import Failed

if TYPE_CHECKING:
    from transformers import Trainer

SHOWN = 3  # rows named
HUGE = 1e4  # far above the weights of a sound model
USUAL = 1e-2  # the highest learning rate of a sound run


def explain_bad_step(trainer: Trainer, norm: float | torch.Tensor) -> str:
    """One line, equal on all processes; each process looks at its own rows."""
    found = [diagnose(trainer, norm)]
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    return max(found)[1]  # from the process that found the most


def diagnose(trainer: Trainer, norm: float | torch.Tensor = 0.0) -> tuple[int, str]:
    """(how many rows and tensors it names, the line), for this process alone."""
    inputs: Any = None
    rows: list[torch.Tensor] = []
    tensor = None
    if trainer.broken:
        inputs, what = trainer.broken
        rows, tensor = find_bad_rows(trainer, inputs)
    else:
        what = f"the gradient is not finite (norm {float(norm):g})"
        if gradient := first_bad_gradient(trainer.model):
            what += f", first in {gradient}"
    if rows:
        what += f" in {name_rows(trainer, rows)}, first in {tensor}"
    return len(rows) + bool(inputs), f"step {trainer.state.global_step + 1}: {what}. {say_cause(trainer, bool(rows))}"


def say_cause(trainer: Trainer, in_rows: bool) -> str:
    args = trainer.args
    weight, largest = largest_weight(trainer.model)
    rate = f"--learning_rate {args.learning_rate:g}"
    if not largest < HUGE:
        return f"{weight} has grown to {largest:g}: {rate} is too high"
    if args.learning_rate > USUAL:
        return f"{rate} is too high: Adam changes each weight by about that much a step"
    if args.fp16:
        return "float16 holds no number above 65504. Type --dtype bfloat16 or float32"
    if in_rows:
        return "The weights are finite, so the text of these rows is the cause. Correct or remove them"
    return f"Weights and outputs are finite. Type a lower value than {rate}"


def refuse_broken(model: torch.nn.Module, path: str) -> None:
    """Raises Failed if a weight is nan or infinite before any training."""
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise Failed(f"{path}: {name} holds nan or infinity before any training. Copy the model again")


def largest_weight(model: torch.nn.Module) -> tuple[str, float]:
    """(name, magnitude) of the trained tensor with the largest number; a nan counts as the largest."""
    held = ((name, local(p)) for name, p in model.named_parameters() if p.requires_grad)
    sizes = {name: max(map(abs, tensor.detach().aminmax())).item() for name, tensor in held if tensor.numel()}
    return max(sizes.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=("", 0.0))


def first_bad_gradient(model: torch.nn.Module) -> str | None:
    """Its name; None if every gradient is bad, as after clipping by a norm of nan."""
    sound = {name: all_finite(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return next((name for name in sound if not sound[name]), None) if any(sound.values()) else None


def all_finite(tensor: torch.Tensor) -> bool:
    if type(tensor).__name__ == "Params4bit":  # packed numbers, even if stored in a float dtype
        return True
    tensor = local(tensor).detach()
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(end.isfinite() for end in tensor.aminmax())  # makes no copy; isfinite() takes 2.5 times the tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor under ZeRO-3 or FSDP2; else the tensor."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def find_bad_rows(trainer: Trainer, inputs: Any) -> tuple[list[torch.Tensor], str | None]:
    """(token rows with a non-finite output, the first such module), each row computed alone.

    ([], None) if the weights are sharded: a process cannot compute alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()):
        return [], None
    bad: list[torch.Tensor] = []
    tensor = None
    for ids in token_rows(inputs, trainer.args.device):
        seen: list[str] = []
        hooks = [module.register_forward_hook(note(seen, name)) for name, module in model.named_modules()]
        try:
            with torch.no_grad(), trainer.accelerator.autocast():
                model(input_ids=ids[None])
        finally:
            for hook in hooks:
                hook.remove()
        if seen:
            bad.append(ids)
            tensor = tensor or seen[0]
    return bad, tensor


def note(seen: list[str], name: str) -> Callable:
    """A forward hook that adds the module to `seen` if its output is not finite."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and not all_finite(first):
            seen.append(f"{name.removeprefix('base_model.model.') or 'the model'} ({type(module).__name__})")

    return hook


def token_rows(inputs: Any, device: torch.device) -> Iterator[torch.Tensor]:
    """Token ids (T,) of each sequence in a pass, without padding. `inputs`: from a collator of TRL, or prompts."""
    if isinstance(inputs, list):
        yield from (torch.tensor(ids, device=device) for ids in inputs)
        return
    for key, ids in inputs.items():
        if key.endswith("input_ids"):
            mask = inputs.get(f"{key.removesuffix('input_ids')}attention_mask", torch.ones_like(ids))
        elif key == "prompt_ids" and "completion_ids" in inputs:
            ids = torch.cat([ids, inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        else:
            continue
        yield from (row[kept.bool()] for row, kept in zip(ids, mask, strict=True) if kept.any())


def name_rows(trainer: Trainer, rows: list[torch.Tensor]) -> str:
    """ "data/kto.jsonl:17, data/kto.jsonl:4": the data rows of these tokens, or else the start of the first text.

    The two answers of a pair are one row. KTO also pairs a prompt with another row's answer, which is no data row.
    """
    texts = [squeeze(trainer.processing_class.decode(ids, skip_special_tokens=True)) for ids in rows]
    found = [next((where for where, values in trainer.rows if holds(text, values)), None) for text in texts]
    named = list(dict.fromkeys(filter(None, found))) or [f'the row that begins "{texts[0][:60]}"']
    return ", ".join(named[:SHOWN]) + ", ..." * (len(named) > SHOWN)


def holds(text: str, values: dict) -> bool:
    """True if the text contains the end of a row's prompt and the start of one of its answers."""
    prompt = squeeze(last_text(values.get("prompt", values.get("messages", ""))))
    answers = [squeeze(last_text(values[name])) for name in ("chosen", "rejected", "completion") if name in values]
    return prompt[-60:] in text and (not answers or any(answer[:60] in text for answer in answers))


def last_text(value: str | list[dict]) -> str:
    """A text, or the text of the last message of a chat."""
    return value if isinstance(value, str) else value[-1]["content"] if value else ""


def squeeze(text: str) -> str:
    return " ".join(text.split())
