"""A reward file is one module with helpers, pools, an event loop and a time limit of its own.

`pytest tests/rewards/test_reward_files.py`
"""

import pickle
import sys
import threading
import time

import pytest

import rejection_sampling
import train_rlhf
from tests.conftest import command, read_rows, slow_but, write_rows
from utils.rejection import scoring
from utils.results import report
from utils.rewards import files as rewards_files, functions
from utils.runtime import environment
from utils.runtime.errors import Refused

CHATS = [{"prompt": [{"role": "user", "content": f"Count to {number}."}]} for number in range(8)]
FAST = "--rlhf_type RLOO --max_completion_length 8 --num_generations 2 --per_device_train_batch_size 4 --max_steps 2 "
FAST += "--logging_steps 1 --learning_rate 2e-2 --save_strategy no --dtype float32"
JUDGE = "def judge(completions, **columns):\n    return [float(grade(c[-1]['content'])) for c in completions]\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write({name: text}) writes files; it returns the path of own.py."""

    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder joins it

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / "own.py")

    return write


def load(file, *names, timeout=None):
    rows = [("row", {**row, "further": {}}) for row in CHATS]
    return functions.load_functions([f"{file}:{name}" for name in names], rows, scoring.no_tokens, timeout)


def ask(function, *texts):
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return function(prompts=["p"] * len(texts), completions=answers)


def words(tiny_model, tmp_path, *further):
    rows = write_rows(tmp_path / "rows.jsonl", CHATS)
    asked = f"{FAST} --model_name_or_path {tiny_model} --train_data_path {rows} --output_dir {tmp_path}/out"
    return [*asked.split(), *further]


# ── one module ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_functions_of_a_file_share_what_the_file_holds(write):
    count = "calls = []\n\ndef NAME(completions, **columns):\n    calls.append('NAME')\n    return [len(calls)]\n"
    file = write({"own.py": count.replace("NAME", "one") + count.partition("\n\n")[2].replace("NAME", "two")})
    one, two = (functions.load_reward_function(f"{file}:{name}") for name in ("one", "two"))
    assert [ask(one, "a"), ask(two, "a"), ask(one, "a")] == [[1.0], [2.0], [3.0]]
    assert one.function.__module__ == two.function.__module__


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from utils import weigh

def grade(text):
    from trainers import twice
    return twice(weigh(text))

def pooled(completions, kind):
    with ProcessPoolExecutor(1, multiprocessing.get_context(kind)) as pool:
        texts = [c[-1]["content"] for c in completions]
        found = list(pool.map(grade, texts))
    assert found == [2.0 * len(text) for text in texts]
    return found

def forked(completions, **columns):
    return pooled(completions, "fork")

def spawned(completions, **columns):
    return pooled(completions, "spawn")
"""


def test_pools_of_both_kinds_grade_in_the_command_itself(write, tiny_model, tmp_path):
    helpers = {
        "utils.py": "def weigh(text):\n    return len(text)\n",
        "trainers.py": "def twice(x):\n    return x * 2.0\n",
    }
    file = write({"own.py": POOL, **helpers})
    specs = [f"{file}:{name}" for name in ("forked", "spawned")]
    done = command("train_rlhf.py", *words(tiny_model, tmp_path, "--check", "--reward_funcs", *specs), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "name", ["my-rewards.py", "v1.2.py", "a b.c/my rewards.py", "评分/奖励.py", "sub/__init__.py"]
)
def test_a_file_of_any_name_is_found_by_the_name_of_its_module(name, write, tmp_path, monkeypatch):
    write({name: "def grade(text):\n    return len(text)\n\n" + JUDGE})
    (function,) = load(tmp_path / name, "judge")
    pickled = pickle.dumps(function.function)
    kept = {name: module for name, module in sys.modules.items() if not name.startswith("utils.rewards.files.")}
    monkeypatch.setattr(sys, "modules", kept)  # as in a process that has not read the file
    assert pickle.loads(pickled)([[{"content": "four"}]]) == [4.0]


def test_a_file_that_failed_is_read_again_once_it_is_mended(write):
    file = write({"own.py": "import nothing_of_the_kind\n"})
    with pytest.raises(Refused):
        load(file, "judge")
    write({"own.py": "grade = len  # mended\n\n" + JUDGE})
    (function,) = load(file, "judge")
    assert ask(function, "four") == [4.0]


@pytest.mark.parametrize("edited", ["own.py", "utils.py"])
def test_a_file_that_was_edited_is_read_again_with_all_of_its_folder(edited, write):
    files = {"own.py": "from utils import grade\n\n" + JUDGE, "utils.py": "grade = len\n"}
    (before,) = load(write(files), "judge")
    (same,) = load(write({}), "judge")
    new = {"own.py": "from utils import grade as size\n\ndef grade(x):\n    return 2 * size(x)\n\n" + JUDGE}
    new |= {"utils.py": "def grade(text):\n    return 2 * len(text)\n"}
    (after,) = load(write({edited: new[edited]}), "judge")
    assert before.function is same.function is not after.function
    assert [ask(function, "four") for function in (before, after)] == [[4.0], [8.0]]


def test_a_file_without_py_is_refused(write, tmp_path):
    write({"own.txt": JUDGE})
    (problem,) = functions.check_reward_functions([f"{tmp_path}/own.txt:judge"])
    assert f"--reward_funcs {tmp_path}/own.txt:judge: " in problem and "FILE.py:FUNCTION" in problem


# ── helpers beside it ────────────────────────────────────────────────────────────────────────────────────────────────

OURS = ["utils", "trainers", "data", "common_args", "rlhf_args", "train_rlhf", "tests"]
LAZY = "def grade(text):\n    from NAME import grade\n    return grade(text)\n"
HELPERS = {
    "a module": ({"NAME.py": "grade = len\n"}, "from NAME import grade\n"),
    "a module under another name": ({"NAME.py": "grade = len\n"}, "import NAME as n\n\ngrade = n.grade\n"),
    "a package": ({"NAME/__init__.py": "", "NAME/deep.py": "grade = len\n"}, "from NAME.deep import grade\n"),
    "a module of a package": (
        {"NAME/__init__.py": "", "NAME/deep.py": "grade = len\n"},
        "from NAME import deep\nimport NAME.deep\n\ngrade = NAME.deep.grade\nassert deep is NAME.deep\n",
    ),
    "a folder": ({"NAME/deep.py": "grade = len\n"}, "import NAME.deep as deep\n\ngrade = deep.grade\n"),
    "in the function": ({"NAME.py": "grade = len\n"}, LAZY),
    "a relative import": ({"NAME.py": "grade = len\n"}, "from .NAME import grade\n"),
    "of a helper": (
        {"helper.py": "import NAME\n\n" + LAZY + "\nassert NAME.grade is len\n", "NAME.py": "grade = len\n"},
        "from helper import grade\n",
    ),
    "inside a package": (
        {"NAME/__init__.py": "from .deep import *\n", "NAME/deep.py": "from beside import grade\n"}
        | {"beside.py": "grade = len\n"},
        "from NAME import grade\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*OURS, "helpers_of_mine"])
@pytest.mark.parametrize("case", HELPERS)
def test_a_helper_may_have_any_name(case, name, write):
    files, text = HELPERS[case]
    files = {file.replace("NAME", name): body.replace("NAME", name) for file, body in files.items()}
    ours = {name: sys.modules.get(name) for name in OURS}
    (function,) = load(write({**files, "own.py": text.replace("NAME", name) + "\n" + JUDGE}), "judge")
    assert ask(function, "four", "") == [4.0, 0.0]
    assert {name: sys.modules.get(name) for name in OURS} == ours
    assert functions.files is rewards_files


def test_a_helper_that_imports_the_file_gets_the_same_module(write):
    file = write({"own.py": "seen = []\nfrom utils import grade\n\n" + JUDGE, "utils.py": HELPER_OF_OWN})
    (function,) = load(file, "judge")
    assert ask(function, "a") == [5.0]  # 4 answers of the trial were seen before


HELPER_OF_OWN = "import own\n\ndef grade(text):\n    own.seen.append(text)\n    return len(own.seen)\n"


def test_installed_packages_stay_what_they_are(write):
    text = "import datasets\nimport json.decoder\nimport transformers\n\nassert datasets.Dataset and json.loads\n"
    text += "assert transformers.AutoConfig\nimport data.rewards\n\ngrade = data.rewards.length\n\n" + JUDGE
    beside = {"datasets/train.jsonl": "", "transformers/setup.py": "raise SystemExit\n", "data/train.jsonl": ""}
    (function,) = load(write({**beside, "own.py": text}), "judge")
    assert ask(function, "two words") == [2.0]


def test_a_file_in_the_projects_own_folder_sees_the_project(write, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_files, "ROOT", tmp_path)
    file = write(
        {
            "own.py": "from utils.data.template import shared_length as _\n\ngrade = len\n" + JUDGE,
            "utils/__init__.py": "",
        }
    )
    assert ask(*load(file, "judge"), "four") == [4.0]


UNSEEN = {
    "beside another file": ("from utils import grade\n\n" + JUDGE, ":1"),
    "by a name in a string": ("import importlib\n\ngrade = importlib.import_module('utils').grade\n\n" + JUDGE, ":3"),
    "a module by a string": ("import importlib\n\nimportlib.import_module('utils.mine')\n\n" + JUDGE, ":3"),
    "in the function": ("def grade(text):\n    from utils import grade\n    return grade(text)\n\n" + JUDGE, ":2"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSEEN)
def test_a_helper_that_cannot_be_seen_is_refused_with_its_name_and_the_folder(case, write, tmp_path):
    text, line = UNSEEN[case]
    file = write({"own.py": text, "other/utils.py": "grade = len\n"})
    with pytest.raises(Refused) as refused:
        load(file, "judge")
    (problem,) = refused.value.problems
    assert f"{file}{line}" in problem and ". utils is a name of this project" in problem
    assert f"({tmp_path})" in problem and "rename it" in problem


def test_an_import_that_fails_in_the_users_own_files_is_not_explained(write, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_files, "ROOT", tmp_path)  # the reward file is in a folder of the project, as data/ is
    write({"data/own.py": "from helper import grade\n\n" + JUDGE, "data/helper.py": "size = len\n"})
    with pytest.raises(Refused, match=f"cannot import name 'grade' .* at {tmp_path}/data/own.py:1$"):
        load(tmp_path / "data" / "own.py", "judge")


# ── async ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LIMITED = """
import asyncio, functools

limit = asyncio.Semaphore(1)
loops = set()

async def grade(text):
    async with limit:
        await asyncio.sleep(0.001)
        loops.add(id(asyncio.get_running_loop()))
        return float(len(text)) / len(loops)

async def judged(completions, extra=0, **columns):
    return [extra + score for score in await asyncio.gather(*(grade(c[-1]["content"]) for c in completions))]

class Judge:
    async def __call__(self, completions, **columns):
        return await judged(completions)

judge = judged
partial = functools.partial(judged, extra=1)
of_a_class = Judge()
partial_of_a_class = functools.partial(Judge(), unused=1)
plain = lambda completions, **columns: judged(completions)
"""


@pytest.mark.parametrize("name", ["judge", "partial", "of_a_class", "partial_of_a_class", "plain"])
def test_an_async_function_of_any_form_keeps_its_event_loop(name, write):
    (function,) = load(write({"own.py": LIMITED}), name)
    assert not functions.inspect.iscoroutinefunction(function)
    for _ in range(3):  # beside the trial; more answers than the semaphore lets through
        assert ask(function, "four", "") == ([5.0, 1.0] if name == "partial" else [4.0, 0.0])


def test_a_semaphore_of_a_file_lasts_from_the_trial_to_the_last_rollout(write, tiny_model, tmp_path):
    file = write({"own.py": LIMITED})
    assert train_rlhf.main(words(tiny_model, tmp_path, "--reward_funcs", f"{file}:judge", f"{file}:partial")) == 0
    lines = read_rows(tmp_path / "out" / "completions.jsonl")
    assert len(lines) == 8
    for line in lines:
        length = len(line["completion"][-1]["content"])
        assert line["rewards"] == {"judge": length, "partial": length + 1}


def rejection(tiny_model, tmp_path, *further):
    rows = write_rows(tmp_path / "rows.jsonl", CHATS)
    asked = f"--model_name_or_path {tiny_model} --train_data_path {rows} --output_dir {tmp_path}/pool --dtype float32"
    asked += " --num_completions 20 --max_new_tokens 4 --keep_cut True"
    return rejection_sampling.main([*asked.split(), *further])


def test_a_semaphore_of_a_file_lasts_over_all_chunks_of_a_rejection_sampling(write, tiny_model, tmp_path):
    file = write({"own.py": LIMITED})
    assert rejection(tiny_model, tmp_path, "--reward_funcs", f"{file}:judge") == 0
    answers = {(line["prompt"], line["sample"]): line for line in read_rows(tmp_path / "pool" / "completions.jsonl")}
    scores = read_rows(tmp_path / "pool" / "scores.jsonl")
    assert len(scores) == 160  # 8 prompts x 20, in chunks of 80
    for line in scores:
        assert line["score"] == len(answers[line["prompt"], line["sample"]]["completion"])


TOGETHER = """
import asyncio

here, calls = set(), []

async def meet(name):
    calls.append(name)
    here.add(name)
    for _ in range(500 * (len(calls) > 2)):  # the trials are made one by one
        if len(here) == 2:
            break
        await asyncio.sleep(0.01)
    met = len(here) == 2
    await asyncio.sleep(0.1)
    here.discard(name)
    return met

async def one(completions, **columns):
    return [float(await meet("one"))] * len(completions)

async def two(completions, **columns):
    return [float(await meet("two"))] * len(completions)

def plain(completions, **columns):
    return [0.0] * len(completions)
"""


def test_async_functions_work_on_a_batch_at_the_same_time(write):
    one, plain, two = load(write({"own.py": TOGETHER}), "one", "plain", "two")
    for _ in range(2):
        answers = [[{"role": "assistant", "content": "a"}]]
        columns = {"prompts": ["p"], "completions": answers}
        assert [one(**columns), plain(**columns), two(**columns)] == [[1.0], [0.0], [1.0]]
    assert len(sys.modules[one.function.__module__].calls) == 2 + 4  # each was called once a batch


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_function_that_leaves_is_a_failure_and_not_an_end(kind, write):
    file = write({"own.py": f"{kind} judge(completions, **columns):\n    raise SystemExit(3)\n"})
    with pytest.raises(Refused, match=f"judge raised SystemExit: 3 at {file}:2"):
        load(file, "judge")


def test_an_iterator_that_raises_is_a_failure_of_the_function(write):
    file = write({"own.py": "def judge(completions, **columns):\n    return map(len, [1])\n"})
    with pytest.raises(Refused, match="judge raised TypeError: object of type 'int' has no len"):
        load(file, "judge")


# ── --reward_timeout ─────────────────────────────────────────────────────────────────────────────────────────────────

STUCK = """
import asyncio, time

def sleeps(completions, **columns):
    try:
        time.sleep(SECONDS)
    except BaseException:
        pass
    return [0.0] * len(completions)

def counts(completions, **columns):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pass
    return [0.0] * len(completions)

async def awaits(completions, **columns):
    await asyncio.sleep(SECONDS)
    return [0.0] * len(completions)

async def blocks(completions, **columns):
    time.sleep(SECONDS)
    return [0.0] * len(completions)

class Judge:
    async def __call__(self, completions, **columns):
        return await awaits(completions)

of_a_class = Judge()
"""


@pytest.fixture
def given_up(monkeypatch):
    monkeypatch.setattr(environment, "abandoned", [])
    return environment


@pytest.mark.parametrize("name", ["sleeps", "counts", "awaits", "of_a_class", "blocks"])
def test_a_call_that_takes_too_long_is_given_up(name, write, given_up):
    file, began = write({"own.py": STUCK.replace("SECONDS", "4")}), time.monotonic()
    with pytest.raises(Refused) as refused:
        load(file, name, timeout=0.5)
    assert time.monotonic() - began < 3
    (problem,) = refused.value.problems
    assert f" {name} did not return within 0.5 s for 4 completions" in problem and "--reward_timeout 0.5" in problem
    line = {"sleeps": 6, "counts": 13, "awaits": 18, "blocks": 22, "of_a_class": 18}[name]
    assert any(f"{file}:{near}" in problem for near in (line - 1, line, line + 1)), problem
    assert given_up.abandoned == [name]


@pytest.mark.parametrize("name", ["sleeps", "awaits"])
def test_a_call_in_time_is_as_without_the_flag(name, write, given_up):
    (function,) = load(write({"own.py": STUCK.replace("SECONDS", "0.01")}), name, timeout=30)
    assert ask(function, "a", "b") == [0.0, 0.0] and given_up.abandoned == []


def test_a_function_stays_in_one_thread(write):
    text = "import threading\n\ndef judge(completions, **columns):\n    return [float(threading.get_ident() % 2**40)]"
    file = write({"own.py": text + " * len(completions)\n"})
    here = float(threading.get_ident() % 2**40)
    (function,) = load(file, "judge", timeout=30)
    assert ask(function, "a") == ask(function, "a") != [here]
    (function,) = load(file, "judge")
    assert ask(function, "a") == [here]


def test_the_search_for_the_failing_row_has_the_time_limit_too(write, given_up):
    text = (
        "import time\n\ndef judge(completions, **columns):\n    time.sleep(4 * (len(completions) == 1))\n    1 / 0\n"
    )
    file, began = write({"own.py": text}), time.monotonic()
    with pytest.raises(Refused, match=f"judge raised ZeroDivisionError: division by zero at {file}:5$"):
        load(file, "judge", timeout=0.5)
    assert time.monotonic() - began < 3 and given_up.abandoned == ["judge"]


HANGS = """
import time
from concurrent.futures import ThreadPoolExecutor

calls = []

def wait(text):
    time.sleep(600 * (len(calls) == WHEN))
    return 0.0

def judge(completions, **columns):
    calls.append(1)
    with ThreadPoolExecutor(2) as pool:
        return [len(c) + score for c, score in zip(completions, pool.map(wait, completions))]
"""


@pytest.mark.parametrize("when, status", slow_but([(2, 1)], [(1, 2), (2, 1)]))  # in the trial, in the first rollout
def test_the_command_ends_although_threads_of_the_function_go_on(when, status, write, tiny_model, tmp_path):
    file, began = write({"own.py": HANGS.replace("WHEN", str(when))}), time.monotonic()
    asked = words(tiny_model, tmp_path, "--reward_funcs", f"{file}:judge", "--reward_timeout", "2")
    done = command("train_rlhf.py", *asked, timeout=120)
    assert done.returncode == status and time.monotonic() - began < 100
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if "judge did not return" in line]
    assert (
        len(said) == 1
        and "--reward_timeout 2" in said[0]
        and f"{file}:14" in said[0]
        and "Traceback" not in done.stderr
    )
    assert said[0].startswith({2: "refused: ", 1: "failed: "}[status])
    assert (tmp_path / "out" / "error.log").exists() == (status == 1)
    if status == 1:
        assert "in judge" in (tmp_path / "out" / "error.log").read_text(encoding="utf-8")


def test_a_rejection_sampling_has_the_time_limit(write, tiny_model, tmp_path, capsys, given_up):
    file = write({"own.py": STUCK.replace("SECONDS", "4")})
    assert rejection(tiny_model, tmp_path, "--reward_funcs", f"{file}:sleeps", "--reward_timeout", "0.5") == 2
    assert "sleeps did not return within 0.5 s" in capsys.readouterr().err
    assert (
        rejection(tiny_model, tmp_path, "--reward_funcs", f"{file}:sleeps", "--reward_timeout", "0.5", "--check") == 2
    )
    assert "sleeps did not return within 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_limit_is_a_number_of_seconds(seconds, tiny_model, tmp_path, capsys):
    asked = words(tiny_model, tmp_path, "--reward_funcs", "data/rewards.py:brevity", "--reward_timeout", seconds)
    assert train_rlhf.main(asked) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--reward_timeout" in line]
    assert line.startswith(f"refused: --reward_timeout {seconds}: ") and "above 0" in line


def test_a_time_limit_without_a_function_is_refused(tiny_model, tmp_path, capsys):
    asked = words(tiny_model, tmp_path, "--reward_model_path", tiny_model, "--reward_timeout", "5")
    assert train_rlhf.main(asked) == 2
    assert "refused: --reward_timeout: only used with --reward_funcs" in capsys.readouterr().err
    assert train_rlhf.main([*asked, "--rlhf_type", "DPO"]) == 2
    assert "refused: --reward_timeout: DPO trains on the answers" in capsys.readouterr().err
    judged = "--judge_model j --judge_base_url http://127.0.0.1:9/v1 --reward_timeout 5".split()
    assert rejection(tiny_model, tmp_path, *judged) == 2
    assert "refused: --reward_timeout: only used with --reward_funcs" in capsys.readouterr().err


# ── what is shown while they run ─────────────────────────────────────────────────────────────────────────────────────

SLOW = "import time\n\ndef judge(completions, **columns):\n    time.sleep(1.3)\n    return map(len, completions)\n"


def test_a_slow_function_is_shown_while_it_runs(write, tiny_model, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(report.Report, "show_scoring", lambda self, name, seconds: shown.append((name, seconds)))
    asked = words(tiny_model, tmp_path, "--reward_funcs", f"{write({'own.py': SLOW})}:judge", "--max_steps", "1")
    assert train_rlhf.main(asked) in (0, 1)  # one rollout, which may move nothing
    assert [name for name, _ in shown] == ["judge"] * 2
    assert shown[0][1] == pytest.approx(1, abs=0.3) and shown[1][1] is None


class Bar:
    def __init__(self):
        self.said = []

    def set_description(self, text):
        self.said.append(text)

    def write(self, text, file):
        self.said.append(text)


@pytest.mark.parametrize("live", [True, False])
def test_the_bar_names_the_function_and_its_seconds(live, monkeypatch):
    follow = object.__new__(report.Report)
    follow.bar = Bar()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live, raising=False)
    for seconds in (1.02, 59.1, 60.1, 61.1, None):
        follow.show_scoring("judge", seconds)
    assert len(follow.bar.said) == (5 if live else 1)  # a log file gets one line a minute
    assert all("judge" in said for said in follow.bar.said[:4])
    assert any("60 s" in said for said in follow.bar.said) and "judge" not in follow.bar.said[-1] or not live


def test_a_rejection_sampling_shows_a_slow_function(write, tiny_model, tmp_path, monkeypatch):
    from tqdm import tqdm

    shown = []
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda self, text, **kwargs: shown.append(text))
    assert rejection(tiny_model, tmp_path, "--reward_funcs", f"{write({'own.py': SLOW})}:judge") == 0
    assert shown == ["judge 1 s", ""] * 2  # two chunks
