"""What judges an answer judges it right, and what cannot judge is refused: `pytest tests/rewards/test_rewards.py`.

The judge here is a Llama of another tokenizer and template than the Qwen that answers, as reward models are.
"""

import datetime
import decimal
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForSequenceClassification

import train_rlhf
from tests.conftest import command, read_rows, write_rows
from utils import score_reward_model
from utils.models import load
from utils.rewards import models

ASKED = [
    "Say hi.",
    "What is 2 + 2?",
    "Name a colour.",
    "今天天气怎么样？",
    "Why?",
    "Spell cat.",
    "Sing!",
    "Who are you?",
]
TEXTS = [{"prompt": f"Q: {asked}\nA:"} for asked in ASKED]
CHATS = [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED]
FAST = "--max_completion_length 8 --num_generations 2 --per_device_train_batch_size 4 --max_steps 2 --logging_steps 1 "
FAST += "--learning_rate 2e-2 --save_strategy no --dtype float32"
REWARDED = "--reward_funcs data/rewards.py:brevity"

# ── the judge ────────────────────────────────────────────────────────────────────────────────────────────────────────

JUDGE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_judge(folder, pad=None, labels=1, holds=512, seed=1):
    """A tiny Llama with a trained-looking head. Its pad is the end of its turns unless `pad` is another token."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, processors
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|eot|>", "<|pad|>"]
    tokens = [*reversed(sorted(pre_tokenizers.ByteLevel.alphabet())), *special]  # the policy's run the other way
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(kinds.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad)
    tokenizer.chat_template = JUDGE_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=holds,
        num_labels=labels,
        pad_token_id=vocabulary[pad or "<|eot|>"],
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    return make_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session", params=[None, "<|pad|>"], ids=["pad ends turns", "a pad of its own"])
def padded_judge(request, tmp_path_factory):
    return make_judge(tmp_path_factory.mktemp("judge"), request.param)


def load_judge(folder, rows=CHATS, batch_size=8):
    tried = [(f"row:{number}", {**row, "further": {}}) for number, row in enumerate(rows)]
    return models.load_reward_model(folder, tried, "float32", "cpu", batch_size)


def by_hand(folder, prompt, answer):
    """One row's score: its text as the judge's template would write it, through the judge's own tokenizer and trunk.

    transformers puts a score on the last token that is not the pad: where turns end with the pad, on the one before.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if isinstance(prompt, str):
        text = f"<s>{prompt}{answer}</s>"
    else:
        text = "<s>" + "".join(f"[{m['role']}] {m['content']}<|eot|>" for m in prompt + answer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        cut = len(ids) - model.config.max_position_embeddings
        ids = ids[:1] + ids[1 + cut :] if cut > 0 else ids  # the BOS stays
        states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        last = -1 if tokenizer.pad_token else -2  # what ends the turn pads too
        return float(states[0, last] @ model.score.weight[0])


def says(text):
    return [{"role": "assistant", "content": text}]


ANSWERS = [
    "Hi!",
    "Four, of course; what else could it be?",
    "",
    "天气很好。",
    "Because\n",
    "c",
    "La <s> la",
    "me " * 40,
]


def test_a_judge_of_another_family_scores_the_policys_text_in_its_own_template(padded_judge, tiny_model):
    policy, judges = (load.load_tokenizer(folder) for folder in (tiny_model, padded_judge))
    assert policy("hi")["input_ids"] != judges("hi", add_special_tokens=False)["input_ids"]
    prompts, completions = [row["prompt"] for row in CHATS], [says(answer) for answer in ANSWERS]
    further = {"completion_ids": [[0]] * 8, "trainer_state": 0}
    found = load_judge(padded_judge)(prompts=prompts, completions=completions, **further)
    hand = [by_hand(padded_judge, *pair) for pair in zip(prompts, completions, strict=True)]
    assert found == pytest.approx(hand, rel=1e-5, abs=1e-5)  # float32, summed over a padded batch
    assert len({round(score, 3) for score in hand}) == 8  # rows that were mixed up would be seen


def test_plain_text_is_judged_without_a_template(judge):
    prompts = [row["prompt"] for row in TEXTS]
    found = load_judge(judge, TEXTS)(prompts=prompts, completions=ANSWERS)
    hand = [by_hand(judge, *pair) for pair in zip(prompts, ANSWERS, strict=True)]
    assert found == pytest.approx(hand, rel=1e-5, abs=1e-5)


def test_a_rows_score_alone_is_its_score_in_a_batch_of_any_size(padded_judge):
    reward = load_judge(padded_judge)
    rows = [reward.tokens(row["prompt"], says(answer)) for row, answer in zip(CHATS, ANSWERS, strict=True)]
    assert len({len(row["input_ids"]) for row in rows}) > 4  # some are padded
    alone = [reward.score([row])[0] for row in rows]
    assert reward.score(rows) == pytest.approx(alone, rel=1e-5, abs=1e-5)
    reward.batch_size = 3
    assert reward.score(rows[::-1]) == pytest.approx(alone[::-1], rel=1e-5, abs=1e-5)


def test_a_text_longer_than_the_judge_holds_keeps_its_bos_and_its_end(tmp_path):
    folder = make_judge(tmp_path / "judge", holds=32)
    reward = load_judge(folder)
    prompt, answer = [{"role": "user", "content": "so long " * 20}], says("The end.")
    ids = reward.tokens(prompt, answer)["input_ids"]
    assert reward.tokenizer.decode(ids) == "<s> so long <|eot|>[assistant] The end.<|eot|>"
    assert len(ids) == 32  # 1 + 9 + 1 + 20 + 1
    assert reward([prompt], [answer])[0] == pytest.approx(by_hand(folder, prompt, answer), rel=1e-5)
    other_begin, other_end = [{"role": "user", "content": "xy" + "so long " * 20}], says("The eng.")
    assert reward([other_begin], [answer]) == reward([prompt], [answer]) != reward([prompt], [other_end])


# ── running it ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded the policy."""


def without_bars(stderr):
    """Its lines but for the bar's and what a run warns of, which tiny models give reason for."""
    lines = stderr.replace("\r", "\n").splitlines()
    bars = re.compile(r"step/s|s/step")
    return [line for line in lines if line.strip() and not bars.search(line) and not line.startswith("warning ")]


@pytest.fixture
def run(tmp_path, tiny_model, capsys):
    """run(flags, ...) types a whole command; (status, stdout, lines of stderr without bars)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(flags, method="RLOO", rows=TEXTS, model=tiny_model, out=tmp_path / "out", mode="lora"):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        words = ["--rlhf_type", method, "--model_name_or_path", model, "--train_data_path", data, "--train_mode", mode]
        status = train_rlhf.main([*words, "--output_dir", str(out), *f"{FAST} {flags}".split()])
        said = capsys.readouterr()
        return status, said.out, without_bars(said.err)

    return run


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...) is the one problem that is said before the policy is loaded, with nothing written."""

    def load_policy(**source):
        raise Loaded

    def refused(*args, **kwargs):
        status, _, lines = run(*args, **kwargs)
        assert (status, len(lines)) == (2, 1), lines
        assert lines[0].startswith("refused: ") and not (tmp_path / "out").exists()
        return lines[0].removeprefix("refused: ")

    monkeypatch.setattr(load, "load_policy", load_policy)
    return refused


@pytest.fixture
def write(tmp_path):
    """write(text) is the name of a file of reward functions that holds it."""

    def write(text):
        (tmp_path / "own.py").write_text(text, encoding="utf-8")
        return str(tmp_path / "own.py")

    return write


def recorded(tmp_path):
    lines = read_rows(tmp_path / "out" / "completions.jsonl")
    assert len(lines) == 8  # two rollouts of four
    return lines


def test_what_the_policy_learns_from_is_what_the_judge_says_of_its_answers(run, judge, tmp_path):
    assert run(f"--reward_model_path {judge}", rows=CHATS)[0] == 0
    lines = recorded(tmp_path)
    hand = [by_hand(judge, line["prompt"], line["completion"]) for line in lines]
    assert [line["rewards"][Path(judge).name] for line in lines] == pytest.approx(hand, rel=1e-4, abs=1e-4)
    assert len(set(hand)) > 4


# ── a LoRA judge on the policy's base ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lora_judge(tiny_model, tmp_path_factory):
    """An adapter that our Reward method trained on the very model that the policy starts from."""
    folder = tmp_path_factory.mktemp("lora") / "preferred"
    words = f"--rlhf_type Reward --model_name_or_path {tiny_model} --train_data_path data/reward.jsonl --max_steps 2 "
    words += f"--output_dir {folder} --learning_rate 2e-2 --dtype float32 --save_strategy no --lora_dropout 0.2"
    words += " --disable_dropout False"
    assert train_rlhf.main(words.split()) == 0
    return str(folder)


@pytest.fixture(scope="module")
def lora_policy(tiny_model, tmp_path_factory):
    """An adapter on the tiny model that goes on being trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("lora") / "policy"
    shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), shape).save_pretrained(folder)
    load.load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method, start", [("RLOO", "base"), ("RLOO", "adapter"), ("PPO", "base")])
def test_a_lora_judge_on_the_policys_base_needs_no_second_base(
    method, start, run, lora_judge, lora_policy, tiny_model, tmp_path, monkeypatch
):
    def load_reward_model(*args):
        raise AssertionError("a second base")

    policy = {"base": tiny_model, "adapter": lora_policy}[start]
    assert models.shares_base(lora_judge, policy, "lora") and not models.shares_base(lora_judge, policy, "full")
    saved = "--save_strategy steps --save_steps 1" + " --num_iterations 1" * (method == "PPO")
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_reward_model", load_reward_model)
        status, out, _ = run(f"--reward_model_path {lora_judge} {saved}", method, CHATS, policy)
    assert status == 0 and "preferred (an adapter on the policy's own base: no second copy)" in out

    lines = recorded(tmp_path)
    whole = load_judge(lora_judge)([line["prompt"] for line in lines], [line["completion"] for line in lines])
    # float32, its LoRA merged or beside the base; the second rollout's policy has moved, and must not be seen
    assert [line["rewards"]["preferred"] for line in lines] == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert len(set(whole)) > 4

    files = list((tmp_path / "out").rglob("*"))
    adapters = [file for file in files if file.name == "adapter_model.safetensors"]
    # the result and two checkpoints, which keep the start of an adapter too, as TRL compares with it
    assert sorted(file.parent.name for file in adapters if file.parent.name != "ref") == [
        "checkpoint-1",
        "checkpoint-2",
        "out",
    ]
    assert not [file for file in files if file.name == "reward"]
    for file in adapters:
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if ".reward." in name or "score" in name]


@pytest.fixture
def stopped(run, lora_judge, tmp_path):
    """(completions, weights) of a run with a LoRA judge, and of one that went on from its first checkpoint."""
    flags = f"--reward_model_path {lora_judge} --save_strategy steps --save_steps 1"
    assert run(flags, rows=CHATS)[0] == 0
    out = tmp_path / "out"
    whole, weights = recorded(tmp_path), load_file(out / "adapter_model.safetensors")
    (out / "run_card.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-2")
    assert run(f"{flags} --resume_from_checkpoint auto", rows=CHATS)[0] == 0
    return whole, weights, read_rows(out / "completions.jsonl"), load_file(out / "adapter_model.safetensors")


def test_a_run_with_a_lora_judge_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(stopped):
    whole, weights, lines, again = stopped
    assert lines[-4:] == whole[-4:]
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_that_goes_on_says_no_answer_twice(stopped):
    whole, _, lines, _ = stopped
    assert lines == whole


def test_a_lora_judge_is_loaded_whole_for_another_policy(run, lora_judge, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    assert not models.shares_base(lora_judge, str(other), "lora")
    status, out, _ = run(f"--reward_model_path {lora_judge}", rows=CHATS, model=str(other))
    assert status == 0 and "no second copy" not in out.partition("rollouts")[0].partition("reward ")[2]
    lines = recorded(tmp_path)
    whole = load_judge(lora_judge)([line["prompt"] for line in lines], [line["completion"] for line in lines])
    assert [line["rewards"]["preferred"] for line in lines] == pytest.approx(whole, rel=1e-4, abs=1e-5)


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
    "no function": ("judge = 3\n", "--reward_funcs FILE:judge: judge is no function"),
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
    assert (status, "result" in out) == (1, False)
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
    assert status == 0 and "columns that the reward functions are given: wanted" in out
    wanted = {row["prompt"]: row["wanted"] for row in rows}
    for line in recorded(tmp_path):
        assert line["rewards"]["judge"] == wanted[line["prompt"]] + len(line["completion"])


TWO = """
def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

def question(prompts, **columns):
    return [float(len(prompt)) if SOMETIMES else None for prompt in prompts]
"""


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
    said = "two rewards are called brevity, which the log would add up. Rename one"
    assert refused(f"{REWARDED} {file}:brevity") == said
    named = Path(judge).rename(Path(judge).with_name("brevity"))
    try:
        assert refused(f"{REWARDED} --reward_model_path {named}") == said
    finally:
        named.rename(judge)


@pytest.mark.parametrize("weights, given", [("1", 1), ("1 2 3", 3)])
def test_each_reward_has_its_weight(weights, given, refused, judge):
    assert refused(f"{REWARDED} --reward_model_path {judge} --reward_weights {weights}") == (
        f"--reward_weights: {given} of them for 2 rewards. Give each its weight"
    )


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────

PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4
DATA_SAYS = "DPO learns from the answers in the data, not from a reward. RLOO, GRPO, PPO take it"


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
        assert (status, lines) == (0, ["note: --kl_coef is called --beta here, and is read as that"])
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


def change(folder, to, change):
    """A copy of a model's folder whose tensors are `change`d."""
    shutil.copytree(folder, to)
    file = next(to.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return to


def without_head(tensors):
    del tensors[next(name for name in tensors if name.endswith("score.weight"))]


def zero_head(tensors):
    tensors[next(name for name in tensors if name.endswith("score.weight"))].zero_()


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
    said = f"--reward_model_path {folder}: the same score 0 for every one of 8"  # two answers to each of four prompts
    assert refused(f"--reward_model_path {folder}", rows=CHATS) == said


def test_a_lora_judge_to_whom_all_is_the_same_ends_the_run_at_its_first_rollout(run, lora_judge, tmp_path):
    folder = change(lora_judge, tmp_path / "judge", zero_head)
    status, _, lines = run(f"--reward_model_path {folder}", rows=CHATS)
    assert status == 1
    assert lines == [f"failed: --reward_model_path {folder}: the same score 0 for every one of 8"]


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


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ODD = [
    "--num_generations 3",
    "--num_generations 9",
    "--num_generations 3 --gradient_accumulation_steps 2",
    "--num_generations 5 --steps_per_generation 3",
    "--num_generations 5 --generation_batch_size 12",
    "--num_generations 3 --num_mini_batches 2",
    "--num_generations 2 --per_device_train_batch_size 1",
    "--num_generations 2 --per_device_train_batch_size 3",
    "--num_generations 1",
]


@pytest.mark.parametrize("flags", ODD)
def test_answers_that_are_no_whole_number_of_prompts_are_refused_with_what_works(flags, refused, run):
    found = refused(f"{REWARDED} {flags} --check", rows=TEXTS * 4)
    assert found.startswith(f"--num_generations {re.search('num_generations (.)', flags)[1]}: ")
    ways = re.findall(r"--\w+ \d+", found.partition("Type ")[2])
    assert ways
    for way in ways:  # a flag given twice is what it is last
        status, _, lines = run(f"{REWARDED} {flags} {way} --check", rows=TEXTS * 4)
        assert (status, lines) == (0, []), way


# flags: what is said
NUMBERS = {
    "--total_episodes 0": "--total_episodes 0: 1 or more",
    "--num_iterations 0": "--num_iterations 0: 1 or more",
    "--num_mini_batches 0": "--num_mini_batches 0: 1 or more",
    "--steps_per_generation 0": "--steps_per_generation 0: 1 or more",
    "--generation_batch_size 0": "--generation_batch_size 0: 1 or more",
    "--num_generations_eval 0": "--num_generations_eval 0: 1 or more",
    "--per_device_train_batch_size 0 --total_episodes 8": "--per_device_train_batch_size 0: 1 or more",
    "--per_device_train_batch_size -1": "--per_device_train_batch_size -1: 1 or more",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0: 1 or more",
    "--beta -1": "--beta -1: 0 or more",
    "--temperature nan": "--temperature nan: answers are sampled, so above 0",
    "--reward_weights nan": "--reward_weights nan: a finite number for each reward",
    "--max_completion_length 0": "--max_completion_length 0: 1 or more",
    "--max_prompt_length 0": "--max_prompt_length 0: 1 or more",
    "--missing_eos_penalty -1": "--missing_eos_penalty -1: it is taken off, so 0 or more",
}


@pytest.mark.parametrize("flags", NUMBERS)
@pytest.mark.parametrize("method", ["RLOO", "GRPO", "PPO"])
def test_a_number_of_which_no_rollout_can_be_made_is_refused(method, flags, refused):
    assert refused(f"{REWARDED} {flags} --check", method).startswith(NUMBERS[flags])


def test_episodes_asked_for_are_said_in_steps(run):
    # 4 answers a rollout: 10 are 3 rollouts, and each is learned from 4 times in 2 mini-batches of half the rows
    flags = f"{REWARDED} --total_episodes 10 --num_iterations 4 --num_mini_batches 2 --per_device_train_batch_size 2"
    status, out, _ = run(f"{flags} --check", "PPO")
    assert (
        status == 0
        and "--total_episodes 10 is --max_steps 24 here: steps of 2 answers, each answer used 4 times" in out
    )


def test_what_works_works_for_as_many_processes_as_are_asked_for(refused, run, monkeypatch):
    monkeypatch.setenv("LAUNCH_PROCESSES", "3")
    found = refused(f"{REWARDED} --num_generations 5 --check", rows=TEXTS * 4)
    assert "a rollout has 12 answers" in found  # 4 a device x 3
    ways = re.findall(r"--\w+ \d+", found.partition("Type ")[2])
    assert len(ways) == 2
    for way in ways:
        assert run(f"{REWARDED} --num_generations 5 {way} --check", rows=TEXTS * 4)[0] == 0, way


def test_prompts_that_leave_the_model_no_room_are_counted(run, write, tmp_path):
    # the tiny model holds 2048 tokens, a byte each; 8 are for the answer
    fits, long = {"prompt": "x" * 2040}, {"prompt": "x" * 2041}
    status, out, lines = run(f"{REWARDED} --check", rows=[*TEXTS, fits])
    assert (status, lines) == (0, []) and "9 rows to train on, none held out" in out and "refused: none" in out
    status, out, lines = run(f"--reward_funcs {write(TWO)}:length --max_drop_fraction 0.5", rows=[*TEXTS, fits, long])
    assert status == 0 and "9 rows to train on" in out and "refused: 1 prompt longer than max_prompt_length" in out
    card = json.loads((tmp_path / "out" / "run_card.json").read_text(encoding="utf-8"))
    assert (card["dropped_rows"], card["train_rows"]) == ({"prompt longer than max_prompt_length": 1}, 9)
    dropped = read_rows(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) == 1 and f"{tmp_path}/rows.jsonl:10" in json.dumps(dropped)


def test_a_limit_on_prompts_is_kept(run):
    # "Q: " + asked + "\nA:" is asked + 6 bytes: only "Why?" and "Sing!" have 11 or less
    status, out, _ = run(f"{REWARDED} --max_prompt_length 11 --max_drop_fraction 0.9 --check", rows=TEXTS)
    assert status == 0 and "2 rows to train on" in out and "6 prompt longer than max_prompt_length" in out


def test_fewer_prompts_than_a_rollout_are_refused(refused, run):
    flags = f"{REWARDED} --per_device_train_batch_size 8 --num_generations 2 --check"
    assert refused(flags, rows=TEXTS[:3]) == (
        "3 prompts, and a rollout takes 4 (8 answers, 2 each). Give more prompts, or type "
        "--per_device_train_batch_size, --gradient_accumulation_steps or NUM_PROCESSES smaller"
    )
    assert run(flags, rows=TEXTS[:4])[0] == 0


def test_an_answer_longer_than_the_model_is_refused(refused):
    assert refused(f"{REWARDED} --max_completion_length 2048 --check") == (
        "--max_completion_length 2048: the model holds 2048 tokens, prompt and answer. "
        "Type --max_completion_length 1024"
    )


def test_vllm_that_is_not_there_is_refused(refused, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    assert refused(f"{REWARDED} --use_vllm --check") == (
        "--use_vllm: vLLM is not installed. Type pip install -r requirements-vllm.txt, or leave the flag out"
    )


# ── python -m utils.score_reward_model ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def score(tmp_path, capsys):
    """score(model, pairs) types the command; (status, stdout, stderr, reward_model.json or None)."""

    def score(model, pairs):
        words = [model, write_rows(tmp_path / "pairs.jsonl", pairs), "--output_dir", str(tmp_path / "score")]
        capsys.readouterr()
        status = score_reward_model.main(words)
        file = tmp_path / "score" / "reward_model.json"
        said = capsys.readouterr()
        return status, said.out, said.err, json.loads(file.read_text()) if file.exists() else None

    return score


def pair(asked, chosen, rejected):
    return {"prompt": [{"role": "user", "content": asked}], "chosen": says(chosen), "rejected": says(rejected)}


def test_held_out_pairs_measure_a_judge(score, judge, tmp_path):
    pairs = [pair(asked, "x" * (3 + number), "yes" * 3) for number, asked in enumerate(ASKED)]  # 3 to 10 against 9
    pairs.append(pair("Dropped?", "same", "same"))
    status, out, _, found = score(judge, pairs)
    assert status == 0 and "1 chosen equals rejected" in out and (tmp_path / "score" / "reward_model.png").exists()
    margins, scores, lengths = [], [], []
    for row in pairs[:8]:
        sides = [by_hand(judge, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        margins.append(sides[0] - sides[1])
        scores += sides
        lengths += [len(row[side][0]["content"]) for side in ("chosen", "rejected")]  # a byte is a token
    assert found["pairs"] == 8 and found["dropped_rows"] == {"chosen equals rejected": 1}
    assert found["accuracy"] == sum(margin > 0 for margin in margins) / 8
    assert found["mean_margin"] == pytest.approx(sum(margins) / 8, rel=1e-4)
    assert found["longer_wins_accuracy"] == (1 + 0.5) / 8  # 10 against 9 is right, 9 against 9 a tie
    pearson = torch.corrcoef(torch.tensor([scores, lengths]))[0, 1]
    assert found["score_length_correlation"] == pytest.approx(float(pearson), rel=1e-3)


def test_what_cannot_be_measured_is_refused_and_nothing_is_written(score, tiny_model, judge, tmp_path):
    pairs = [pair("Hi?", "Hi", "No")] * 2
    status, out, err, _ = score(tiny_model, [*pairs, {"prompt": "p"}])
    assert (status, out) == (2, "") and [line.partition(":")[0] for line in err.splitlines()] == ["refused"] * 2
    assert f"MODEL {tiny_model}: a language model" in err and 'pairs.jsonl:3: no "chosen"' in err
    zero = change(judge, tmp_path / "zero", zero_head)
    status, out, err, _ = score(str(zero), pairs)
    assert (status, out, err) == (2, "", f"refused: MODEL {zero}: the same score 0 for every one of 4\n")
    status, _, err, _ = score(judge, [])
    assert status == 2 and len(err.splitlines()) == 1
    assert not (tmp_path / "score").exists()
    (tmp_path / "score").write_text("")
    status, _, err, _ = score(judge, pairs)
    assert status == 2 and err.startswith(f"refused: --output_dir {tmp_path}/score: nothing can be written in ")
