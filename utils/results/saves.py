"""Save the result, and check it: every trained parameter is there, and some differ from the start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.runtime.errors import Failed
from utils.runtime.paths import empty

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer

Tensors = dict[str, Callable[[], "torch.Tensor"]]  # functions that read a tensor of a safetensors file


def save(trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Save model or adapter (safetensors), tokenizer and chat template to output_dir; all processes call it.

    Returns the number of trained parameters that the save must contain.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    for adapter in [name for name in getattr(model, "peft_config", {}) if name in ("ref", "reward")]:
        model.delete_adapter(
            adapter
        )  # frozen: the copy of an adapter that was trained further, or a judge on the same base
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
    # ds_numel: full size of a parameter sharded by ZeRO-3. A critic is not part of the result
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "critic." not in name]
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained)


class Unchanged(Failed):
    """The saved weights are whole, but equal to the initial weights."""


def check_trained(folder: str | Path, start: str | Path | None, expected: int) -> None:
    """Raises Failed if the safetensors in `folder` are not a trained model, Unchanged if they equal the start.

    start: folder of the initial weights; None for a new adapter, whose lora_B starts at zero.
    expected: number of trained parameters; the save may hold more (buffers, embeddings), never fewer.
    """
    tensors = open_tensors(folder)
    begun = open_tensors(start) if start else {}
    held, moved = 0, False
    for name, read in tensors.items():
        held += read().numel()
        moved = moved or differs(name, read(), begun, start)
    if held < expected:
        raise Failed(f"{folder} is not a sound save: {held} numbers where {expected} were trained")
    if not moved:
        raise Unchanged(f"{folder} is not a sound save: no weight differs from the start")


def differs(name: str, tensor: "torch.Tensor", begun: Tensors, start: str | Path | None) -> bool:
    if start is None:
        return "lora_B" in name and bool(tensor.any())
    return name in begun and not tensor.float().equal(begun[name]().float())


def open_tensors(folder: str | Path) -> Tensors:
    """{name: function that reads the tensor}, for all safetensors files of a folder; {} for a Hub id."""
    from safetensors import safe_open

    found: Tensors = {}
    for file in sorted(file for file in Path(folder).glob("*.safetensors") if file.name != "critic.safetensors"):
        handle = safe_open(file, framework="pt")
        found |= {name: (lambda handle=handle, name=name: handle.get_tensor(name)) for name in handle.keys()}
    return found


def prepare_output_dir(folder: str | Path, overwrite: bool, dropped: list[tuple]) -> None:
    """Make the folder, empty it if asked, and write dropped.jsonl: each unused row with the reason."""
    folder = Path(folder)
    if overwrite and folder.is_dir():
        empty(folder)  # the folder itself may be a link or a mount
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "dropped.jsonl", "w", encoding="utf-8") as handle:
        for where, reason, values in dropped:
            line = {"where": where, "reason": reason, "row": values}
            handle.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
