"""The folders that a run reads and writes: models, adapters, tokenizers, output."""

import json
import re
from pathlib import Path

from utils.cli.recipes import recipes_in
from utils.models.folders import (
    base_of,
    check_adapter,
    check_folder,
    first_difference,
    is_reward_model,
    is_safetensors,
    read_adapter,
    read_header,
    read_tensors,
    read_vocabulary,
    vocabulary_rows,
)
from utils.runtime.errors import Refused
from utils.runtime.paths import check_overwrite, check_writable, looks_local, near_path


def check_model(path, name, method):
    """Problems of the policy's folder; a Hub id is left to the loader."""
    problems, described = check_folder(path, "--model_name_or_path")
    if described is None:
        return problems
    quantised = described.get("quantization_config")
    if quantised:
        problems.append(
            f"{path}: its weights are quantised already ({quantised.get('quant_method', 'unknown')}). Take the "
            "original; --train_mode qlora holds it in 4 bits"
        )
    if method.task == "CAUSAL_LM" and is_reward_model(described):
        problems.append(
            f"{path}: a trained reward model, which scores and cannot answer. {name} starts from a language model"
        )
    adapter = (Path(path) / "adapter_config.json").exists()
    return problems + check_adapter(path, described, name, method) if adapter else problems


def check_value_model(path, common, kind):
    """Problems of the weights that a critic with a trunk of its own starts from. It reads the policy's tokens."""
    from utils.rewards.models import on_policy_base

    flag = f"--value_model_path {path}"
    if looks_local(path) or Path(path).exists():
        yield from check_folder(path, "--value_model_path")[0]
    else:
        way_out = near_path(path) or ". Download it and name its folder: its tokenizer and head are looked at first"
        yield f"{flag}: not a folder here{way_out}"
    adapter = (Path(path) / "adapter_config.json").exists()
    if kind == "model" and adapter:
        yield f"{flag}: an adapter. Merge it first: python -m utils.merge_lora {path} MERGED"
    if kind == "lora" and not adapter:
        yield f"{flag}: a whole model. --critic lora takes an adapter on the policy's base. Type --critic model"
    elif kind == "lora" and not on_policy_base(
        path, common.model_name_or_path, common.train_mode, common.model_revision
    ):
        yield f"{flag}: an adapter on another base than the policy's. Merge it, and type --critic model"
    elif kind == "lora":
        theirs, ours = read_adapter(path), {"r": common.lora_rank, "lora_alpha": common.lora_alpha}
        for key, value in (ours | {"use_dora": common.use_dora, "use_rslora": False}).items():
            if theirs.get(key, False) != value:
                flag_of = {"r": "lora_rank"}.get(key, key)
                way_out = f"Type --{flag_of} {theirs.get(key)}, or merge it, and type --critic model"
                yield f"{flag}: an adapter with {key} {theirs.get(key)}, and the run has {value}. {way_out}"
    different = first_difference(read_vocabulary(common.model_name_or_path), read_vocabulary(path))
    if different:
        yield f"{flag}: its tokenizer is not the policy's: {different}. A critic reads the policy's tokens"


# The flags that name what a run reads, one path or several; a reward function is FILE.py:FUNCTION.
MODELS = "model_name_or_path", "reward_model_path", "teacher_model_name_or_path", "value_model_path"
READS = (
    *MODELS, "train_data_path", "eval_data_path", "reward_funcs", "judge_template", "critic_path",
    "chat_template_path", "answers_dir", "deepspeed",
)  # fmt: skip


def reads(*configs: object) -> list[tuple[str, str]]:
    """(flag, path) of everything that a run with these dataclasses of flags reads; of an adapter also its base."""
    given = {flag: value for config in configs for flag, value in vars(config).items() if flag in READS and value}
    found = []
    for flag, value in given.items():
        for path in value if isinstance(value, list) else [value] * isinstance(value, str):
            path = path.rpartition(":")[0] if flag == "reward_funcs" else path
            found += [(flag, one) for one in dict.fromkeys((path, base_of(path) if flag in MODELS else path))]
    return found


def check_output_dir(common, config):
    folder = Path(config.output_dir)
    if problems := check_writable(folder):
        return problems
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    if not any((folder / trace).exists() for trace in ("metrics.jsonl", "run_card.json", "dropped.jsonl")):
        return [f"--output_dir {folder}: holds files that no run of ours made. Name another folder"]
    if common.overwrite_output_dir:
        return check_overwrite(folder, reads(common, config))
    if (folder / "run_card.json").exists():
        return [f"--output_dir {folder}: holds a finished run. Name another folder, or add --overwrite_output_dir"]
    if not config.resume_from_checkpoint:
        return [
            f"--output_dir {folder}: holds an unfinished run. Add --resume_from_checkpoint auto to finish it, "
            "or --overwrite_output_dir to start afresh"
        ]
    return []


def check_recipes(common, config, argv):
    """Problems of deleting a recipe that --config names."""
    if not common.overwrite_output_dir or not config.output_dir:
        return []
    return check_overwrite(config.output_dir, [("config", file) for file in recipes_in(argv)])


EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


def check_folders(common, config):
    """Problems of the weights of every model that the run would load, as far as their headers tell."""
    folders = dict.fromkeys(path for flag, path in reads(common, config) if flag in MODELS)
    return [problem for folder in folders if Path(folder).is_dir() for problem in check_weights(Path(folder))]


def check_weights(folder):
    """Problems of a folder's safetensors files: cut ones, and those that are missing of several."""
    again = "Download or copy it again"
    for file in sorted(folder.glob("*.safetensors")):
        if not is_safetensors(file):
            continue  # said by checks.check_folder
        try:
            whole = end_of(file)
        except (ValueError, TypeError, KeyError):
            yield f"{file}: its header cannot be read. {again}"
            continue
        size = file.stat().st_size
        if size != whole:
            yield f"{file}: has {size} bytes, and {whole} by its header. {again}"
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            yield f"{index}: cannot be read. {again}"
            continue
        yield from (
            f"{index}: names {shard}, which is not there. {again}" for shard in shards if not (folder / shard).exists()
        )


def end_of(file):
    """How many bytes a safetensors file has, by its header."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    return 8 + length + max((tensor["data_offsets"][1] for tensor in read_header(file).values()), default=0)


def check_vocabulary(common, tokenizer, highest):
    """Raises Refused where the model has no embedding for a token that the data use, of which `highest` is the last.

    A tokenizer may know further ones that text has no use for (Gemma's for images).
    """
    path, revision = common.model_name_or_path, common.model_revision
    tensors = read_tensors(base_of(path)) | read_tensors(path)
    said = vocabulary_rows(path, revision)
    rows = next((tensor["shape"][0] for name, tensor in tensors.items() if EMBEDDINGS.search(name)), said)
    if not rows:
        return
    if said and said != rows and not read_adapter(path):
        raise Refused(
            [
                f"{path}: vocab_size is {said} in its config.json, and its embeddings have {rows} rows. Copy both "
                "from the original model"
            ]
        )
    used = max(highest, tokenizer.pad_token_id, tokenizer.eos_token_id)
    if used >= rows:
        raise Refused(
            [
                f"{path}: the data need token {used} ({tokenizer.convert_ids_to_tokens(used)!r}), and its embeddings "
                f"have {rows} rows. Its tokenizer is another model's, or tokens were added to it alone: copy the "
                "tokenizer from the original model"
            ]
        )
