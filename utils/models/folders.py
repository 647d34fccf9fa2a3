"""The files of a model or adapter, read without loading the model."""

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.models import shapes
from utils.runtime.errors import Refused
from utils.runtime.paths import looks_local, near_path

if TYPE_CHECKING:
    from common_args import CommonArgs
    from rlhf_args.methods import Method

TOKENIZERS = "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spm.model", "sentencepiece.bpe.model"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names: torch's
NOT_ADAPTED = re.compile(r"embed|wte|wpe|lm_head|score|embed_out")  # matrices without LoRA: embeddings and heads
AGAIN = "Download or copy it again"


class Tensor(NamedTuple):
    """A tensor's entry in the header of a safetensors file. dtype: as safetensors writes it, "BF16"."""

    dtype: str
    shape: tuple[int, ...]


class ModelFolder:
    """A model or LoRA adapter, in a folder or on the Hub. Each file is read at most once, when first needed.

    For a Hub id only JSON files are fetched; weights and vocabulary are empty. Raises Refused for a broken JSON file.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        self.path, self.revision = path, revision
        self.folder = Path(path)
        self.json: dict[str, dict | None] = {}

    @staticmethod
    def at(path: str | Path | None, revision: str | None = None) -> "ModelFolder":
        """The folder or Hub id; the same object while its files are unchanged. The flags' checks refuse None."""
        name = str(path)
        entries = list(os.scandir(name)) if Path(name).is_dir() else []
        return known(name, revision, frozenset(map(entry_stamp, entries)))

    # ── config and tokenizer ─────────────────────────────────────────────────────────────────────────────────────────

    def read(self, name: str) -> dict | None:
        """A JSON file; None if it does not exist or the Hub cannot be reached."""
        if name not in self.json:
            file = self.folder / name if self.folder.exists() else self.fetch(name)
            self.json[name] = read_object(file) if file and file.exists() else None
        return self.json[name]

    def fetch(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        try:
            return Path(cached_file(self.path, name, revision=self.revision))
        except OSError:  # loading the model will say why
            return None

    @property
    def adapter(self) -> dict | None:
        """adapter_config.json; None for a full model and for a Hub id."""
        return self.read("adapter_config.json") if self.folder.exists() else None

    @property
    def base(self) -> "ModelFolder":
        """The base model of an adapter; a full model is its own base."""
        named = self.adapter and self.adapter.get("base_model_name_or_path")
        return ModelFolder.at(named, self.adapter.get("revision")) if self.adapter and named else self

    @property
    def config(self) -> dict:
        """config.json of the base; {} if it cannot be read."""
        shape = shapes.find_shape(self.base.path)
        return shape.to_dict() if shape else self.base.read("config.json") or {}

    @property
    def generation_config(self) -> dict:
        return {} if shapes.find_shape(self.base.path) else self.base.read("generation_config.json") or {}

    @property
    def described(self) -> dict | None:
        """adapter_config.json or config.json; None for a Hub id or a file that `check` refuses."""
        try:
            return (self.adapter or self.read("config.json")) if self.folder.exists() else None
        except Refused:
            return None

    @property
    def is_reward_model(self) -> bool:
        described = self.described or {}
        kinds = described.get("architectures") or ()
        return described.get("task_type") == "SEQ_CLS" or any("SequenceClassification" in kind for kind in kinds)

    @property
    def positions(self) -> int | None:
        """Maximum context in tokens; None if the config does not state it."""
        return self.config.get("max_position_embeddings") or self.text_config.get("max_position_embeddings")

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the embedding; None if the config does not state them."""
        return self.config.get("vocab_size") or self.text_config.get("vocab_size")

    @property
    def text_config(self) -> dict:
        return self.config.get("text_config") or {}

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """{token: id} of tokenizer.json; {} without that file."""
        file = self.folder / "tokenizer.json"
        if not file.exists():
            return {}
        described = read_object(file)
        tokens = described["model"].get("vocab", {})
        if isinstance(tokens, list):  # of pairs (token, score)
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        return tokens | {token["content"]: token["id"] for token in described.get("added_tokens", ())}

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @functools.cached_property
    def weights(self) -> dict[Path, dict[str, Tensor] | None]:
        """{safetensors file: its header}; None for a truncated file."""
        return {file: read_header(file) for file in sorted(self.folder.glob("*.safetensors"))}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for header in self.weights.values() for name, tensor in (header or {}).items()}

    @property
    def numbers(self) -> int:
        """Parameters of the base model."""
        return count_elements(self.base.tensors)

    def describe_weights(self) -> str:
        """ "0.27 GB bfloat16 safetensors in 1 file", for the base and for the adapter; "" for a Hub id."""
        said = []
        for part in [self.base, self] if self.adapter else [self]:
            if not part.tensors:
                continue
            held: dict[str, int] = {}
            for tensor in part.tensors.values():
                held[tensor.dtype] = held.get(tensor.dtype, 0) + math.prod(tensor.shape)
            kind = max(held, key=lambda dtype: held[dtype])
            size, files = sum(file.stat().st_size for file in part.weights), len(part.weights)
            of, dtype = "the adapter " if part.adapter else "", DTYPES.get(kind, kind)
            said.append(f"{of}{gigabytes(size)} {dtype} safetensors in {files} file{'s' * (files > 1)}")
        return ", ".join(said)

    def starting_weights(self, train_mode: str) -> Path | None:
        """The folder with the weights that training starts from; None for a new adapter."""
        if train_mode != "full":
            return self.folder if self.adapter else None
        if self.base.folder.is_dir():
            return self.base.folder
        config = self.base.fetch("config.json")
        return config.parent if config else None  # the snapshot in the Hub's cache

    # ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, flag: str) -> list[str]:
        """Problems of the folder except its weights (check_weights); none for a Hub id. flag: the flag of the path."""
        if not self.folder.exists():
            near = near_path(self.path)
            if not looks_local(self.path) and (not near or on_hub(self.path)):
                return []
            way_out = near or ". `python -m utils.demo_model` makes models/SmolLM2-135M-Instruct"
            return [f"{flag} {self.path}: no such folder{way_out}"]
        names = {*os.listdir(self.folder)} if self.folder.is_dir() else set()
        if not names & {"adapter_config.json", "config.json"}:
            return [f"{flag} {self.path}: no config.json (nor adapter_config.json) in it, so not a model folder"]
        problems = []
        if not names.intersection(TOKENIZERS):
            copy = "Copy it from the original model"
            problems.append(f"{self.path}: no tokenizer (tokenizer.json or tokenizer.model) in it. {copy}")
        if not any(name.endswith(".safetensors") for name in names):
            pickled = sorted(name for name in names if re.search(r"\.bin$|\.pt", name) and name != "training_args.bin")
            found = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
            problems.append(f"{self.path}: {found}. Needed: *.safetensors (model.save_pretrained writes them)")
        try:
            if self.base.folder.exists():
                self.base.read("config.json")
        except Refused as refusal:
            problems += refusal.problems
        return problems

    def check_whole(self, flag: str) -> list[str]:
        """Problems of the folder, its weights, and the weights of an adapter's base. Imports numpy."""
        problems = self.check(flag)
        parts = {} if self.described is None else {part.path: part for part in (self, self.base)}
        return problems + [problem for part in parts.values() for problem in part.check_weights()]

    def check_weights(self) -> Iterator[str]:
        """Problems of the safetensors files: truncated files and missing shards."""
        for file, header in self.weights.items():
            if header is None:
                size = file.stat().st_size if file.exists() else 0
                yield f"{file}: not a whole safetensors file ({size} bytes). {AGAIN}, or type git lfs pull"
        for index in sorted(self.folder.glob("*.safetensors.index.json")):
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, TypeError, KeyError, AttributeError):
                yield f"{index}: cannot be read. {AGAIN}"
                continue
            for shard in shards:
                if not (self.folder / shard).exists():
                    yield f"{index}: names {shard}, which does not exist. {AGAIN}"

    def check_adapter(self, name: str, method: "Method") -> Iterator[str]:
        """Problems of training this adapter further with `method`, called `name`."""
        described = self.adapter or {}
        base = described.get("base_model_name_or_path")
        if not base or (looks_local(base) or Path(base).exists()) and not (Path(base) / "config.json").exists():
            way_out = "Set base_model_name_or_path in its adapter_config.json"
            yield f"{self.path}: its base model {base or '(unnamed)'} does not exist. {way_out}"
        if (kind := described.get("peft_type", "LORA")) != "LORA":
            yield f"{self.path}: an adapter of type {kind}. Only LoRA adapters are supported"
        if method.task == "SEQ_CLS" and not self.is_reward_model:
            way_out = f"Merge it first: python -m utils.merge_lora {self.path} MERGED"
            yield f"{self.path}: a language model's adapter, and {name} needs a new one on top. {way_out}"


@functools.lru_cache(maxsize=64)
def known(path: str, revision: str | None, stamps: frozenset) -> ModelFolder:
    return ModelFolder(path, revision)


def entry_stamp(entry: os.DirEntry) -> tuple:
    """A value that changes with the file."""
    try:
        found = entry.stat()
    except OSError:  # a broken link
        return (entry.name,)
    return entry.name, found.st_ino, found.st_size, found.st_mtime_ns


def read_object(file: Path) -> dict:
    """A JSON object. Raises Refused."""
    try:
        found = read_json_file(file)
    except ValueError:
        raise Refused(f"{file}: not valid JSON. Copy it from the original model") from None
    if not isinstance(found, dict):
        raise Refused(f"{file}: not a JSON object. Copy it from the original model")
    return found


def read_json_file(file: Path) -> Any:
    """A file's JSON; None if the file does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def read_header(file: str | Path) -> dict[str, Tensor] | None:
    """{name: Tensor} of a safetensors file, without its data; None for a truncated file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Tensor(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError):
        return None


def on_hub(path: str) -> bool:
    """True if the Hub or its local cache has a model of this name; it could also be a misspelt folder."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        cached = [try_to_load_from_cache(path, file) for file in ("config.json", "adapter_config.json")]
        return any(isinstance(file, str) for file in cached) or bool(HfApi().model_info(path, timeout=5))
    except (*HfHubHTTPError.__bases__, OSError, ValueError):  # type: ignore[misc]  # not found, not reachable, or not an id
        return False


def first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    """The first id with different tokens in the policy's vocabulary `ours` ({token: id}) and in `theirs`, or None.

    Tokens in only one of the two are ignored: saving a tokenizer can add tokens.
    """
    mine, others = ({number: token for token, number in tokens.items()} for tokens in (ours, theirs))
    for number in sorted(mine.keys() & others.keys()):
        if mine[number] != others[number]:
            return f"token {number} is {others[number]!r} in it and {mine[number]!r} in the model that is trained"
    return None


def count_elements(tensors: dict[str, Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def count_trained(common: "CommonArgs") -> int:
    """Trained parameters, from the headers of the policy's files; 0 for a Hub id."""
    policy, mode = ModelFolder.at(common.model_name_or_path), common.train_mode
    if policy.adapter and mode != "full":
        return count_elements(policy.tensors)
    if mode == "full":
        return policy.numbers
    total = 0
    for name, tensor in policy.tensors.items():
        module, _, kind = name.rpartition(".")
        wanted = common.lora_target_modules
        adapted = module.rpartition(".")[2] in wanted if wanted else not NOT_ADAPTED.search(module)
        if kind == "weight" and len(tensor.shape) == 2 and adapted:
            total += common.lora_rank * sum(tensor.shape) + common.use_dora * tensor.shape[0]
    return total


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.2g} MB"


def same_path(one: str, other: str) -> bool:
    return one == other or Path(one).exists() and Path(other).exists() and Path(one).samefile(other)
