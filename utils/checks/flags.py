"""Checks before a model is loaded. Each returns its problems, one line each; the caller prints all of them."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common_args import CommonArgs, RewardArgs, SharedArgs
from rlhf_args.judge_config import JudgeConfig
from rlhf_args.methods import METHODS, Method
from utils.checks.folders import check_model, check_output_dir, check_value_model
from utils.checks.launch import check_launch, check_oldest_versions
from utils.cli.ranges import check_ranges
from utils.cli.run import Run
from utils.models import sampling
from utils.models.folders import ModelFolder, read_header
from utils.runtime import environment
from utils.runtime.errors import Refused, guess_name

VLLM = "0.22.0", "0.31.0"  # oldest and newest version for trl 1.16.0 (trl/import_utils.py)


def check_common(common: SharedArgs, name: str, method: Method) -> list[str]:
    """Problems of the shared flags and the model folder. Imports no heavy library."""
    problems = [*check_oldest_versions(), *check_mode(common, name, method), *check_ranges(type(common), common)]
    for flag in ("num_processes", "gpu_memory"):
        if getattr(common, flag) is not None:
            problems.append(f"--{flag} {getattr(common, flag)}: only used with --plan. Add --plan, or remove it")
    if common.eval_fraction and common.eval_data_path:
        problems.append("--eval_fraction and --eval_data_path together: choose one of the two")
    twice = sorted(set(common.train_data_path or ()) & set(common.eval_data_path or ()))
    if twice:
        way_out = "Type --eval_fraction 0.1, or OWNER/NAME:test"
        problems.append(f"--eval_data_path {twice[0]}: is also the training data. {way_out}")
    if not common.train_data_path:
        problems.append(f"--train_data_path: missing. Type --train_data_path {method.sample_data} to try")
    if not common.model_name_or_path:
        return [
            *problems,
            "--model_name_or_path: missing. Type a folder or Hub id; `python -m utils.demo_model` makes one",
        ]
    return problems + check_model(common.model_name_or_path, name, method)


def check_mode(common: SharedArgs, name: str, method: Method) -> Iterator[str]:
    """Problems of --train_mode and --use_dora."""
    if common.train_mode not in method.train_modes:
        yield f"--train_mode {common.train_mode}: {name} takes {', '.join(method.train_modes)}"
    if common.use_dora and common.train_mode == "full":
        yield "--use_dora with --train_mode full: DoRA is a kind of adapter. Type --train_mode lora"


def check_rewards(common: RewardArgs, name: str, method: Method, judged: JudgeConfig) -> list[str]:
    """Problems of the rewards: unused, missing, or without their files. judged: for example the method's config."""
    flags = ("reward_model_path", "reward_funcs", "reward_timeout")
    asked = [flag for flag in flags if getattr(common, flag) is not None]
    if not method.sample_reward:
        takers = ", ".join(other for other, m in METHODS.items() if m.sample_reward)
        return [f"--{flag}: {name} trains on the answers in the data. {takers} take rewards" for flag in asked]
    if not common.reward_model_path and not common.reward_funcs and not judged.judge_model:
        choices = f"--reward_funcs {method.sample_reward} to try, --reward_model_path FOLDER or --judge_model NAME"
        return [f"no reward: {name} needs one. Type {choices}"]
    from utils.rewards import functions, judge, models  # imported only if needed

    problems = [*functions.check_reward_functions(common.reward_funcs or [])]
    if common.reward_timeout is not None and not common.reward_funcs:
        problems.append("--reward_timeout: only used with --reward_funcs. Add that, or remove it")
    names = functions.name_rewards(common) + judge.name_numbers(judged)
    for twice in sorted({one for one in names if names.count(one) > 1}):
        problems.append(f"two rewards are called {twice}, which the log would mix up. Rename one")
    return problems + (models.check_reward_model(common.reward_model_path) if common.reward_model_path else [])


def check_config(common: CommonArgs, config: Any, name: str, method: Method) -> list[str]:
    """Problems of the method's own flags and of the output folder."""
    problems = []
    batch = config.per_device_train_batch_size
    if batch < method.min_batch_size:
        least = f"{name} compares the rows of a batch and needs at least {method.min_batch_size} per device"
        problems.append(f"--per_device_train_batch_size {batch}: {least}")
    if config.eval_strategy != "no" and not (common.eval_data_path or common.eval_fraction):
        way_out = "Add --eval_data_path FILE or --eval_fraction 0.1"
        problems.append(f"--eval_strategy {config.eval_strategy.value}: no held-out rows. {way_out}")
    asked = config.loss_type
    for loss in [asked] if isinstance(asked, str) else asked:
        if loss not in method.losses:
            problems.append(f"--loss_type {loss}: {name} takes {', '.join(method.losses)}")
    if method.sample_reward:
        problems += check_rollouts(common, config)
    # SFT has no disable_dropout: its dropout is on
    if common.lora_dropout and "lora_dropout" in common.typed and config.disable_dropout:
        way_out = "Remove it, or add --disable_dropout False"
        problems.append(f"--lora_dropout {common.lora_dropout:g}: no effect, as {name} turns dropout off. {way_out}")
    problems += check_best(config, name, method)
    if config.n_gpu > 1 and not common.check:
        way_out = f"Type bash {method.entry}_run.sh, or CUDA_VISIBLE_DEVICES=0 for one GPU"
        problems.append(f"{config.n_gpu} GPUs are visible to one process. {way_out}")
    if config.model_init_kwargs:
        problems.append(
            "--model_init_kwargs: not used here. Type --dtype, --attn_implementation, --model_revision or "
            "--train_mode instead (qlora: 4 bits; 8-bit weights are not supported)"
        )
    from transformers.integrations import get_available_reporting_integrations

    trackers = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in trackers:
            problems.append(f"--report_to {tracker}: no such tracker installed. It takes none, {', '.join(trackers)}")
    checkpoint = config.resume_from_checkpoint
    if checkpoint and str(checkpoint).lower() not in ("auto", "true") and not Path(checkpoint).is_dir():
        problems.append(
            f"--resume_from_checkpoint {checkpoint}: no such folder. Type auto for the newest checkpoint in "
            "output_dir, or remove the flag to start a new run"
        )
    problems += check_launch(common, config)
    # rank 0 owns the folder, and may already be writing while the others check
    writes = environment.is_main() and not common.probe
    return problems + check_output_dir(common, config) if writes else problems


def check_best(config: Any, name: str, method: Method) -> Iterator[str]:
    """Problems of --metric_for_best_model."""
    asked, known = config.metric_for_best_model, ("loss", *method.evaluated)
    if not asked or any(fnmatch(asked.removeprefix("eval_"), pattern) for pattern in known):
        return
    names = [f"eval_{log}" for log in known]
    near = dict(method.metrics).get(asked.removeprefix("eval_"), asked.removeprefix("eval_"))
    guess = guess_name(f"eval_{near}", names)
    yield f"--metric_for_best_model {asked}: {name} does not log it. It logs {', '.join(names)}{guess}"


def check_rollouts(common: RewardArgs, config: Any) -> Iterator[str]:
    """Problems of rollouts: sampling, rewards, critic."""
    from utils.rewards import judge  # imported only if needed

    judges = len(judge.name_scorers(common, config))
    if config.reward_weights and len(config.reward_weights) != judges:
        yield f"--reward_weights: {len(config.reward_weights)} weights for {judges} rewards. Type one per reward"
    yield from judge.check_judge(config, "num_generations", config.num_generations)
    held_out = common.eval_data_path or common.eval_fraction
    if held_out and judges == 1 and config.judge_model and config.judge_mode == "pick":
        yield (
            "--judge_mode pick with held-out prompts: the scores for one prompt always sum to 1, so their mean says "
            "nothing. Type --eval_fraction 0, or --judge_mode score"
        )
    yield from check_sampling(common, config)
    if "stop_strings" in (config.generation_kwargs or {}):
        for flag in ("mask_truncated_completions", "use_transformers_continuous_batching"):
            if getattr(config, flag):
                yield f"--{flag} with stop_strings in --generation_kwargs: TRL handles only the end token there"
    answers, batch = config.num_generations_eval or config.num_generations, config.per_device_eval_batch_size
    if (common.eval_data_path or common.eval_fraction) and batch * config.world_size % answers:
        yield (
            f"--num_generations_eval {answers}: an evaluation batch of {batch * config.world_size} answers is not a "
            f"multiple of it. Type --per_device_eval_batch_size {answers}"
        )
    if kind := config.critic_kind(common.train_mode):
        yield from check_critic(common, config, kind)


def check_sampling(common: SharedArgs, config: Any) -> Iterator[str]:
    """Problems of sampling answers from the trained model."""
    held = ModelFolder.at(common.model_name_or_path).positions
    if held and held <= config.max_completion_length:
        way_out = f"Type --max_completion_length {held // 2}"
        yield f"--max_completion_length {config.max_completion_length}: the model holds {held} tokens. {way_out}"
    yield from sampling.check_settings(config)
    if config.use_vllm:
        yield from check_vllm()


def length_limit(config: Any, path: str) -> int | None:
    """Maximum tokens of prompt and answer, or of the prompt alone if the policy samples the answer."""
    if config.length_flag == "max_length":
        return config.max_length
    held = ModelFolder.at(path).positions
    # check_sampling refuses a max_completion_length that leaves no room
    room = [held - config.max_completion_length] if held and held > config.max_completion_length else []
    return min([*room, *([config.max_prompt_length] if config.max_prompt_length else [])], default=None)


def check_rollout_fits(run: Run) -> None:
    """Raises Refused if the prompts do not fill one rollout: TRL would train on nothing."""
    config, prompts = run.config, len(run.train.rows) if run.train else 0
    needed = config.rollout_size() // config.num_generations
    if prompts < needed:
        raise Refused(
            f"{prompts} prompts, and a rollout takes {needed} ({config.rollout_size()} answers, "
            f"{config.num_generations} each). Give more prompts, or type --per_device_train_batch_size, "
            "--gradient_accumulation_steps or NUM_PROCESSES smaller"
        )


def check_vllm(flag: str = "--use_vllm") -> Iterator[str]:
    """Problems of the installed vLLM."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        yield f"{flag}: vLLM is not installed. Type pip install -r requirements-vllm.txt, or remove the flag"
        return
    from packaging.version import Version

    found = importlib.metadata.version("vllm")
    if not Version(VLLM[0]) <= Version(Version(found).base_version) <= Version(VLLM[1]):
        yield f"{flag}: vLLM {found} is installed; this TRL needs {VLLM[0]} to {VLLM[1]}. See requirements-vllm.txt"


def check_critic(common: SharedArgs, config: Any, kind: str) -> Iterator[str]:
    """Problems of PPO's critic. kind: as in OnlineConfig.critic_kind."""
    from rlhf_args.ppo_config import OWN_TRUNK, SCALE

    path, file, own = config.value_model_path, config.critic_path, kind in OWN_TRUNK
    adapted = common.train_mode != "full"
    if kind == "lora" and not adapted:
        yield "--critic lora: needs a frozen base, and --train_mode full has none. Type --critic model"
    if kind == "model" and adapted and path is None:
        yield (
            f"--critic model with --train_mode {common.train_mode}: would load the policy's base twice. Type --critic "
            "lora (an adapter on that base), or add --value_model_path MODEL"
        )
    if path is not None and not own:
        yield f"--value_model_path {path}: not used by --critic {kind}. Type --critic model, or remove it"
    elif path is not None:
        yield from check_value_model(path, common, kind)
    if config.critic_layer is not None:
        described = ModelFolder.at(common.model_name_or_path, common.model_revision).config
        layers = (described.get("text_config") or described).get("num_hidden_layers")
        if own:
            yield f"--critic_layer {config.critic_layer}: only used with --critic head or mlp, not {kind}. Remove it"
        elif layers and not -layers <= config.critic_layer < layers:
            yield f"--critic_layer {config.critic_layer}: the policy has {layers} layers. Type 0 to {layers - 1}"
    if file is not None and not Path(file).is_file():
        yield f"--critic_path {file}: no such file. A run with --save_critic True leaves OUTPUT_DIR/critic.safetensors"
    elif file is not None and SCALE not in (read_header(file) or {}):
        yield f"--critic_path {file}: not a critic saved by PPO"
    elif file is not None and path is not None and kind == "lora":
        yield f"--value_model_path {path} with --critic_path: {file} contains the whole adapter. Remove one of the two"
    if 0 < config.max_steps <= config.critic_warmup_steps:
        steps = f"all {config.max_steps} steps would train the critic alone. Type at most {config.max_steps - 1}"
        yield f"--critic_warmup_steps {config.critic_warmup_steps}: {steps}"
