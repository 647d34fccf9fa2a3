"""The command line before parsing: recipes (--config FILE) become flags, flags are translated to their names here."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.paths import near_path

if TYPE_CHECKING:
    from yaml import Node, SafeLoader

# The name of a flag in other projects -> its name here.
RENAMED = {
    "dataset_name": "train_data_path",
    "lora_r": "lora_rank",
    "torch_dtype": "dtype",
}

OFF = "false", "f", "no", "n", "off", "0"  # the values that turn a switch off


def expand(argv: list[str], quiet: bool = False) -> list[str]:
    """`argv` with the flags of --config files in front (typed flags win) and translated names.

    Notes each translation on stderr unless `quiet`. Raises Refused if a recipe cannot be read.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if re.match(r"--[\w-]+=", word) else [word])]
    recipe: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise Refused("--config: no file given. Type --config recipes/NAME.yaml")
        recipe += read_recipe(argv[at + 1])
        del argv[at : at + 2]
    return translate(read_use_peft(recipe + argv, quiet), RENAMED, quiet)


def drop_flags(words: list[str], names: set[str]) -> list[str]:
    """The words without these flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word[2:].replace("-", "_") in names
        kept += [] if dropping else [word]
    return kept


def read_recipe(path: str) -> list[str]:
    """The flags of a YAML file as command-line words. Raises Refused."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        recipe = loader.get_single_node()
        if not isinstance(recipe, yaml.MappingNode):
            raise Refused(f"{path}: not a mapping. A recipe has a line `flag: value` for each flag")
        loader.flatten_mapping(recipe)
        return [word for flag, value in recipe.value for word in read_flag(path, loader, flag, value)]
    except OSError as error:
        raise Refused(f"--config {path}: {str(error.strerror).lower()}{near_path(path)}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"--config {path}: not UTF-8 (byte {error.start}). Save the file as UTF-8") from None
    except yaml.YAMLError as error:
        line = getattr(error, "problem_mark", None)
        raise Refused(f"{path}:{line.line + 1 if line else 1}: not valid yaml") from None


def read_flag(path: str, loader: "SafeLoader", flag: "Node", value: "Node") -> list[str]:
    """The words of one line of a recipe. Values stay as written (YAML reads `no` as False); mappings become JSON."""
    import yaml

    where = f"{path}:{flag.start_mark.line + 1}: {flag.value}"
    if flag.value == "config":
        raise Refused(f"{where}: a recipe cannot include another. Type both: --config OTHER.yaml --config {path}")
    words = [f"--{flag.value}"]
    for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
        if item.tag == "tag:yaml.org,2002:null":
            quoted = f'"{item.value or "null"}"'
            raise Refused(
                f"{where}: {item.value or 'no value'}. Delete the line for the default, or write a value; "
                f"for the word itself type {quoted} in quotes"
            )
        scalar = isinstance(item, yaml.ScalarNode)
        words.append(item.value if scalar else json.dumps(loader.construct_object(item, deep=True), default=str))
    return words


def read_use_peft(words: list[str], quiet: bool = False) -> list[str]:
    """The words with TRL's --use_peft as --train_mode lora; --use_peft False as full."""
    if "--use_peft" not in words:
        return words
    at = words.index("--use_peft")
    value = words[at + 1 : at + 2] if words[at + 1 : at + 2] and not words[at + 1].startswith("--") else []
    mode = "full" if value and not is_on(value[0]) else "lora"
    say_note(quiet, f"--use_peft is read as --train_mode {mode}")
    return [*words[:at], "--train_mode", mode, *words[at + 1 + len(value) :]]


def say_note(quiet: bool, text: str) -> None:
    # the check that utils/launch.py starts has printed the note already
    if not quiet and environment.is_main() and "LAUNCH_CHECKED" not in os.environ:
        print(f"note: {text}", file=sys.stderr)


def translate(words: list[str], renamed: dict[str, str], quiet: bool = False) -> list[str]:
    """The words with flags renamed by {old name: new name}. Notes each on stderr unless `quiet`."""
    translated = []
    for word in words:
        name = word[2:].replace("-", "_")
        if not word.startswith("--") or name not in renamed:
            translated.append(word)
            continue
        say_note(quiet, f"{word} is read as --{renamed[name]}")
        translated.append(f"--{renamed[name]}")
    return translated


def typed_flags(words: list[str]) -> frozenset[str]:
    """Names of the flags in `words`; --no_plain counts as plain."""
    return frozenset(word[2:].replace("-", "_").removeprefix("no_") for word in words if word.startswith("--"))


def read_flags(words: Iterable[str]) -> dict[str, str]:
    """{flag: its first value, "" without one}; --no_plain is {"plain": "False"}."""
    flags: dict[str, str] = {}
    flag = None
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            flag = name.removeprefix("no_")
            flags[flag] = "" if flag == name else "False"
        elif flag:
            flags[flag] = flags[flag] or word
    return flags


def given_flags(argv: list[str], renamed: dict[str, str] | None = None) -> dict[str, str]:
    """read_flags of the typed words and their recipes. Raises Refused if a recipe cannot be read."""
    return read_flags(translate(expand(argv, quiet=True), renamed or {}, quiet=True))


def is_on(value: str | None) -> bool:
    """True if a switch with this value is on. "": a switch without a value, which is on; None: no such flag."""
    return value is not None and value.lower() not in OFF


def recipes_in(words: list[str]) -> list[str]:
    """The files of --config on a command line."""
    given = [part for word in words for part in word.split("=", 1)]
    return [file for flag, file in pairwise(given) if flag == "--config"]


def asks_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def asks_plan(words: list[str]) -> bool:
    """True if --plan is on, typed or in a recipe."""
    with contextlib.suppress(Refused):  # an unreadable recipe is refused later, by expand
        return is_on(given_flags(words).get("plan")) and not asks_help(words)
    return False
