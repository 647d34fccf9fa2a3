"""Why a step came out as nan or infinity: in which rows, in which tensor first, and what most likely made it so."""

import math

import torch

from utils.runtime.errors import Failed

SHOWN = 3  # rows named
HUGE = 1e4  # no weight of a sound model comes near
USUAL = 1e-2  # no learning rate of a sound run is above


def explain(trainer, norm):
    """One line, the same on all processes; each looks at its own rows."""
    found = [diagnose(trainer, norm)]
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    return max(found)[1]  # of the process that names the most


def diagnose(trainer, norm=None):
    """(how much it names, the line), of what this process has seen."""
    inputs, rows, tensor = None, [], None
    if trainer.broken:
        inputs, what = trainer.broken
        rows, tensor = find_bad_rows(trainer, inputs)
    else:
        what = f"the gradient is no number (norm {float(norm):g})"
        if gradient := first_bad_gradient(trainer.model):
            what += f", first in {gradient}"
    if rows:
        what += f" in {name_rows(trainer, rows)}, first in {tensor}"
    return len(rows) + bool(inputs), f"step {trainer.state.global_step + 1}: {what}. {say_cause(trainer, bool(rows))}"


def say_cause(trainer, in_rows):
    args = trainer.args
    weight, largest = largest_weight(trainer.model)
    rate = f"--learning_rate {args.learning_rate:g}"
    if not largest < HUGE:
        return f"{weight} has grown to {largest:g}: {rate} is too high"
    if args.learning_rate > USUAL:
        return f"{rate} is too high: Adam moves each weight by about that much a step"
    if args.fp16:
        return "float16 ends at 65504: type --dtype bfloat16 or float32"
    if in_rows:
        return "The weights are sound, so it is what these rows say: mend or remove them"
    return f"Weights and outputs are sound: a lower value than {rate} would help"


def refuse_broken(model, path):
    """Raises Failed where a model has weights that are no numbers before any training."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise Failed(f"{path}: {name} holds nan or infinity before any training. Copy the model again")


def largest_weight(model):
    """(name, magnitude) of the trained tensor that holds the largest number, nan if one is none."""
    held = ((name, local(p)) for name, p in model.named_parameters() if p.requires_grad)
    sizes = {name: max(map(abs, tensor.detach().aminmax())).item() for name, tensor in held if tensor.numel()}
    return max(sizes.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], default=("", 0.0))


def first_bad_gradient(model):
    """Its name; None where all are bad, as clipping by a norm of nan makes them."""
    sound = {name: is_finite(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return next((name for name in sound if not sound[name]), None) if any(sound.values()) else None


def is_finite(tensor):
    if type(tensor).__name__ == "Params4bit":  # packed numbers, be it in the dtype of floats
        return True
    tensor = local(tensor).detach()
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(end.isfinite() for end in tensor.aminmax())  # no copies, where isfinite() takes 2.5 times the tensor


def local(tensor):
    """What this process holds of a tensor that ZeRO-3 or FSDP2 has cut in pieces."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def find_bad_rows(trainer, inputs):
    """(token rows of the pass whose outputs are no numbers, the first module that gives such), each computed alone.

    Nothing where the weights lie in pieces on all processes: one of them cannot compute alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()):
        return [], None
    bad, tensor = [], None
    for ids in token_rows(inputs, trainer.args.device):
        seen = []
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


def note(seen, name):
    """A hook that adds `name` to `seen` where a module gives out what is no number."""

    def hook(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and not is_finite(first):
            seen.append(f"{name.removeprefix('base_model.model.') or 'the model'} ({type(module).__name__})")

    return hook


def token_rows(inputs, device):
    """Token ids (T,) of each sequence in a pass, without padding; of any of TRL's collators, or a list of prompts."""
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


def name_rows(trainer, rows):
    """ "data/kto.jsonl:17, data/kto.jsonl:4": the rows whose words the tokens hold, or else how the first text begins.

    Both answers of a pair are one row; KTO's passes also hold a prompt with another row's answer, which is none.
    """
    texts = [squeeze(trainer.processing_class.decode(ids, skip_special_tokens=True)) for ids in rows]
    found = [next((where for where, values in trainer.rows if holds(text, values)), None) for text in texts]
    named = list(dict.fromkeys(filter(None, found))) or [f'the row that begins "{texts[0][:60]}"']
    return ", ".join(named[:SHOWN]) + ", ..." * (len(named) > SHOWN)


def holds(text, values):
    """Whether a text is made of a row: it has the end of the prompt in it, and how one of its answers begins."""
    prompt = squeeze(words(values.get("prompt", values.get("messages", ""))))
    answers = [squeeze(words(values[name])) for name in ("chosen", "rejected", "completion") if name in values]
    return prompt[-60:] in text and (not answers or any(answer[:60] in text for answer in answers))


def words(value):
    """A text, or what the last message of a chat says."""
    return value if isinstance(value, str) else value[-1]["content"] if value else ""


def squeeze(text):
    return " ".join(text.split())
