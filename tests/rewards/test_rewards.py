"""Functions. `pytest tests/rewards/test_rewards.py`"""

import datetime
import decimal
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import train_rlhf
from tests.conftest import command, read_rows, write_rows
from tests.rewards.conftest import (
    CHATS,
    FAST,
    JUDGE_TEMPLATE,
    REWARDED,
    TEXTS,
    TWO,
    change,
    make_judge,
    recorded,
    without_bars,
    zero_head,
)
from utils.models import load

# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


HEAD = "def judge(completions, **columns):\n"


TRIED = "--reward_funcs: tried on the first 4 rows, judge"


FUNCTIONS = {
    "a syntax error": (
        "def judge(completions, **columns)\n    return 0\n",
        "FILE:1: expected ':', so --reward_funcs FILE:judge cannot be loaded",
    ),
    "another name": (
        "def jugde(completions, **columns):\n    return [0.0] * len(completions)\n",
        "--reward_funcs FILE:judge: no function judge in FILE. Did you mean jugde?",
    ),
    "no name at all": ("", "--reward_funcs FILE:judge: no function judge in FILE. It has none"),
    "not UTF-8": (
        HEAD + "    return 'é'\n",
        "FILE:2: (unicode error) 'utf-8' codec can't decode byte 0xe9 in position ",
    ),
    "no function": ("judge = 3\n", "--reward_funcs FILE:judge: judge is not a function"),
    "an import that fails": (
        "import nothing_of_the_kind\n" + HEAD + "    return [0.0] * len(completions)\n",
        "--reward_funcs FILE:judge: ModuleNotFoundError: No module named 'nothing_of_the_kind' at FILE:1",
    ),
    "leaves while it is imported": (
        "raise SystemExit(3)\n" + HEAD + "    return []\n",
        "--reward_funcs FILE:judge: SystemExit: 3 at FILE:1",
    ),
    "raises": (
        HEAD + "    return [columns['wanted'][0] for _ in completions]\n",
        f"{TRIED} raised KeyError: 'wanted' at FILE:2, for row 0, prompt 'Q: Say hi.\\nA:'",
    ),
    "raises in one row": (
        "def judge(prompts, **columns):\n    return [1 / prompt.index('2') for prompt in prompts]\n",
        f"{TRIED} raised ValueError: substring not found at FILE:2, for row 0, prompt 'Q: Say hi.\\nA:'",
    ),
    "raises in a later row": (
        "def judge(prompts, **columns):\n    return [1 / ('2 + 2' not in prompt) for prompt in prompts]\n",
        f"{TRIED} raised ZeroDivisionError: division by zero at FILE:2, for row 1, prompt 'Q: What is 2 + 2?\\nA:'",
    ),
    "raises, several lines": (
        HEAD + "    raise RuntimeError('one\\n  two')\n",
        f"{TRIED} raised RuntimeError: one two at FILE:2, for row 0, prompt 'Q: Say hi.\\nA:'",
    ),
    "raises while it yields": (
        HEAD + "    yield 1.0\n    raise RuntimeError('out of ideas')\n",
        f"{TRIED} raised RuntimeError: out of ideas at FILE:3, for row 0, prompt 'Q: Say hi.\\nA:'",
    ),
    "does not take what it is given": (
        "def judge(completions):\n    return [0.0] * len(completions)\n",
        f"{TRIED} raised TypeError: judge() got an unexpected keyword argument 'prompts' (FILE), for row 0, prompt ",
    ),
    "too few": (HEAD + "    return [1.0]\n", f"{TRIED} (FILE) returned 1 rewards for 4 completions"),
    "one number": (HEAD + "    return 0.5\n", f"{TRIED} (FILE) returned 0.5, not a list of numbers"),
    "NaN": (
        HEAD + "    return [1.0, float('nan'), 1.0, 1.0]\n",
        f"{TRIED} (FILE) returned nan for row 1, prompt 'Q: What is 2 + 2?\\nA:'. A reward is a finite number",
    ),
    "infinity": (HEAD + "    return [float('inf')] * 4\n", f"{TRIED} (FILE) returned inf for row 0, prompt "),
    "strings": (
        HEAD + "    return ['1.0'] * 4\n",
        f"{TRIED} (FILE) returned '1.0' for row 0, prompt 'Q: Say hi.\\nA:'. A reward is a finite number",
    ),
    "numpy's strings": (
        "import numpy\n" + HEAD + "    return [numpy.str_('1.0')] * 4\n",
        f"{TRIED} (FILE) returned np.str_('1.0') for row 0, prompt 'Q: Say hi.\\nA:'. A reward is a finite number",
    ),
    "a row of numbers each": (
        "import torch\n" + HEAD + "    return torch.ones(4, 2)\n",
        f"{TRIED} (FILE) returned [1.0, 1.0] for row 0, prompt 'Q: Say hi.\\nA:'. A reward is a finite number",
    ),
    "raises, async": (
        f"async {HEAD}    raise ConnectionError('no server')\n",
        f"{TRIED} raised ConnectionError: no server at FILE:2",
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_that_cannot_judge_is_refused_before_the_policy_is_loaded(case, refused, write, tmp_path):
    text, problem = FUNCTIONS[case]
    file = write(text)
    if case == "not UTF-8":
        Path(file).write_text(text, encoding="latin-1")
    found, problem = refused(f"--reward_funcs {file}:judge"), problem.replace("FILE", file)
    assert found == problem if not problem.endswith((" ", "(")) else found.startswith(problem)


def test_a_file_of_functions_that_is_not_there_is_refused(refused, write, tmp_path):
    write("")
    assert refused(f"--reward_funcs {tmp_path}/owm.py:judge") == (
        f"--reward_funcs {tmp_path}/owm.py:judge: no file {tmp_path}/owm.py. Did you mean {tmp_path}/own.py?"
    )
    assert refused(f"--reward_funcs {tmp_path}/own.py") == (
        f"--reward_funcs {tmp_path}/own.py: written as FILE.py:FUNCTION, like data/rewards.py:brevity"
    )


# what a file may hold before `judge` is found in it
DEFINITIONS = {
    "under a condition": "if True:\n    def judge(completions, **columns):\n        return [1.0] * len(completions)\n",
    "in a try": "try:\n    import gone\nexcept ImportError:\n    def judge(completions, **columns):\n"
    "        return [1.0] * len(completions)\n",
    "annotated": "judge: object = lambda completions, **columns: [1.0] * len(completions)\n",
    "of an object": "class Judge:\n    def __call__(self, completions, **columns):\n"
    "        return [1.0] * len(completions)\n\njudge = Judge()\n",
    "imported": "from data.rewards import brevity as judge\n",
    "imported with all": "from data.rewards import *\njudge = brevity\n",
    "beside a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\n"
    "class Score:\n    value: float\n\ndef judge(completions, **columns):\n"
    "    return [Score(1.0).value for _ in completions]\n",
    "tensors": "import torch\n\ndef judge(completions, **columns):\n    return torch.ones(len(completions))\n",
    "numbers of numpy": "import numpy\n\ndef judge(completions, **columns):\n    return [numpy.float32(1)] * "
    "len(completions)\n",
}


@pytest.mark.parametrize("case", DEFINITIONS)
def test_a_function_may_be_defined_in_any_way(case, run, write):
    status, _, lines = run(f"--reward_funcs {write(DEFINITIONS[case])}:judge --check")
    assert (status, lines) == (0, [])


LATER = """
calls = []

def judge(completions, **columns):
    calls.append(completions)
    if len(calls) == 3:
        return [len(nothing) for _ in completions]
    return [float(len(completion)) for completion in completions]
"""


def test_a_function_that_fails_later_ends_the_run_with_one_line(run, write, tmp_path):
    file = write(LATER)  # its first call is the trial, its third the second rollout
    status, out, lines = run(f"--reward_funcs {file}:judge")
    assert (status, "\nresult " in out) == (1, False)
    assert lines == [f"failed: judge raised NameError: name 'nothing' is not defined at {file}:7"]
    log = (tmp_path / "out" / "error.log").read_text(encoding="utf-8")
    assert log.startswith("Traceback") and f'{file}", line 7, in judge' in log and "name 'nothing'" in log
    assert [line["step"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")] == [1]
    assert len(read_rows(tmp_path / "out" / "completions.jsonl")) == 4  # the rollout before it is kept


def test_a_function_that_returns_nonsense_later_ends_the_run_with_one_line(run, write, tmp_path):
    file = write(LATER.replace("len(nothing)", "float('nan')"))
    status, _, lines = run(f"--reward_funcs {file}:judge")
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith(f"failed: judge ({file}) returned nan for row 0, prompt 'Q: ")
    assert (tmp_path / "out" / "error.log").exists()


def test_the_command_itself_ends_with_status_1_and_no_traceback(write, tiny_model, tmp_path):
    data, file = write_rows(tmp_path / "rows.jsonl", TEXTS), write(LATER)
    words = ["--rlhf_type", "RLOO", "--model_name_or_path", tiny_model, "--train_data_path", data]
    words += ["--output_dir", tmp_path / "out", "--reward_funcs", f"{file}:judge", *FAST.split()]
    done = command("train_rlhf.py", *words)
    assert (done.returncode, without_bars(done.stderr)) == (
        1,
        [f"failed: judge raised NameError: name 'nothing' is not defined at {file}:7"],
    )


def test_an_async_function_judges(run, write, tmp_path):
    file = write(
        "import asyncio\n\nasync def judge(completions, **columns):\n    await asyncio.sleep(0)\n"
        "    return [float(len(completion)) for completion in completions]\n"
    )
    assert run(f"--reward_funcs {file}:judge")[0] == 0
    for line in recorded(tmp_path):
        assert line["rewards"] == {"judge": len(line["completion"])}


def test_dates_in_a_further_column_reach_the_function_and_the_run_card(write, tiny_model, tmp_path):
    rows = [row | {"day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50")} for row in TEXTS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    file = write(
        "def judge(completions, day, price, **_):\n"
        "    return [len(answer) + float(d.day * p) for answer, d, p in zip(completions, day, price)]\n"
    )
    words = ["--rlhf_type", "RLOO", "--model_name_or_path", tiny_model, "--train_data_path", tmp_path / "rows.parquet"]
    words += ["--output_dir", tmp_path / "out", "--reward_funcs", f"{file}:judge", *FAST.split()]
    assert train_rlhf.main(list(map(str, words))) == 0
    for line in recorded(tmp_path):
        assert line["rewards"]["judge"] == len(line["completion"]) + 2 * 1.5
    card = json.loads((tmp_path / "out" / "run_card.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", card["data_hash"])


def test_further_columns_of_the_data_reach_the_function(run, write, tmp_path):
    file = write(
        "def judge(completions, wanted, **columns):\n    assert 'completion_ids' in columns and 'prompts' in columns\n"
        "    return [float(number + len(answer)) for number, answer in zip(wanted, completions)]\n"
    )
    rows = [{**row, "wanted": 10 + number} for number, row in enumerate(TEXTS)]
    status, out, _ = run(f"--reward_funcs {file}:judge", rows=rows)
    assert status == 0 and "columns passed to the reward functions: wanted" in out
    wanted = {row["prompt"]: row["wanted"] for row in rows}
    for line in recorded(tmp_path):
        assert line["rewards"]["judge"] == wanted[line["prompt"]] + len(line["completion"])


def test_several_functions_are_summed_by_their_weights(run, write, tmp_path):
    file = write(TWO.replace("SOMETIMES", "True"))
    status, out, _ = run(f"--reward_funcs {file}:length {file}:question --reward_weights 2 -0.5")
    assert status == 0 and f"reward    2 x {file}:length + -0.5 x {file}:question" in out
    lines = recorded(tmp_path)
    sums = [2 * len(line["completion"]) - 0.5 * len(line["prompt"]) for line in lines]
    metrics = read_rows(tmp_path / "out" / "metrics.jsonl")
    # the mean over each rollout of four; float32
    assert [line["reward"] for line in metrics] == pytest.approx([sum(sums[:4]) / 4, sum(sums[4:]) / 4], rel=1e-5)


def test_a_function_may_leave_rows_to_another(run, write, tmp_path):
    file = write(TWO.replace("SOMETIMES", "'W' in prompt"))
    assert run(f"--reward_funcs {file}:length {file}:question")[0] == 0
    lines = recorded(tmp_path)
    means = [line["reward"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    sums = [len(line["completion"]) + len(line["prompt"]) * ("W" in line["prompt"]) for line in lines]
    assert means == pytest.approx([sum(sums[:4]) / 4, sum(sums[4:]) / 4], rel=1e-5)


@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_an_answer_that_no_function_judges_ends_the_run(method, run, write, tmp_path):
    file = write(
        "calls = []\n\ndef judge(completions, **columns):\n    calls.append(1)\n"
        "    return [1.0 if len(calls) == 1 else None] * len(completions)\n"
    )
    status, _, lines = run(f"--reward_funcs {file}:judge --missing_eos_penalty 1", method)
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("failed: judge returned None for ")


def test_two_rewards_of_one_name_are_refused(refused, write, judge):
    file = write("def brevity(completions, **columns):\n    return [0.0] * len(completions)\n")
    said = "two rewards are called brevity, which the log would mix up. Rename one"
    assert refused(f"{REWARDED} {file}:brevity") == said
    named = Path(judge).rename(Path(judge).with_name("brevity"))
    try:
        assert refused(f"{REWARDED} --reward_model_path {named}") == said
    finally:
        named.rename(judge)


@pytest.mark.parametrize("weights, given", [("1", 1), ("1 2 3", 3)])
def test_each_reward_has_its_weight(weights, given, refused, judge):
    assert refused(f"{REWARDED} --reward_model_path {judge} --reward_weights {weights}") == (
        f"--reward_weights: {given} weights for 2 rewards. Type one per reward"
    )


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4


DATA_SAYS = "DPO trains on the answers in the data. RLOO, GRPO, PPO take rewards"


@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_no_reward_at_all_is_refused(method, refused):
    assert refused("", method) == (
        f"no reward: {method} needs one. Type --reward_funcs data/rewards.py:brevity to try, "
        "--reward_model_path FOLDER or --judge_model NAME"
    )


@pytest.fixture
def dpo(tmp_path, tiny_model, capsys):
    """dpo(flags) is what a DPO run with these flags is refused for."""

    def dpo(flags):
        words = f"--rlhf_type DPO --model_name_or_path {tiny_model} --output_dir {tmp_path}/out --check {flags} "
        status = train_rlhf.main([*words.split(), "--train_data_path", write_rows(tmp_path / "pairs.jsonl", PAIRS)])
        said = capsys.readouterr()
        assert (status, (tmp_path / "out").exists()) == (2, False)
        return said.err.splitlines()

    return dpo


def test_a_reward_for_a_method_that_takes_none_is_refused(dpo, judge):
    assert dpo(REWARDED) == [f"refused: --reward_funcs: {DATA_SAYS}"]
    assert dpo(f"--reward_model_path {judge}") == [f"refused: --reward_model_path: {DATA_SAYS}"]
    assert dpo("--reward_weights 1") == [
        "refused: --reward_weights: no such flag for DPO. It is one of RLOO, GRPO, PPO"
    ]


def test_an_older_trainers_name_is_translated_where_it_means_something_only(run, dpo):
    assert dpo("--kl_coef 0.1") == ["refused: --kl_coef: no such flag for DPO. It is one of RLOO, GRPO, PPO"]
    for value, reference in {"0": "none needed", "0.2": "the same model with the adapter off"}.items():
        status, out, lines = run(f"{REWARDED} --kl_coef {value} --check")
        assert (status, lines) == (0, ["note: --kl_coef is read as --beta"])
        assert f"reference {reference}" in out


def test_a_flag_of_ppo_alone_is_refused_for_rloo(refused):
    assert refused(f"{REWARDED} --vf_coef 0.1") == "--vf_coef: no such flag for RLOO. It is one of PPO"


# ── judges that are none ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_language_model_as_judge_is_refused(refused, tiny_model):
    assert refused(f"--reward_model_path {tiny_model}") == (
        f"--reward_model_path {tiny_model}: a language model, whose score head would be random. Train one with "
        "--rlhf_type Reward"
    )


def test_a_judge_that_is_not_there_is_refused(refused, tmp_path):
    (tmp_path / "judge").mkdir()
    assert refused(f"--reward_model_path {tmp_path}/juge") == (
        f"--reward_model_path {tmp_path}/juge: no such folder. Did you mean {tmp_path}/judge?"
    )


def without_head(tensors):
    del tensors[next(name for name in tensors if name.endswith("score.weight"))]


def two_heads(tensors):
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = torch.cat([tensors[name]] * 2)


def broken(tensors):
    for tensor in tensors.values():
        tensor.fill_(float("nan"))


def test_a_judge_without_a_head_is_refused(refused, judge, lora_judge, tmp_path):
    whole = change(judge, tmp_path / "whole", without_head)
    lora = change(lora_judge, tmp_path / "lora", without_head)
    said = "no weights for score.weight in it. A reward model has a trained head"
    assert refused(f"--reward_model_path {whole}", rows=CHATS) == f"--reward_model_path {whole}: {said}"
    assert refused(f"--reward_model_path {lora}", rows=CHATS) == f"--reward_model_path {lora}: {said}"


def test_a_judge_of_two_labels_is_refused(refused, lora_judge, tmp_path):
    whole = make_judge(tmp_path / "whole", labels=2)
    lora = change(lora_judge, tmp_path / "lora", two_heads)
    said = "scores 2 labels. A reward model has one"
    assert refused(f"--reward_model_path {whole}", rows=CHATS) == f"--reward_model_path {whole}: {said}"
    assert refused(f"--reward_model_path {lora}", rows=CHATS) == f"--reward_model_path {lora}: {said}"


def test_a_judge_to_whom_all_is_the_same_is_refused(refused, judge, tmp_path):
    folder = change(judge, tmp_path / "judge", zero_head)
    said = f"--reward_model_path {folder}: the same score 0 for all 8 answers"  # two answers to each of four prompts
    assert refused(f"--reward_model_path {folder}", rows=CHATS) == said


def test_a_lora_judge_to_whom_all_is_the_same_ends_the_run_at_its_first_rollout(run, lora_judge, tmp_path):
    folder = change(lora_judge, tmp_path / "judge", zero_head)
    status, _, lines = run(f"--reward_model_path {folder}", rows=CHATS)
    assert status == 1
    assert lines == [f"failed: --reward_model_path {folder}: the same score 0 for all 8 answers"]


def test_a_judge_of_broken_weights_is_refused(refused, judge, tmp_path):
    folder = change(judge, tmp_path / "judge", broken)
    assert refused(f"--reward_model_path {folder}", rows=CHATS) == (
        f"--reward_model_path {folder}: scores nan on the first rows. Its weights are broken"
    )


def test_a_judge_whose_template_cannot_write_a_row_is_refused_with_the_row(refused, judge, tmp_path):
    folder = Path(shutil.copytree(judge, tmp_path / "judge"))
    sulks = "{% if 'Sing!' in messages|string %}{{ raise_exception('I do not sing') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(sulks + JUDGE_TEMPLATE)
    assert refused(f"--reward_model_path {folder}", rows=CHATS) == (
        f"{tmp_path}/rows.jsonl:7: the template of --reward_model_path {folder} refuses it "
        "(TemplateError: I do not sing)"
    )


def test_a_critic_with_another_tokenizer_is_refused(refused, judge, tiny_model):
    found = refused(f"{REWARDED} --value_model_path {judge}", "PPO", mode="full")
    assert found.startswith(f"--value_model_path {judge}: its tokenizer is not the policy's: ")
    assert found.endswith(" in the model that is trained. A critic reads the policy's tokens")
    number, theirs, ours = re.search(r"token (\d+) is '(.+)' in it and '(.+)' in", found).groups()
    tokenizers = [load.load_tokenizer(folder) for folder in (judge, tiny_model)]
    assert [theirs, ours] == [tokenizer.convert_ids_to_tokens(int(number)) for tokenizer in tokenizers]
