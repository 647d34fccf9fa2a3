"""What a rejection sampling refuses before anything is sampled, and what it compares with an earlier run's folder."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_args.methods import METHODS, REJECTION, find_method
from utils.checks import flags
from utils.checks.folders import reads
from utils.data import files
from utils.models import folders, sampling
from utils.rejection import selection
from utils.rejection.folder import compare_settings, read_settings
from utils.rewards import judge
from utils.rewards.server import check_failed_fraction, check_server
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.paths import check_overwrite, check_writable

if TYPE_CHECKING:
    from common_args import CommonArgs
    from rlhf_args.rejection_config import RejectionConfig

STAGES = ("generate", "score", "select")
TRAINING = (
    "train_mode", "use_dora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "resume",
    "max_bad_steps", "auto_batch", "plain", "deal_by_length",
)  # fmt: skip


def needs_model(config: "RejectionConfig") -> bool:
    """Whether the model's folder is read: to sample from it, or to train it."""
    return "generate" in config.stages and config.engine != "openai" or bool(config.then)


def check_flags(common: "CommonArgs", config: "RejectionConfig", words: list[str]) -> list[str]:
    """Problems of the flags of rejection sampling, all of them."""
    problems = [*check_generation(common, config)] if "generate" in config.stages else []
    problems += check_scorers(common, config) if "score" in config.stages else []
    problems += check_selection(config)
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        problems.append(f"--stages {','.join(config.stages)}: takes {', '.join(STAGES)}, some or all")
    problems += check_failed_fraction(config)
    if "generate" in config.stages:
        problems += check_data(common, config)
    if environment.engine():
        problems.append(f"LAUNCH={environment.engine()}: each process samples with a whole model. Type LAUNCH=auto")
    if config.then:
        problems += check_then(common, config)
    else:
        given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        problems += [f"--{name}: nothing is trained without --then. Remove it" for name in TRAINING if name in given]
        if config.rounds != 1:
            problems.append(f"--rounds {config.rounds}: a round ends with a training. Add --then DPO (or another)")
    asked = [flag for flag in ("plan", "probe") if getattr(common, flag)]
    problems += [f"--{flag}: of a training alone. Give it to train_rlhf.py" for flag in asked]
    if needs_model(config):
        problems += flags.check_common(common, "Rejection sampling", REJECTION)
    return problems + check_rejection_folder(common, config)


def check_data(common: "CommonArgs", config: "RejectionConfig") -> Iterator[str]:
    if not common.train_data_path and not needs_model(config):
        yield f"--train_data_path: missing. Type --train_data_path {REJECTION.sample_data} to try"
    for flag, paths in (("--train_data_path", common.train_data_path), ("--eval_data_path", common.eval_data_path)):
        try:
            files.find_files(paths or (), flag)
        except Refused as refusal:
            yield from refusal.problems
    if common.eval_data_path and not config.then:
        yield "--eval_data_path: measures what --then trains. Leave it out, or add --then"


def check_generation(common: "CommonArgs", config: "RejectionConfig") -> Iterator[str]:
    if config.num_completions < 1:
        yield f"--num_completions {config.num_completions}: 1 or more"
    if config.max_prompt_length is not None and config.max_prompt_length < 1:
        yield f"--max_prompt_length {config.max_prompt_length}: 1 or more"
    if config.held_out_prompts and not common.eval_fraction:
        yield "--held_out_prompts: no prompt is held out. Add --eval_fraction 0.1"
    if config.max_new_tokens < 1:
        yield f"--max_new_tokens {config.max_new_tokens}: 1 or more"
    if not config.temperature >= 0:
        yield f"--temperature {config.temperature:g}: 0 (the likeliest token) or more"
    elif config.temperature == 0 and config.num_completions > 1:
        yield (
            f"--temperature 0 with --num_completions {config.num_completions}: the same answer so many times. Type "
            "--temperature 1, or --num_completions 1"
        )
    if not 0 < config.top_p <= 1:
        yield f"--top_p {config.top_p:g}: above 0, up to 1"
    if config.top_k < 0:
        yield f"--top_k {config.top_k}: 0 (all tokens) or more"
    if config.generate_batch_size is not None and config.generate_batch_size < 1:
        yield f"--generate_batch_size {config.generate_batch_size}: 1 or more"
    if config.engine == "openai":
        if not config.api_base_url:
            yield "--engine openai: no server. Type --api_base_url http://localhost:8000/v1"
        if not config.api_model:
            yield "--engine openai: which of the server's models? Type --api_model NAME"
        if config.max_prompt_length:
            yield "--max_prompt_length with --engine openai: the server counts the tokens, not we. Leave it out"
        if config.top_k:
            yield "--top_k with --engine openai: its API has no such field. Leave it out; --top_p it has"
        yield from check_server(config, "api_base_url", config.api_base_url, config.api_key_variable)
    else:
        for name in ("api_base_url", "api_model"):
            if getattr(config, name) and not (name == "api_base_url" and config.judge_model):
                yield f"--{name}: is for --engine openai, and this is {config.engine}. Add --engine openai"
    if config.engine == "vllm":
        yield from flags.check_vllm("--engine vllm")
        if environment.processes_asked() > 1:
            yield "--engine vllm with several processes: one engine is one process here. Type NUM_PROCESSES=1"
        path = common.model_name_or_path
        if path and folders.read_adapter(path):
            yield f"--engine vllm: {path} is an adapter. Type python -m utils.merge_lora {path} MERGED, and give that"
        if config.then and common.train_mode != "full":
            yield f"--engine vllm with --then and --train_mode {common.train_mode}: it takes no adapter. Type full"


def check_scorers(common: "CommonArgs", config: "RejectionConfig") -> Iterator[str]:
    names = judge.name_scorers(common, config)
    if not names:
        yield (
            f"no scorer: what is a good answer? Type --reward_funcs {REJECTION.sample_reward} to try, "
            "--reward_model_path FOLDER or --judge_model NAME"
        )
    else:
        yield from flags.check_rewards(common, "Rejection sampling", REJECTION, config)
    if config.reward_weights and len(config.reward_weights) != len(names):
        yield f"--reward_weights: {len(config.reward_weights)} of them for {len(names)} rewards. Give each its weight"
    weights = config.reward_weights or []
    if not all(map(math.isfinite, weights)):
        yield f"--reward_weights {' '.join(map(str, weights))}: must be finite numbers"
    if config.score_batch_size < 1:
        yield f"--score_batch_size {config.score_batch_size}: 1 or more"
    answers = config.num_completions + bool(config.reference_column)
    yield from judge.check_judge(config, "num_completions", answers, unused="judge_")


def check_selection(config: "RejectionConfig") -> Iterator[str]:
    for name in config.write:
        if name not in selection.FILES.values():
            yield f"--write {name}: takes {', '.join(selection.FILES.values())}"
    if not config.write:
        yield f"--write: names no file. It takes {', '.join(selection.FILES.values())}"
    if config.threshold is not None and not math.isfinite(config.threshold):
        yield f"--threshold {config.threshold}: a finite number"
    if (config.select == "threshold") != (config.threshold is not None):
        yield "--select threshold and --threshold NUMBER belong together: give both, or neither"
    if config.select_k < 1:
        yield f"--select_k {config.select_k}: 1 or more"
    if not config.min_margin >= 0:
        yield f"--min_margin {config.min_margin:g}: 0 or more"
    if config.chunk_size is not None and config.chunk_size < 1:
        yield f"--chunk_size {config.chunk_size}: 1 or more rows a file"


def check_then(common: "CommonArgs", config: "RejectionConfig") -> Iterator[str]:
    name = find_method(config.then)
    able = [method for method in METHODS if selection.file_for(method)]
    if name not in able:
        why = "it samples for itself, with --rlhf_type" if name else "no such method"
        yield f"--then {config.then}: {why}. It takes {', '.join(able)}"
    if config.rounds < 1:
        yield f"--rounds {config.rounds}: 1 or more"
    if config.rounds > 1 and config.engine == "openai":
        yield "--rounds with --engine openai: the server's model would be the same in each. Type --rounds 1"
    if name and METHODS[name].task != "CAUSAL_LM" and config.rounds > 1:
        yield f"--then {name} with --rounds: a reward model cannot answer in the next round. Type --rounds 1"
    held_out = common.eval_data_path or common.eval_fraction
    if held_out and config.judge_mode == "pick" and judge.name_scorers(common, config) == [judge.name_judge(config)]:
        yield (
            "--judge_mode pick with held-out prompts: what it gives the answers to a prompt always adds up to 1 and "
            "measures no model. Type --judge_mode score, or --eval_fraction 0"
        )
    if set(config.stages) != set(STAGES):
        yield f"--then with --stages {','.join(config.stages)}: it needs all of them. Leave --stages out"


def check_rejection_folder(common: "CommonArgs", config: "RejectionConfig") -> list[str]:
    if not config.output_dir:
        return ["--output_dir: missing. A folder for the answers, scores and files"]
    folder = Path(config.output_dir)
    if problems := check_writable(folder):
        return problems
    ours = any((folder / trace).exists() for trace in ("settings.json", "prompts.jsonl.part", ".lock", "rounds.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        return [f"--output_dir {folder}: holds files that no rejection sampling made. Name another folder"]
    rounds = "rounds" in read_settings(folder) or (folder / "rounds.json").exists()
    plain = (folder / "prompts.jsonl").exists()
    if (plain if config.then else rounds) and not common.overwrite_output_dir:
        holds, other = ("rounds of --then", "without") if rounds else ("one sampling", "with")
        return [f"--output_dir {folder}: holds {holds}, and this run is {other} --then. Name another folder"]
    if common.overwrite_output_dir:
        return check_overwrite(folder, reads(common, config))
    if config.then:
        return []  # of a round's folder its own run looks
    if "generate" not in config.stages and not (folder / "completions.jsonl").exists():
        return [f"--output_dir {folder}: no completions in it. Add generate to --stages"]
    if config.stages == ["select"] and not (folder / "scores.jsonl").exists():
        return [f"--output_dir {folder}: no scores in it. Add score to --stages"]
    return [*compare_with_folder(common, config, folder)]


# ── what a folder was made with ──────────────────────────────────────────────────────────────────────────────────────


def compare_with_folder(common: "CommonArgs", config: "RejectionConfig", folder: Path) -> Iterator[str]:
    """Problems of going on in a folder that was made with other settings."""
    anew = "Name another --output_dir, or add --overwrite_output_dir to start afresh"
    if "generate" in config.stages and (folder / "prompts.jsonl").exists():
        yield from compare_settings(folder, "generate", generation_settings(common, config), anew)
    if "score" in config.stages and any(folder.glob("scores.*")):
        anew = f"Name another --output_dir, or rm -r {folder}/scores.* to score the same answers anew"
        yield from compare_settings(folder, "score", score_settings(common, config), anew)


def generation_settings(common: "CommonArgs", config: "RejectionConfig") -> dict[str, Any]:
    """All that an answer depends on."""
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


def weights_of(path: str | None, revision: str | None) -> list[Any]:
    adapter = folders.read_adapter(path)
    base = [adapter["base_model_name_or_path"], adapter.get("revision")] if adapter else None
    return [sampling.describe_weights(path, revision), base and sampling.describe_weights(*base)]


def score_settings(common: "CommonArgs", config: "RejectionConfig") -> dict[str, Any]:
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
    if not Path(path).expanduser().is_file():
        return None  # a Hub id
    with open(Path(path).expanduser(), "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


def hash_short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
