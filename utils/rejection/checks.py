"""Checks of a rejection sampling before it samples: its flags, and the settings of an earlier run's folder."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common_args import CommonArgs
from rlhf_args.methods import METHODS, REJECTION, find_method
from rlhf_args.rejection_config import RejectionConfig
from utils.checks import flags
from utils.checks.folders import reads
from utils.data import files
from utils.models import sampling
from utils.models.folders import ModelFolder
from utils.rejection import selection
from utils.rejection.folder import compare_settings, read_settings
from utils.rewards import judge
from utils.rewards.server import check_server
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.paths import check_overwrite, check_writable

STAGES = ("generate", "score", "select")
TRAINING = (
    "train_mode", "use_dora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "resume",
    "max_bad_steps", "auto_batch", "plain", "deal_by_length",
)  # fmt: skip


def needs_model(config: RejectionConfig) -> bool:
    """True if the model is loaded: to sample from it, or to train it."""
    return "generate" in config.stages and config.engine != "openai" or bool(config.then)


def check_flags(common: CommonArgs, config: RejectionConfig, words: list[str]) -> list[str]:
    """All problems of the flags of rejection sampling."""
    problems = [*check_generation(common, config)] if "generate" in config.stages else []
    problems += check_scorers(common, config) if "score" in config.stages else []
    problems += check_selection(config)
    if not config.stages or set(config.stages) - set(STAGES):
        problems.append(f"--stages {','.join(config.stages)}: must be one or more of {', '.join(STAGES)}")
    if "generate" in config.stages:
        problems += check_data(common, config)
    if environment.engine():
        problems.append(f"LAUNCH={environment.engine()}: each process needs a whole model to sample. Type LAUNCH=auto")
    if config.then:
        problems += check_then(common, config)
    else:
        given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        problems += [f"--{name}: nothing is trained without --then. Remove it" for name in TRAINING if name in given]
        if config.rounds != 1:
            problems.append(
                f"--rounds {config.rounds}: each round ends with a training. Add --then DPO (or another method)"
            )
    asked = [flag for flag in ("plan", "probe") if getattr(common, flag)]
    problems += [f"--{flag}: only train_rlhf.py has it. Remove it" for flag in asked]
    if needs_model(config):
        problems += flags.check_common(common, "Rejection sampling", REJECTION)
    return problems + check_rejection_folder(common, config)


def check_data(common: CommonArgs, config: RejectionConfig) -> Iterator[str]:
    if not common.train_data_path and not needs_model(config):
        yield f"--train_data_path: missing. Type --train_data_path {REJECTION.sample_data} to try"
    for flag, paths in (("--train_data_path", common.train_data_path), ("--eval_data_path", common.eval_data_path)):
        try:
            files.find_files(paths or (), flag)
        except Refused as refusal:
            yield from refusal.problems
    if common.eval_data_path and not config.then:
        yield "--eval_data_path: only used to measure the model that --then trains. Remove it, or add --then"


def check_generation(common: CommonArgs, config: RejectionConfig) -> Iterator[str]:
    if config.held_out_prompts and not common.eval_fraction:
        yield "--held_out_prompts: no prompt is held out. Add --eval_fraction 0.1"
    if config.temperature == 0 and config.num_completions > 1:
        yield (
            f"--temperature 0 with --num_completions {config.num_completions}: greedy answers to a prompt are all the "
            "same. Type --temperature 1, or --num_completions 1"
        )
    if config.engine == "openai":
        if not config.api_base_url:
            yield "--engine openai: no server. Type --api_base_url http://localhost:8000/v1"
        if not config.api_model:
            yield "--engine openai: no model. Type --api_model NAME, the server's name for it"
        if config.max_prompt_length:
            yield "--max_prompt_length with --engine openai: the server's tokenizer is not known. Remove it"
        if config.top_k:
            yield "--top_k with --engine openai: the API has no such field. Remove it, or type --top_p"
        yield from check_server(config, "api_base_url", config.api_base_url, config.api_key_variable)
    else:
        for name in ("api_base_url", "api_model"):
            if getattr(config, name) and not (name == "api_base_url" and config.judge_model):
                yield f"--{name}: only used with --engine openai, not {config.engine}. Add --engine openai"
    if config.engine == "vllm":
        yield from flags.check_vllm("--engine vllm")
        if environment.processes_asked() > 1:
            yield "--engine vllm: runs in one process. Type NUM_PROCESSES=1"
        path = common.model_name_or_path
        if path and ModelFolder.at(path).adapter:
            yield f"--engine vllm: {path} is an adapter. Merge it: python -m utils.merge_lora {path} MERGED"
        if config.then and common.train_mode != "full":
            yield f"--train_mode {common.train_mode} with --engine vllm and --then: vLLM loads no adapter. Type full"


def check_scorers(common: CommonArgs, config: RejectionConfig) -> Iterator[str]:
    names = judge.name_scorers(common, config)
    if not names:
        yield (
            f"no scorer. Type --reward_funcs {REJECTION.sample_reward} to try, "
            "--reward_model_path FOLDER or --judge_model NAME"
        )
    else:
        yield from flags.check_rewards(common, "Rejection sampling", REJECTION, config)
    if config.reward_weights and len(config.reward_weights) != len(names):
        yield f"--reward_weights: {len(config.reward_weights)} weights for {len(names)} rewards. Type one for each"
    answers = config.num_completions + bool(config.reference_column)
    yield from judge.check_judge(config, "num_completions", answers, unused="judge_")


def check_selection(config: RejectionConfig) -> Iterator[str]:
    for name in config.write:
        if name not in selection.FILES.values():
            yield f"--write {name}: must be one or more of {', '.join(selection.FILES.values())}"
    if not config.write:
        yield f"--write: no file. Type one or more of {', '.join(selection.FILES.values())}"
    if (config.select == "threshold") != (config.threshold is not None):
        yield "--select threshold and --threshold NUMBER need each other. Type both, or neither"


def check_then(common: CommonArgs, config: RejectionConfig) -> Iterator[str]:
    name = find_method(config.then)
    able = [method for method in METHODS if selection.file_for(method)]
    if name not in able:
        why = "it samples its own answers, through train_rlhf.py" if name else "no such method"
        yield f"--then {config.then}: {why}. Type one of {', '.join(able)}"
    if config.rounds > 1 and config.engine == "openai":
        yield "--rounds with --engine openai: the server's model does not change between rounds. Type --rounds 1"
    if name and METHODS[name].task != "CAUSAL_LM" and config.rounds > 1:
        yield f"--then {name} with --rounds: a reward model cannot answer in the next round. Type --rounds 1"
    held_out = common.eval_data_path or common.eval_fraction
    if held_out and config.judge_mode == "pick" and judge.name_scorers(common, config) == [judge.name_judge(config)]:
        yield (
            "--judge_mode pick with held-out prompts: the scores of a prompt's answers add up to 1 for every model, "
            "so they measure none. Type --judge_mode score, or --eval_fraction 0"
        )
    if set(config.stages) != set(STAGES):
        yield f"--then with --stages {','.join(config.stages)}: needs all stages. Remove --stages"


def check_rejection_folder(common: CommonArgs, config: RejectionConfig) -> list[str]:
    if not config.output_dir:
        return ["--output_dir: missing. Type --output_dir FOLDER"]
    folder = Path(config.output_dir)
    if problems := check_writable(folder):
        return problems
    ours = any((folder / trace).exists() for trace in ("settings.json", "prompts.jsonl.part", ".lock", "rounds.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        return [f"--output_dir {folder}: holds files of something else. Type another folder"]
    rounds = "rounds" in read_settings(folder) or (folder / "rounds.json").exists()
    plain = (folder / "prompts.jsonl").exists()
    if (plain if config.then else rounds) and not common.overwrite_output_dir:
        other, own = ("with", "without") if rounds else ("without", "with")
        return [f"--output_dir {folder}: holds a run {other} --then, this run is {own} it. Type another folder"]
    if common.overwrite_output_dir:
        return check_overwrite(folder, reads(common, config))
    if config.then:
        return []  # each round checks its own folder
    if "generate" not in config.stages and not (folder / "completions.jsonl").exists():
        return [f"--output_dir {folder}: holds no completions. Add generate to --stages"]
    if config.stages == ["select"] and not (folder / "scores.jsonl").exists():
        return [f"--output_dir {folder}: holds no scores. Add score to --stages"]
    return [*compare_with_folder(common, config, folder)]


# ── the settings of a folder ─────────────────────────────────────────────────────────────────────────────────────────


def compare_with_folder(common: CommonArgs, config: RejectionConfig, folder: Path) -> Iterator[str]:
    """Problems of resuming in a folder that other settings made."""
    anew = "Type another --output_dir, or add --overwrite_output_dir to start again"
    if "generate" in config.stages and (folder / "prompts.jsonl").exists():
        yield from compare_settings(folder, "generate", generation_settings(common, config), anew)
    if "score" in config.stages and any(folder.glob("scores.*")):
        anew = f"Type another --output_dir, or rm -r {folder}/scores.* to score the same answers again"
        yield from compare_settings(folder, "score", score_settings(common, config), anew)


def generation_settings(common: CommonArgs, config: RejectionConfig) -> dict[str, Any]:
    """Everything that an answer depends on."""
    path, revision = common.model_name_or_path, common.model_revision
    if config.engine == "openai":
        asked = {"api_model": config.api_model}
    else:
        asked = {"model": path, "model_revision": revision, "dtype": common.dtype}
        asked |= {"weights": hash_short(str(weights_of(path, revision)))}
    names = (
        "engine", "num_completions", "temperature", "top_p", "top_k", "max_new_tokens", "max_prompt_length",
        "system_prompt", "reference_column", "seed", "held_out_prompts",
    )  # fmt: skip
    found = files.find_files(common.train_data_path, "--train_data_path")
    return {
        **{name: getattr(config, name) for name in names},
        **asked,
        "data": {file: hash_content(file) for file in found},
        "max_samples": common.max_samples,
        "eval_fraction": common.eval_fraction,
    }


def weights_of(path: str, revision: str | None) -> list[Any]:
    adapter = ModelFolder.at(path).adapter
    base = [adapter["base_model_name_or_path"], adapter.get("revision")] if adapter else None
    return [sampling.identify_weights(path, revision), base and sampling.identify_weights(*base)]


def score_settings(common: CommonArgs, config: RejectionConfig) -> dict[str, Any]:
    functions = {spec: hash_content(spec.rpartition(":")[0]) for spec in common.reward_funcs or ()}
    found: dict[str, Any] = {"reward_funcs": functions, "reward_weights": config.reward_weights}
    if common.reward_model_path:
        weights = hash_short(str(weights_of(common.reward_model_path, None)))
        found |= {"reward_model_path": common.reward_model_path, "reward_model_weights": weights}
    if config.judge_model:
        found |= {"judge_model": config.judge_model, "judge_mode": config.judge_mode}
        found |= {"judge_template": hash_content(judge.template_of(config)), "judge_scale": config.judge_scale}
    return found


def hash_content(path: str) -> str | None:
    """First 12 hex digits of a file's SHA-256; None for a Hub id."""
    if not Path(path).expanduser().is_file():
        return None
    with open(Path(path).expanduser(), "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


def hash_short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
