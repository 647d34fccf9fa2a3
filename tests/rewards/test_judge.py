"""A language model judges the answers of online RL, and rubrics: `python -m pytest tests/rewards/test_judge.py -q`.

Offline but for a server on 127.0.0.1, whose verdict follows from the answer that it is shown. The judge by itself, and
in rejection sampling, is tested in tests/rejection/servers/test_servers.py.
"""

# ruff: noqa: F401, F811  fixtures are imported from tests/rejection/servers/test_servers.py

import os
import re
import subprocess

import pytest

import train_rlhf
from data.rewards import brevity
from rlhf_args.judge_config import JudgeConfig
from tests.conftest import ROOT, read_rows, write_rows
from tests.rejection.servers.conftest import (
    FAULTS,
    KEY,
    clients,
    dead_url,
    digest,
    key,
    lines_with,
    make_judge,
    run as sample,
    start,
    waits,
)
from trainers import online_trainer, ppo_trainer
from utils.cli import recipes, variables
from utils.models import load
from utils.rejection import scoring
from utils.rewards import judge, judge_reward, server

CHATS = [{"prompt": [{"role": "user", "content": f"What is {n} + {n}?"}]} for n in range(8)]
FAST = "--max_completion_length 8 --num_generations 2 --per_device_train_batch_size 4 --max_steps 2 --logging_steps 1 "
FAST += "--learning_rate 2e-2 --save_strategy no --dtype float32"
RUBRIC = (
    "criterion brief 0.25: Is it brief?\ncriterion Sense 2: Does it make sense?\n\n"
    "{criteria}\n#\n{prompt}\n#\n{completion}\n#\nEnd like [[brief: 7]] [[Sense: 3]]."
)


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def answer_in(body):
    """The answer that a judge was shown by SCORE or RUBRIC."""
    return body["messages"][0]["content"].split("\n#\n")[2]


def worth(answer, kind=""):
    return 1 + digest(kind, answer) % 10


def rate(body):
    return f"Well. [[{worth(answer_in(body))}]]", "stop"


def rate_by_criteria(body):
    answer = answer_in(body)
    return f"[[sense: {worth(answer, 's')}]], [[Brief: {worth(answer, 'b')}]]", "stop"


def pick_highest(body):
    """The letter of the answer that is worth most; of equal ones the first."""
    texts = dict(re.findall(r"^\[([A-Z])\]\n(.*?)(?=\n\n\[[A-Z]\]\n|\Z)", answer_in(body), re.M | re.S))
    return f"[[{max(sorted(texts), key=lambda letter: worth(texts[letter]))}]]", "stop"


def wins(answers):
    """What pick_highest makes of a group, by hand: 1 to the one of most worth, halves to two equal ones."""
    best = max(map(worth, answers))
    places = [place for place, text in enumerate(answers) if worth(text) == best]
    return [place in places and 1 / len(places) for place in range(len(answers))] if len(places) < 3 else None


@pytest.fixture
def template(tmp_path):
    """template(text) is the name of a file that holds it."""

    def template(text="Rate.\n#\n{prompt}\n#\n{completion}\n#\nEnd like [[7]]."):
        (tmp_path / "judge.txt").write_text(text, encoding="utf-8")
        return str(tmp_path / "judge.txt")

    return template


PICK = "Pick.\n#\n{prompt}\n#\n{completions}\n#\nEnd like [[B]]."


@pytest.fixture
def run(tmp_path, tiny_model, capsys, waits):
    """run(flags, method, api): (status, lines of stdout, why it ended); the folder is tmp_path / out."""

    def run(flags, method="GRPO", api=None, mode="lora"):
        words = ["--rlhf_type", method, "--model_name_or_path", tiny_model, "--train_mode", mode]
        words += ["--train_data_path", write_rows(tmp_path / "rows.jsonl", CHATS), "--output_dir", tmp_path / "out"]
        words += ["--judge_model", "j", "--judge_base_url", api if isinstance(api, str) else api.url] if api else []
        words += ["--judge_key_variable", KEY, "--api_timeout", "30"] if api else []
        capsys.readouterr()
        status = train_rlhf.main([str(word) for word in (*words, *f"{FAST} {flags}".split())])
        said = capsys.readouterr()
        return status, said.out.splitlines(), re.findall(r"^(?:refused|failed): .*$", said.err, re.M)

    return run


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...): what is said of a run that is refused before its policy is loaded, with nothing written."""

    def load_policy(**source):
        raise AssertionError("the policy was loaded")

    def refused(*args, **options):
        status, _, lines = run(*args, **options)
        assert status == 2 and lines and not (tmp_path / "out").exists()
        return [line.removeprefix("refused: ") for line in lines]

    monkeypatch.setattr(load, "load_policy", load_policy)
    return refused


def rollouts(folder, size=4):
    """completions.jsonl as one list a rollout."""
    lines = read_rows(folder / "completions.jsonl")
    assert len(lines) == 2 * size
    return [lines[:size], lines[size:]]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ── score ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_a_judge_alone_is_the_reward_and_each_number_is_as_it_said(method, start, run, template, tmp_path):
    api = start(write=rate)
    passes = "--num_iterations 1" * (method == "PPO")
    status, out, _ = run(f"--judge_template {template()} {passes}", method, api)
    assert status == 0
    logged = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2]
    for lines, log in zip(rollouts(tmp_path / "out"), logged, strict=True):
        given = [line["rewards"]["j"] for line in lines]
        assert given == [worth(text_of(line["completion"])) for line in lines]
        assert log["rewards/j/mean"] == log["reward"] == pytest.approx(mean(given))
        assert log["judge/failed"] == 0
    assert len(api.asked) == 1 + 8  # the trial, and each answer once
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in api.asked} == {("j", 0.0, 512)}
    assert lines_with(out, "reward ") == [f"reward    j (a judge, --judge_mode score, at {api.url})"]
    assert lines_with(out, "judge ") == ["judge     j, tried on the first row: it gave a verdict"]
    assert not lines_with(out, "failed")


def test_weights_are_in_the_order_functions_then_judge(start, run, template, tmp_path):
    """The sum is brevity / 4 + judge * 2; in rejection sampling the flags are the same."""
    api = start(write=rate)
    flags = f"--judge_template {template()} --reward_funcs data/rewards.py:brevity --reward_weights 0.25 2"
    status, out, _ = run(f"{flags} --missing_eos_penalty 3", api=api)
    assert status == 0
    for lines, log in zip(rollouts(tmp_path / "out"), read_rows(tmp_path / "out" / "metrics.jsonl"), strict=True):
        said = [line["completion"] for line in lines]
        short, judged = brevity(completions=said), [worth(text_of(one)) for one in said]
        assert [line["rewards"]["brevity"] for line in lines] == pytest.approx(short)
        assert log["rewards/brevity/mean"] == pytest.approx(mean(short), rel=1e-5)
        cut = mean(line["rewards"]["missing_eos"] for line in lines)
        assert log["reward"] == pytest.approx(mean(short) / 4 + 2 * mean(judged) + cut, rel=1e-5)
    assert "0.25 x data/rewards.py:brevity + 2 x j (a judge" in lines_with(out, "reward ")[0]


def test_answers_are_judged_at_once_and_logged_by_the_last_part_of_the_judges_name(start, run, template, tmp_path):
    api = start(write=rate, pause=0.2)
    assert run(f"--judge_template {template()} --api_concurrency 3 --judge_model models/7B", api=api)[0] == 0
    assert api.most == 3 and {body["model"] for body in api.asked} == {"models/7B"}
    assert "rewards/7B/mean" in read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert set(read_rows(tmp_path / "out" / "completions.jsonl")[0]["rewards"]) == {"7B"}


def test_held_out_answers_are_judged_too(start, run, template, tmp_path):
    api = start(write=rate)
    assert run(f"--judge_template {template()} --eval_fraction 0.25 --per_device_eval_batch_size 2", api=api)[0] == 0
    held = read_rows(tmp_path / "out" / "eval.jsonl")
    assert len(held) == 2 and all(1 <= line["eval_rewards/j/mean"] == line["eval_reward"] <= 10 for line in held)
    assert len(api.asked) == 1 + 8 + 2 * 2


# ── pick ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GRPO", "PPO"])
def test_a_pick_compares_the_answers_to_one_prompt(method, start, run, template, tmp_path):
    api = start(write=pick_highest)
    flags = f"--judge_mode pick --judge_template {template(PICK)} --num_generations 4 --per_device_train_batch_size 8"
    assert run(flags + " --num_iterations 1", method, api)[0] == 0
    groups = [lines[first : first + 4] for lines in rollouts(tmp_path / "out", 8) for first in (0, 4)]
    assert len({str(group[0]["prompt"]) for group in groups}) >= 2
    for group in groups:
        assert len({str(line["prompt"]) for line in group}) == 1
        expected = wins([text_of(line["completion"]) for line in group])
        assert expected is None or [line["rewards"]["j"] for line in group] == expected
        question = group[0]["prompt"][0]["content"]
        asked = [body for body in api.asked[1:] if f"\n#\n{question}\n#\n" in str(body["messages"][0]["content"])]
        for line in group:  # and was shown them together, in both passes
            assert sum(text_of(line["completion"]) in answer_in(body) for body in asked) >= 2
    assert len(api.asked) == 1 + 4 * 2


def test_a_pick_takes_no_part_in_what_is_held_out(start, run, template, tmp_path):
    api = start(write=pick_highest)
    flags = f"--judge_mode pick --judge_template {template(PICK)} --reward_funcs data/rewards.py:brevity "
    assert run(flags + "--eval_fraction 0.25 --per_device_eval_batch_size 2", api=api)[0] == 0
    held = read_rows(tmp_path / "out" / "eval.jsonl")
    assert len(held) == 2
    for line in held:
        assert line["eval_reward"] == pytest.approx(line["eval_rewards/brevity/mean"])
        assert not [name for name in line if "/j/" in name or "judge" in name]
    assert len(api.asked) == 1 + 2 * 2 * 2


@pytest.mark.parametrize("batch", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_compare_whole_groups(batch, warm, start, template, tiny_model, tmp_path):
    """Batches of 2 with 4 answers to a prompt: each process has half a group."""
    api = start(write=pick_highest)
    env = {**os.environ, "PYTHON": warm, "LAUNCH": "cpu", "NUM_PROCESSES": "2", "RLHF_TYPE": "GRPO"}
    env |= {"MODEL": tiny_model, "TRAIN_DATA": write_rows(tmp_path / "rows.jsonl", CHATS), "EVAL_FRACTION": "0"}
    words = ["bash", "rlhf_run.sh", "--output_dir", tmp_path / "out", "--judge_model", "j", "--judge_base_url"]
    words += [api.url, "--judge_key_variable", KEY, "--judge_mode", "pick", "--judge_template", template(PICK)]
    words += f"{FAST} --num_generations 4 --per_device_train_batch_size {batch}".split()
    done = subprocess.run([str(word) for word in words], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    lines = read_rows(tmp_path / "out" / "completions.jsonl")
    assert len(lines) == 2 * 2 * batch
    for first in range(0, len(lines), 4):
        group = lines[first : first + 4]
        assert len({str(line["prompt"]) for line in group}) == 1
        expected = wins([text_of(line["completion"]) for line in group])
        assert expected is None or [line["rewards"]["j"] for line in group] == expected
    # the launcher's check and each process try the judge once; then two passes a group
    assert len(api.asked) == 3 + 2 * len(lines) // 4


def test_one_answer_and_answers_of_one_text_are_no_request(make_judge):
    """A judge that always says [[A]] gave three equal texts 0.5, 0 and 0.5: a signal from their places alone."""
    found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
    alone, same, two, none = found.score(
        [("Why?", ["So."]), ("Why?", ["So."] * 3), ("Who?", ["I.", "You."]), ("Me?", [])]
    )
    assert isinstance(alone[0], server.GivenUp) and "one answer" in str(alone[0])
    assert (same, two, none) == ([1 / 3] * 3, [0.5, 0.5], [])
    assert len(found.api.asked) == 2 and "Why?" not in str(found.api.asked)
    assert found.score([("Why?", ["So.", "So.", "No."])]) and len(found.api.asked) == 4  # another text is compared
    rated = make_judge(lambda body: ("[[7]]", "stop"))
    assert rated.score([("Why?", ["So."] * 3)]) == [[7.0] * 3]  # each by itself


def test_rejection_sampling_pays_no_request_for_the_only_answer_left(make_judge):
    """Of two answers the server gave up on one, so that stages.py scores a group of one."""
    scorers = object.__new__(scoring.Scorers)
    scorers.judge, scorers.functions, scorers.weights = make_judge(rate, mode="pick"), [], {"j": 1.0}
    (line,) = scorers.score([{"prompt": "Why?", "further": {}}], [[{"prompt": 0, "sample": 1, "completion": "So."}]])
    assert (line["prompt"], line["sample"]) == (0, 1) and "one answer" in line["failed"] and "score" not in line
    assert not scorers.judge.server.failures and not scorers.judge.api.asked


# ── what the judge fails on ──────────────────────────────────────────────────────────────────────────────────────────


def rate_but(fails):
    """A judge without a verdict on the answers for which fails(answer)."""
    return lambda body: ("Well." if fails(answer_in(body)) else rate(body)[0], "stop")


class Kept:
    """The (advantages, completion masks) of each rollout of a trainer."""

    def __init__(self, kind, monkeypatch):
        self.rollouts, whole = [], kind._generate_and_score_completions

        def kept(trainer, inputs):
            output = whole(trainer, inputs)
            rewards = list(trainer._logs["rewards"]["j"])[-len(inputs) :]
            self.rollouts.append((rewards, output["advantages"].clone(), output["completion_mask"].clone()))
            return output

        monkeypatch.setattr(kind, "_generate_and_score_completions", kept)


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_an_answer_without_a_verdict_gives_no_signal_and_is_counted(
    method, start, run, template, tmp_path, monkeypatch, caplog
):
    """Neither itself, nor in the baseline of the others; the other functions' numbers do not stand in for it."""
    api = start(write=rate_but(lambda answer: digest(answer) % 3 == 0))
    kept = Kept(ppo_trainer.PPOTrainer if method == "PPO" else online_trainer.Online, monkeypatch)
    flags = f"--judge_template {template()} --max_failed_fraction 0.9 --api_retries 1 --num_generations 4 "
    flags += "--per_device_train_batch_size 16 --reward_funcs data/rewards.py:brevity --reward_weights 0 1 --beta 0 "
    status, out, _ = run(flags + "--num_iterations 1" + " --scale_rewards none" * (method == "GRPO"), method, api)
    assert status == 0 and "returned None" not in caplog.text
    lines = [line for rollout in rollouts(tmp_path / "out", 16) for line in rollout]
    failed = [digest(text_of(line["completion"])) % 3 == 0 for line in lines]
    assert 2 < sum(failed) < 28
    for line, fails in zip(lines, failed, strict=True):
        expected = None if fails else worth(text_of(line["completion"]))
        assert line["rewards"]["j"] == expected and (line["rewards"]["brevity"] is None) == fails
    logged = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [log["judge/failed"] for log in logged] == [sum(failed[:16]) / 16, sum(failed[16:]) / 16]
    assert logged[0]["reward"] == pytest.approx(
        mean(line["rewards"]["j"] for line in lines[:16] if line["rewards"]["j"])
    )
    (said,) = lines_with(out, "failed")
    assert f"{sum(failed)} of 32" in said
    assert f"{2 * sum(failed)} the judge gave no verdict" in lines_with(out, "attempts")[0]
    for rewards, advantages, mask in kept.rollouts:
        unjudged = [reward != reward for reward in rewards]
        if method == "PPO":
            assert [not row.any() for row in mask] == unjudged and advantages[unjudged].abs().sum() == 0
            continue
        for first in range(0, 16, 4):
            group = rewards[first : first + 4]
            sound = [reward for reward in group if reward == reward]
            for reward, advantage in zip(group, advantages[first : first + 4].tolist(), strict=True):
                others = len(sound) - 1 if method == "RLOO" else len(sound)
                base = (sum(sound) - reward * (method == "RLOO")) / others if others > 0 else reward
                expected = reward - base if reward == reward and others > 0 else 0.0
                assert advantage == pytest.approx(expected, abs=1e-5)


def test_a_judge_alone_may_fail_on_a_few_answers(start, run, template, tmp_path):
    api = start(write=rate_but(lambda answer: digest(answer) % 3 == 0))
    flags = f"--judge_template {template()} --max_failed_fraction 0.9 --api_retries 0 --num_generations 4 "
    assert run(flags + "--per_device_train_batch_size 16 --max_steps 1", api=api)[0] == 0
    given = [line["rewards"]["j"] for line in read_rows(tmp_path / "out" / "completions.jsonl")]
    assert 0 < given.count(None) < len(given) == 16


def test_a_judge_that_fails_too_often_ends_the_run_in_one_line(start, run, template, tmp_path):
    api = start(write=rate_but(lambda answer: digest(answer) % 2))
    flags = f"--judge_template {template()} --api_retries 1 --max_failed_fraction 0.25 "
    flags += "--num_generations 4 --per_device_train_batch_size 32"
    status, out, lines = run(flags, api=api)
    assert status == 1 and len(lines) == 1
    bad = sum(digest(answer_in(body)) % 2 for body in api.asked[1:]) // 2  # each asked twice
    assert 8 < bad < 32
    assert f"{bad} of the latest 32" in lines[0] and "--max_failed_fraction 0.25" in lines[0]
    assert "no verdict" in lines[0] and not (tmp_path / "out" / "run_card.json").exists()
    details = (tmp_path / "out" / "error.log").read_text(encoding="utf-8")
    assert re.search(rf"^ *{bad}  the judge gave no verdict$", details, re.M)
    assert re.search(rf"^ *{2 * bad}  the judge gave no verdict$", details, re.M)


@pytest.mark.parametrize(
    "limit, rollouts, ends",
    [
        (0.1, [(1, 8)], False),  # 12 %, but one answer
        (0.1, [(1, 8)] * 7, False),
        (0.1, [(1, 8)] * 8, True),  # 8 of 64
        (0.1, [(2, 2)], True),  # a whole rollout
        (0.0, [(1, 100)], True),
        (1.0, [(8, 8)] * 3, False),
        (0.1, [(100, 1000), (100, 1000)], False),  # not more than a tenth
        (0.1, [(0, 10000), (101, 1000)], True),  # the latest 1000 count
        (0.1, [(0, 500), (101, 500)], True),
        (0.1, [(0, 600), (101, 500)], False),  # of 1100
    ],
)
def test_how_many_failures_end_a_run(limit, rollouts, ends, make_judge, monkeypatch):
    monkeypatch.setattr(judge_reward, "Judge", lambda config: make_judge())
    online = judge_reward.OnlineJudge(JudgeConfig(judge_model="j", max_failed_fraction=limit))
    online.reasons["the judge gave no verdict"] = 1
    *before, last = rollouts
    for failed, total in before:
        online.count_failures(failed, total)
    if ends:
        with pytest.raises(judge_reward.RewardFailed, match="--max_failed_fraction"):
            online.count_failures(*last)
    else:
        online.count_failures(*last)


def test_a_judge_whose_key_is_withdrawn_ends_the_run(start, run, template, tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "401", lambda handler, reply: handler.send({"error": "expired"}, 401))
    api = start(write=rate)
    api.plan = lambda body, attempt: "401" if len(api.asked) > 5 else None
    status, _, lines = run(f"--judge_template {template()}", api=api)
    assert status == 1 and "401" in lines[0] and len(lines) == 1


# ── before the policy is loaded ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("check", ["", "--check"])
@pytest.mark.parametrize("case", ["address", "path", "key", "model"])
def test_a_judge_that_cannot_be_asked_is_refused_before_the_policy_is_loaded(
    case, check, start, refused, template, monkeypatch
):
    status = {"key": 401, "model": 400, "path": 404, "address": "ConnectError"}[case]
    monkeypatch.setitem(FAULTS, "status", lambda handler, reply: handler.send({"error": "wrong"}, status))
    api = start(write=rate, plan=lambda body, attempt: "status" if case in ("key", "model") else None)
    url = {"address": dead_url(), "path": api.url + "/v2"}.get(case, api.url)
    (line,) = refused(f"--judge_template {template()} --api_retries 1 {check}", api=url)
    assert line.startswith("--judge_model j") and url in line and str(status) in line and "secret" not in line


def test_a_judge_without_a_verdict_on_the_trial_is_said_and_not_refused(start, run):
    api = start(write=lambda body: ("I like it.", "stop"))
    status, out, _ = run("--check", api=api)
    (said,) = lines_with(out, "judge ")
    assert status == 0 and "no verdict" in said and "'I like it.'" in said and len(api.asked) == 1


def test_a_flag_of_the_judge_without_a_judge_is_refused(refused):
    for flags in (
        "--judge_mode pick", "--judge_scale 0 1", "--judge_template x.txt", "--judge_max_tokens 9", "--api_retries 1",
        "--api_concurrency 2", "--api_timeout 3", "--max_failed_fraction 0.5", "--judge_base_url http://a/v1",
        "--judge_key_variable A",
    ):  # fmt: skip
        (line,) = refused(f"--reward_funcs data/rewards.py:brevity {flags}")
        assert line.startswith(f"{flags.split()[0]}: ") and "--judge_model" in line
    (line,) = refused("")  # no reward at all
    assert "--judge_model" in line and "--reward_funcs" in line


MANY = "--num_generations 28 --per_device_train_batch_size 28"
OTHER = RUBRIC.replace("brief", "brevity", 1)  # a criterion with the name of another reward
# the judge's template if not the default, flags -> the beginning of the refusal … further facts in it
REFUSED = [
    (None, "--judge_scale 5 5", "--judge_scale 5.0 5.0"),
    (None, "--judge_scale 1 inf", "--judge_scale 1 inf"),
    (None, "--judge_scale 0 1 --judge_mode pick", "--judge_scale with --judge_mode pick"),
    (None, "--judge_max_tokens 0", "--judge_max_tokens 0"),
    (None, "--api_concurrency 0", "--api_concurrency 0"),
    (None, "--max_failed_fraction 2", "--max_failed_fraction 2"),
    (None, "--judge_template gone.txt", "--judge_template gone.txt"),
    (None, "--judge_template data/judge_pick.txt", "--judge_template data/judge_pick.txt … {completion}"),
    (None, "--judge_base_url localhost:1", "--judge_base_url localhost:1"),
    (None, "--reward_weights 1 2", "--reward_weights: 2"),
    (None, "--judge_key_variable NO_SUCH_KEY", "NO_SUCH_KEY is not set"),
    (PICK, "--judge_mode pick --num_generations 1", "--judge_mode pick … --num_generations 2"),
    (PICK, f"--judge_mode pick {MANY}", "--judge_mode pick … --num_generations 28 … --num_generations 26"),
    (PICK, "--judge_mode pick --eval_fraction 0.25", "--judge_mode pick … held-out … --eval_fraction 0"),
    (RUBRIC, "--judge_mode pick", "--judge_template … --judge_mode score"),
    (OTHER, "--reward_funcs data/rewards.py:brevity", " … brevity … Rename"),
]


@pytest.mark.parametrize("text, flags, problem", REFUSED)
def test_a_wrong_flag_of_the_judge_is_refused_without_a_request(text, flags, problem, start, refused, template):
    api, (begin, *facts) = start(write=rate), problem.split(" … ")
    method = "PPO" if "--num_generations 1" in flags else "GRPO"  # which takes 1
    lines = refused(f"{flags} --judge_template {template(text)}" if text else flags, method, api)
    assert any(line.startswith(begin) and all(fact in line for fact in facts) for line in lines) and not api.asked


def test_another_method_says_who_takes_a_judge(capsys, tiny_model, tmp_path):
    words = ["--rlhf_type", "DPO", "--model_name_or_path", tiny_model, "--train_data_path", "data/preference.jsonl"]
    assert train_rlhf.main([*words, "--output_dir", str(tmp_path / "out"), "--judge_model", "j"]) == 2
    assert "--judge_model: no such flag for DPO. It is one of RLOO, GRPO, PPO" in capsys.readouterr().err


# ── the run scripts ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("script", ["train_rlhf.py", "rejection_sampling.py"])
def test_the_samples_reward_is_not_added_to_a_judge(script):
    def rewards(*words, **given):
        env = {"MODEL": "m", "RLHF_TYPE": "GRPO", **given}
        flags = recipes.read_flags(variables.fill([script, *words], env))
        return {flag: value for flag, value in flags.items() if "reward" in flag or "judge" in flag}

    assert rewards() == {"reward_funcs": "data/rewards.py:brevity"}
    assert rewards("--judge_model", "j") == {"judge_model": "j"}
    both = rewards("--judge_model", "j", REWARD="my.py:f")  # the user named both
    assert both == {"judge_model": "j", "reward_funcs": "my.py:f"}


# ── rubrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GRPO", "PPO"])
def test_each_criterion_of_a_rubric_is_a_reward_of_its_own(method, start, run, template, tmp_path):
    """reward = size / 2 + 3 * (brief / 4 + 2 * Sense)"""
    api = start(write=rate_by_criteria)
    (tmp_path / "own.py").write_text("def size(completions, **_):\n    return [len(str(c)) for c in completions]\n")
    flags = f"--judge_template {template(RUBRIC)} --reward_funcs {tmp_path}/own.py:size --reward_weights 0.5 3"
    assert run(f"{flags} --num_iterations 1", method, api)[0] == 0
    for lines, log in zip(rollouts(tmp_path / "out"), read_rows(tmp_path / "out" / "metrics.jsonl"), strict=True):
        texts = [text_of(line["completion"]) for line in lines]
        brief, sense = [worth(text, "b") for text in texts], [worth(text, "s") for text in texts]
        assert [line["rewards"]["brief"] for line in lines] == brief
        assert [line["rewards"]["Sense"] for line in lines] == sense
        assert set(lines[0]["rewards"]) == {"size", "brief", "Sense"}
        assert log["rewards/brief/mean"] == pytest.approx(mean(brief))
        assert log["rewards/Sense/mean"] == pytest.approx(mean(sense))
        size = mean(len(str(line["completion"])) for line in lines)
        assert log["reward"] == pytest.approx(size / 2 + 3 * (mean(brief) / 4 + 2 * mean(sense)), rel=1e-5)
    assert len(api.asked) == 1 + 8  # one request an answer gives both
    sent = api.asked[1]["messages"][0]["content"]
    assert sent.startswith("- brief: Is it brief?\n- Sense: Does it make sense?\n#\n") and "criterion" not in sent


def test_a_rubric_in_rejection_sampling_gives_each_criterion_and_their_sum(start, sample, template, tmp_path):
    def write(body):
        return rate_by_criteria(body) if body["model"] == "j" else (f"answer {body['seed']}", "stop")

    api = start(write=write)
    flags = f"--judge_model j --judge_base_url {api.url} --judge_template {template(RUBRIC)} --reward_weights 0.5 3"
    assert sample(api, flags)[0] == 0
    texts = {(line["prompt"], line["sample"]): line["completion"]
             for line in read_rows(tmp_path / "out" / "completions.jsonl")}  # fmt: skip
    lines = read_rows(tmp_path / "out" / "scores.jsonl")
    assert len(lines) == 12
    for line in lines:
        text = texts[line["prompt"], line["sample"]]
        (short,), brief, sense = brevity(completions=[text]), worth(text, "b"), worth(text, "s")
        assert line["scores"] == {"brevity": short, "brief": brief, "Sense": sense}
        assert line["score"] == pytest.approx(short / 2 + 3 * (brief / 4 + 2 * sense))
    assert sum(body["model"] == "j" for body in api.asked) == 12


SCORE, CRITERIA = "{prompt}{completion}", "criterion a 1: A?\ncriterion b 1: B?\n{prompt}{completion}"
# template, reply -> the verdict, or why it is none
VERDICTS = [
    (SCORE, "<think>First [[3]], no, [[5]].</think> Good. [[7]]", 7.0),
    (SCORE, "Hm, [[3]]?\n</think>\n\n[[7]]", 7.0),  # where the template writes <think> itself
    (SCORE, "<think>a</think> [[2]] <think>b [[4]]</think> [[7]]", 7.0),
    (SCORE, "<think>So [[7]] it is", "cut"),
    (SCORE, "<think>a [[7]]</think> and <think> again [[7]]", "cut"),
    (SCORE, "<think>[[7]]</think> Good.", "no verdict"),
    (SCORE, "<think>[[7]]</think> [[7]] or [[8]]", "two verdicts"),
    (CRITERIA, "[[a: 7]] [[b: 3]]", {"a": 7.0, "b": 3.0}),
    (CRITERIA, "[[B: 3]]\n[[ a :7.5]]", {"a": 7.5, "b": 3.0}),
    (CRITERIA, "<think>[[a: 1]] [[b: 1]]</think>[[a: 7]] [[b: 3]]", {"a": 7.0, "b": 3.0}),
    (CRITERIA, "[[a: 7]]", "left out"),
    (CRITERIA, "[[a: 7]] [[a: 7]] [[b: 3]]", "twice: a"),
    (CRITERIA, "[[a: 7]] [[b: 3]] [[b: 4]]", "twice: b"),
    (CRITERIA, "[[a: 7]] [[b: 3]] [[c: 3]]", "no criterion"),
    (CRITERIA, "[[a: 7]] [[b: 11]]", "not within 1 to 10"),
    (CRITERIA, "[[a: 7]] [[b]]", "no number"),
    (CRITERIA, "[[7]] [[3]]", "no criterion"),
    (CRITERIA, "a: 7, b: 3", "no verdict"),
]


@pytest.mark.parametrize("template, written, expected", VERDICTS)
def test_a_verdict_is_behind_the_thoughts_and_rates_each_criterion_once(template, written, expected, make_judge):
    found = make_judge(template=template)
    read = found.read_criteria if template == CRITERIA else found.read_number
    if isinstance(expected, str):
        with pytest.raises(server.Unusable, match=expected):
            read(written, 9, True)
    else:
        assert read(written, 9, True) == expected


def test_a_rubric_with_a_criterion_left_out_is_asked_again(make_judge):
    replies = ["[[a: 7]]", "[[a: 7]] [[a: 6]] [[b: 2]]", "[[b: 2]] [[a: 7]]"]
    found = make_judge(lambda body: (replies[body["seed"] - 42], "stop"), template=CRITERIA)
    assert found.score([("Why?", ["So."])]) == [[{"a": 7.0, "b": 2.0}]]
    assert found.server.failures == {
        f"the judge {fault}": 1 for fault in ("left out a criterion", "rated a criterion twice")
    }


@pytest.mark.parametrize(
    "head, line, said",
    [
        ("criterion a: Is it?\n", 1, "criterion NAME WEIGHT: QUESTION"),
        ("criterion a much: Is it?\n", 1, "criterion NAME WEIGHT: QUESTION"),
        ("criterion a 1: Is it?\n\ncriterion A 2: Again?\n", 3, "criterion A"),
        ("criterion a 0: Is it?\ncriterion b 0: Is it?\n", 2, "weight 0"),
        ("Rate.\ncriterion a 1: Is it?\n", 2, "at the top"),
    ],
)
def test_a_rubric_that_cannot_be_read_is_refused_with_its_line(head, line, said, start, refused, template):
    path = template(head + "{prompt}{completion}")
    (problem,) = refused(f"--judge_template {path} --check", api=start(write=rate))
    assert problem.startswith(f"{path}:{line}: ") and said in problem


def test_the_shipped_rubric_is_sound():
    path = ROOT / "data" / "judge_rubric.txt"
    assert not list(judge.check_template(path, "score"))
    weights, _, sent = judge.read_rubric(path.read_text(encoding="utf-8"))
    assert sum(weights.values()) == pytest.approx(1) and len(weights) == 3
    assert re.findall(r"\[\[(\w+): \d+\]\]", sent) == list(weights) and "{criteria}" not in sent
