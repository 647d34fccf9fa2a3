"""Why a step came out as nan or infinity: in which rows, in which tensor first, and what most likely made it so."""

import sys

import torch

from utils.environment import is_main

SHOWN = 3  # rows named


def explain(trainer, norm):
    """One line, the same on all processes; each looks at its own rows."""
    found = [diagnose(trainer, norm)]
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    return max(found)[1]  # of the process that names the most


def diagnose(trainer, norm):
    """(how much it names, the line)."""
    args, step = trainer.args, trainer.state.global_step + 1
    inputs, loss = trainer.broken or (None, None)
    what = f"step {step}: the gradient is no number (norm {float(norm):g})" if inputs is None else (
        f"step {step}: the loss is {loss:g}"
    )  # fmt: skip
    weight = first_bad_weight(trainer.model)
    if weight:
        since = "before the first step: the model's folder is broken, copy it again" if step == 1 else (
            f"since an earlier step: --learning_rate {args.learning_rate:g} is too high, a tenth would do"
        )  # fmt: skip
        return 1, f"{what}, as {weight} is no number {since}"
    rows, bad, tensor = ([], [], None) if inputs is None else find_bad_rows(trainer, inputs)
    if bad:
        where = ", ".join(name_row(trainer, row) for row in bad[:SHOWN]) + ", ..." * (len(bad) > SHOWN)
        cause = "every row of this pass gives it" if len(bad) == len(rows) > 1 else "mend or remove what is named"
        return 3, f"{what} in {where}, first in {tensor}; the weights are sound: {say_cause(args, cause)}"
    gradient = first_bad_gradient(trainer.model)
    where = f", first in the gradient of {gradient}" if gradient else ""
    lower = f"a lower --learning_rate than {args.learning_rate:g} would help"
    return 2 if inputs else 0, f"{what}{where}; weights and outputs are sound: {say_cause(args, lower)}"


def say_cause(args, otherwise):
    return "float16 ends at 65504, type --dtype bfloat16 or float32" if args.fp16 else otherwise


def warn(line, trainer):
    if is_main():
        print(f"warning   {line}", file=sys.stderr)


def first_bad_weight(model):
    return next((name for name, p in model.named_parameters() if not is_finite(p)), None)


def first_bad_gradient(model):
    found = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, gradient in found if not is_finite(gradient)), None)


def is_finite(tensor):
    tensor = getattr(tensor, "ds_tensor", tensor)  # of ZeRO-3 the part that this process holds
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def find_bad_rows(trainer, inputs):
    """(token rows of the pass, those whose outputs are no numbers, the first module that gives such), each alone.

    Nothing where the weights lie in pieces on all processes: one of them cannot compute alone.
    """
    rows = list(token_rows(inputs))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters()):
        return rows, [], None
    bad, tensor = [], None
    for ids in rows:
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
    return rows, bad, tensor


def note(seen, name):
    """A hook that adds `name` to `seen` where a module gives out what is no number."""

    def hook(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and not is_finite(first):
            seen.append(f"{name.removeprefix('base_model.model.') or 'the model'} ({type(module).__name__})")

    return hook


def token_rows(inputs):
    """Token ids (T,) of each sequence in a pass, without padding; of any of TRL's collators."""
    for key, ids in inputs.items():
        if key.endswith("input_ids"):
            mask = inputs.get(f"{key.removesuffix('input_ids')}attention_mask", torch.ones_like(ids))
        elif key == "prompt_ids" and "completion_ids" in inputs:
            ids = torch.cat([ids, inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        else:
            continue
        yield from (row[kept.bool()] for row, kept in zip(ids, mask, strict=True) if kept.any())


def name_row(trainer, ids):
    """ "data/kto.jsonl:17" of the row whose words the tokens hold, or how the text begins."""
    text = squeeze(trainer.processing_class.decode(ids, skip_special_tokens=True))
    where = next((where for where, values in trainer.rows if holds(text, values)), None)
    return where or f'the row that begins "{text[:60]}"'


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
