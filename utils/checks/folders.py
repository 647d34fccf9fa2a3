"""The folders that a run reads and writes: models, adapters, tokenizers, output."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.recipes import recipes_in
from utils.models.folders import ModelFolder, first_difference
from utils.runtime.errors import Refused
from utils.runtime.paths import check_overwrite, check_writable, looks_local, near_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from common_args import CommonArgs, SharedArgs
    from rlhf_args.methods import Method


def check_model(path: str, name: str, method: "Method") -> list[str]:
    """Problems of the policy's folder; loading checks a Hub id."""
    folder = ModelFolder.at(path)
    problems = folder.check("--model_name_or_path")
    if folder.described is None:
        return problems
    quantised = folder.described.get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method", "unknown")
        problems.append(f"{path}: already quantised ({kind}). Use the original; --train_mode qlora loads it in 4 bits")
    if method.task == "CAUSAL_LM" and folder.is_reward_model:
        problems.append(f"{path}: a trained reward model. {name} starts from a language model")
    return problems if folder.adapter is None else [*problems, *folder.check_adapter(name, method)]


def check_value_model(path: str, common: "SharedArgs", kind: str) -> Iterator[str]:
    """Problems of --value_model_path. kind: as in OnlineConfig.critic_kind."""
    from utils.rewards.models import on_policy_base

    flag, folder = f"--value_model_path {path}", ModelFolder.at(path)
    if looks_local(path) or Path(path).exists():
        yield from folder.check("--value_model_path")
    else:
        way_out = near_path(path) or ". Download it and type its folder: its tokenizer and head are checked first"
        yield f"{flag}: not a local folder{way_out}"
    adapter = folder.adapter
    if kind == "model" and adapter:
        yield f"{flag}: an adapter. Merge it first: python -m utils.merge_lora {path} MERGED"
    if kind == "lora" and not adapter:
        yield f"{flag}: not an adapter, and --critic lora needs one on the policy's base. Type --critic model"
    elif kind == "lora" and not on_policy_base(
        path, common.model_name_or_path, common.train_mode, common.model_revision
    ):
        yield f"{flag}: an adapter whose base is not the policy's. Merge it, and type --critic model"
    elif kind == "lora" and adapter:
        ours = {"r": common.lora_rank, "lora_alpha": common.lora_alpha, "use_dora": common.use_dora}
        for key, value in (ours | {"use_rslora": False}).items():
            if adapter.get(key, False) != value:
                flag_of = {"r": "lora_rank"}.get(key, key)
                way_out = f"Type --{flag_of} {adapter.get(key)}, or merge the adapter and type --critic model"
                yield f"{flag}: an adapter with {key} {adapter.get(key)}; the run has {value}. {way_out}"
    different = first_difference(ModelFolder.at(common.model_name_or_path).vocabulary, folder.vocabulary)
    if different:
        yield f"{flag}: its tokenizer is not the policy's: {different}. A critic reads the policy's tokens"


# Flags with paths that the run reads; a reward function is FILE.py:FUNCTION.
MODELS = "model_name_or_path", "reward_model_path", "teacher_model_name_or_path", "value_model_path"
READS = (
    *MODELS, "train_data_path", "eval_data_path", "reward_funcs", "judge_template", "critic_path",
    "chat_template_path", "answers_dir", "deepspeed",
)  # fmt: skip


def reads(*configs: object) -> list[tuple[str, str]]:
    """(flag, path) of each input of a run with these flags; for an adapter also its base."""
    given = {flag: value for config in configs for flag, value in vars(config).items() if flag in READS and value}
    found = []
    for flag, value in given.items():
        for path in value if isinstance(value, list) else [value] * isinstance(value, str):
            path = path.rpartition(":")[0] if flag == "reward_funcs" else path
            paths = (path, ModelFolder.at(path).base.path) if flag in MODELS else (path,)
            found += [(flag, one) for one in dict.fromkeys(paths)]
    return found


def check_output_dir(common: "SharedArgs", config: "TrainingArguments") -> list[str]:
    folder = Path(config.output_dir)
    if problems := check_writable(folder):
        return problems
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    if not any((folder / trace).exists() for trace in ("metrics.jsonl", "run_card.json", "dropped.jsonl")):
        return [f"--output_dir {folder}: contains files that no training run wrote. Name another folder"]
    if common.overwrite_output_dir:
        return check_overwrite(folder, reads(common, config))
    if (folder / "run_card.json").exists():
        return [f"--output_dir {folder}: contains a finished run. Name another folder, or add --overwrite_output_dir"]
    if not config.resume_from_checkpoint:
        way_out = "Add --resume_from_checkpoint auto to finish it, or --overwrite_output_dir to start a new run"
        return [f"--output_dir {folder}: contains an unfinished run. {way_out}"]
    return []


def check_recipes(common: "CommonArgs", config: "TrainingArguments", argv: list[str]) -> list[str]:
    """Problems of --overwrite_output_dir that would delete a --config file."""
    if not common.overwrite_output_dir or not config.output_dir:
        return []
    return check_overwrite(config.output_dir, [("config", file) for file in recipes_in(argv)])


EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


def check_folders(common: "CommonArgs", config: "TrainingArguments") -> list[str]:
    """Problems of the weights of all models of the run."""
    paths = dict.fromkeys(path for flag, path in reads(common, config) if flag in MODELS)
    return [problem for path in paths for problem in ModelFolder.at(path).check_weights()]


def check_vocabulary(common: "CommonArgs", tokenizer: "PreTrainedTokenizerBase", highest: int) -> None:
    """Raises Refused if the model lacks the embedding of a token in the data. highest: the highest id in the data.

    Tokens beyond the embeddings are allowed if the data do not use them (Gemma's image tokens).
    """
    path, model = common.model_name_or_path, ModelFolder.at(common.model_name_or_path, common.model_revision)
    tensors, said = model.base.tensors | model.tensors, model.vocabulary_rows
    rows = next((tensor.shape[0] for name, tensor in tensors.items() if EMBEDDINGS.search(name)), said)
    if not rows:
        return
    if said and said != rows and not model.adapter:
        raise Refused(
            f"{path}: config.json has vocab_size {said}, but the embeddings have {rows} rows. Copy both from the "
            "original model"
        )
    used = max(highest, tokenizer.pad_token_id, tokenizer.eos_token_id)
    if used >= rows:
        raise Refused(
            f"{path}: the data use token {used} ({tokenizer.convert_ids_to_tokens(used)!r}), but the embeddings have "
            f"{rows} rows. Copy the tokenizer from the original model"
        )
