"""Proof that a saved model computes as in memory: a probe beside the weights is recomputed in a fresh process."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from utils.models import load
from utils.models.folders import ModelFolder, read_json_file
from utils.results.soundness import check_files
from utils.runtime import output, paths
from utils.runtime.errors import Failed, Refused

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2. 今天天气很好。 def f(x): return x"
FILE = "probe.json"
LIKELIEST = 64  # tokens per position whose log-probabilities are recorded
# Largest difference of log-probabilities, by the lowest precision on either side; the mean may be a quarter of it.
# On the same kind of device sums are mostly equal to the last digit, in 4 bits too: SAME_DEVICE applies. Other devices
# add in another order. SmolLM2-135M on a CPU, eager against sdpa attention: float32 4e-5 (mean 6e-6), bfloat16 0.48
# (0.09), nf4 in bfloat16 0.69 (0.09); float16 has 8 times bfloat16's precision.
TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0, "nf4": 1.5}
SAME_DEVICE = 0.05  # for precisions below float32: an engine may add in another order (5e-3 seen)
OUT_OF_MEMORY = 137  # exit status for too little memory to reopen the model, which is no fault of the saved files
TIES = 0.25  # share of positions where rounding may make another token the likeliest (2 of 41 seen)
OF_A_LAUNCH = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|DS_ACCELERATOR|(MASTER|ACCELERATE|FSDP|TORCHELASTIC|LAUNCH)_.*"
)


def record(
    model: "Module",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    *,
    task: str,
    four_bit: bool = False,
    accelerator: "Accelerator | None" = None,
) -> None:
    """Write probe.json: the model's outputs for the probe. All processes call it, rank 0 writes.

    model: as wrapped by the engine of `accelerator`. Computed in the dtype of the weights, without autocast.
    Raises Failed if the outputs have NaN.
    """
    was_training = model.training
    model.eval()
    with unwrapped(model, accelerator) as inner:
        mixed = is_mixed(inner)
        # float32 norms between 4-bit layers and a bfloat16 head need autocast
        with accelerator.autocast() if mixed and accelerator else contextlib.nullcontext():
            values = compute_outputs(inner, tokenizer(TEXT)["input_ids"], task)
        held_in = inner.get_input_embeddings().weight.dtype
        kinds = {p.dtype for p in inner.parameters() if p.is_floating_point()}
    model.train(was_training)
    # only FSDP2 computes in another dtype than that of the weights, also for a float32 adapter on a bfloat16 base
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator else None
    computed_in = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    dtype, exact_to = (str(one).removeprefix("torch.") for one in (held_in, computed_in or held_in))
    exact_to = "bfloat16" if mixed else exact_to
    same = exact_to == dtype and (computed_in is None or kinds == {computed_in})
    if accelerator is None or accelerator.is_main_process:
        write_probe(folder, values, tokenizer, task=task, dtype=dtype, exact_to=exact_to, same=same, four_bit=four_bit)


def is_mixed(model: "Module") -> bool:
    """True if the frozen weights have more than one dtype."""
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name and "score" not in name]
    return len({p.dtype for p in frozen if p.is_floating_point()}) > 1


@contextlib.contextmanager
def unwrapped(model: "Module", accelerator: "Accelerator | None") -> Iterator["Module"]:
    """The model without the wrappers of accelerate and the engine; all processes call it."""
    if accelerator is None:
        yield model
        return
    from trl.models.utils import unwrap_model_for_generation

    # as in report.Report.sample: CPU memory holds a whole model, and gloo is slow
    gather = accelerator.device.type == "cpu"
    with unwrap_model_for_generation(model, accelerator, gather_deepspeed3_params=gather) as inner:
        with_autocast, plain = inner.forward, vars(inner).get("_original_forward")
        if plain is not None:
            inner.forward = plain
        try:
            yield inner
        finally:
            if plain is not None:
                inner.forward = with_autocast


def compute_outputs(model: "Module", ids: list[int], task: str) -> "torch.Tensor":
    """Outputs of `model` for `ids` (T,), in float32: log-probabilities (T, V), or scores of tokens (T, 1)."""
    import torch

    ids = torch.tensor([ids], device=model.device)
    heard = []
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    # a reward model returns only the last token's score, which two models may share by chance
    hook = base.score.register_forward_hook(lambda head, _, out: heard.append(out)) if task == "SEQ_CLS" else None
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        torch.set_float32_matmul_precision(precision)
        if hook:
            hook.remove()
    return heard[0][0].float() if hook else out.logits[0].float().log_softmax(-1)


def write_probe(
    folder: str | Path,
    values: "torch.Tensor",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task: str,
    dtype: str,
    exact_to: str,
    same: bool,
    four_bit: bool = False,
) -> None:
    """Write probe.json from the outputs of `ask`.

    exact_to: the lowest precision on either side. same: True if the reopened model computes in the same precision.
    """
    import torch

    kept = values if task == "SEQ_CLS" else values.topk(min(LIKELIEST, values.shape[1])).values
    if not torch.isfinite(kept).all():
        raise Failed("the trained model answers the probe with NaN")
    probe = {
        "task": task,
        "dtype": dtype,
        "four_bit": four_bit,
        "exact_to": "nf4" if four_bit else exact_to,
        "device": name_device(values.device) if same else None,  # the sums differ on every device
        "chat_template": hash_template(tokenizer),
        "input_ids": tokenizer(TEXT)["input_ids"],
        "tokens": None if task == "SEQ_CLS" else values.topk(kept.shape[1]).indices.tolist(),
        "values": [[float(f"{value:.9g}") for value in row] for row in kept.tolist()],  # full precision of float32
    }
    Path(folder, FILE).write_text(json.dumps(probe) + "\n", encoding="utf-8")


def name_device(device: "torch.device") -> str:
    """Decides the order of sums: the model of a GPU, the instruction set of a CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def hash_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def verify_in_fresh_process(folder: str | Path, device: str = "cpu") -> str:
    """The line of `python -m utils.verify FOLDER`, or a line about a killed process. Raises Failed."""
    words = ["-m", "utils.verify", str(folder), *(["--device", device] if device != "cpu" else [])]
    done = subprocess.run(
        [sys.executable, *words], env=clean_environment(os.environ, device), capture_output=True, text=True
    )
    if done.returncode < 0 or done.returncode == OUT_OF_MEMORY:
        how = "ran out of memory" if done.returncode > 0 else f"was killed (signal {-done.returncode}: out of memory?)"
        return (
            f"not verified: the process that reopened {folder} {how}. With more memory, type "
            f"python {shlex.join(words)}"
        )
    if done.returncode:
        said = done.stderr.strip() or f"python {shlex.join(words)} ended with status {done.returncode}"
        raise Failed(said.splitlines()[-1], details=said)
    return done.stdout.strip().splitlines()[-1]


def clean_environment(inherited: Mapping[str, str], device: str = "cpu") -> dict[str, str]:
    """The environment without a launch's variables, and without GPUs unless `device` is one."""
    env = {name: value for name, value in inherited.items() if not OF_A_LAUNCH.fullmatch(name)}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env if device != "cpu" else env | {"CUDA_VISIBLE_DEVICES": ""}


def verify(folder: str | Path, device: str = "cpu") -> str:
    """One line about the content of a sound folder. Raises Failed if it is not sound, Refused if it has no model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused([f"{folder}: no such folder{paths.near_path(str(folder))}"])
    traces = ("config.json", "adapter_config.json", "*.safetensors", "manifest.json", FILE)
    if not any(found for trace in traces for found in folder.glob(trace)):
        raise Refused([f"{folder}: neither a model nor an adapter in it"])
    problems, tensors, size = check_files(folder)
    fail_if(folder, problems)
    said = f"verified  {folder}: {tensors} tensors, {size / 1e6:.1f} MB"
    with reopening(folder):
        tokenizer = open_config_and_tokenizer(folder)
    probe = read_probe(folder)
    if probe is None:
        return f"{said}; its files alone: no {FILE} was recorded there"
    fail_if(folder, list(check_tokenizer(tokenizer, probe)))
    with reopening(folder):
        values = compute_outputs(open_model(folder, tokenizer, probe, device), probe["input_ids"], probe["task"])
    return f"{said}, {compare_outputs(folder, probe, values)}"


def read_probe(folder: Path) -> dict | None:
    """The content of probe.json, None without the file. Raises Failed for a broken file."""
    try:
        probe = read_json_file(folder / FILE)
    except ValueError:
        raise Failed(f"{folder} is not sound: {FILE} is not valid JSON") from None
    missing = {"task", "dtype", "four_bit", "exact_to", "device", "chat_template", "input_ids", "tokens", "values"}
    missing -= (probe or {}).keys()
    if probe is not None and missing:
        raise Failed(f"{folder} is not sound: {FILE} has no {', '.join(sorted(missing))}")
    return probe


def fail_if(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Failed(f"{folder} is not sound: {'; '.join(problems[:5])}{more}")


@contextlib.contextmanager
def reopening(folder: Path) -> Iterator[None]:
    """Turn any error of reopening into Failed with one line; Refused if the model needs its own code."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  libraries raise any class for a broken folder
        said = output.first_line(error) if str(error).strip() else type(error).__name__
        if "custom code" in said:  # transformers' words
            raise Refused([f"{folder}: comes with code of its own, which is not run here ({said})"]) from None
        raise Failed(f"{folder} is not sound: it cannot be reopened: {said}") from error


def open_config_and_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoConfig

    base = ModelFolder.at(folder).base
    AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=False)
    return load.load_tokenizer(folder, flag="tokenizer of")


def open_model(folder: Path, tokenizer: "PreTrainedTokenizerBase", probe: dict, device: str) -> "Module":
    """The model as it was in memory: in the same dtype, or in 4 bits."""
    model = load.load_model(
        folder,
        probe["task"],
        probe["dtype"],
        tokenizer=tokenizer,
        seed=0,
        four_bit=probe["four_bit"],
        flag="model of",
    )
    if ModelFolder.at(folder).adapter:
        hold_as_saved(model, folder)
    return model.eval().to(device)


def hold_as_saved(model: "Module", folder: Path) -> None:
    """Give each trained parameter its saved dtype: PEFT loads float32, TRL trains bfloat16 over 4 bits."""
    from safetensors.torch import load_file

    saved = load_file(Path(folder) / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        tensor = saved.get(re.sub(r"\.(modules_to_save|default)(?=\.)", "", name))
        if tensor is not None:
            parameter.data = parameter.data.to(tensor.dtype)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", probe: dict) -> Iterator[str]:
    if tokenizer(TEXT)["input_ids"] != probe["input_ids"]:
        yield "its tokenizer makes other tokens of the probe than the one in memory did"
    if hash_template(tokenizer) != probe["chat_template"]:
        yield "its chat template is not the one in memory"


def compare_outputs(folder: Path, probe: dict, values: "torch.Tensor") -> str:
    """One line about values (T, V) or (T, 1) that agree with the recorded values. Raises Failed."""
    import torch

    same, coarse = probe["device"] == name_device(values.device), probe["exact_to"]
    recorded, values = torch.tensor(probe["values"]), values.cpu()
    tolerance = TOLERANCE[coarse] if not same else TOLERANCE["float32"] if coarse == "float32" else SAME_DEVICE
    scored = probe["task"] == "SEQ_CLS"
    what = "scores" if scored else "logits"
    if not values.isfinite().all():
        raise Failed(f"{folder} is not sound: reopened, it answers the probe with NaN")
    there = values if scored else values.gather(1, torch.tensor(probe["tokens"]))
    apart = (there - recorded).abs()
    difference, mean = apart.max().item(), apart.mean().item()
    if scored:  # scores have any scale, unlike log-probabilities
        tolerance *= max(1.0, recorded.abs().max().item())
    if difference > tolerance or mean > tolerance / 4:
        raise Failed(
            f"{folder} is not sound: {what} of a fresh process differ from those in memory by up to "
            f"{short(difference)}, in the mean by {short(mean)}. Rounding to "
            f"{coarse} allows {short(tolerance)} and {short(tolerance / 4)}"
        )
    said = f"{what} of a fresh process equal those in memory {f'to {short(difference)}' if difference else 'exactly'}"
    if scored:
        return said
    other = values.argmax(1) != torch.tensor(probe["tokens"])[:, 0]
    where = f"at {other.sum()} of {len(other)} positions"
    by = (values.max(1).values - recorded[:, 0]).abs()[other].max().item() if other.any() else 0
    if by > tolerance or other.float().mean() > TIES:
        raise Failed(f"{folder} is not sound: in a fresh process another token is the likeliest {where}")
    return f"{said} (another token is the likeliest {where}, where they tie)" if other.any() else said


def short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-") if number < 0.01 else f"{number:.2g}"
