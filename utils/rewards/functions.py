"""Reward functions from a user's file, tried on a few rows before a model is loaded.

A function gets prompts, completions, completion_ids and the further columns of the data by keyword, as in TRL. It
returns a number for each completion.
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
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from common_args import RewardArgs
from utils.data.columns import text_of
from utils.rewards import files
from utils.rewards.server import Row
from utils.runtime import environment
from utils.runtime.errors import Failed, Refused
from utils.runtime.paths import near_path

Attempt = tuple[Any, BaseException | None]  # what a call returned, or the exception
TRIED = 4  # rows that a reward is tried on
LOOP = "reward event loop"  # name of its thread


class RewardFailed(Failed):
    """A reward function raised, or returned something else than rewards."""


def check_reward_functions(specs: list[str]) -> Iterator[str]:
    """Problems of --reward_funcs that show without running the files."""
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


def names_in(tree: ast.Module) -> Iterator[str]:
    """Names defined at a module's top level: functions, classes, assignments, imports ("*" for a star import)."""
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
    """The function of "file.py:function". Raises Refused if its file fails."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    try:
        function = getattr(files.import_file(file), name)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise Refused([f"--reward_funcs {spec}: {say_where(error, file)}"]) from error
    if not callable(function):
        raise Refused([f"--reward_funcs {spec}: {name} is not a function"])
    return RewardFunction(function, name, file, timeout)


class RewardFunction:
    """A function of a user's file, async or not, as a plain function that returns a float or None for each completion.

    All async functions run on one event loop until the process ends, so a semaphore or an HTTP client at the top level
    of the file stays usable. The async functions of a run work on a batch concurrently.
    timeout: maximum seconds of a call (None: no limit). The function then runs in its own thread.
    """

    def __init__(self, function: Callable[..., Any], name: str, file: Path, timeout: float | None = None) -> None:
        self.__name__, self.function, self.file, self.timeout = name, function, file, timeout
        bare = function
        while isinstance(bare, functools.partial):
            bare = bare.func
        self.is_async = inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(type(bare).__call__)
        self.together: list[
            RewardFunction
        ] = []  # the async functions of the run, this one among them, if there are several
        self.begun: tuple[list[Any], Call] | None = (
            None  # the call that another function of `together` began: its completions and its Call
        )

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        columns = {"prompts": prompts, "completions": completions, **columns}
        for other in self.together if self.begun is None else []:
            other.begun = completions, other.begin(columns)
        begun, self.begun = self.begun, None
        # TRL gives the same list to each function of a rollout
        call = begun[1] if begun and begun[0] is completions else self.begin(columns)
        rewards, error = self.wait(call, len(prompts))
        if error is not None:
            row = None if self.is_async else self.first_failing(columns)
            place = "" if row is None else f", for row {row}, prompt {say_prompt(prompts[row])}"
            details = "".join(traceback.format_exception(error))
            raise RewardFailed(f"{self.__name__} raised {say_where(error, self.file)}{place}", details) from error
        return to_rewards(rewards, self.__name__, self.file, prompts)

    def begin(self, columns: dict[str, Any]) -> "Call":
        attempted = functools.partial(attempt, self.function, columns)
        return self.thread.begin(attempted) if self.timeout or self.together else Call(attempted())

    @functools.cached_property
    def thread(self) -> "Worker":
        return Worker(self.__name__)

    def wait(self, call: "Call", count: int) -> Attempt:
        """The result of `attempt`. Raises RewardFailed after `timeout` seconds."""
        try:
            return call.result(self.timeout)
        except TimeoutError:
            environment.abandoned.append(self.__name__)
            place, stack = self.where_now()
            limit = f"{self.timeout:g} s for {count} completions (--reward_timeout {self.timeout:g})"
            message = (
                f"{self.__name__} did not return within {limit}{place}. Type a longer time, or correct the function"
            )
            raise RewardFailed(message, f"{message}\n{stack}") from None

    def where_now(self) -> tuple[str, str]:
        """(" and is at FILE:LINE" or "", the stack) of a call that timed out."""
        loop = event_loop()
        stacks = [traceback.StackSummary.extract(awaiting(task.get_coro())) for task in asyncio.all_tasks(loop)]
        frames = sys._current_frames()
        threads = [*(thread for thread in threading.enumerate() if thread.name == LOOP), self.thread.thread]
        stacks += [traceback.extract_stack(frames[thread.ident]) for thread in threads if thread.ident]
        for stack in reversed(stacks):
            if lines := [frame.lineno for frame in stack if Path(frame.filename) == self.file]:
                return f" and is at {self.file}:{lines[-1]}", "".join(stack.format())
        return "", "".join(stacks[-1].format())

    def first_failing(self, columns: dict[str, Any]) -> int | None:
        """The first row of a failed batch that fails by itself; None if none does within ten seconds."""
        until = time.monotonic() + 10
        for row in range(len(columns["prompts"])):
            if time.monotonic() > until:  # a call may be slow or cost money
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


def awaiting(coroutine: Any) -> Iterator[tuple[FrameType, int]]:
    """(frame, line) of a waiting coroutine, then of the coroutine that it waits for, ..."""
    while frame := getattr(coroutine, "cr_frame", None):
        yield frame, frame.f_lineno
        coroutine = coroutine.cr_await


def attempt(function: Callable[..., Any], columns: dict[str, Any]) -> Attempt:
    """(rewards, None) or (None, exception) of a call of a user's function."""
    try:
        found = function(**columns)
        if inspect.isawaitable(found):
            return asyncio.run_coroutine_threadsafe(attempt_async(found), event_loop()).result()
        return list(found) if isinstance(found, Iterator) else found, None  # a generator runs, and may raise, only now
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001  may raise anything
        return None, error


async def attempt_async(found: Awaitable[Any]) -> Attempt:
    try:
        return await found, None
    except BaseException as error:  # noqa: BLE001  SystemExit would end the event loop
        return None, error


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async reward functions. It runs in its own thread until the process ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=LOOP, daemon=True).start()
    return loop


class Call:
    """A call of a reward function: finished (done) or running (future)."""

    def __init__(self, done: Any = None, future: "concurrent.futures.Future[Any] | None" = None) -> None:
        self.done, self.future, self.began = done, future, time.monotonic()

    def result(self, timeout: float | None) -> Any:
        """The result. Raises TimeoutError `timeout` seconds after the call began."""
        if self.future is None:
            return self.done
        return self.future.result(None if timeout is None else max(0, self.began + timeout - time.monotonic()))


class Worker:
    """A daemon thread that runs one call after another. The process can end during a call."""

    def __init__(self, name: str) -> None:
        self.calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any], int | None]]
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name=f"reward {name}", daemon=True)
        self.thread.start()

    def begin(self, function: Callable[[], Any]) -> Call:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        torch = sys.modules.get("torch")
        device = torch.cuda.current_device() if torch and torch.cuda.is_initialized() else None
        self.calls.put((future, function, device))
        return Call(future=future)

    def work(self) -> None:
        while True:
            future, function, device = self.calls.get()
            if device is not None:  # each thread has its own device
                sys.modules["torch"].cuda.set_device(device)
            future.set_result(function())


@contextlib.contextmanager
def ticking(tell: Callable[[float | None], None]) -> Iterator[None]:
    """Call tell(seconds so far) once a second from another thread, and tell(None) at the end if it was called."""
    over, began = threading.Event(), time.monotonic()
    told: list[bool] = []

    def tick() -> None:
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


# ── their rewards ────────────────────────────────────────────────────────────────────────────────────────────────────


def to_rewards(rewards: Any, name: str, file: Path, prompts: list[Any]) -> list[float | None]:
    """`rewards` as a list of floats or None. Raises RewardFailed with the function and the first wrong row."""
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


def is_number(reward: Any) -> bool:
    """True for a finite number of Python, NumPy or PyTorch."""
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def say_where(error: BaseException, file: Path) -> str:
    """The exception on one line, with its line in the user's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    place = f" at {file}:{frames[-1].lineno}" if frames else f" ({file})"
    explained = files.explain_import(error, file)
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}{explained}"


def say_prompt(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:59] + "…")


# ── trying them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_functions(
    specs: list[str] | None, rows: list[Row], tokenizer: Callable[..., Any], timeout: float | None = None
) -> list[Any]:
    """Every reward function, tried on a few rows. Raises Refused."""
    functions = [load_reward_function(spec, timeout) for spec in specs or ()]
    for function in functions:
        try_reward_function(function, rows, tokenizer)
    waiting = [function for function in functions if function.is_async]
    for function in waiting if len(waiting) > 1 else ():
        function.together = waiting
    return functions


def try_reward_function(reward: RewardFunction, rows: list[Row], tokenizer: Callable[..., Any]) -> None:
    """Try a reward function on the first rows and an example answer. Raises Refused if it fails."""
    from transformers import TrainerState

    tried = [values for _, values in rows[:TRIED]]
    prompts = [values["prompt"] for values in tried]
    completions = [example_answers(values)[0] for values in tried]
    further = {name: [values["further"].get(name) for values in tried] for name in tried[0]["further"]}
    ids = [tokenizer(text_of(completion))["input_ids"] for completion in completions]
    given = {"prompts": prompts, "completions": completions, "completion_ids": ids, "trainer_state": TrainerState()}
    given |= {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
    try:
        reward(**further | given)
    except RewardFailed as error:
        raise Refused([f"--reward_funcs: tried on the first {len(tried)} rows, {error}"]) from error


def example_answers(values: dict[str, Any]) -> list[Any]:
    """Two answers to a row's prompt to try a reward on: its chosen and rejected, or two short examples."""
    found = [values["further"].get(name) for name in ("chosen", "rejected")]
    chat = isinstance(values["prompt"], list)
    if all(isinstance(answer, list if chat else str) and answer for answer in found):
        return [answer[-1:] if chat else answer for answer in found]
    texts = ["Yes.", "I am not sure what you mean. Could you say it again, with a few more words?"]
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def name_rewards(common: RewardArgs) -> list[str]:
    """The names of the reward functions and of the reward model, without the judge."""
    names = [spec.rpartition(":")[2] for spec in common.reward_funcs or ()]
    return names + ([Path(common.reward_model_path).name] if common.reward_model_path else [])
