"""A server that speaks OpenAI's API: asked by many threads, again after a failure, and never taken at half a word."""

import collections
import json
import math
import os
import random
import threading
import time
import urllib.parse
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from utils.runtime.errors import Failed
from utils.runtime.output import say

HOPELESS = (401, 404)  # the key, the address or the model's name is wrong: no request would fare better
USELESS = (400, 403, 413, 422)  # this request would fail again
IN_A_ROW = 64  # requests given up one after another: the server is gone


class Unusable(ValueError):
    """A reply that cannot be used as it is; another attempt may give a better one."""


class GivenUp(RuntimeError):
    """A request that failed at every attempt, and why."""


class Server:
    """`model` behind `base_url`, with the key in the environment variable `key`; `failures` counts by reason."""

    def __init__(self, base_url, model, key, *, concurrency, timeout, retries):
        import httpx2

        self.url, self.model, self.retries = base_url.rstrip("/"), model, retries
        limits = httpx2.Limits(max_connections=concurrency)
        headers = {"Authorization": f"Bearer {os.environ[key]}"}
        self.client = httpx2.Client(timeout=timeout, limits=limits, headers=headers)
        self.timeout, self.threads, self.over = timeout, ThreadPoolExecutor(concurrency), threading.Event()
        self.failures, self.given_up, self.lock = collections.Counter(), 0, threading.Lock()

    def ask_all(self, asks):
        """For each of [(prompt, read, sampling)] what `ask` returns; one that cannot be helped ends them all."""
        futures = [self.threads.submit(self.ask, *one) for one in asks]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            self.over.set()
            self.threads.shutdown(wait=False, cancel_futures=True)
            raise

    def ask(self, prompt, read, sampling):
        """`read(text, tokens, ended)` of the reply to a prompt, messages or plain text; or a GivenUp.

        `sampling(refused)`: the request's fields, after so many replies that `read` refused (it raises Unusable).
        Raises Failed where no request can succeed.
        """
        import httpx2

        chat = isinstance(prompt, list)
        where = f"{self.url}/{'chat/' * chat}completions"
        refused, reason = 0, "the run ended"
        for attempt in range(self.retries + 1):
            if self.over.is_set():
                break
            body = {"model": self.model, "stream": False, "messages" if chat else "prompt": prompt}
            seconds = min(2**attempt, 60) * random.uniform(0.5, 1)
            try:
                reply, written = self.post(where, body | sampling(refused))
                if reply.status_code in HOPELESS:
                    raise Failed(f"{where}: {reply.status_code} {one_line(written)}")
                if reply.status_code != 200:
                    seconds = max(seconds, to_seconds(reply.headers.get("retry-after")))
                    raise Unusable(f"status {reply.status_code}: {one_line(written)}")
                said = read_reply(json.loads(written), chat)
                refused += 1
                found = read(*said)
                self.given_up = 0
                return found
            except httpx2.TimeoutException:
                reason = "timed out"
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
            except ValueError as error:  # Unusable, or no JSON
                reason = one_line(error) if isinstance(error, Unusable) else "the reply is not JSON"
            self.count(reason, where)
            if reason.startswith(tuple(f"status {code}" for code in USELESS)):
                break
            if attempt < self.retries:
                self.pause(seconds)
        with self.lock:
            self.given_up += 1
        if self.given_up >= IN_A_ROW:
            raise Failed(f"{where}: {self.given_up} requests failed one after another, the last: {reason}")
        return GivenUp(reason)

    def pause(self, seconds):
        self.over.wait(seconds)

    def post(self, where, body):
        """(reply, its text), all of it within the time-out, which httpx counts anew for each read."""
        import httpx2

        until = time.monotonic() + self.timeout
        with self.client.stream("POST", where, json=body) as reply:
            parts = []
            for part in reply.iter_bytes():
                parts.append(part)
                if time.monotonic() > until:
                    raise httpx2.ReadTimeout("too slow")
        return reply, b"".join(parts).decode("utf-8", "replace")

    def count(self, reason, where):
        with self.lock:
            kind = reason.split(":")[0]
            self.failures[kind] += 1
            if self.failures[kind] == 1:
                say(f"\nwarning   {where}: {reason}; asked again up to {self.retries} times, and counted")

    def say_failures(self):
        if self.failures:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.failures.most_common())
            say(f"attempts  {self.failures.total()} requests failed and were made again or given up: {kinds}")


def read_reply(reply, chat):
    """(text, its tokens or None, whether it ended by itself) of a reply's JSON. Raises Unusable."""
    try:
        choice = reply["choices"][0]
        written = choice["message"]["content"] if chat else choice["text"]
        end = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise Unusable("the reply has no choices, message or finish_reason") from None
    if not isinstance(written, str):
        raise Unusable("the reply has no text")
    if end not in ("stop", "length"):
        raise Unusable(f"the reply is half an answer (finish_reason {end!r})")
    written = written.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji cannot be kept
    used = reply.get("usage")
    return written, used.get("completion_tokens") if isinstance(used, dict) else None, end == "stop"


def to_seconds(word):
    """What a Retry-After asks for, up to a minute; 0 where it is none, or a date."""
    try:
        seconds = float(word)
    except (TypeError, ValueError):
        return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), 60.0)


def one_line(what):
    return " ".join(str(what).split())[:200]


# ── the flags ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_server(config, flag, url, variable):
    """Problems of the flags of a server: `flag` gives its address `url`, the environment's `variable` its key."""
    key = os.environ.get(variable)
    if not key:
        yield f"{variable} is not set: the server's key. Type export {variable}=...; a local server takes any word"
    elif not (key.isascii() and key.isprintable()):
        yield f"{variable}: holds a line break or a letter that no key has. Set it anew"
    if url and not is_address(url):
        yield f"--{flag} {url}: no address of a server. It is like http://localhost:8000/v1"


def is_address(url):
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
