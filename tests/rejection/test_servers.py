"""Rejection sampling by servers that speak OpenAI's API: ones that fail in every way, and `transformers serve`.

    python -m pytest tests/rejection/test_servers.py -q            offline, a minute
    python -m pytest tests/rejection/test_servers.py -q -m slow    SmolLM2-135M-Instruct answers and judges, a minute

The server of these tests answers from the request alone, so a failed attempt must not change what is kept. Most runs
call main() in this process, where the waits between attempts are noted instead of waited for; the command itself is
typed where its exit status, its last line or its files could differ.
"""

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import rejection_sampling
from rlhf_args.rejection_config import RejectionConfig
from tests.conftest import ROOT, command, read_rows, write_rows
from utils.data.rows import text_key
from utils.rejection import engines
from utils.results import plots
from utils.rewards import judge, server
from utils.runtime.errors import Failed

KEY = "TEST_SERVER_KEY"
CHATS = [{"prompt": [{"role": "user", "content": f"{word} is it?"}]} for word in ("Who", "What", "Where", "When")]
TEXTS = [{"prompt": f"{word} is it? "} for word in ("Who", "What", "Where", "When")]
SOON = 1.0  # --api_timeout: a sound reply takes milliseconds, also where two processors have other work


# ── a server ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Api(ThreadingHTTPServer):
    """Answers as OpenAI's API does: what `write(body)` says. `plan(body, attempt)` names the fault to show instead.

    Keeps the bodies that came (`asked`), the faults that it showed (`faults`), how many requests were under way at
    once (`most`) and the keys that were sent.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, write=None, plan=lambda body, attempt: None, pause=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.write, self.plan, self.pause = write or answer, plan, pause
        self.asked, self.faults, self.keys = [], collections.Counter(), set()
        self.attempts, self.under_way, self.most = collections.Counter(), 0, 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that waited long enough hangs up

    def calm(self):
        """Sound from here on, and as if nothing had been asked."""
        self.plan = lambda body, attempt: None
        self.asked, self.faults, self.attempts = [], collections.Counter(), collections.Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        api, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            return self.send({"error": {"message": "no such path"}}, 404)
        with api.lock:
            key = identity(body)
            attempt, api.attempts[key] = api.attempts[key], api.attempts[key] + 1
            api.asked.append(body)
            api.keys.add(self.headers["authorization"])
            api.under_way += 1
            api.most = max(api.most, api.under_way)
        try:
            time.sleep(api.pause)
            fault = api.plan(body, attempt)
            if fault is not None:
                with api.lock:
                    api.faults[fault] += 1
                FAULTS[fault](self, reply_to(body, chat, api.write))
            else:
                self.send(reply_to(body, chat, api.write))
        finally:
            with api.lock:
                api.under_way -= 1

    def send(self, reply, status=200, length=None, **headers):
        written = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(written)))
        self.end_headers()
        self.wfile.write(written)
        self.wfile.flush()
        return None

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def reply_to(body, chat, write):
    written, end = write(body)
    choice = {"index": 0, "finish_reason": end}
    choice |= {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
    used = {"prompt_tokens": 1, "completion_tokens": len(written.split()), "total_tokens": 1 + len(written.split())}
    return {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": used}


def identity(body):
    """What tells a request from others. A judge is asked the same again with another seed."""
    left_out = ("seed", "temperature") if body["model"] == "j" else ()
    return json.dumps({name: body[name] for name in sorted(body) if name not in left_out})


def digest(*values):
    return int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest()[:8], "little")


def answer(body):
    """Of 1 to 30 words, as all of the request says; one in eight was cut. A judge's verdict follows from it too."""
    number = digest(identity(body))
    if body["model"] == "j":
        return f"It is what it is. [[{number % 10 + 1}]]", "stop"
    words = " ".join(f"w{number % (1009 + place)}" for place in range(1 + number % 30))
    return words, "length" if number % 8 == 0 else "stop"


def without(*path):
    """A fault: the reply lacks what `path` names."""

    def fault(handler, reply):
        inner = reply["choices"][0]
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        handler.send(reply)

    return fault


def with_null(name):
    def fault(handler, reply):
        inner = reply["choices"][0]
        (inner if name in inner else inner["message"])[name] = None
        handler.send(reply)

    return fault


def too_late(handler, reply):
    handler.server.ended.wait(3 * SOON)
    handler.send(reply)


def hang_up_midway(handler, reply):
    written = json.dumps(reply).encode()
    handler.send(written[: len(written) // 2], length=len(written))
    handler.hang_up()


def break_text(handler, reply):
    handler.send(json.dumps(reply).encode()[:-9])


# what a server can do wrong -> how the client names it
FAULTS = {
    "status 500": lambda handler, reply: handler.send({"error": "busy"}, 500),
    "status 429": lambda handler, reply: handler.send({"error": "slower"}, 429, Retry_After="0"),
    "a time-out": too_late,
    "broken JSON": break_text,
    "half a body": hang_up_midway,
    "no finish_reason": without("finish_reason"),
    "finish_reason null": with_null("finish_reason"),
    "content null": with_null("content"),
    "a closed connection": lambda handler, reply: handler.hang_up(),
    "an error with status 200": lambda handler, reply: handler.send({"error": {"message": "overloaded"}}),
    "a list": lambda handler, reply: handler.send([reply]),
    "no choice": lambda handler, reply: handler.send(reply | {"choices": []}),
}
REASONS = {
    "status 500": "status 500",
    "status 429": "status 429",
    "a time-out": "timed out",
    "broken JSON": "the reply is not JSON",
    "half a body": "RemoteProtocolError",
    "no finish_reason": "the reply has no choices, message or finish_reason",
    "finish_reason null": "the reply is half an answer (finish_reason None)",
    "content null": "the reply has no text",
    "a closed connection": "RemoteProtocolError",
    "an error with status 200": "the reply has no choices, message or finish_reason",
    "a list": "the reply has no choices, message or finish_reason",
    "no choice": "the reply has no choices, message or finish_reason",
}
PLAIN = [fault for fault in FAULTS if fault != "content null"]  # plain completions have no message


def a_few_faults(most, kinds=tuple(FAULTS), seed=0):
    """A plan: each request fails 0 to `most` times, in ways that it and `seed` give, and then is answered."""

    def plan(body, attempt):
        failing = digest(seed, identity(body)) % (most + 1)
        return kinds[digest(seed, identity(body), attempt) % len(kinds)] if attempt < failing else None

    return plan


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, "secret-word")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def start():
    """start(...) is an Api at work; all of them end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*args, **options):
            api = Api(*args, **options)
            stack.callback(api.server_close)
            stack.callback(api.shutdown)
            stack.callback(api.ended.set)
            threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            return api

        yield start


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client waited between attempts: noted, and not waited for."""
    noted = []
    monkeypatch.setattr(server.Server, "pause", lambda self, seconds: noted.append(seconds))
    return noted


@pytest.fixture
def clients(monkeypatch):
    """The Servers that a run made, whose failures are counted."""
    made = []

    class Noted(server.Server):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    for module in (engines, judge):
        monkeypatch.setattr(module, "Server", Noted)
    return made


def words_for(api, prompts, out, flags="", samples=3):
    """A whole, sound command but for `flags`."""
    url = api if isinstance(api, str) else api.url
    words = ["--engine", "openai", "--api_base_url", url, "--api_model", "m", "--api_key_variable", KEY]
    words += ["--train_data_path", str(prompts), "--output_dir", str(out), "--num_completions", str(samples)]
    words += ["--max_new_tokens", "64", "--api_timeout", str(SOON), "--reward_funcs", "data/rewards.py:brevity"]
    return words + flags.split()


@pytest.fixture
def run(tmp_path, waits, clients, capsys, monkeypatch):
    """run(api, flags, ...): (status, lines of stdout, stderr as it is); the folder is tmp_path / out."""

    monkeypatch.setattr(plots, "draw", lambda *_: None)  # the picture takes longer than all else

    def run(api, flags="", rows=CHATS, out="out", **options):
        prompts = write_rows(tmp_path / "prompts.jsonl", rows)
        capsys.readouterr()
        status = rejection_sampling.main(words_for(api, prompts, tmp_path / out, flags, **options))
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return run


def keys_in(file):
    return [(line["prompt"], line["sample"]) for line in read_rows(file)]


def every(prompts, samples):
    return [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]


def contents(folder, *names):
    return {name: (Path(folder) / name).read_text(encoding="utf-8") for name in names}


KEPT = ("prompts.jsonl", "completions.jsonl", "scores.jsonl", "sft.jsonl")


def make_client(api, retries=4, concurrency=2, timeout=SOON):
    url = api if isinstance(api, str) else api.url
    return server.Server(url, "m", KEY, concurrency=concurrency, timeout=timeout, retries=retries)


def ask(client, prompt="Why?", read=lambda written, tokens, ended: written):
    (found,) = client.ask_all([(prompt, read, lambda attempt: {"seed": 1})])
    return found


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_counted_by_its_reason_and_the_request_made_again(fault, start, waits):
    api = start(plan=lambda body, attempt: fault if attempt < 2 else None)
    client = make_client(api)
    prompt = CHATS[0]["prompt"]
    assert ask(client, prompt) == answer({"model": "m", "stream": False, "messages": prompt, "seed": 1})[0]
    assert dict(client.failures) == {REASONS[fault]: 2} and api.faults == {fault: 2}
    assert len(api.asked) == 3 and len(waits) == 2 and api.keys == {"Bearer secret-word"}


@pytest.mark.parametrize("rows, kinds", [(CHATS, list(FAULTS)), (TEXTS, PLAIN)], ids=["chats", "texts"])
def test_a_server_that_fails_in_every_way_loses_no_row_and_each_failure_is_counted(
    rows, kinds, start, run, clients, tmp_path
):
    # the judge is a chat also where the prompts are plain
    plans = {"m": a_few_faults(4, kinds), "j": a_few_faults(4)}
    api = start(plan=lambda body, attempt: plans[body["model"]](body, attempt))
    judged = "--judge_model j --judge_base_url " + api.url
    assert run(api, judged, rows=rows, samples=6)[0] == 0
    # of the four prompts 24 answers, and a verdict on each
    assert keys_in(tmp_path / "out" / "completions.jsonl") == keys_in(tmp_path / "out" / "scores.jsonl") == every(4, 6)
    assert set(api.faults) == set(FAULTS)
    assert len(api.asked) == 48 + api.faults.total()
    expected = collections.Counter()
    for fault, number in api.faults.items():
        expected[REASONS[fault]] += number
    assert sum((client.failures for client in clients), collections.Counter()) == expected
    assert {client.model for client in clients if client.failures} == {"m", "j"}
    # the same server, sound: each file is the same to the last byte
    api.calm()
    assert run(api, judged, rows=rows, samples=6, out="sound")[0] == 0
    assert len(api.asked) == 48 and not api.faults
    assert contents(tmp_path / "out", *KEPT) == contents(tmp_path / "sound", *KEPT)
    assert len(read_rows(tmp_path / "out" / "sft.jsonl")) == 4


def test_the_command_brings_the_same_files_from_a_failing_server(start, run, tmp_path):
    api, flags = start(), "--stages generate"
    assert run(api, flags, out="sound", samples=2)[0] == 0
    api.calm()
    # one fault a request at most, so that a back-off takes a second at most
    api.plan = a_few_faults(1, list(FAULTS), seed=2)
    words = words_for(api, tmp_path / "prompts.jsonl", tmp_path / "out", flags, samples=2)
    done = command("rejection_sampling.py", *words)
    assert done.returncode == 0, done.stderr
    assert api.faults and len(api.asked) == 8 + sum(api.faults.values())
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 2)
    assert contents(tmp_path / "out", *KEPT[:2]) == contents(tmp_path / "sound", *KEPT[:2])
    assert "Traceback" not in done.stderr and not any(line.startswith("failed ") for line in done.stdout.splitlines())
    assert "secret-word" not in done.stdout + done.stderr
    warned = [line for line in done.stdout.splitlines() if line.startswith("warning   ")]
    assert len(warned) == len({REASONS[fault] for fault in api.faults})  # the first of each kind is said


def test_how_many_attempts_failed_is_said_at_the_end(start, run):
    api = start(plan=a_few_faults(3, ["status 500", "broken JSON"]))
    out = run(api)[1]
    assert api.faults.total() > 1
    assert re.search(rf"\b{api.faults.total()}\b.*(attempt|request)", "\n".join(out[out.index("") :]))


@pytest.mark.parametrize(
    "sent, waited",
    [
        (None, (0.5, 1)),  # half of 1 second to all of it
        ("0", (0.5, 1)),
        ("7", (7, 7)),
        ("7.5", (7.5, 7.5)),
        ("99999", (60, 60)),
        ("inf", (60, 60)),
        ("-5", (0.5, 1)),
        ("soon", (0.5, 1)),
        ("Wed, 21 Oct 2026 07:28:00 GMT", (0.5, 1)),  # a date is not read
        ("nan", (0.5, 1)),
    ],
)
def test_retry_after_is_honoured_up_to_a_minute(sent, waited, start, waits, monkeypatch):
    headers = {} if sent is None else {"Retry_After": sent}
    monkeypatch.setitem(FAULTS, "slower", lambda handler, reply: handler.send({}, 429, **headers))
    client = make_client(start(plan=lambda body, attempt: "slower" if attempt == 0 else None))
    assert isinstance(ask(client), str) and client.failures == {"status 429": 1}
    (seconds,) = waits
    assert waited[0] <= seconds <= waited[1]


def test_each_wait_is_twice_as_long_as_the_one_before(start, waits):
    client = make_client(start(plan=lambda body, attempt: "status 500"), retries=8)
    found = ask(client)
    assert isinstance(found, server.GivenUp) and str(found) == 'status 500: {"error": "busy"}'
    assert client.failures == {"status 500": 9}
    # 1, 2, 4, ..., and a minute at most; half of it to all of it, so that not all come back at once
    for seconds, most in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert most / 2 <= seconds <= most
    assert len({seconds / most for seconds, most in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True)}) > 1


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_request_that_the_server_refuses_is_not_made_again(status, start, waits, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"detail": "too\n long"}, status))
    api = start(plan=lambda body, attempt: "no")
    client = make_client(api)
    found = ask(client)
    assert isinstance(found, server.GivenUp) and str(found) == f'status {status}: {{"detail": "too\\n long"}}'
    assert (len(api.asked), waits, dict(client.failures)) == (1, [], {f"status {status}": 1})


def test_a_reply_that_trickles_is_given_up_after_the_time_out_too(start, waits, monkeypatch):
    """--api_timeout is "Seconds to wait for one reply", and a proxy can send a blank now and then for ever."""

    def trickle(handler, reply):
        written = b" " * 6 + json.dumps(reply).encode()
        handler.send(b"", length=len(written))
        for _ in range(6):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(SOON / 4)
        handler.wfile.write(written[6:])

    monkeypatch.setitem(FAULTS, "trickles", trickle)
    client = make_client(start(plan=lambda body, attempt: "trickles" if attempt == 0 else None))
    assert isinstance(ask(client), str)
    assert client.failures == {"timed out": 1}


def test_an_answer_with_half_a_character_is_kept_or_fails_alone(start, run, tmp_path):
    """JSON can hold the first half of an emoji, where a server cut a text: "\\ud83d"."""
    api = start(write=lambda body: ("Yes \ud83d", "stop") if "Who" in str(body) else answer(body))
    assert run(api, "--max_failed_fraction 1")[0] == 0
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 3)


# ── what fails to the end ────────────────────────────────────────────────────────────────────────────────────────────


def lines_with(lines, word):
    return [line for line in lines if line.startswith(word)]


def test_what_fails_at_every_attempt_is_marked_and_tried_again_by_the_next_run(start, run, clients, tmp_path):
    out, fails = tmp_path / "out", lambda body, attempt: "status 500" if "Where" in str(body) else None
    api = start(plan=fails)
    completions = f"{out / 'completions.jsonl'}"
    summary = f"failed    3 of 12 in {completions}: 3 status 500. The same command tries them again"

    # 3 of 12 answers are a share of 0.25
    status, said, err = run(api, "--max_failed_fraction 0.25")
    assert status == 0 and lines_with(said, "failed ") == [summary]
    assert clients[-1].failures == {"status 500": 3 * 5}  # an attempt, and 4 more
    failed = [line for line in read_rows(completions) if "failed" in line]
    assert failed == [
        {"prompt": 2, "sample": sample, "failed": 'status 500: {"error": "busy"}'} for sample in range(3)
    ]
    assert keys_in(completions) == every(4, 3)
    assert keys_in(out / "scores.jsonl") == [(n, s) for n, s in every(4, 3) if n != 2]  # it went on
    assert len(read_rows(out / "sft.jsonl")) == 3

    # less than that: the run goes on just the same, and its exit status says it
    api.attempts.clear()
    status, said, err = run(api, "--max_failed_fraction 0.24")
    assert status == 1 and lines_with(said, "failed ") == [summary]
    assert err.splitlines()[-1] == "failed: 25% failed, more than --max_failed_fraction 0.24"
    assert keys_in(completions) == every(4, 3) and len(read_rows(out / "sft.jsonl")) == 3

    # the same command, when the server is well again
    api.calm()
    status, said, _ = run(api, "--max_failed_fraction 0.24")
    assert status == 0 and not lines_with(said, "failed ")
    assert lines_with(said, "generate ") == ["generate  3 answers to sample, 9 are there"]
    assert len(api.asked) == 3 and all("Where" in str(body["messages"]) for body in api.asked)

    # and all is as if nothing had happened
    assert run(api, out="sound")[0] == 0
    assert contents(out, *KEPT) == contents(tmp_path / "sound", *KEPT)


def test_the_next_run_may_find_the_model_at_another_address(start, run, tmp_path):
    gone, other = start(plan=lambda body, attempt: "broken JSON" if "Where" in str(body) else None), start()
    assert run(gone)[0] == 1
    assert run(other)[0] == 0 and len(other.asked) == 3
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 3)


def test_the_command_ends_with_status_1_where_too_much_failed(start, tmp_path):
    api = start(plan=lambda body, attempt: "finish_reason null" if "Where" in str(body) else None)
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    flags = "--api_retries 0 --stages generate"
    done = command("rejection_sampling.py", *words_for(api, prompts, tmp_path / "out", flags))
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "failed: 25% failed, more than --max_failed_fraction 0.1"
    )
    file = tmp_path / "out" / "completions.jsonl"
    assert f"failed    3 of 12 in {file}: 3 the reply is half an answer. The same" in done.stdout


def test_verdicts_that_fail_are_marked_and_asked_for_again_by_the_next_run(start, run, tmp_path):
    def fails(body, attempt):
        return "broken JSON" if body["model"] == "j" and "Where" in str(body) else None

    out, api = tmp_path / "out", start(plan=fails)
    flags = f"--judge_model j --judge_base_url {api.url} --max_failed_fraction 0.25"
    status, said, _ = run(api, flags)
    assert status == 0 and lines_with(said, "failed ") == [
        f"failed    3 of 12 in {out / 'scores.jsonl'}: 3 the reply is not JSON. The same command tries them again"
    ]
    assert [line for line in read_rows(out / "scores.jsonl") if "failed" in line] == [
        {"prompt": 2, "sample": sample, "failed": "the reply is not JSON"} for sample in range(3)
    ]
    assert run(api, flags.replace("0.25", "0.2"))[0] == 1
    api.calm()
    status, said, _ = run(api, flags)
    assert status == 0 and lines_with(said, "score ") == ["score     3 answers to score, 9 are there"]
    assert [body["model"] for body in api.asked] == ["j"] * 3
    assert run(api, flags, out="sound")[0] == 0
    assert contents(out, *KEPT) == contents(tmp_path / "sound", *KEPT)


@pytest.mark.parametrize("status, path", [(401, "/v1"), (404, "/v1"), (404, "/v2")])
def test_a_key_an_address_or_a_model_that_is_wrong_ends_the_run_at_once(status, path, start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": {"message": "no"}}, status))
    api = start(plan=lambda body, attempt: "no")
    url = api.url.replace("/v1", path)
    found, _, err = run(url, "--api_concurrency 2", samples=20)
    assert found == 1 and len(api.asked) <= 4  # of 80: those under way
    (line,) = [line for line in re.split("[\r\n]", err) if "failed: " in line]
    message = "no" if path == "/v1" else "no such path"
    assert line.endswith(f'failed: {url}/chat/completions: {status} {{"error": {{"message": "{message}"}}}}')


def test_the_command_says_in_one_line_that_the_key_is_wrong(start, tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    api = start(plan=lambda body, attempt: "no")
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    done = command("rejection_sampling.py", *words_for(api, prompts, tmp_path / "out", "--stages generate"))
    assert done.returncode == 1 and "secret-word" not in done.stdout + done.stderr
    lines = re.split("[\r\n]+", done.stderr.strip())
    assert all(line.startswith(("generate: ", "failed: ")) for line in lines)  # the bar, and that: no traceback
    assert sum(f'failed: {api.url}/chat/completions: 401 {{"error": "wrong key"}}' in line for line in lines) == 1


def test_what_ends_the_run_stands_on_a_line_of_its_own(start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    assert lines_with(re.split("[\r\n]+", run(start(plan=lambda body, attempt: "no"))[2]), "failed: ")


def test_a_wrong_key_ends_the_run_also_while_other_requests_hang(start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    api = start(plan=lambda body, attempt: "no" if len(api.asked) == 4 else "a time-out")
    assert run(api, "--api_concurrency 4")[0] == 1
    assert len(api.asked) <= 8  # and not 3 * 5 + 1: the three that hung are not made again four times more


def dead_url():
    """The address of a port where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


def test_a_server_that_is_gone_ends_the_run(run, waits, clients, tmp_path):
    url = dead_url()
    status, said, err = run(url, "--api_retries 1", samples=20)  # 80 answers, and 64 failures in a row are the end
    assert status == 1
    (line,) = [line for line in re.split("[\r\n]", err) if "failed: " in line]
    wanted = rf"failed: {url}/chat/completions: (\d+) requests failed one after another, the last: ConnectError: .+"
    failed = int(re.search(wanted + "$", line)[1])
    # as many as may be under way are failing at the same moment
    assert server.IN_A_ROW == 64 and 64 <= failed < 64 + 8 and len(waits) <= failed + 8
    assert not (tmp_path / "out" / "completions.jsonl").exists()


def test_one_reply_in_between_says_that_the_server_is_there(start, waits):
    # each tenth request is answered: 63 in a row never fail
    api = start(plan=lambda body, attempt: None if "9?" in body["prompt"] else "status 500")
    client = make_client(api, retries=0)
    asks = [(f"Why {number}?", lambda written, *_: written, lambda attempt: {}) for number in range(130)]
    found = client.ask_all(asks)
    assert sum(isinstance(one, server.GivenUp) for one in found) == client.failures.total() == 117 > server.IN_A_ROW


def test_a_server_that_is_gone_before_a_few_answers_leaves_them_for_the_next_run(run, start, tmp_path):
    url = dead_url()  # 12 answers are less than 64 in a row
    status, said, err = run(url, "--api_retries 1")
    assert status == 1 and lines_with(said, "failed ") == [
        f"failed    12 of 12 in {tmp_path / 'out' / 'completions.jsonl'}: 12 ConnectError. "
        "The same command tries them again"
    ]
    assert err.splitlines()[-1] == "failed: 100% failed, more than --max_failed_fraction 0.1"


def test_a_judge_that_is_gone_leaves_the_answers_as_they_are(start, run, tmp_path):
    api = start()
    assert run(api, "--judge_model j --api_retries 0 --judge_base_url " + dead_url())[0] == 1
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 3)
    assert len(api.asked) == 12


# ── the judge ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def make_judge(start, waits, tmp_path):
    """make_judge(write, mode, ...): a Judge whose replies are `write(body)`, with the api behind it."""

    def make_judge(write=None, mode="score", template=None, plan=lambda body, attempt: None, retries=2, **options):
        api = start(write=write, plan=plan)
        if template:
            (tmp_path / "template.txt").write_text(template, encoding="utf-8")
            options["judge_template"] = str(tmp_path / "template.txt")
        config = RejectionConfig(
            judge_model="j", judge_base_url=api.url, api_key_variable=KEY, api_timeout=SOON, api_retries=retries,
            judge_mode=mode, **options,
        )  # fmt: skip
        found = judge.Judge(config)
        found.api = api
        return found

    return make_judge


NO_VERDICT, TWO = "the judge gave no verdict", "the judge gave two verdicts"
NO_NUMBER, NO_LETTER = "the judge's verdict is no number", "the judge's verdict is none of the letters"
OUTSIDE = "the judge's verdict is not within 1 to 10"
SCORES = [
    ("[[7]]", 7.0),
    ("It is brief and right. [[7.5]]", 7.5),
    ("[[ 3 ]]\n", 3.0),
    ("First [[4]], and so: [[4]]", 4.0),
    ("[[1]]", 1.0),
    ("[[10]]", 10.0),
    ("", NO_VERDICT),
    ("7", NO_VERDICT),
    ("7/10. I give it a [7].", NO_VERDICT),
    ("[[7]", NO_VERDICT),
    ("[[7\n]]", NO_VERDICT),
    ("[[7]] or [[8]]", TWO),
    ("[[7]], in words [[seven]]", TWO),
    ("[[seven]]", NO_NUMBER),
    ("[[7/10]]", NO_NUMBER),
    ("[[]]", NO_NUMBER),
    ("[[A]]", NO_NUMBER),
    ("[[rating]]", NO_NUMBER),
    ("[[[7]]]", NO_NUMBER),
    ("[[0]]", OUTSIDE),
    ("[[11]]", OUTSIDE),
    ("[[-7]]", OUTSIDE),
    ("[[nan]]", NO_NUMBER),
    ("[[inf]]", NO_NUMBER),
    ("[[1e400]]", NO_NUMBER),
    ("[[1_0]]", NO_NUMBER),
]


@pytest.mark.parametrize("written, expected", SCORES)
def test_a_verdict_is_a_number_of_the_scale_in_double_brackets_or_none(written, expected, make_judge):
    found = make_judge()
    if isinstance(expected, float):
        assert found.read_number(written, 3, True) == expected
    else:
        with pytest.raises(server.Unusable, match=f"^{re.escape(expected)}$"):
            found.read_number(written, 3, True)


def test_the_scale_is_that_of_the_flag(make_judge):
    found = make_judge(judge_scale=[0.0, 1.0])
    assert [found.read_number(f"[[{number}]]", 1, True) for number in ("0", "0.5", "1")] == [0.0, 0.5, 1.0]
    with pytest.raises(server.Unusable, match="^the judge's verdict is not within 0 to 1$"):
        found.read_number("[[7]]", 1, True)


def test_a_reply_that_was_cut_before_its_end_is_no_verdict(make_judge):
    found = make_judge()
    with pytest.raises(server.Unusable):
        found.read_number("You ask for a rating like [[3]]. The answer is brief and", 12, False)


LETTERS = [("[[B]]", "second"), ("It is [[A]].", "first"), ("[[ C ]]", "third")]
NO_LETTERS = [
    ("[[D]]", NO_LETTER),  # there are three
    ("[[Z]]", NO_LETTER),
    ("[[AB]]", NO_LETTER),
    ("[[]]", NO_LETTER),
    ("[[b]]", NO_LETTER),
    ("[[1]]", NO_LETTER),
    ("[[A]] or [[B]]", TWO),
    ("B", NO_VERDICT),
]


@pytest.mark.parametrize("written, expected", LETTERS + NO_LETTERS)
def test_a_pick_is_one_of_the_letters_that_were_shown_or_none(written, expected, make_judge):
    found, order = make_judge(mode="pick"), ["first", "second", "third"]
    if (written, expected) in LETTERS:
        assert found.read_label(written, 3, True, order) == expected
    else:
        with pytest.raises(server.Unusable, match=f"^{re.escape(expected)}$"):
            found.read_label(written, 3, True, order)


def by_attempt(verdicts):
    """A judge whose replies to a request follow its seed: 42 at first, one more at each attempt."""
    return lambda body: (verdicts[min(body["seed"] - 42, len(verdicts) - 1)], "stop")


def test_nonsense_is_asked_again_with_another_seed_and_at_a_temperature(make_judge):
    found = make_judge(by_attempt(["Nice!", "[[99]]", "Well: [[4]]"]))
    assert found.score([("Why?", ["So."])]) == [[4.0]]
    asked = [(body["temperature"], body["seed"], body["max_tokens"]) for body in found.api.asked]
    assert asked == [(0.0, 42, 512), (1.0, 43, 512), (1.0, 44, 512)]
    assert found.server.failures == {NO_VERDICT: 1, OUTSIDE: 1}


def test_nonsense_to_the_end_is_failed_and_counted_and_never_guessed(make_judge):
    found = make_judge(lambda body: ("7 of 10, I would say" if "Bad" in str(body) else "[[7]]", "stop"))
    ((good, bad), (alone,)) = found.score([("Why?", ["Good.", "Bad."]), ("Who?", ["Good."])])
    assert (good, alone) == (7.0, 7.0)
    assert isinstance(bad, server.GivenUp) and str(bad) == NO_VERDICT
    assert found.server.failures == {NO_VERDICT: 3}  # an attempt, and 2 more


def test_a_run_with_a_judge_that_talks_nonsense_goes_on_and_ends_with_status_1(start, run, tmp_path):
    def write(body):
        if body["model"] != "j":
            return answer(body)
        return ("It is nice." if "Where" in str(body) else f"[[{1 + digest(identity(body)) % 10}]]"), "stop"

    api = start(write=write)
    status, said, err = run(api, f"--judge_model j --judge_base_url {api.url} --api_retries 2")
    assert status == 1
    assert lines_with(said, "failed ") == [
        f"failed    3 of 12 in {tmp_path / 'out' / 'scores.jsonl'}: 3 {NO_VERDICT}. The same command tries them again"
    ]
    lines = read_rows(tmp_path / "out" / "scores.jsonl")
    assert [(line["prompt"], line["sample"]) for line in lines] == every(4, 3)
    assert [line["prompt"] for line in lines if "failed" in line] == [2, 2, 2]
    assert all("score" not in line for line in lines if "failed" in line)
    assert sum(body["model"] == "j" for body in api.asked) == 9 + 3 * 3
    # of the failed prompt nothing is selected
    assert len(read_rows(tmp_path / "out" / "sft.jsonl")) == 3


def test_a_verdict_after_a_failed_connection_is_the_likeliest_one_all_the_same(make_judge):
    fails_once = {"plan": lambda body, attempt: "status 500" if attempt == 0 else None}
    found = make_judge(lambda body: ("[[4]]", "stop"), **fails_once)
    assert found.score([("Why?", ["So."])]) == [[4.0]]
    first, second = found.api.asked
    assert second == first and first["temperature"] == 0.0


def shown(body):
    """{letter: answer} of what a judge was shown."""
    (message,) = body["messages"]
    return dict(re.findall(r"^\[([A-Z])\]\n(.*)$", message["content"], re.MULTILINE))


GROUPS = [(f"Why {number}?", [f"answer {number} {letter}" for letter in "xyz"[:count]])
          for number, count in enumerate([2, 2, 2, 2, 3, 2])]  # fmt: skip


def test_a_judge_that_always_says_a_gives_both_of_a_pair_a_half(make_judge):
    found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
    pairs = [group for group in GROUPS if len(group[1]) == 2]
    assert found.score(pairs) == [[0.5, 0.5]] * 5
    # of three one stands in the middle both times: the two others win once each
    ((scores),) = found.score([GROUPS[4]])
    assert sorted(scores) == [0.0, 0.5, 0.5]


def test_a_judge_that_knows_the_best_gives_it_one_wherever_it_stands(make_judge):
    def knows(body):
        return next(f"[[{letter}]]" for letter, text in shown(body).items() if text.endswith("y")), "stop"

    found = make_judge(knows, mode="pick")
    assert found.score(GROUPS) == [[0.0, 1.0] if len(answers) == 2 else [0.0, 1.0, 0.0] for _, answers in GROUPS]
    places = [list(shown(body).values()).index(f"answer {number} y")
              for number in range(6) for body in found.api.asked if f"Why {number}?" in str(body)]  # fmt: skip
    assert len(set(places)) > 1  # it was not always the same letter


def test_the_second_pass_shows_the_answers_in_exactly_the_reverse_order(make_judge):
    groups = [("Why?", [f"answer {number}" for number in range(7)]), ("Who?", ["one", "two", "three"])]
    found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
    found.score(groups)
    assert len(found.api.asked) == 4
    starts = set()
    for prompt, answers in groups:
        first, second = (shown(body) for body in found.api.asked if prompt in str(body))
        assert list(first) == list(second) == list("ABCDEFG"[: len(answers)])
        assert list(first.values()) == list(second.values())[::-1] and sorted(first.values()) == sorted(answers)
        starts |= {tuple(first.values()), tuple(second.values())}
    # in an order of the prompt's own, and not that of the samples
    assert not starts & {tuple(groups[0][1]), tuple(groups[0][1][::-1])}


def test_the_order_is_the_same_in_the_next_run(make_judge):
    asked = []
    for _ in range(2):
        found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
        found.score(GROUPS)
        asked.append(sorted(str(shown(body)) for body in found.api.asked))
    assert asked[0] == asked[1] and len(asked[0]) == 12
    assert text_key(42, "Why 0?") == text_key(42, "Why 0?") != text_key(43, "Why 0?")


def test_a_pass_that_fails_fails_the_whole_prompt(make_judge):
    """Half a comparison would be biased by position."""

    def write(body):
        return ("[[C]]" if shown(body)["A"] == "answer 1 x" else "[[A]]"), "stop"  # of a pair: no such letter

    found = make_judge(write, mode="pick")
    scores = found.score(GROUPS[:3])
    assert scores[0] == scores[2] == [0.5, 0.5]
    assert [str(one) for one in scores[1]] == [NO_LETTER] * 2 and isinstance(scores[1][0], server.GivenUp)
    assert found.server.failures == {NO_LETTER: 3}


def test_a_run_picks_the_best_of_each_prompts_answers(start, run, tmp_path):
    """The judge likes the longest answer; brevity has no weight."""

    def write(body):
        if body["model"] != "j":
            return f"{'long ' * (1 + body['seed'] % 9)}{body['seed']}", "stop"
        texts = shown(body)
        return f"[[{max(texts, key=lambda letter: (len(texts[letter]), texts[letter]))}]]", "stop"

    api = start(write=write)
    assert run(api, f"--judge_model j --judge_mode pick --judge_base_url {api.url} --reward_weights 0 1")[0] == 0
    assert sum(body["model"] == "j" for body in api.asked) == 4 * 2
    texts = {(line["prompt"], line["sample"]): line["completion"]
             for line in read_rows(tmp_path / "out" / "completions.jsonl")}  # fmt: skip
    for number in range(4):
        group = [line for line in read_rows(tmp_path / "out" / "scores.jsonl") if line["prompt"] == number]
        assert sorted(line["scores"]["j"] for line in group) == [0.0, 0.0, 1.0]
        best = max(group, key=lambda line: line["score"])
        longest = max((texts[number, sample] for sample in range(3)), key=lambda text: (len(text), text))
        assert texts[number, best["sample"]] == longest


# ── the judge's template ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_places_of_a_template_are_filled_once(make_judge):
    template = "{prompt}|{completion}|{prompt}|{other}|{}|{{prompt}}|[[1]]"
    found = make_judge(lambda body: ("[[4]]", "stop"), template=template)
    found.score([("What is {completion}?", ["{prompt} and {completions}"])])
    ((message,),) = [body["messages"] for body in found.api.asked]
    question, said = "What is {completion}?", "{prompt} and {completions}"
    assert message == {"role": "user", "content": f"{question}|{said}|{question}|{{other}}|{{}}|{{{question}}}|[[1]]"}


def test_a_chat_is_shown_to_the_judge_with_its_roles_and_a_question_as_it_is(make_judge):
    found = make_judge(lambda body: ("[[4]]", "stop"), template="{prompt}|{completion}")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    found.score([([user], ["So."]), ([system, user], ["So."]), ("Why? ", ["So."])])
    assert sorted(body["messages"][0]["content"] for body in found.api.asked) == [
        "Why? |So.", "Why?|So.", "system: Be brief.\n\nuser: Why?|So.",
    ]  # fmt: skip


@pytest.fixture
def refused(run, tmp_path):
    """refused(flags, api): the problems of a run that is refused, which writes nothing."""

    def refused(flags, api="http://127.0.0.1:9/v1"):
        status, out, err = run(api, flags)
        assert (status, out) == (2, []) and not (tmp_path / "out").exists()
        lines = err.splitlines()
        assert lines and all(line.startswith("refused: ") for line in lines)
        return [line.removeprefix("refused: ") for line in lines]

    return refused


@pytest.mark.parametrize(
    "mode, written, missing",
    [
        ("score", "Rate it: {completion}", ["{prompt}"]),
        ("score", "Rate it for {prompt}", ["{completion}"]),
        ("score", "Rate {prompt} {completions}", ["{completion}"]),
        ("score", "Rate it.", ["{prompt}", "{completion}"]),
        ("pick", "Pick: {prompt} {completion}", ["{completions}"]),
    ],
)
def test_a_template_without_its_places_is_refused_with_their_names(mode, written, missing, refused, tmp_path):
    file = tmp_path / "template.txt"
    file.write_text(written, encoding="utf-8")
    needs = "{prompt} and {completion}" if mode == "score" else "{prompt} and {completions}"
    has = f"With --judge_mode {mode} it has {needs}, as data/judge_{mode}.txt has"
    assert refused(f"--judge_model j --judge_mode {mode} --judge_template {file}") == [
        f"--judge_template {file}: no {place} in it. {has}" for place in missing
    ]


def test_a_template_that_is_not_there_or_no_text_is_refused(refused, tmp_path):
    gone = tmp_path / "gone.txt"
    assert refused(f"--judge_model j --judge_template {gone}") == [
        f"--judge_template {gone}: No such file or directory"
    ]
    assert refused(f"--judge_model j --judge_template {tmp_path}") == [f"--judge_template {tmp_path}: Is a directory"]
    (tmp_path / "latin.txt").write_bytes("{prompt} {completion} ä".encode("latin-1"))
    assert refused(f"--judge_model j --judge_template {tmp_path / 'latin.txt'}") == [
        f"--judge_template {tmp_path / 'latin.txt'}: not UTF-8"
    ]


def test_the_shipped_templates_ask_for_what_is_read(make_judge):
    for mode, places in judge.PLACES.items():
        assert not list(judge.check_template(judge.TEMPLATES[mode], mode))
        written = (ROOT / judge.TEMPLATES[mode]).read_text(encoding="utf-8")
        (example,) = judge.VERDICT.findall(written)
        assert all(place in written for place in places)
        found = make_judge(mode=mode)
        assert (found.read_number(f"[[{example}]]", 1, True) if mode == "score" else
                found.read_label(f"[[{example}]]", 1, True, [0, 1])) in (3.0, 1)  # fmt: skip


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
        (["--api_model"], ["--engine openai: which of the server's models? Type --api_model NAME"]),
    ]:
        left = [word for place, word in enumerate(words) if not {word, words[place - 1]} & set(flags)]
        assert rejection_sampling.main(left) == 2
        assert capsys.readouterr().err.splitlines() == [f"refused: {problem}" for problem in problems]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("--top_k 5", "--top_k with --engine openai: its API has no such field. Leave it out; --top_p it has"),
        ("--api_concurrency 0", "--api_concurrency 0: 1 or more"),
        ("--api_timeout 0", "--api_timeout 0: seconds, above 0"),
        ("--api_timeout nan", "--api_timeout nan: seconds, above 0"),
        ("--api_retries -1", "--api_retries -1: 0 or more"),
        (
            "--judge_base_url http://127.0.0.1:9/v1",
            "--judge_base_url: without --judge_model there is no judge. Type --judge_model NAME",
        ),
        ("--judge_model j --judge_scale 5 5", "--judge_scale 5.0 5.0: the least number and the highest, like 1 10"),
        ("--judge_model j --judge_scale 1 nan", "--judge_scale 1.0 nan: the least number and the highest, like 1 10"),
        (
            "--judge_model j --judge_mode pick --num_completions 1",
            "--judge_mode pick: picks of 2 to 26 answers, and there are 1",
        ),
        (
            "--judge_model j --judge_mode pick --num_completions 27",
            "--judge_mode pick: picks of 2 to 26 answers, and there are 27",
        ),
        ("--engine transformers --judge_model j", "--api_model: is for --engine openai"),
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
