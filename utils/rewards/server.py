"""The flags of a server with OpenAI's API, and the types of its requests. client.py asks it."""

import os
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_args.judge_config import JudgeConfig

Row = tuple[str, dict[str, Any]]  # (where, values), as in utils/data/rows.py
Prompt = str | list[dict[str, str]]  # plain text, or messages
Reply = tuple[str, int | None, bool]  # text, its tokens if the server says so, True if it ended by itself
# prompt; read(*Reply), which may raise Unusable; sampling fields by number of refused replies
Request = tuple[Prompt, Callable[[str, int | None, bool], Any], Callable[[int], dict[str, Any]]]


class Unusable(ValueError):
    """A reply that cannot be used. Another attempt may give a better one."""


class GivenUp(RuntimeError):
    """A request that failed at every attempt, and the last reason."""


def check_server(config: JudgeConfig, flag: str, url: str | None, variable: str) -> Iterator[str]:
    """Problems of a server's flags. flag: names the address `url`. variable: environment variable of the key."""
    key = os.environ.get(variable)
    if not key:
        yield f"{variable} is not set: the server's key. Type export {variable}=...; a local server takes any word"
    elif not (key.isascii() and key.isprintable()):
        yield f"{variable}: holds a line break or a letter that no key has. Set it anew"
    if url and not is_address(url):
        yield f"--{flag} {url}: not an address. Type one like http://localhost:8000/v1"


def is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return url.isprintable() and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False
