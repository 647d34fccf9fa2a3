"""What is refused. `pytest tests/rejection/servers/test_refused_servers.py`"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import rejection_sampling
from tests.conftest import ROOT, command, read_rows, write_rows
from tests.rejection.servers.conftest import (
    CHATS,
    KEY,
    NO_VERDICT,
    TEXTS,
    dead_url,
    every,
    keys_in,
    make_client,
    words_for,
)
from utils.runtime.errors import Failed

# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_is_not_set_is_refused(refused, monkeypatch):
    line = f"{KEY} is not set: the server's key. Type export {KEY}=...; a local server takes any word"
    monkeypatch.setenv(KEY, "")
    assert refused("") == [line]
    monkeypatch.delenv(KEY)
    assert refused("") == [line]
    other = f"--judge_model j --judge_key_variable OTHER_{KEY}"
    assert refused(other) == [line, line.replace(KEY, f"OTHER_{KEY}")]
    monkeypatch.setenv(KEY, "word")
    assert refused(other) == [line.replace(KEY, f"OTHER_{KEY}")]


def test_the_command_refuses_a_missing_key_in_one_line_and_writes_nothing(tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    done = command("rejection_sampling.py", *words_for(dead_url(), prompts, tmp_path / "out"), env={KEY: ""})
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.splitlines() == [
        f"refused: {KEY} is not set: the server's key. Type export {KEY}=...; a local server takes any word"
    ]


@pytest.mark.parametrize("value", ["secret-word\n", "secret-w\u00f6rd"], ids=["line break", "not ASCII"])
def test_a_key_that_no_header_can_hold_is_refused_and_never_shown(value, start, run, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, value)
    status, out, err = run(start(), "--stages generate --api_retries 0")
    assert status == 2 and KEY in err
    assert "secret" not in "".join(out) + err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://localhost:80o0/v1"])
def test_an_address_that_is_none_is_refused(url, refused):
    (line,) = refused("", api=url)
    assert line.startswith(f"--api_base_url {url}: ")


def test_a_server_or_a_model_that_is_not_named_is_refused(tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    words = words_for("http://127.0.0.1:9/v1", prompts, tmp_path / "out")
    for flags, problems in [
        (["--api_base_url"], ["--engine openai: no server. Type --api_base_url http://localhost:8000/v1"]),
        (["--api_model"], ["--engine openai: no model. Type --api_model NAME, the server's name for it"]),
    ]:
        left = [word for place, word in enumerate(words) if not {word, words[place - 1]} & set(flags)]
        assert rejection_sampling.main(left) == 2
        assert capsys.readouterr().err.splitlines() == [f"refused: {problem}" for problem in problems]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("--top_k 5", "--top_k with --engine openai: "),
        ("--api_concurrency 0", "--api_concurrency 0: must be at least 1"),
        ("--api_timeout 0", "--api_timeout 0: must be above 0"),
        ("--api_timeout nan", "--api_timeout nan: must be above 0"),
        ("--api_retries -1", "--api_retries -1: must be at least 0"),
        (
            "--judge_base_url http://127.0.0.1:9/v1",
            "--judge_base_url: only used with a judge. Add --judge_model NAME",
        ),
        ("--judge_model j --judge_scale 5 5", "--judge_scale 5.0 5.0: "),
        ("--judge_model j --judge_scale 1 nan", "--judge_scale 1 nan: "),
        (
            "--judge_model j --judge_mode pick --num_completions 1",
            "--judge_mode pick: needs 2 to 26 answers to a prompt, not 1",
        ),
        (
            "--judge_model j --judge_mode pick --num_completions 27",
            "--judge_mode pick: needs 2 to 26 answers to a prompt, not 27",
        ),
        ("--engine transformers --judge_model j", "--api_model: only used with --engine openai"),
    ],
)
def test_a_flag_of_servers_that_is_wrong_is_refused(flags, problem, refused):
    problems = refused(flags)
    assert any(line.startswith(problem) for line in problems), problems


# ── at once ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_many_requests_are_under_way_at_once_as_asked_for_and_no_more(start, run, tmp_path):
    api = start(pause=0.2)
    assert run(api, "--api_concurrency 8 --stages generate", samples=4)[0] == 0
    assert len(api.asked) == 16 and 1 < api.most <= 8
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 4)


def test_a_concurrency_of_one_asks_one_after_another(start, run):
    api = start(pause=0.01)
    assert run(api, "--api_concurrency 1 --stages generate")[0] == 0
    assert (len(api.asked), api.most) == (12, 1)


def test_what_is_sent_is_what_the_flags_say(start, run, tmp_path):
    api = start()
    flags = "--temperature 0.5 --top_p 0.9 --max_new_tokens 7 --stages generate"
    for rows, field in ((CHATS, "messages"), (TEXTS, "prompt")):
        api.calm()
        assert run(api, flags, rows=rows, out=field)[0] == 0
        assert {frozenset(body) for body in api.asked} == {
            frozenset(["model", "stream", field, "temperature", "top_p", "max_tokens", "seed"])
        }
        assert {(body["model"], body["stream"], body["temperature"], body["top_p"], body["max_tokens"])
                for body in api.asked} == {("m", False, 0.5, 0.9, 7)}  # fmt: skip
        assert sorted({str(body[field]) for body in api.asked}) == sorted(str(row["prompt"]) for row in rows)
        seeds = [body["seed"] for body in api.asked]
        assert len(set(seeds)) == 12 and all(0 <= seed < 2**31 for seed in seeds)
        for line in read_rows(tmp_path / field / "completions.jsonl"):
            assert line["tokens"] == len(line["completion"].split())


def test_an_answer_that_was_cut_is_marked_as_cut(start, run, tmp_path):
    api = start(write=lambda body: ("So it", "length" if body["seed"] % 2 else "stop"))
    assert run(api, "--stages generate", samples=4)[0] == 0
    ended = {line["ended"] for line in read_rows(tmp_path / "out" / "completions.jsonl")}
    assert ended == {True, False}
    cut = sum(not line["ended"] for line in read_rows(tmp_path / "out" / "completions.jsonl"))
    assert cut == sum(body["seed"] % 2 for body in api.asked)


def test_a_client_without_a_server_says_so_when_it_gives_up(waits):
    client = make_client(dead_url(), retries=0, concurrency=1)
    asks = [("Why?", lambda *reply: reply, lambda attempt: {})] * 64
    with pytest.raises(Failed, match="64 requests failed one after another, the last: ConnectError"):
        client.ask_all(asks)


# ── a real one ───────────────────────────────────────────────────────────────────────────────────────────────────────


LACKING = [name for name in ("fastapi", "uvicorn", "openai", "rich") if importlib.util.find_spec(name) is None]


def test_the_packages_of_transformers_serve_are_installed():
    assert not LACKING, f"pip install -r requirements-dev.txt: no {', '.join(LACKING)}"


@contextlib.contextmanager
def serve(model, log):
    """The address of a `transformers serve` of a model folder, started for this block."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen(words, stdout=handle, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert process.poll() is None and time.monotonic() < until, Path(log).read_text(encoding="utf-8")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def sampling_copy(model, folder):
    """The model, of which its folder says that it samples: `transformers serve` takes that from nowhere else."""
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"do_sample": True}), encoding="utf-8")
    return folder


def words_for_serve(url, model, prompts, out, flags):
    words = ["--engine", "openai", "--api_base_url", url, "--api_model", str(model), "--api_key_variable", KEY]
    words += ["--train_data_path", str(prompts), "--output_dir", str(out), "--judge_model", str(model)]
    return words + flags.split()


@pytest.mark.slow
def test_transformers_serve_answers_and_judges(tiny_model, tmp_path, waits, capsys):
    """A model of random weights: its answers are noise, and its verdicts none. All is counted as what it is."""
    model = sampling_copy(tiny_model, tmp_path / "model")
    out, plain = tmp_path / "out", tmp_path / "plain"
    flags = "--num_completions 3 --max_new_tokens 12 --judge_max_tokens 12 --api_retries 1 --api_timeout 60 "
    with serve(model, tmp_path / "log") as url:
        prompts = write_rows(tmp_path / "chats.jsonl", CHATS)
        words = words_for_serve(url, model, prompts, out, flags + "--stages generate")
        done = command("rejection_sampling.py", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = read_rows(out / "completions.jsonl")
        assert [(line["prompt"], line["sample"]) for line in lines] == every(4, 3)
        assert not any("failed" in line for line in lines)
        assert len({line["completion"] for line in lines}) > 4  # it sampled
        # finish_reason and usage are those of the API: 12 tokens where an answer was cut, fewer where it ended
        assert all(0 < line["tokens"] <= 12 and line["ended"] == (line["tokens"] < 12) for line in lines)
        assert any(not line["ended"] for line in lines)
        # of verdicts there are none, and none is made up
        words = words_for_serve(url, model, prompts, out, flags + "--stages score --max_failed_fraction 1")
        assert rejection_sampling.main(words) == 0
        judged = read_rows(out / "scores.jsonl")
        assert [(line["prompt"], line["sample"]) for line in judged] == every(4, 3)
        assert {line["failed"] for line in judged} <= {NO_VERDICT, "the judge's reply was cut at --judge_max_tokens"}
        assert f"failed    12 of 12 in {out / 'scores.jsonl'}: " in capsys.readouterr().out

        # the same without a chat: /v1/completions
        prompts, flags = write_rows(tmp_path / "texts.jsonl", TEXTS), flags + "--stages generate"
        assert rejection_sampling.main(words_for_serve(url, model, prompts, plain, flags)) == 0
        assert keys_in(plain / "completions.jsonl") == every(4, 3)
        assert not any("failed" in line for line in read_rows(plain / "completions.jsonl"))

        # another model than it serves, which it says with status 400: no answer, and the exit status says so
        capsys.readouterr()
        assert rejection_sampling.main(words_for_serve(url, "another", prompts, tmp_path / "another", flags)) == 1
        assert ": 12 status 400. " in capsys.readouterr().out
        # the address without its /v1 ends the run at once
        url = url.removesuffix("/v1")
        assert rejection_sampling.main(words_for_serve(url, model, prompts, tmp_path / "root", flags)) == 1
        assert f'failed: {url}/completions: 404 {{"detail":"Not Found"}}' in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_answers_and_judges_behind_transformers_serve(tmp_path):
    from utils.demo_model import make_demo_model

    model = sampling_copy(make_demo_model(), tmp_path / "model")
    questions = ["What is the capital of France?", "How many legs has a spider?", "Name a color."]
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    prompts, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out"
    (tmp_path / "judge.txt").write_text(SMOL_TEMPLATE, encoding="utf-8")
    flags = f"--num_completions 4 --max_new_tokens 32 --judge_max_tokens 16 --judge_template {tmp_path / 'judge.txt'} "
    flags += "--api_timeout 300 --api_retries 2 --max_failed_fraction 0.5 --keep_cut"
    with serve(model, tmp_path / "log") as url:
        done = command("rejection_sampling.py", *words_for_serve(url, model, prompts, out, flags))
    assert done.returncode == 0, done.stdout + done.stderr
    assert keys_in(out / "completions.jsonl") == keys_in(out / "scores.jsonl") == every(3, 4)
    judged = [line for line in read_rows(out / "scores.jsonl") if "failed" not in line]
    assert len(judged) >= 6 and all(1 <= line["score"] <= 10 for line in judged)
    print(f"{len(judged)} verdicts of 12: {[line['score'] for line in judged]}")


def turn(question, said, verdict):
    """A turn that was: SmolLM2's marks of a chat make earlier turns of what is one message."""
    return (
        f"Request: {question}\nAnswer: {said}\nRating in double brackets:<|im_end|>\n"
        f"<|im_start|>assistant\n[[{verdict}]]<|im_end|>\n<|im_start|>user\n"
    )


SMOL_TEMPLATE = (
    turn("What is two plus two?", "Four.", 9)
    + turn("What is the sun?", "A kind of cheese.", 2)
    + turn("Name a fruit.", "An apple is a fruit.", 9)
    + turn("How many days has a week?", "Twelve, I think.", 1)
    + "Request: {prompt}\nAnswer: {completion}\nRating in double brackets:"
)
