"""What the files of a model or adapter folder say, read without loading the model."""

import json
import math
import re
from pathlib import Path

from utils.models import shapes
from utils.runtime.errors import Refused
from utils.runtime.paths import looks_local, near_path

TOKENIZERS = "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spm.model", "sentencepiece.bpe.model"


def check_folder(path, flag):
    """(problems, its config.json or adapter_config.json as a dict) of a model or adapter folder; None for a Hub id."""
    folder = Path(path)
    if not folder.exists():
        near = near_path(path)
        if looks_local(path) or near and not on_hub(path):
            way_out = near or ". `python -m utils.demo_model` makes models/SmolLM2-135M-Instruct"
            return [f"{flag} {path}: no such folder{way_out}"], None
        return [], None
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    if not adapter.exists() and not config.exists():
        return [f"{flag} {path}: no config.json (nor adapter_config.json) in it, so not a model folder"], None
    problems = []
    if not any((folder / file).exists() for file in TOKENIZERS):
        problems.append(
            f"{path}: no tokenizer (tokenizer.json or tokenizer.model) in it. Copy it from the original model"
        )
    weights = sorted(folder.glob("*.safetensors"))
    problems += [
        f"{file}: not a whole safetensors file (a broken download, or a Git LFS pointer: `git lfs pull`)"
        for file in weights
        if not is_safetensors(file)
    ]
    if not weights:
        pickled = [
            file.name
            for file in sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])
            if file.name != "training_args.bin"
        ]
        what = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
        problems.append(f"{path}: {what}. Needed: *.safetensors (model.save_pretrained writes them)")
    file = adapter if adapter.exists() else config
    try:
        return problems, read_json(file)
    except Refused as refusal:
        return [*problems, *refusal.problems], None


def on_hub(path: str) -> bool:
    """True if the Hub, or its cache here, has a model of that name: for a name that may be a folder's, misspelt."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        cached = [try_to_load_from_cache(path, file) for file in ("config.json", "adapter_config.json")]
        return any(isinstance(file, str) for file in cached) or bool(HfApi().model_info(path, timeout=5))
    except (*HfHubHTTPError.__bases__, OSError, ValueError):  # not found; not reached, by any HTTP library; no id
        return False


def is_reward_model(described):
    """Whether a config.json or adapter_config.json, as a dict, is that of a model that scores."""
    kinds = described.get("architectures") or ()
    return described.get("task_type") == "SEQ_CLS" or any("SequenceClassification" in kind for kind in kinds)


def is_safetensors(file):
    """True if the file begins with a header of safetensors: its length in 8 bytes, and so many bytes of JSON."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 1 < length <= file.stat().st_size - 8:
            return False
        try:
            return isinstance(json.loads(handle.read(length)), dict)
        except ValueError:
            return False


def read_header(file):
    """{tensor: {dtype, shape, data_offsets}} of a safetensors file, without its data."""
    with open(file, "rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def check_adapter(path, described, name, method):
    problems = []
    base = described.get("base_model_name_or_path")
    if not base or (looks_local(base) or Path(base).exists()) and not (Path(base) / "config.json").exists():
        problems.append(
            f"{path}: its base model {base or '(unnamed)'} is not there. Set base_model_name_or_path in "
            "its adapter_config.json"
        )
    if described.get("peft_type", "LORA") != "LORA":
        problems.append(f"{path}: an adapter of the kind {described['peft_type']}. Only LoRA adapters are read")
    if method.task == "SEQ_CLS" and not is_reward_model(described):
        problems.append(
            f"{path}: a language model's adapter, and {name} would need a second one on top. "
            f"Merge it first: python -m utils.merge_lora {path} MERGED"
        )
    return problems


def first_difference(ours, theirs):
    """The first id that stands for another token in the model that is trained ({token: id}) than in another; or None.

    Tokens that only one has are none: a tokenizer gains some when it is saved again.
    """
    ours, theirs = ({number: token for token, number in one.items()} for one in (ours, theirs))
    number = next((n for n in sorted(ours.keys() & theirs.keys()) if ours[n] != theirs[n]), None)
    if number is None:
        return None
    return f"token {number} is {theirs[number]!r} in it and {ours[number]!r} in the model that is trained"


def read_vocabulary(folder):
    """{token: id} of a folder's tokenizer.json, {} where there is none."""
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        return {}
    described = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = described["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of pairs (token, score)
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in described.get("added_tokens", ())}


def model_positions(path):
    """How many tokens a model's config says it holds, of an adapter its base's; None where it does not say."""

    config = read_base_config(path)
    return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as safetensors calls them, as we do


# What the matrices that LoRA leaves alone are called: embeddings and heads
NOT_ADAPTED = re.compile(r"embed|wte|wpe|lm_head|score|embed_out")


def base_of(path):
    """The folder or Hub id that an adapter stands on; of another model itself."""
    return (read_adapter(path) or {}).get("base_model_name_or_path") or path


def read_tensors(path):
    """{tensor: {dtype, shape, data_offsets}} of a folder's weights; {} of a Hub id."""
    files = sorted(Path(path).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def count(tensors):
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def describe_weights(path):
    """ "0.27 GB bfloat16 safetensors in 1 file", of an adapter's base and the adapter; "" for a Hub id."""
    said = []
    for folder in dict.fromkeys((base_of(path), path)):
        files, sizes = sorted(Path(folder).glob("*.safetensors")), {}
        for tensor in read_tensors(folder).values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
        if sizes:
            kind = max(sizes, key=sizes.get)
            size = sum(file.stat().st_size for file in files)
            held = (
                f"{gigabytes(size)} {DTYPES.get(kind, kind)} safetensors in {len(files)} file{'s' * (len(files) > 1)}"
            )
            said.append(held if folder != path or not read_adapter(path) else f"the adapter {held}")
    return ", ".join(said)


def gigabytes(size):
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.2g} MB"


def count_trained(common):
    """How many numbers are trained, read off the headers of the policy's folder; 0 where it is a Hub id."""
    path, mode = common.model_name_or_path, common.train_mode
    if read_adapter(path) and mode != "full":
        return count(read_tensors(path).values())
    tensors = read_tensors(base_of(path))
    if mode == "full":
        return count(tensors.values())
    total = 0
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        wanted = common.lora_target_modules
        adapted = module.rpartition(".")[2] in wanted if wanted else not NOT_ADAPTED.search(module)
        if kind == "weight" and len(tensor["shape"]) == 2 and adapted:
            total += common.lora_rank * sum(tensor["shape"]) + common.use_dora * tensor["shape"][0]
    return total


def read_adapter(path):
    """The adapter_config.json of a LoRA folder as a dict, or None where `path` is no adapter."""
    return read_json(Path(path) / "adapter_config.json")


def read_config(path):
    """What describes a folder: its adapter_config.json, or its config.json; {} for a Hub id."""
    return read_adapter(path) or read_json(Path(path) / "config.json") or {}


def read_base_config(path, revision=None, file="config.json"):
    """The config.json (or `file`) of a folder or Hub id, of an adapter that of its base; {} where it cannot be had."""
    adapter = read_adapter(path)
    if adapter:
        path, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    if Path(path).exists():
        return read_json(Path(path) / file) or {}
    if shape := shapes.find_shape(path):
        return shape.to_dict()
    from transformers.utils import cached_file

    try:
        return read_json(Path(cached_file(path, file, revision=revision)))
    except OSError:  # its loading will say why
        return {}


def read_json(file: Path) -> dict | None:
    """The JSON object in a model's file; None if there is no such file. Raises Refused."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError:
        raise Refused([f"{file}: not valid JSON. Copy it from the original model"]) from None
    if found is not None and not isinstance(found, dict):
        raise Refused([f"{file}: not a JSON object. Copy it from the original model"])
    return found


def same_path(one, other):
    return one == other or Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def starting_weights(path, revision, train_mode):
    """The folder with the tensors that will be saved, as they were before training; None for a new adapter."""
    adapter = read_adapter(path)
    if train_mode != "full":
        return Path(path) if adapter else None
    path, revision = (adapter["base_model_name_or_path"], adapter.get("revision")) if adapter else (path, revision)
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    return Path(cached_file(path, "config.json", revision=revision)).parent  # the snapshot in the Hub's cache


def vocabulary_rows(path, revision=None):
    """How many tokens a model's config has embeddings for, of an adapter its base's; None where it does not say."""
    config = read_base_config(path, revision)
    return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")


def count_numbers(path):
    """Parameters in a folder's safetensors files, read off their headers; of an adapter, its base's."""
    adapter, total = read_adapter(path), 0
    for file in Path(adapter["base_model_name_or_path"] if adapter else path).glob("*.safetensors"):
        total += sum(math.prod(tensor["shape"]) for tensor in read_header(file).values())
    return total
