"""What judges an answer: functions from a user's file and reward models, each tried before the policy is loaded.

All are reward functions as TRL has them: called with prompts, completions, completion_ids and every further column of
the data by keyword, they return a number for each completion.
"""

import ast
import asyncio
import contextlib
import difflib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from pathlib import Path

from utils.checks import Refused, is_reward_model, near_path

TRIED = 4  # rows that a reward is tried on


class RewardFailed(RuntimeError):
    """A reward function raised, or returned what is no reward. One line; `details` is the whole traceback."""

    def __init__(self, message, details=None):
        super().__init__(message)
        self.details = details or message


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_reward_functions(specs):
    """Problems of --reward_funcs that can be seen without running the files."""
    for spec in specs:
        path, _, name = spec.rpartition(":")
        file = Path(path).expanduser()
        if not path or not name.isidentifier():
            yield f"--reward_funcs {spec}: written as FILE.py:FUNCTION, like data/rewards.py:brevity"
        elif not file.is_file():
            yield f"--reward_funcs {spec}: no file {path}{near_path(path)}"
        else:
            try:
                defined = list(names_in(ast.parse(file.read_text(encoding="utf-8"))))
            except SyntaxError as error:
                yield f"{path}:{error.lineno}: {error.msg}, so --reward_funcs {spec} cannot be loaded"
                continue
            except ValueError as error:  # half a character, a null byte
                yield f"{path}: not Python ({' '.join(str(error).split())}), so --reward_funcs {spec} cannot be loaded"
                continue
            if name not in defined and "*" not in defined:
                near = difflib.get_close_matches(name, defined, 1)
                guess = f"Did you mean {near[0]}?" if near else f"It has {', '.join(defined) or 'none'}"
                yield f"--reward_funcs {spec}: no function {name} in {path}. {guess}"


def names_in(tree):
    """The names that a module's top level defines: functions, classes, assignments, imports ("*": whatever it has)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        else:  # under an if, try or with
            for part in ("body", "orelse", "finalbody"):
                yield from names_in(ast.Module(getattr(node, part, []), []))
            for handler in getattr(node, "handlers", []):
                yield from names_in(handler)


def load_reward_function(spec):
    """The function behind "file.py:function", made to fail in one line. Raises Refused where its file fails."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    loader = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    module = sys.modules[loader.name] = importlib.util.module_from_spec(loader)  # where dataclasses and pickle look
    try:
        loader.loader.exec_module(module)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise Refused([f"--reward_funcs {spec}: {say_where(error, file)}"]) from error
    if not callable(function):
        raise Refused([f"--reward_funcs {spec}: {name} is no function"])
    return careful(function, name, file)


def careful(function, name, file):
    """`function`, whose rewards are checked: as many as completions, each a finite number (None: does not apply)."""

    def explain(error, prompts, row):
        row = "" if row is None else f", for row {row}, prompt {say_prompt(prompts[row])}"
        return RewardFailed(f"{name} raised {say_where(error, file)}{row}", "".join(traceback.format_exception(error)))

    def call(**columns):
        rewards = function(**columns)
        return list(rewards) if inspect.isgenerator(rewards) else rewards  # it runs, and may raise, only now

    def first_failing(**columns):
        """The row that fails by itself, of a batch that failed; None where none does."""
        for row in range(len(columns["prompts"])):
            alone = {n: v[row : row + 1] if isinstance(v, list) else v for n, v in columns.items()}
            try:
                call(**alone)
            except Exception:  # noqa: BLE001  as above
                return row
        return None

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def checked(prompts, completions, **columns):
            try:
                rewards = await function(prompts=prompts, completions=completions, **columns)
            except Exception as error:  # noqa: BLE001
                raise explain(error, prompts, None) from error
            return check_rewards(rewards, name, file, prompts)
    else:

        def checked(prompts, completions, **columns):
            try:
                rewards = call(prompts=prompts, completions=completions, **columns)
            except Exception as error:  # noqa: BLE001  a user's function may raise anything
                row = first_failing(prompts=prompts, completions=completions, **columns)
                raise explain(error, prompts, row) from error
            return check_rewards(rewards, name, file, prompts)

    checked.__name__ = name
    return checked


def check_rewards(rewards, name, file, prompts):
    """`rewards` as a list of floats or None. Raises RewardFailed, with the function and the first wrong row."""
    try:
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
    except TypeError:
        raise RewardFailed(f"{name} ({file}) returned {rewards!r}, not a list of numbers") from None
    if len(rewards) != len(prompts):
        raise RewardFailed(f"{name} ({file}) returned {len(rewards)} rewards for {len(prompts)} completions")
    for row, reward in enumerate(rewards):
        if reward is not None and not is_finite(reward):
            raise RewardFailed(
                f"{name} ({file}) returned {reward!r} for row {row}, prompt {say_prompt(prompts[row])}. A reward is a "
                "finite number"
            )
    return [None if reward is None else float(reward) for reward in rewards]


def is_finite(reward):
    """Whether it is one finite number, of Python, NumPy or PyTorch."""
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def say_where(error, file):
    """The exception on one line with its place in the user's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    place = f" at {file}:{frames[-1].lineno}" if frames else f" ({file})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def say_prompt(prompt):
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:59] + "…")


# ── reward models ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_reward_model(path):
    """Problems of --reward_model_path that its folder's files show."""
    from utils.checks import check_folder

    problems, described = check_folder(path, "--reward_model_path")
    if described is not None and not is_reward_model(described):
        problems.append(
            f"--reward_model_path {path}: a language model, whose score head would be random. Train one with "
            "--rlhf_type Reward"
        )
    elif described and not problems and described.get("task_type") == "SEQ_CLS":
        problems += check_adapters_head(path)
    return problems


def check_adapters_head(path):
    """Problems of an adapter's score head: loaded over its base, one that lacks it would score at random."""
    shapes = {}
    for file in Path(path).glob("*.safetensors"):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name.endswith("score.weight")}
    if not shapes:
        yield f"--reward_model_path {path}: no weights for score.weight in it. A reward model has a trained head"
    for shape in shapes.values():
        if shape[0] != 1:
            yield f"--reward_model_path {path}: scores {shape[0]} labels. A reward model has one"


class RewardModel:
    """A sequence classifier of one label as a reward function, whatever its family, tokenizer and template.

    Prompt and completion are written in the model's own template, as our Reward method trains them, cut at the front
    to what the model holds, padded on the right, and scored in batches of like length.
    """

    def __init__(self, path, model, tokenizer, batch_size):
        self.__name__ = Path(path).name
        self.path, self.model, self.tokenizer, self.batch_size = path, model, tokenizer, batch_size
        held = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        self.longest = min(held, tokenizer.model_max_length)

    def __call__(self, prompts, completions, **columns):
        return self.score([self.tokens(p, c) for p, c in zip(prompts, completions, strict=True)])

    def tokens(self, prompt, completion):
        from utils.text import render, tokenize

        text, (answer,), _ = render(self.tokenizer, {"prompt": prompt, "completion": completion})
        return tokenize(self.tokenizer, text + answer)[-self.longest :]

    def score(self, rows):
        """Scores of token rows, in their order; as many forward passes on every process that has as many rows."""
        import torch

        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(len(rows[row]) for row in batch)
            ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
                mask[place, : len(rows[row])] = 1
            for row, score in zip(batch, self.forward(ids, mask).tolist(), strict=True):
                scores[row] = score
        return scores

    def forward(self, ids, mask):
        """Scores (B,) of right-padded token ids (B, L)."""
        import torch

        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()

    def attach(self, trainer):
        """Puts the model where the trainer's are; under ZeRO-3 in pieces, as the policy."""
        from trl.models import prepare_deepspeed

        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        else:
            self.model.to(trainer.accelerator.device)


class SharedRewardModel(RewardModel):
    """A LoRA reward model on the policy's own base: its adapter beside the policy's, its head, and no second base."""

    def __init__(self, path, tokenizer, batch_size, rows):
        self.__name__ = Path(path).name
        self.path, self.tokenizer, self.batch_size, self.rows = path, tokenizer, batch_size, rows

    def attach(self, trainer):
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        model = trainer.accelerator.unwrap_model(trainer.model)
        shape = LoraConfig.from_pretrained(self.path)
        shape.task_type, shape.modules_to_save, shape.inference_mode = None, None, True
        model.add_adapter("reward", shape)
        tensors = load_file(Path(self.path) / "adapter_model.safetensors")
        head = [name for name in tensors if name.endswith("score.weight")]
        set_peft_model_state_dict(model, {n: t for n, t in tensors.items() if n not in head}, adapter_name="reward")
        for name, parameter in model.named_parameters():
            if ".reward." in name:
                parameter.requires_grad_(False)
        self.head = tensors[head[0]].float()
        self.trainer = trainer
        save = model.save_pretrained

        def save_without_judge(*args, **kwargs):
            """Checkpoints hold what is trained; a judge in one would take the place of another one named on resume."""
            kept = [name for name in model.peft_config if name != "reward"]
            return save(*args, **{"selected_adapters": kept, **kwargs})

        model.save_pretrained = save_without_judge
        text = model.get_base_model().config.get_text_config()
        self.longest = min(getattr(text, "max_position_embeddings", None) or 10**9, self.tokenizer.model_max_length)

    def __call__(self, prompts, completions, **columns):
        if self.rows:  # tried now, at the first rollout: the base is there, in whatever pieces
            rows, self.rows = self.rows, None
            try:
                try_reward_model(self, rows, str(self.trainer.model.dtype).removeprefix("torch."))
            except Refused as refusal:
                raise RewardFailed(str(refusal)) from None
        return super().__call__(prompts, completions, **columns)

    def forward(self, ids, mask):
        """The last state of each row under the reward's adapter, through the whole wrapped model, times the head."""
        import torch
        from trl.trainer.utils import use_adapter

        trainer = self.trainer
        device = trainer.accelerator.device
        wrapped = trainer.accelerator.unwrap_model(trainer.model)
        states, training = [], wrapped.training
        wrapped.eval()  # rollouts are judged in mid-training: no dropout, neither the base's nor the judge's
        trunk = wrapped.get_base_model().base_model
        hook = trunk.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            with torch.no_grad(), use_adapter(wrapped, adapter_name="reward"), trainer.accelerator.autocast():
                trainer.model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=1)
        finally:
            hook.remove()
            wrapped.train(training)
        # where transformers puts a score: on the last token that is not the pad, which an end of turn may be
        place = (torch.arange(ids.shape[1]) * (ids != self.tokenizer.pad_token_id)).argmax(1)
        last = states[0][torch.arange(len(ids)), place]
        return (last.float() @ self.head.to(device).T)[:, 0]


def shares_base(path, policy_path, train_mode):
    """Whether the reward model is an adapter on the very base that the policy's adapter is trained on."""
    from utils.models import read_adapter

    adapter, other = read_adapter(path), read_adapter(policy_path)
    base = other["base_model_name_or_path"] if other else policy_path
    return bool(adapter) and train_mode != "full" and same_path(adapter["base_model_name_or_path"], base)


def same_path(one, other):
    return one == other or Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code=False):
    """A whole RewardModel on `device`, never in pieces yet. Raises Refused without a trained head of one label."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from utils.models import first_line, fit_config, read_adapter

    adapter = read_adapter(path)
    tokenizer = load_reward_tokenizer(path, rows, trust_remote_code)
    kwargs = {"num_labels": 1} if adapter else {}
    with unsharded():
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                adapter["base_model_name_or_path"] if adapter else path,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, ValueError) as error:
            raise Refused([f"--reward_model_path {path}: cannot be loaded ({first_line(error)})"]) from None
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        elif loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise Refused(
                [f"--reward_model_path {path}: no weights for {missing} in it. A reward model has a trained head"]
            )
    if model.config.num_labels != 1:
        raise Refused([f"--reward_model_path {path}: scores {model.config.num_labels} labels. A reward model has one"])
    fit_config(model, tokenizer)
    return RewardModel(path, model.to(device).eval().requires_grad_(False), tokenizer, batch_size)


def load_reward_tokenizer(path, rows, trust_remote_code=False):
    """The reward model's tokenizer, able to write every row's prompt. Raises Refused where its template cannot."""
    from utils.data import is_chat, refuse_rows
    from utils.models import load_tokenizer
    from utils.text import fit_tokenizer, render, say_error

    tokenizer = load_tokenizer(path, None, trust_remote_code, flag="--reward_model_path")
    try:
        fit_tokenizer(tokenizer, chat=is_chat(rows[0][1]))
    except Refused as refusal:
        raise Refused([f"--reward_model_path {path}: {problem}" for problem in refusal.problems]) from None
    problems = []
    for where, values in rows:
        try:
            render(tokenizer, {"prompt": values["prompt"], "completion": example_answers(values)[0]})
        except Exception as error:  # noqa: BLE001  templates raise what they like
            problems.append(f"{where}: the template of --reward_model_path {path} refuses it ({say_error(error)})")
    refuse_rows(problems)
    return tokenizer


@contextlib.contextmanager
def unsharded():
    """Loads a model whole although ZeRO-3 loads the policy in pieces: it is tried before there is an engine."""
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    holder = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(holder())


# ── trying them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_functions(specs, rows, tokenizer):
    """Every reward function, tried on a few rows: [callable]. Raises Refused."""
    functions = [load_reward_function(spec) for spec in specs or ()]
    for function in functions:
        try_reward_function(function, rows, tokenizer)
    return functions


def load_model(path, rows, *, policy_path, train_mode, dtype, device, batch_size, trust_remote_code=False):
    """The reward model, tried on a few rows; on the policy's own base it can be tried only once that is there."""
    if shares_base(path, policy_path, train_mode):
        return SharedRewardModel(path, load_reward_tokenizer(path, rows, trust_remote_code), batch_size, rows)
    reward = load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code)
    try_reward_model(reward, rows, dtype)
    return reward


def try_reward_function(reward, rows, tokenizer):
    """Raises Refused where it fails on the first rows with an answer that says little."""
    from transformers import TrainerState

    rows = [values for _, values in rows[:TRIED]]
    prompts = [values["prompt"] for values in rows]
    completions = [example_answers(values)[0] for values in rows]
    further = {name: [values["further"].get(name) for values in rows] for name in rows[0]["further"]}
    kwargs = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None, **further}
    ids = [tokenizer(text_of_answer(completion))["input_ids"] for completion in completions]
    try:
        found = reward(prompts=prompts, completions=completions, completion_ids=ids, **kwargs)
        if inspect.iscoroutine(found):
            asyncio.run(found)
    except RewardFailed as error:
        raise Refused([f"--reward_funcs: tried on the first {len(rows)} rows, {error}"]) from error


def try_reward_model(reward, rows, dtype):
    """Raises Refused unless a row's score alone is its score in a padded batch, and scores differ at all."""
    rows = [values for _, values in rows[:TRIED]]
    pairs = [(values["prompt"], answer) for values in rows for answer in example_answers(values)]
    tokens = [reward.tokens(*pair) for pair in pairs]
    together = reward.score(tokens)
    alone = [reward.score([row])[0] for row in tokens]
    apart = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    allowed = (1e-3 if dtype == "float32" else 5e-2) * (1 + max(map(abs, alone)))
    if not all(map(math.isfinite, alone + together)):
        raise Refused(
            [f"--reward_model_path {reward.path}: scores {alone[0]} on the first rows. Its weights are broken"]
        )
    if apart > allowed:
        raise Refused(
            [
                f"--reward_model_path {reward.path}: a row's score alone and in a padded batch are {apart:.3g} apart. "
                "Its pad token stands inside its template, or it pads on the left: set another pad_token"
            ]
        )
    if max(alone) == min(alone):
        raise Refused(
            [f"--reward_model_path {reward.path}: the same score {alone[0]:.3g} for every one of {len(alone)}"]
        )


def example_answers(values):
    """Two answers to a row's prompt to try a reward on: those that it has, else two that say little."""
    found = [values["further"].get(name) for name in ("chosen", "rejected")]
    chat = isinstance(values["prompt"], list)
    if all(isinstance(answer, list if chat else str) and answer for answer in found):
        return [answer[-1:] if chat else answer for answer in found]
    texts = ["Yes.", "I am not sure what you mean. Could you say it again, with a few more words?"]
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def text_of_answer(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
