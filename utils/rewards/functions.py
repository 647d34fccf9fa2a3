"""Reward functions from a user's file: found, called as TRL calls them, and tried before a model is loaded.

Called with prompts, completions, completion_ids and every further column of the data by keyword, one returns a number
for each completion.
"""

import ast
import asyncio
import concurrent.futures
import contextlib
import difflib
import functools
import inspect
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from utils.data.columns import text_of
from utils.rewards import files
from utils.runtime import environment
from utils.runtime.errors import Failed, Refused
from utils.runtime.paths import near_path

TRIED = 4  # rows that a reward is tried on


class RewardFailed(Failed):
    """A reward function raised, or returned what is no reward."""


def check_reward_functions(specs):
    """Problems of --reward_funcs that can be seen without running the files."""
    for spec in specs:
        path, _, name = spec.rpartition(":")
        file = Path(path).expanduser()
        if file.suffix != ".py" or not name.isidentifier():
            yield f"--reward_funcs {spec}: written as FILE.py:FUNCTION, like data/rewards.py:brevity"
        elif not file.is_file():
            yield f"--reward_funcs {spec}: no file {path}{near_path(path)}"
        else:
            try:
                defined = list(names_in(ast.parse(file.read_bytes())))
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


def check_timeout(common):
    """Problems of --reward_timeout."""
    seconds = common.reward_timeout
    if seconds is None:
        return
    if not 0 < seconds < math.inf:
        yield f"--reward_timeout {seconds:g}: seconds, above 0. Leave it out for no limit"
    elif not common.reward_funcs:
        yield f"--reward_timeout {seconds:g}: limits the calls of --reward_funcs, and there are none. Leave it out"


def names_in(tree):
    """The names that a module's top level defines: functions, classes, assignments, imports ("*": whatever it has)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        else:  # under an if, try or with
            for part in ("body", "orelse", "finalbody"):
                yield from names_in(ast.Module(getattr(node, part, []), []))
            for handler in getattr(node, "handlers", []):
                yield from names_in(handler)


def load_reward_function(spec: str, timeout: float | None = None) -> "RewardFunction":
    """The function behind "file.py:function", made to fail in one line. Raises Refused where its file fails."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    try:
        function = getattr(files.import_file(file), name)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise Refused([f"--reward_funcs {spec}: {say_where(error, file)}"]) from error
    if not callable(function):
        raise Refused([f"--reward_funcs {spec}: {name} is no function"])
    return RewardFunction(function, name, file, timeout)


class RewardFunction:
    """A function of a user's file, async or not, as a plain function that returns a float or None for each completion.

    Async functions run on the one event loop of the process, from the trial to the last rollout: a semaphore or an
    HTTP client at the top level of the file stays usable. The async functions of a run work on a batch concurrently.
    timeout: seconds that a call may take (None: no limit). The function then runs in a thread of its own.
    """

    def __init__(self, function, name, file, timeout=None):
        self.__name__, self.function, self.file, self.timeout = name, function, file, timeout
        bare = function
        while isinstance(bare, functools.partial):
            bare = bare.func
        self.is_async = inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(type(bare).__call__)
        self.together = ()  # the async functions of the run, this one among them, if there are several
        self.begun = None  # the call that another function of `together` began: its completions and its Call

    def __call__(self, prompts, completions, **columns):
        columns = {"prompts": prompts, "completions": completions, **columns}
        for other in self.together if self.begun is None else ():
            other.begun = completions, other.begin(columns)
        begun, self.begun = self.begun, None
        # TRL gives the same list to each function of a rollout
        call = begun[1] if begun and begun[0] is completions else self.begin(columns)
        rewards, error = self.wait(call, len(prompts))
        if error is not None:
            row = None if self.is_async else self.first_failing(columns)
            row = "" if row is None else f", for row {row}, prompt {say_prompt(prompts[row])}"
            details = "".join(traceback.format_exception(error))
            raise RewardFailed(f"{self.__name__} raised {say_where(error, self.file)}{row}", details) from error
        return to_rewards(rewards, self.__name__, self.file, prompts)

    def begin(self, columns):
        attempted = functools.partial(attempt, self.function, columns)
        return self.thread.begin(attempted) if self.timeout or self.together else Call(attempted())

    @functools.cached_property
    def thread(self):
        return Worker(self.__name__)

    def wait(self, call, count):
        """What `attempt` returned. Raises RewardFailed after `timeout` seconds."""
        try:
            return call.result(self.timeout)
        except TimeoutError:
            environment.abandoned.append(self.__name__)
            place, stack = self.where_now()
            limit = f"{self.timeout:g} s for {count} completions (--reward_timeout {self.timeout:g})"
            message = f"{self.__name__} did not return within {limit}{place}. Type a longer time, or mend the function"
            raise RewardFailed(message, f"{message}\n{stack}") from None

    def where_now(self):
        """(" and is at FILE:LINE" or "", the stack) of the call that did not return."""
        loop = event_loop()
        stacks = [traceback.StackSummary.extract(awaiting(task.get_coro())) for task in asyncio.all_tasks(loop)]
        frames = sys._current_frames()
        stacks += [traceback.extract_stack(frames[thread.ident]) for thread in (loop.thread, self.thread.thread)]
        for stack in reversed(stacks):
            if lines := [frame.lineno for frame in stack if Path(frame.filename) == self.file]:
                return f" and is at {self.file}:{lines[-1]}", "".join(stack.format())
        return "", "".join(stacks[-1].format())

    def first_failing(self, columns):
        """The row that fails by itself, of a batch that failed; None if none does within ten seconds."""
        until = time.monotonic() + 10
        for row in range(len(columns["prompts"])):
            if time.monotonic() > until:  # a call may be slow, or paid
                return None
            alone = {n: v[row : row + 1] if isinstance(v, list) else v for n, v in columns.items()}
            try:
                _, error = self.begin(alone).result(self.timeout)
            except TimeoutError:
                environment.abandoned.append(self.__name__)
                return None
            if error is not None:
                return row
        return None


def awaiting(coroutine):
    """(frame, line) of a coroutine that waits, then of the one that it waits for, ..."""
    while frame := getattr(coroutine, "cr_frame", None):
        yield frame, frame.f_lineno
        coroutine = coroutine.cr_await


def attempt(function, columns):
    """(rewards, None), or (None, the exception) of a call of a user's function."""
    try:
        found = function(**columns)
        if inspect.isawaitable(found):
            return asyncio.run_coroutine_threadsafe(attempt_async(found), event_loop()).result()
        return list(found) if isinstance(found, Iterator) else found, None  # a generator runs, and may raise, only now
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001  may raise anything
        return None, error


async def attempt_async(found):
    try:
        return await found, None
    except BaseException as error:  # noqa: BLE001  SystemExit would end the event loop
        return None, error


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async reward functions. It runs in a thread of its own until the process ends."""
    loop = asyncio.new_event_loop()
    loop.thread = threading.Thread(target=loop.run_forever, name="reward event loop", daemon=True)
    loop.thread.start()
    return loop


class Call:
    """A call of a reward function: its result is there, or in the future."""

    def __init__(self, done=None, future=None):
        self.done, self.future, self.began = done, future, time.monotonic()

    def result(self, timeout):
        """Raises TimeoutError if it is not there `timeout` seconds after the call began."""
        if self.future is None:
            return self.done
        return self.future.result(None if timeout is None else max(0, self.began + timeout - time.monotonic()))


class Worker:
    """A thread that makes one call after another. It ends with the process, even in the middle of a call."""

    def __init__(self, name):
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name=f"reward {name}", daemon=True)
        self.thread.start()

    def begin(self, function):
        call = Call(future=concurrent.futures.Future())
        torch = sys.modules.get("torch")
        device = torch.cuda.current_device() if torch and torch.cuda.is_initialized() else None
        self.calls.put((call.future, function, device))
        return call

    def work(self):
        while True:
            future, function, device = self.calls.get()
            if device is not None:  # which each thread has its own of
                sys.modules["torch"].cuda.set_device(device)
            future.set_result(function())


@contextlib.contextmanager
def ticking(tell):
    """Call tell(seconds so far) once a second from another thread, and tell(None) at the end if it was called."""
    over, began, told = threading.Event(), time.monotonic(), []

    def tick():
        while not over.wait(1):
            told.append(True)
            tell(time.monotonic() - began)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if told:
            tell(None)


# ── what they return ─────────────────────────────────────────────────────────────────────────────────────────────────


def to_rewards(rewards, name, file, prompts):
    """`rewards` as a list of floats or None. Raises RewardFailed, with the function and the first wrong row."""
    try:
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
    except TypeError:
        raise RewardFailed(f"{name} ({file}) returned {rewards!r}, not a list of numbers") from None
    if len(rewards) != len(prompts):
        raise RewardFailed(f"{name} ({file}) returned {len(rewards)} rewards for {len(prompts)} completions")
    for row, reward in enumerate(rewards):
        if reward is not None and not is_number(reward):
            raise RewardFailed(
                f"{name} ({file}) returned {reward!r} for row {row}, prompt {say_prompt(prompts[row])}. A reward is a "
                "finite number"
            )
    return [None if reward is None else float(reward) for reward in rewards]


def is_number(reward):
    """Whether it is one finite number, of Python, NumPy or PyTorch."""
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def say_where(error, file):
    """The exception on one line with its place in the user's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    place = f" at {file}:{frames[-1].lineno}" if frames else f" ({file})"
    explained = files.explain_import(error, file)
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}{explained}"


def say_prompt(prompt):
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:59] + "…")


# ── trying them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_functions(specs, rows, tokenizer, timeout: float | None = None) -> list:
    """Every reward function, tried on a few rows. Raises Refused."""
    functions = [load_reward_function(spec, timeout) for spec in specs or ()]
    for function in functions:
        try_reward_function(function, rows, tokenizer)
    waiting = [function for function in functions if function.is_async]
    for function in waiting if len(waiting) > 1 else ():
        function.together = waiting
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
        reward(prompts=prompts, completions=completions, completion_ids=ids, **kwargs)
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


def name_rewards(common):
    """The names of the reward functions and of the reward model, without the judge."""
    names = [spec.rpartition(":")[2] for spec in common.reward_funcs or ()]
    return names + ([Path(common.reward_model_path).name] if common.reward_model_path else [])
