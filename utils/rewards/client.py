"""Concurrent requests to a server with OpenAI's API, through the openai SDK: it retries, backs off, obeys Retry-After.

Import this file only where a server is used: importing the SDK takes a second.
"""

import asyncio
import collections
import os
from typing import Any

import httpx2
import openai

from utils.rewards.server import GivenUp, Reply, Request, Unusable
from utils.runtime.errors import Failed
from utils.runtime.output import say
from utils.runtime.secrets import HIDDEN

HOPELESS = (401, 404)  # wrong key, address or model name: every request would fail
IN_A_ROW = 64  # failed requests without a successful one in between: the server is gone


class BadReply(httpx2.RemoteProtocolError):
    """A reply with status 200 but without a whole answer. The SDK retries it like a lost connection."""


class Server:
    """`model` at `base_url`. key: environment variable that holds the key. failures: failed attempts by reason."""

    def __init__(self, base_url: str, model: str, key: str, *, concurrency: int, timeout: float, retries: int) -> None:
        self.url, self.model, self.key = base_url.rstrip("/"), model, os.environ[key]
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.failures: collections.Counter[str] = collections.Counter()
        self.given_up = 0  # requests in a row

    def ask_all(self, requests: list[Request]) -> list[Any]:
        """The result of `request` for each request. The first error cancels the others and is raised."""
        try:
            return asyncio.run(self.ask_concurrently(requests))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        except httpx2.InvalidURL as error:
            raise Failed(f"{self.url}: {error}") from None

    async def ask_concurrently(self, requests: list[Request]) -> list[Any]:
        free = asyncio.Semaphore(self.concurrency)
        http = CountingClient(self)
        async with openai.AsyncOpenAI(
            api_key=self.key, base_url=self.url, timeout=self.timeout, http_client=http
        ) as client:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.request(client, free, *request)) for request in requests]
        return [task.result() for task in tasks]

    async def request(self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, *request: Any) -> Any:
        """What `read` makes of a reply, or GivenUp after all attempts. Raises Failed if no request can succeed."""
        prompt, read, sampling = request
        chat = isinstance(prompt, list)
        where = f"{self.url}/{'chat/' * chat}completions"
        body = {"model": self.model, "stream": False, "messages" if chat else "prompt": prompt}
        refused, left = 0, self.retries
        async with free:
            while left >= 0:
                sdk = client.with_options(max_retries=left)
                try:
                    reply = await (sdk.chat if chat else sdk).completions.with_raw_response.create(
                        **body, **sampling(refused)
                    )
                    found = read(*read_reply(reply.http_response))
                    self.given_up = 0
                    return found
                except Unusable as error:
                    reason = str(error)
                    self.count_failure(where, reason)
                    refused, left = refused + 1, left - reply.retries_taken - 1
                except openai.APIStatusError as error:
                    if error.status_code in HOPELESS:
                        raise Failed(f"{where}: {error.status_code} {self.one_line(error.response.text)}") from None
                    reason = self.say_status(error.response)
                    break
                except openai.APIConnectionError as error:
                    reason = self.name_error(error.__cause__)
                    break
        self.given_up += 1
        if self.given_up >= IN_A_ROW:
            raise Failed(f"{where}: {self.given_up} requests failed one after another, the last: {reason}")
        return GivenUp(reason)

    def count_failure(self, where: str, reason: str) -> None:
        kind = reason.split(":")[0]
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            say(f"\nwarning   {where}: {reason}. Later failures of this kind are only counted")

    def say_failures(self) -> None:
        if self.failures:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.failures.most_common())
            say(f"attempts  {self.failures.total()} requests failed and were made again or given up: {kinds}")

    def say_status(self, reply: httpx2.Response) -> str:
        return f"status {reply.status_code}: {self.one_line(reply.text)}"

    def name_error(self, error: BaseException | None) -> str:
        if isinstance(error, httpx2.TimeoutException):
            return "timed out"
        return self.one_line(error if isinstance(error, BadReply) else f"{type(error).__name__}: {error}")

    def one_line(self, text: object) -> str:
        """The text on one line, at most 200 characters. A server may echo the key: it is hidden."""
        line = " ".join(str(text).split())
        return (line.replace(self.key, HIDDEN) if len(self.key) >= 8 else line)[:200]


class CountingClient(openai.DefaultAsyncHttpxClient):
    """The SDK's HTTP client. It limits the time of a whole attempt, checks the reply, and counts failed attempts."""

    def __init__(self, server: Server) -> None:
        super().__init__(timeout=server.timeout)
        self.server = server

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            try:
                async with asyncio.timeout(self.server.timeout):  # httpx2 limits each read by itself
                    reply = await super().send(request, **options)
            except TimeoutError:
                raise httpx2.ReadTimeout("", request=request) from None
            if reply.status_code == 200:
                read_reply(reply)
            elif reply.status_code not in HOPELESS:
                self.server.count_failure(str(request.url), self.server.say_status(reply))
            return reply
        except Exception as error:
            self.server.count_failure(str(request.url), self.server.name_error(error))
            raise


def read_reply(reply: httpx2.Response) -> Reply:
    """(text, its tokens or None, True if it ended by itself). Raises BadReply."""
    try:
        values = reply.json()
    except ValueError:
        raise BadReply("the reply is not JSON") from None
    try:
        choice = values["choices"][0]
        written = choice["message"]["content"] if "message" in choice else choice["text"]
        end = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise BadReply("the reply has no choices, message or finish_reason") from None
    if not isinstance(written, str):
        raise BadReply("the reply has no text")
    if end not in ("stop", "length"):
        raise BadReply(f"the reply is half an answer (finish_reason {end!r})")
    written = written.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone half of an emoji
    used = values.get("usage")
    return written, used.get("completion_tokens") if isinstance(used, dict) else None, end == "stop"
