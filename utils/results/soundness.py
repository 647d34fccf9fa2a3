"""The files of a result: whole, finite, nothing missing, nothing pickled."""

import json
import re
from pathlib import Path

from utils.models.folders import ModelFolder
from utils.runtime import output

PICKLED = re.compile(r"(pytorch_model|adapter_model|model|consolidated).*\.(bin|pt|pth|ckpt)")


def check_files(folder: Path) -> tuple[list[str], int, int]:
    """(problems, tensors, bytes of the weights) of a model's or adapter's folder, or of a checkpoint."""
    model = ModelFolder.at(folder)
    problems = model.check("folder")
    if (folder / "manifest.json").exists():
        from utils.survival import checkpoints

        problems += checkpoints.problems_of(folder)
    problems += [
        f"{file.name}: pickled weights, which can run code when read. Delete it"
        for file in sorted(folder.iterdir())
        if PICKLED.fullmatch(file.name)
    ]
    held, moved, size = {}, False, 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        wrong, held[file.name], adapts = check_tensors(file)
        problems += wrong
        moved |= adapts
    problems += check_index(folder, held)
    if model.described and (folder / "adapter_config.json").exists():
        if not model.config:
            problems.append(f"its base model {model.base.path} does not exist")
        if held and not moved:
            problems.append("every lora_B is zero, or there is none: the adapter does nothing")
    return problems, sum(map(len, held.values())), size


def check_tensors(file: Path) -> tuple[list[str], list[str], bool]:
    """(problems, names, whether a lora_B is not zero) of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    problems, names, adapts = [], [], False
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                names.append(name)
                if tensor.numel() == 0:
                    problems.append(f"{name} is empty")
                elif tensor.is_floating_point() and not tensor.isfinite().all():
                    problems.append(f"{name} has NaN or infinity in it")
                adapts |= "lora_B" in name and bool(tensor.any())
    except SafetensorError as error:
        problems.append(f"{file.name} is not a whole safetensors file ({output.first_line(error)})")
    return problems, names, adapts


def check_index(folder: Path, held: dict[str, list[str]]) -> list[str]:
    """Problems of weights in several files. `held`: {file name: names of its tensors}."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        pieces = [name for name in held if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
        return [f"{pieces[0]} is one of several files, and there is no model.safetensors.index.json"] if pieces else []
    try:
        mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        return [f"{index.name} cannot be read"]
    missing = [f"{name} is missing, which {index.name} names" for name in sorted({*mapped.values()} - held.keys())]
    return missing + [f"{name} is not in {file}" for name, file in mapped.items() if name not in held.get(file, name)]
