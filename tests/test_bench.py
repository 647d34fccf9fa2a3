"""The arithmetic and the pages of bench/: python -m pytest tests/test_bench.py"""

import json
import re
import sys

import pytest

from bench import harness, speed
from tests.conftest import ROOT


def test_a_function_of_a_benchmark_runs_in_a_process_of_its_own_and_returns_json():
    numbers = harness.call(harness.mean_and_error, [1.0, 3.0])
    assert numbers == [2.0, 1.0]  # standard deviation sqrt(2), over sqrt(2)
    assert harness.mean_and_error([4.0]) == (4.0, None)


def test_a_command_that_fails_is_reported_with_its_status_and_the_end_of_its_stderr():
    with pytest.raises(RuntimeError, match="exit status 3.*\nno disk"):
        harness.run([sys.executable, "-c", "import sys; print('no disk', file=sys.stderr); sys.exit(3)"])


def test_odd_rounds_reverse_the_sides():
    assert [harness.order_of(["ours", "trl"], number)[0] for number in range(3)] == ["ours", "trl", "ours"]


def test_a_saved_output_is_printed_again_as_the_last_line(tmp_path):
    saved = {"bench": "speed", "cells": {}, "steps": 3}
    (tmp_path / "cpu.txt").write_text("DPO lora ours {}\n" + json.dumps(saved))
    assert harness.last_json(harness.run([sys.executable, "bench/speed.py", "--from", tmp_path / "cpu.txt"])) == saved


def test_every_benchmark_command_of_the_docs_has_a_script_that_knows_its_flags():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    commands = re.findall(r"`(?:python )?(bench/\w+\.py)([^`]*)`", text)
    scripts = {script for script, _ in commands}
    assert len(scripts) == 7
    help_of = {script: harness.run([sys.executable, script, "--help"]) for script in scripts}
    for script, words in commands:
        assert [flag for flag in re.findall(r"--\w+", words) if flag not in help_of[script]] == [], script


def run(*ends, losses=(0.7, 0.6, 0.5)):
    """Three steps of two passes that end at these seconds, on 10 tokens each."""
    return {"start": 2.0, "ends": list(ends), "tokens": [10] * 6, "losses": list(losses), "peak_bytes": 2e9}


def test_each_step_counts_at_its_fastest_and_the_first_is_not_timed():
    slow_end, slow_middle = run(3, 4, 5, 6, 8, 10), run(3, 5, 8, 9, 10, 10.5)
    cell = speed.summarize([slow_end, slow_middle], tokens=[20, 20, 22], accumulation=2)
    # step 2 takes 6-4 and 9-5 s, step 3 10-6 and 10.5-9 s: 42 tokens in 2 + 1.5 s
    assert cell["tokens_per_s"] == pytest.approx(42 / 3.5)
    assert cell["tokens"] == [20, 20, 20] and cell["final_loss"] == 0.5 and cell["failures"] == []


def test_a_round_that_failed_is_kept_beside_those_that_did_not():
    cell = speed.summarize([{"failed": "no disk"}, run(3, 4, 5, 6, 7, 8)], tokens=[20] * 3, accumulation=2)
    assert cell["failures"] == ["no disk"] and cell["tokens_per_s"] == 10
    assert speed.summarize([{"failed": "no disk"}], tokens=[20] * 3, accumulation=2) == {"failed": "no disk"}
    short = run(3, 4, 5, 6)
    assert speed.summarize([short], tokens=[20] * 3, accumulation=2) == {"failed": "4 passes instead of 6"}


def page(**runs):
    cell = {side.replace("_", "-"): speed.summarize([one], [20] * 3, 2) for side, one in runs.items()}
    facts = dict.fromkeys(("device", "command", "model", "batch", "accumulation", "steps", "rounds"), "?")
    facts |= {"gpu": False, "dtype": "float32", "versions": dict.fromkeys(cell, {}), "cells": {"DPO lora": cell}}
    return speed.make_page([facts])


def test_the_page_says_why_where_a_ratio_is_below_1():
    ours, faster, slower = run(3, 4, 5, 6, 7, 8), run(2, 3, 3.5, 4, 4.5, 5), run(3, 4, 6, 8, 10, 12)
    said = page(ours=ours, trl=faster, llamafactory=slower)
    # ours 40 tokens in 4 s, the others in 2 and 8 s
    assert "| DPO lora | 10.0 /s | 0.50 | 2.00 |" in said
    assert "- DPO lora, trl 0.500: no reason found" in said and "llamafactory 2" not in said
    noisy = page(ours=run(3, 4, 5, 6, 7, 8.2), trl=run(3, 4, 5, 6, 7, 8))
    assert "- DPO lora, trl 0.952: within the noise of two equal runs" in noisy


def test_the_page_has_a_dash_with_its_reason_and_says_which_losses_differ():
    ours, other = run(3, 4, 5, 6, 7, 8), run(3, 4, 5, 6, 7, 8, losses=(0.7, 0.6, 0.4))
    said = page(ours=ours, trl_cli={"failed": "trl has no command for SimPO"}, ms_swift=other)
    assert "| DPO lora | 10.0 /s | – | 1.00 |" in said and "- trl-cli, DPO lora: trl has no command for SimPO" in said
    assert "| DPO lora | 0.500000 | – | 0.400000 |" in said and "ms-swift: losses up to 1.0e-01 apart" in said


def test_each_task_of_the_ppo_bench_has_its_reward():
    from bench import ppo, toy

    tasks = {task.split()[0].strip(",") for task in (*ppo.TASKS, *ppo.ADAPTED, *ppo.MOVED)}
    assert len(tasks) == 5
    for name in tasks:
        assert len(getattr(toy, name)(prompts=["a01:"], completions=["aba"], completion_ids=[[1, 2, 3]])) == 1
    for name, (factor, offset) in ppo.MOVED.items():
        assert getattr(toy, name)(completions=["aba"]) == [factor * 0.24 + offset]  # two changes of 0.12
