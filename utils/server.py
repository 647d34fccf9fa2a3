"""A server that speaks OpenAI's API: asked by many threads, again after a failure, and never taken at half a word."""

import collections
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from utils.checks import Failed
from utils.summary import say

HOPELESS = (401, 403, 404)  # the key, the address or the model's name is wrong: no request would fare better
USELESS = (400, 413, 422)  # this request would fail again
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
        self.threads = ThreadPoolExecutor(concurrency)
        self.failures, self.given_up, self.lock = collections.Counter(), 0, threading.Lock()

    def ask_all(self, asks):
        """For each of [(prompt, read, sampling by attempt)] what `read` made of the reply, or its GivenUp."""
        futures = [self.threads.submit(self.ask, *one) for one in asks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            self.threads.shutdown(wait=False, cancel_futures=True)
            raise

    def ask(self, prompt, read, sampling):
        """`read(text, tokens, ended)` of the reply to a prompt, messages or plain text; or a GivenUp.

        `sampling(attempt)`: the request's fields. Raises Failed where no request can succeed.
        """
        import httpx2

        chat = isinstance(prompt, list)
        where = f"{self.url}/{'chat/' * chat}completions"
        for attempt in range(self.retries + 1):
            body = {"model": self.model, "stream": False, "messages" if chat else "prompt": prompt}
            wait = 0.0
            try:
                reply = self.client.post(where, json=body | sampling(attempt))
                if reply.status_code in HOPELESS:
                    raise Failed(f"{where}: {reply.status_code} {one_line(reply.text)}")
                if reply.status_code != 200:
                    wait = to_seconds(reply.headers.get("retry-after"))
                    raise Unusable(f"status {reply.status_code}: {one_line(reply.text)}")
                found = read(*read_reply(reply.json(), chat))
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
                time.sleep(max(wait, min(2**attempt, 60) * random.uniform(0.5, 1)))
        with self.lock:
            self.given_up += 1
        if self.given_up >= IN_A_ROW:
            raise Failed(f"{where}: {self.given_up} requests failed one after another, the last: {reason}")
        return GivenUp(reason)

    def count(self, reason, where):
        with self.lock:
            kind = reason.split(":")[0]
            self.failures[kind] += 1
            if self.failures[kind] == 1:
                say(f"\nwarning   {where}: {reason}; asked again up to {self.retries} times, and counted")


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
    used = reply.get("usage")
    return written, used.get("completion_tokens") if isinstance(used, dict) else None, end == "stop"


def to_seconds(word):
    try:
        return min(max(float(word), 0.0), 60.0)
    except (TypeError, ValueError):  # none, or a date
        return 0.0


def one_line(what):
    return " ".join(str(what).split())[:200]
