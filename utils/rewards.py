"""Reward functions from a user's file: found, called as TRL calls them, and tried before a model is loaded.

Called with prompts, completions, completion_ids and every further column of the data by keyword, one returns a number
for each completion.
"""

import ast
import asyncio
import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path

from utils.checks import Failed, Refused, near_path
from utils.data import text_of

TRIED = 4  # rows that a reward is tried on


class RewardFailed(Failed):
    """A reward function raised, or returned what is no reward."""


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
    loader = importlib.util.spec_from_file_location(f"reward_{file.stem}_{abs(hash(str(file)))}", file)
    module = sys.modules[loader.name] = importlib.util.module_from_spec(loader)  # where dataclasses and pickle look
    sys.path.append(str(file.parent))  # it may import a file beside it
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


# ── trying them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_functions(specs, rows, tokenizer):
    """Every reward function, tried on a few rows: [callable]. Raises Refused."""
    functions = [load_reward_function(spec) for spec in specs or ()]
    for function in functions:
        try_reward_function(function, rows, tokenizer)
    return functions


def try_reward_function(reward, rows, tokenizer):
    """Raises Refused where it fails on the first rows with an answer that says little."""
    from transformers import TrainerState

    rows = [values for _, values in rows[:TRIED]]
    prompts = [values["prompt"] for values in rows]
    completions = [example_answers(values)[0] for values in rows]
    further = {name: [values["further"].get(name) for values in rows] for name in rows[0]["further"]}
    kwargs = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None, **further}
    ids = [tokenizer(text_of(completion))["input_ids"] for completion in completions]
    try:
        found = reward(prompts=prompts, completions=completions, completion_ids=ids, **kwargs)
        if inspect.iscoroutine(found):
            asyncio.run(found)
    except RewardFailed as error:
        raise Refused([f"--reward_funcs: tried on the first {len(rows)} rows, {error}"]) from error


def example_answers(values):
    """Two answers to a row's prompt to try a reward on: those that it has, else two that say little."""
    found = [values["further"].get(name) for name in ("chosen", "rejected")]
    chat = isinstance(values["prompt"], list)
    if all(isinstance(answer, list if chat else str) and answer for answer in found):
        return [answer[-1:] if chat else answer for answer in found]
    texts = ["Yes.", "I am not sure what you mean. Could you say it again, with a few more words?"]
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
