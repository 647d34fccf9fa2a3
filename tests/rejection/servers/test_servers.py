"""Rejection sampling by servers that speak OpenAI's API: ones that fail in every way, and `transformers serve`.

    python -m pytest tests/rejection/servers -q            offline, a minute
    python -m pytest tests/rejection/servers -q -m slow    SmolLM2-135M-Instruct answers and judges, a minute

The server of these tests answers from the request alone, so a failed attempt must not change what is kept. Most runs
call main() in this process, where the waits between attempts are noted instead of waited for; the command itself is
typed where its exit status, its last line or its files could differ.
"""

import collections
import email.utils
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, command, read_rows, write_rows
from tests.rejection.servers.conftest import (
    CHATS,
    FAULTS,
    KEPT,
    SOON,
    TEXTS,
    answer,
    contents,
    digest,
    every,
    identity,
    keys_in,
    make_client,
    words_for,
)
from utils.rewards import server

# ── a server ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        (None, (0.375, 0.5)),  # half a second, and up to a quarter less so that not all requests come back at once
        ("0", (0.375, 0.5)),
        ("7", (7, 7)),
        ("7.5", (7.5, 7.5)),
        ("120", (120, 120)),
        ("-5", (0.375, 0.5)),
        ("soon", (0.375, 0.5)),
        ("nan", (0.375, 0.5)),
        ("Wed, 21 Oct 2015 07:28:00 GMT", (0.375, 0.5)),  # past
        ("the date in 100 s", (40, 100)),  # the test may run a minute late
    ],
)
def test_retry_after_is_obeyed(sent, waited, start, waits, monkeypatch):
    if sent == "the date in 100 s":
        sent = email.utils.formatdate(time.time() + 100, usegmt=True)
    headers = {} if sent is None else {"Retry_After": sent}
    monkeypatch.setitem(FAULTS, "slower", lambda handler, reply: handler.send({}, 429, **headers))
    client = make_client(start(plan=lambda body, attempt: "slower" if attempt == 0 else None))
    assert isinstance(ask(client), str) and client.failures == {"status 429": 1}
    (seconds,) = waits
    assert waited[0] <= seconds <= waited[1]


def test_a_request_that_is_to_wait_for_more_than_two_minutes_is_given_up(start, waits, monkeypatch):
    """The run goes on; a quota that is used up ends it after 64 such requests, and not after hours."""
    slower = {"slower": lambda handler, reply: handler.send({"error": "quota"}, 429, Retry_After="3600")}
    monkeypatch.setitem(FAULTS, *slower.popitem())
    api = start(plan=lambda body, attempt: "slower")
    found = ask(make_client(api))
    assert isinstance(found, server.GivenUp) and "status 429" in str(found) and "quota" in str(found)
    assert (len(api.asked), waits) == (1, [])


def test_each_wait_is_twice_as_long_as_the_one_before(start, waits):
    client = make_client(start(plan=lambda body, attempt: "status 500"), retries=8)
    found = ask(client)
    assert isinstance(found, server.GivenUp) and str(found) == 'status 500: {"error": "busy"}'
    assert client.failures == {"status 500": 9}
    for seconds, most in zip(waits, [0.5, 1, 2, 4, 8, 8, 8, 8], strict=True):
        assert 0.75 * most <= seconds <= most
    assert len(set(waits[-4:])) > 1


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


# ── the surroundings ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_the_server_repeats_is_not_shown(start, run, monkeypatch):
    reply = {"error": {"message": "no such key: secret-word"}}
    for status in (401, 500):
        monkeypatch.setitem(FAULTS, "no", lambda handler, _, status=status: handler.send(reply, status))
        code, out, err = run(start(plan=lambda body, attempt: "no"), "--stages generate", out=str(status))
        said = "\n".join(out) + err
        assert code == 1 and "no such key: <hidden>" in said and "secret-word" not in said


def test_the_proxy_of_the_environment_is_asked(start, monkeypatch, waits):
    api = start()
    monkeypatch.setenv("HTTP_PROXY", api.url.removesuffix("/v1"))
    assert isinstance(ask(make_client("http://model.invalid/v1")), str)
    assert len(api.asked) == 1


def test_a_request_under_way_ends_with_ctrl_c(start, tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "hangs", lambda handler, reply: handler.server.ended.wait(60))
    api = start(plan=lambda body, attempt: "hangs")
    words = words_for(api, write_rows(tmp_path / "prompts.jsonl", CHATS), tmp_path / "out", "--stages generate")
    words = [*words, "--api_timeout", "600"]
    with subprocess.Popen(
        [sys.executable, "rejection_sampling.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as run:
        while not api.asked:
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        try:
            err = run.communicate(timeout=20)[1]
        finally:
            run.kill()
    assert run.returncode == 128 + signal.SIGINT
    assert "interrupted" in err and "Traceback" not in err


def test_a_run_without_a_server_does_not_import_the_sdk(tmp_path):
    """Its import takes a second."""
    words = ["--model_name_or_path", "m", "--train_data_path", "data/prompts.jsonl", "--output_dir", str(tmp_path)]
    code = (
        "import sys, rejection_sampling, utils.rejection.stages, utils.rewards.judge_reward\n"
        "rejection_sampling.main(sys.argv[1:])\n"
        "print(sorted({'openai', 'httpx2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
