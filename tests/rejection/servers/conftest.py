"""What the tests of this room share."""

import collections
import contextlib
import hashlib
import json
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest

import rejection_sampling
from rlhf_args.rejection_config import RejectionConfig
from tests.conftest import read_rows, write_rows
from utils.results import plots
from utils.rewards import client, judge

KEY = "TEST_SERVER_KEY"

CHATS = [{"prompt": [{"role": "user", "content": f"{word} is it?"}]} for word in ("Who", "What", "Where", "When")]


TEXTS = [{"prompt": f"{word} is it? "} for word in ("Who", "What", "Where", "When")]


SOON = 1.0  # --api_timeout: a sound reply takes milliseconds, also where two processors have other work


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
        path = urllib.parse.urlsplit(self.path).path  # a proxy is sent the whole address
        chat = path == "/v1/chat/completions"
        if not chat and path != "/v1/completions":
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

    async def sleep(seconds):
        noted.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)  # by which the SDK waits
    return noted


@pytest.fixture
def clients(monkeypatch):
    """The Servers that a run made, whose failures are counted."""
    made = []

    class Noted(client.Server):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(client, "Server", Noted)
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

    monkeypatch.setattr(plots, "draw_rewards", lambda *_: None)  # the picture takes longer than all else

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
    return client.Server(url, "m", KEY, concurrency=concurrency, timeout=timeout, retries=retries)


def dead_url():
    """The address of a port where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


NO_VERDICT, TWO = "the judge gave no verdict", "the judge gave two verdicts"


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


def lines_with(lines, word):
    return [line for line in lines if line.startswith(word)]


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
