"""A dataclass field as a command-line flag."""

from dataclasses import field
from typing import Any


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text. A default that is a list is copied for each instance.

    metadata: `range` (utils/cli/ranges.py), or what HfArgumentParser reads: `choices`, `nargs`, `const`.
    """
    value: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": help, **metadata})
