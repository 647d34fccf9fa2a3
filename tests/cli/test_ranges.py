"""A value outside a flag's range is refused, whatever the flag. `python -m pytest tests/cli/test_ranges.py -n 0 -q`"""

import re
import subprocess
import sys
from dataclasses import fields

import pytest

from common_args import CommonArgs, RewardArgs, SharedArgs
from rlhf_args.methods import EVERY, REJECTION, load
from tests.conftest import ROOT
from utils.cli import arguments, ranges
from utils.runtime.errors import Refused, refuse_if

TABLE = EVERY | {"rejection sampling": REJECTION}
BOUND = re.compile(r"(at least|above|at most|below) (\d[\d.]*)")
WHOLE, REAL = (int, int | None), (float, float | None, list[float], list[float] | None)


def ranged(*kinds):
    """{flag: (its range, its type)} of the flags of dataclasses that have a range."""
    found = {field.name: (ranges.find_range(field), field.type) for kind in kinds for field in fields(kind)}
    return {flag: pair for flag, pair in found.items() if pair[0]}


def flags_of(name):
    return ranged(load(TABLE[name].arguments), load(TABLE[name].config))


def refusals(name, typed):
    """{flag: its refusal} of a command that types {flag: value}."""
    words = [word for flag, value in typed.items() for word in (f"--{flag}", value)]
    with pytest.raises(Refused) as refusal:
        if name in EVERY:
            arguments.parse(["--output_dir", "o", *words], name, planned=True)
        else:
            refuse_if(arguments.parse_rejection(words)[3])
    found = {line.split()[0].removeprefix("--"): line for line in refusal.value.problems}
    assert len(found) == len(refusal.value.problems)
    return found


@pytest.mark.parametrize("name", TABLE)
def test_a_value_just_outside_is_refused_with_the_range_and_a_value_that_works(name):
    flags, outside = flags_of(name), {}
    for flag, (text, kind) in flags.items():
        assert kind in (*WHOLE, *REAL), flag
        step = 1 if kind in WHOLE else 0.001
        for side, (word, number) in enumerate(BOUND.findall(text)):
            beyond = {"at least": -step, "above": 0, "at most": step, "below": 0}[word]
            outside.setdefault(side, {})[flag] = f"{float(number) + beyond:g}"
    assert len(outside[0]) > 12 and len(outside[1]) >= 2
    for typed in outside.values():
        found = refusals(name, typed)
        assert found.keys() == typed.keys()
        for flag, line in found.items():
            assert line.startswith(f"--{flag} {typed[flag]}: ") and flags[flag][0].split(", like")[0] in line
            example = line.partition(f"Type --{flag} ")[2].split()
            assert example and all(ranges.is_within(flags[flag][0], float(value)) for value in example), line


@pytest.mark.parametrize("name", TABLE)
def test_a_number_that_is_not_finite_is_refused(name):
    flags = [flag for flag, (_, kind) in flags_of(name).items() if kind in REAL]
    for value in ("nan", "inf"):
        found = refusals(name, dict.fromkeys(flags, value))
        assert found.keys() == set(flags) and all(f" {value}: " in line for line in found.values())


@pytest.mark.parametrize("name", TABLE)
def test_a_value_at_a_bound_is_in_the_range_and_help_shows_the_range(name):
    kinds, flags = [load(TABLE[name].arguments), load(TABLE[name].config)], flags_of(name)
    parser = arguments.make_parser(kinds)
    at = {f: [n for word, n in BOUND.findall(text) if word.startswith("at")] for f, (text, _) in flags.items()}
    for side in (0, -1):
        typed = {flag: numbers[side] for flag, numbers in at.items() if numbers}
        assert len(typed) > 12
        values, _ = parser.parse_known_args([word for flag in typed for word in (f"--{flag}", typed[flag])])
        assert [problem for kind in kinds for problem in ranges.check_ranges(kind, values)] == []
    shown = {action.dest: action.help for action in parser._actions}
    for flag, (text, _) in flags.items():
        assert shown[flag].endswith(f". {text[0].upper()}{text[1:]}."), flag


def test_every_range_of_the_table_is_that_of_a_flag_and_every_range_has_a_bound_or_is_finite():
    every = {flag: pair[0] for name in TABLE for flag, pair in flags_of(name).items()}
    assert ranges.UPSTREAM.keys() <= every.keys()
    for flag, text in every.items():
        assert ranges.BOUNDS.keys() & set(word for word, _ in BOUND.findall(text)) or text.startswith("finite"), flag


SCRIPTS = {"train_rlhf": CommonArgs, "train_gkd": SharedArgs, "rejection_sampling": RewardArgs}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shared_flag_outside_its_range_ends_the_command_with_status_2_before_torch_is_imported(script, tiny_model):
    shared = ranged(SCRIPTS[script])
    assert shared
    words = [word for flag in shared if flag != "num_processes" for word in (f"--{flag}", "-1")]
    code = f"import sys, {script}; print({script}.main(sys.argv[1:]), 'torch' in sys.modules)"
    words += ["--rlhf_type", "GRPO", "--reward_funcs", "data/rewards.py:brevity"] * (script == "train_rlhf")
    words += ["--model_name_or_path", str(tiny_model), "--train_data_path", "data/prompts.jsonl"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "2 False", done.stderr
    for flag in shared.keys() - {"num_processes"}:
        assert f"refused: --{flag} -1: must be " in done.stderr
