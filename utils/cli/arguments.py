"""The command line: shared flags and the method's own flags, typed or in --config recipe.yaml. Strict."""

import argparse
import difflib
import json
import re
from collections.abc import Container
from dataclasses import Field, fields
from typing import Any, NoReturn

from common_args import CommonArgs
from rlhf_args.method_config import MethodConfig
from rlhf_args.methods import DISTILLATION, EVERY, METHODS, REJECTION, Method, find_method, load
from utils.cli.ranges import check_ranges, explain_range
from utils.cli.recipes import drop_flags, typed_flags
from utils.runtime import environment
from utils.runtime.errors import Refused, guess_name, refuse_if
from utils.runtime.output import one_line

# Flags of other projects that do not exist here -> what to type.
ELSEWHERE = {
    "load_in_4bit": "Type --train_mode qlora",
    "load_in_8bit": "Type --train_mode qlora, which quantises to 4 bits; 8-bit weights are not supported",
}


def peek_shared(argv: list[str], name: str | None = None) -> tuple[Any, str, list[str]]:
    """(shared flags, name of the method, problems), without importing a heavy library.

    name: the method, for a script with a single one. Raises Refused if --rlhf_type names no method.
    """
    common, problems = peek(argv, load(EVERY[name].arguments) if name else CommonArgs)
    found = name or find_method(common.rlhf_type)
    if found is None:
        elsewhere = ". That is train_gkd.py" if common.rlhf_type.upper() in DISTILLATION else ""
        kinds = f"There are {', '.join(METHODS)}{elsewhere or guess_name(common.rlhf_type, METHODS)}"
        raise Refused([*problems, f"--rlhf_type {common.rlhf_type}: no such method. {kinds}"])
    return common, found, problems


def peek(argv: list[str], shared: type) -> tuple[Any, list[str]]:
    """(an instance of the dataclass `shared`, problems), from its flags in `argv`. A bad flag gets its default."""
    parser = make_parser([shared], add_help=False)
    how = {"return_remaining_strings": True, "look_for_args_file": False}
    found, _ = parser.parse_args_into_dataclasses(argv, **how)
    if parser.problems:
        found, _ = parser.parse_args_into_dataclasses(drop_flags(argv, flags_in(parser.problems)), **how)
    return found, parser.problems


def flags_in(problems: list[str]) -> set[str]:
    """The names of the flags that the problems begin with."""
    return {found[1] for problem in problems if (found := re.match(r"--(\w+)", problem))}


def parse(argv: list[str], name: str, planned: bool = False, collected: list[str] | None = None) -> tuple[Any, Any]:
    """(shared flags, TRL config) of the method `name`. Raises Refused; --help prints and exits.

    planned: parse as on a GPU with bfloat16. collected: a list that takes the problems of single flags instead; these
    flags then get their defaults, so that the rest of the run can still be checked.
    """
    method = EVERY[name]
    config_class = load(method.config)
    if not issubclass(config_class, MethodConfig):  # a new method's config may subclass TRL's alone
        config_class.__bases__ += (MethodConfig,)
    config_class._argument_group_name = f"the flags of {name}, under TRL's names"
    parser = make_parser(
        [load(method.arguments), config_class],
        prog=f"train_{method.entry}.py",
        description=f"{name}: {method.title}. train_rlhf.py has --rlhf_type {', '.join(METHODS)}.",
        epilog="--config FILE.yaml reads flags from a file; flags on the command line win.",
    )
    asked, unknown = parser.parse_known_args(argv)
    known = {field.name for kind in parser.dataclass_types for field in fields(kind)}
    problems = refuse_words(unknown, name, known)
    # TRL's configs default to bf16 and raise without the hardware: choose the dtype first.
    typed = typed_flags(argv)
    dtype = "float32"
    try:
        dtype = resolve_dtype(asked.dtype, asked.bf16, asked.fp16, name, method, typed, planned)
    except Refused as refusal:
        problems += refusal.problems
    problems = parser.problems + problems
    problems += [problem for kind in parser.dataclass_types for problem in check_ranges(kind, asked)]
    if collected is None:
        refuse_if(problems)
    else:
        collected += [problem for problem in problems if problem not in collected]
        argv = drop_flags(argv, flags_in(problems))
    defaults = {"use_cpu": True, "dataloader_pin_memory": False} if planned else environment.device_defaults()
    if asked.plain:
        defaults.pop("gradient_checkpointing", None)
    parser.set_defaults(bf16=dtype == "bfloat16", fp16=dtype == "float16", **defaults)
    try:
        common, config, *_ = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=bool(problems)
        )
    except json.JSONDecodeError as error:
        flag = argv[argv.index(error.doc) - 1] if error.doc in argv else "a flag"
        why = f"{error.msg}, character {error.pos + 1}"
        raise Refused(f"{flag} {error.doc}: not JSON ({why}). Type '{{\"key\": value}}', with double quotes") from None
    except (ValueError, TypeError, OSError, ImportError) as error:  # TRL's and transformers' own checks of their flags
        raise Refused(one_line(error)) from None
    common.dtype, common.typed = dtype, typed
    if environment.engine() == "fsdp2" and dtype != "float32":
        config.fsdp_plugin_args = environment.fsdp_precision(dtype)
    return common, config


def parse_rejection(argv: list[str]) -> tuple[Any, Any, list[str], list[str]]:
    """(RewardArgs, RejectionConfig, remaining words for --then's method, problems). A bad flag has its default."""
    kinds = [load(REJECTION.arguments), load(REJECTION.config)]
    kinds[1]._argument_group_name = "the flags of rejection sampling"
    parser = make_parser(
        kinds,
        prog="rejection_sampling.py",
        description=f"{REJECTION.title} ({REJECTION.source}).",
        epilog="--then METHOD also takes that method's flags: `python train_rlhf.py --rlhf_type METHOD --help`.",
    )
    how = {"return_remaining_strings": True, "look_for_args_file": False}
    common, config, left = parser.parse_args_into_dataclasses(argv, **how)
    known = {field.name for kind in kinds for field in fields(kind)}
    problems = [] if config.then else refuse_words(left, None, known)
    problems = [*parser.problems, *problems, *check_ranges(kinds[0], common), *check_ranges(kinds[1], config)]
    if problems:
        common, config, left = parser.parse_args_into_dataclasses(drop_flags(argv, flags_in(problems)), **how)
    else:
        common.dtype = resolve_dtype(common.dtype, None, None, "rejection sampling", REJECTION)
    return common, config, left, problems


def make_parser(dataclass_types: list[type], **kwargs: Any) -> Any:
    from trl.scripts.utils import TrlParser  # imports no heavy library

    class Parser(TrlParser):
        """Collects bad values in `problems`, to refuse all of them at once."""

        problems: list[str] = []

        @staticmethod
        def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
            TrlParser._parse_dataclass_field(parser, explain_range(field))

        def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
            try:
                return super()._get_values(action, words)
            except argparse.ArgumentError as error:
                self.problems = [*self.problems, flag_first(error)]

        def error(self, message: str) -> NoReturn:
            raise Refused([*self.problems, flag_first(message)])

    # allow_abbrev would accept any unique prefix of a flag, so typos too
    parser = Parser(dataclass_types, allow_abbrev=False, **kwargs)
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool":
            action.type = to_bool
            if action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 alone, as --use_dora alone
    return parser


def to_bool(word: str | bool) -> bool:
    """A switch as transformers reads it, and YAML's on and off. Raises ArgumentTypeError."""
    from transformers.hf_argparser import string_to_bool

    return string_to_bool({"on": True, "off": False}.get(str(word).lower(), word))


def flag_first(message: object) -> str:
    """argparse's "argument --dtype/--d-type: invalid ..." as "--dtype: invalid ..."."""
    return re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", one_line(message))


def refuse_words(words: list[str], name: str | None, known: set[str]) -> list[str]:
    """The refusals of words that are no flags of the method `name` (None: rejection sampling)."""
    problems = [no_such_flag(word, name, known) for word in words if word.startswith("--")]
    return problems or ([f"{' '.join(words)}: not a flag. Type each value after its --flag"] if words else [])


def no_such_flag(flag: str, name: str | None, known: set[str]) -> str:
    bare = flag[2:].replace("-", "_")
    choice = f" --rlhf_type {name}" if name in METHODS else ""
    script = f"train_{EVERY[name].entry}.py" if name else "rejection_sampling.py"
    others = [other for other, method in METHODS.items() if bare in {*flags_of(method), *dict(method.renamed)}]
    scripts = [m.entry for m in DISTILLATION.values() if bare in {*flags_of(m), *dict(m.renamed)} and not others]
    near = difflib.get_close_matches(bare, sorted(known), 1)
    if bare in ELSEWHERE:
        way_out = ELSEWHERE[bare]
    elif others:
        way_out = f"It is one of {', '.join(others)}" + ("" if name else ", for --then")
    elif scripts and name not in DISTILLATION:
        way_out = f"It is one of train_{scripts[0]}.py"
    elif near:
        way_out = f"Did you mean --{near[0]}?"
    else:
        way_out = f"`python {script}{choice} --help` lists them"
    return f"{flag}: no such flag for {name or 'rejection sampling'}. {way_out}"


def flags_of(method: Method) -> list[str]:
    return [field.name for field in fields(load(method.config))]


def resolve_dtype(
    dtype: str,
    bf16: bool | None,
    fp16: bool | None,
    name: str,
    method: Method,
    typed: Container[str] = (),
    planned: bool = False,
) -> str:
    """The precision that --dtype, --bf16 and --fp16 select: bfloat16, float16 or float32. Raises Refused.

    On a CPU bfloat16 needs AMX and the typed flag: by default all CPUs use float32, for the same results on each.
    """
    has_gpu, has_bf16 = planned or environment.has_gpu(), planned or environment.has_bf16()
    if bf16 and fp16:
        raise Refused("--bf16 and --fp16 together: choose one. bfloat16 is the default where the hardware has it")
    if bf16:
        return "bfloat16"
    wanted = "float16" if fp16 else "float32" if bf16 is False else dtype
    if wanted == "float16" and wanted not in method.precisions:
        raise Refused(
            f"float16 with {name}: its log-probabilities overflow to NaN. It takes --dtype "
            f"{' or '.join(method.precisions)}"
        )
    if wanted == "float16" and (has_bf16 or not has_gpu):
        better = "bfloat16" if has_bf16 else "float32"
        raise Refused(f"float16: use {better} on this machine, which does not overflow. Type --dtype {better}")
    if wanted == "bfloat16" and not has_bf16 and not ("dtype" in typed and environment.has_amx()):
        return "float32"
    return wanted
