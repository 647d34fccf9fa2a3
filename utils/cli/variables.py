"""The variables of the run scripts as flags: `MODEL=x bash rlhf_run.sh` becomes `--model_name_or_path x`.

A typed flag wins over the recipe (--config FILE), the recipe over a variable, a variable over the script's default.
The scripts explain their variables; this file maps them to flags and has the defaults that depend on other flags.
"""

from collections.abc import Callable, MutableMapping

from rlhf_args.methods import DISTILLATION, EVERY, METHODS, REJECTION, Method, find_method
from utils.cli import recipes
from utils.runtime.paths import DEMO_MODEL, DEMO_STUDENT

Flags = dict[str, str]  # {flag: value}

BOTH = {  # variable -> flag
    "MODEL": "model_name_or_path",
    "TRAIN_DATA": "train_data_path",
    "TRAIN_MODE": "train_mode",
    "EVAL_FRACTION": "eval_fraction",
    "EPOCHS": "num_train_epochs",
    "OUTPUT_DIR": "output_dir",
}
TRAINING = BOTH | {
    "LEARNING_RATE": "learning_rate",
    "BATCH_SIZE": "per_device_train_batch_size",
    "ACCUMULATION": "gradient_accumulation_steps",
    "MAX_STEPS": "max_steps",
}
REWARD = ("reward_funcs", "reward_model_path")  # the variable REWARD sets one of them
INSTEAD = {"eval_fraction": ("eval_data_path",), **dict.fromkeys(REWARD, REWARD)}  # flags that replace a variable
THEN = ("rounds", "train_mode", "eval_fraction", "num_train_epochs")  # rejection_run.sh: only used with THEN


def fill(job: list[str], env: MutableMapping[str, str]) -> list[str]:
    """The job (a script and its words) with the script's variables in `env` appended as flags, unless given.

    Removes these variables from `env`, because the job may start another run script. Raises Refused if a recipe
    cannot be read.
    """
    script, *words = job
    variables, add_defaults = SCRIPTS[script]
    renamed = dict(
        pair for method in EVERY.values() if f"train_{method.entry}.py" == script for pair in method.renamed
    )
    given = recipes.given_flags(words, renamed)
    values = {flag: value for variable, flag in variables.items() if (value := env.pop(variable, ""))}
    if reward := values.pop("reward", ""):
        values["reward_funcs" if ".py:" in reward else "reward_model_path"] = reward
    values = {flag: value for flag, value in values.items() if not given.keys() & INSTEAD.get(flag, ())} | given
    flags = add_defaults(values)
    return [*job, *(word for flag in flags if flag not in given for word in (f"--{flag}", flags[flag]))]


# ── the flags of each script, with its defaults ──────────────────────────────────────────────────────────────────────


def fill_rlhf(values: Flags) -> Flags:
    name = values.get("rlhf_type")
    method = METHODS[find_method(name) or "DPO"]  # train_rlhf.py refuses an unknown name
    batch, accumulation = map(str, method.batch)
    defaults = {"model_name_or_path": DEMO_MODEL, "output_dir": f"output/{name}-{values.get('train_mode')}"}
    defaults |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    if "train_data_path" not in values:  # the sample data: takes minutes
        defaults |= sample_flags(method, values) | recipes.read_flags(method.sample_flags)
    return training_defaults(values) | defaults | values


def fill_gkd(values: Flags) -> Flags:
    kind = "SeqKD" if recipes.is_on(values.get("seq_kd")) else "GKD"
    folder = f"output/{kind}-{values.get('train_mode')}"
    folder += "".join(f"-{flag}{values[flag]}" for flag in ("lmbda", "beta") if flag in values)
    defaults = {"train_data_path": DISTILLATION["GKD"].sample_data, "output_dir": folder}
    models = {"model_name_or_path": DEMO_STUDENT, "teacher_model_name_or_path": DEMO_MODEL}
    if not values.keys() & {*models, "train_data_path"}:  # the shipped models: takes minutes
        defaults |= {"learning_rate": "1e-4", "max_completion_length": "32", "max_steps": "16"}
    return training_defaults(values) | models | defaults | values


def training_defaults(values: Flags) -> Flags:
    defaults = {"per_device_eval_batch_size": "4", "logging_steps": "1", "resume_from_checkpoint": "auto"}
    return defaults if values.get("train_mode") == "full" else defaults | {"learning_rate": "1e-4"}


def fill_rejection(values: Flags) -> Flags:
    then, is_sample = values.get("then"), "train_data_path" not in values
    defaults = {"model_name_or_path": DEMO_MODEL, "output_dir": "output/rejection" + (f"-{then}" if then else "")}
    if "eval_data_path" not in values:
        defaults["eval_fraction"] = "0.2" if is_sample else "0.1"
    if is_sample:  # takes minutes
        defaults |= sample_flags(REJECTION, values) | {
            "max_samples": "40",
            "max_new_tokens": "64",
            "num_train_epochs": "2",
        }
        defaults["system_prompt"] = "Answer in one short sentence."
    return {flag: value for flag, value in (defaults | values).items() if then or flag not in THEN}


def sample_flags(method: Method, values: Flags) -> Flags:
    """The method's sample data and, unless a reward is given, its sample reward."""
    judged = values.keys() & {*REWARD, "judge_model"}
    reward = {"reward_funcs": method.sample_reward} if method.sample_reward and not judged else {}
    return {"train_data_path": method.sample_data, **reward}


SCRIPTS: dict[str, tuple[dict[str, str], Callable[[Flags], Flags]]] = {
    "train_rlhf.py": (TRAINING | {"RLHF_TYPE": "rlhf_type", "REWARD": "reward"}, fill_rlhf),
    "train_gkd.py": (
        TRAINING | {"TEACHER": "teacher_model_name_or_path", "LMBDA": "lmbda", "BETA": "beta", "SEQ_KD": "seq_kd"},
        fill_gkd,
    ),
    "rejection_sampling.py": (
        BOTH
        | {"COMPLETIONS": "num_completions", "MAX_NEW_TOKENS": "max_new_tokens", "SELECT": "select", "WRITE": "write"}
        | {"THEN": "then", "ROUNDS": "rounds", "REWARD": "reward"},
        fill_rejection,
    ),
}
