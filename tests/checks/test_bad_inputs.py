"""What people get wrong, each with what has to be named: `pytest tests/checks/test_bad_inputs.py`.

Every case is typed twice, as a training and with --check: status 2, the flag or the file:line in the message, no
traceback, nothing written. tests/checks/test_refused_*.py have the messages word by word.
"""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import train_gkd
import train_rlhf
from tests.conftest import ROOT, make_model, make_tokenizer
from utils.models import load as models_load
from utils.rewards import models

SCRIPTS = {"rlhf": train_rlhf, "gkd": train_gkd}
MESSAGES = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
PAIR = {"prompt": "Say hi.", "chosen": " Hi there.", "rejected": " No."}
GOOD = {
    "DPO": PAIR,
    "Reward": PAIR,
    "KTO": {"prompt": "Say hi.", "completion": " Hi.", "label": True},
    "SFT": {"messages": MESSAGES},
    "GKD": {"messages": MESSAGES},
    "RLOO": {"prompt": "Say hi."},
}
SAMPLE = {"CPO": "DPO", "SimPO": "DPO", "CPOSimPO": "DPO", "ORPO": "DPO", "GRPO": "RLOO", "PPO": "RLOO"}
REWARD = {name: "--reward_funcs data/rewards.py:brevity" for name in ("RLOO", "GRPO", "PPO")}


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded a model."""


@dataclass
class Bad:
    """A sound command but for `flags`, the rows after the first, the files beside them, what is done to the model."""

    flags: str = ""
    named: str | list = ""  # all that the message has; DIR stands for the folder of the case
    method: str = "DPO"
    rows: list = field(default_factory=list)  # dicts, or lines as they stand
    files: dict = field(default_factory=dict)  # {name: content}
    data: str = "DIR/rows.jsonl"
    model: object = None  # (folder) -> None, done to a copy of the tiny model
    env: dict = field(default_factory=dict)

    def takes_reward(self):
        return not any(flag in f"{self.flags} {self.named}" for flag in ("--reward_funcs", "--reward_model_path"))


def cut(folder, by=1):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-by])


def change(name, **changed):
    def do(folder):
        described = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**described, **changed}))

    return do


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def drop(name):
    return lambda folder: (folder / name).unlink()


def name_a_shard(folder):
    index = {"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_token(folder):
    tokenizer = models_load.load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def be_of_prompts(folder):
    base = shutil.copytree(folder, folder.parent / "base")
    described = {"base_model_name_or_path": str(base), "peft_type": "PROMPT_TUNING"}
    (folder / "adapter_config.json").write_text(json.dumps(described))


def be_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def be_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


ROW = "DIR/rows.jsonl:2: "
LAST = "DIR/rows.jsonl:"
CASES = {
    # ── data ──
    "a line that is cut": Bad(rows=['{"prompt": "Say'], named=ROW),
    "a trailing comma": Bad(rows=[json.dumps(PAIR) + ","], named=ROW),
    "a merge conflict": Bad(rows=["<<<<<<< HEAD"], named=ROW),
    "a pair whose answers are lists of text": Bad(rows=[PAIR | {"chosen": ["Hi"]}], named=[ROW, '"chosen"']),
    "columns with capitals": Bad(rows=[{"Prompt": "a", "Chosen": "b", "Rejected": "c"}], named=[ROW, '"Prompt"']),
    "columns of Alpaca": Bad("", [ROW, "instruction"], "SFT", rows=[{"instruction": "a", "input": "", "output": "b"}]),
    "columns of ShareGPT": Bad("", [ROW, "conversations"], "GKD", rows=[{"conversations": []}]),
    "an empty dialogue": Bad("--max_drop_fraction 0", [LAST, "empty answer"], "SFT", rows=[{"messages": []}]),
    "a dialogue of the user alone": Bad("--max_drop_fraction 0", LAST, "SFT", rows=[{"messages": MESSAGES[:1]}]),
    "a dialogue as plain text for GKD": Bad("", [ROW, '"messages"'], "GKD", rows=[{"messages": "Say hi. Hi."}]),
    "a role of another framework": Bad(
        "", [ROW, "'bot'"], "SFT", rows=[{"messages": [{"role": "bot", "content": ""}]}]
    ),
    "a message without content": Bad("", [ROW, '"content"'], "SFT", rows=[{"messages": [{"role": "user"}]}]),
    "an image in a message": Bad(
        "", [ROW, "a list"], "SFT", rows=[{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]
    ),
    "a label that is a share": Bad("", [ROW, '"label"'], "KTO", rows=[GOOD["KTO"] | {"label": 0.7}]),
    "a label that is null": Bad("", [ROW, '"label" is null'], "KTO", rows=[GOOD["KTO"] | {"label": None}]),
    "pairs for RLOO that have no prompt to split off": Bad("", ROW, "RLOO", rows=[{"answer": 3}]),
    "a column that TRL needs for itself": Bad(
        "", [LAST, '"completions"'], "GRPO", rows=[{"prompt": "a", "completions": "b"}]
    ),
    "a column of two types": Bad(
        "", [LAST, '"answer"'], "PPO", rows=[{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "2"}]
    ),
    "a margin on some rows": Bad("", ["DIR/rows.jsonl:1", '"margin"'], "Reward", rows=[PAIR | {"margin": 1}]),
    "chats among plain text": Bad(
        rows=[{"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]}], named=ROW.rstrip(": ")
    ),
    "a prompt that no length is left for": Bad(
        "--max_length 20", [LAST, "--max_length"], rows=[PAIR | {"prompt": "a" * 40}]
    ),
    "a prompt of more than max_prompt_length": Bad(
        "--max_prompt_length 8", [LAST, "max_prompt_length"], "PPO", rows=[{"prompt": "a" * 40}]
    ),
    "a file in a folder that is not there": Bad(
        data="DIR/gone/rows.jsonl", named="--train_data_path DIR/gone/rows.jsonl"
    ),
    "an ending in capitals of another kind": Bad(
        data="DIR/rows.TSV", files={"rows.TSV": "a\tb"}, named="DIR/rows.TSV"
    ),
    "an archive": Bad(data="DIR/rows.zip", files={"rows.zip": "PK"}, named="DIR/rows.zip"),
    "a csv that is separated by tabs": Bad(
        data="DIR/a.csv", files={"a.csv": "prompt\tchosen\trejected\na\tb\tc\n"}, named="DIR/a.csv:2"
    ),
    "a json that ends too soon": Bad(data="DIR/a.json", files={"a.json": '[{"prompt": "a"},\n'}, named="DIR/a.json:"),
    "a web page": Bad(data="DIR/a.jsonl", files={"a.jsonl": "<!DOCTYPE html>\n<html>\n"}, named="DIR/a.jsonl:1"),
    "a Git LFS pointer": Bad(
        data="DIR/a.jsonl", files={"a.jsonl": "version https://git-lfs.github.com/spec/v1\n"}, named="DIR/a.jsonl:1"
    ),
    "held-out data of other columns": Bad(
        "--eval_data_path DIR/held.jsonl", "DIR/held.jsonl:1", files={"held.jsonl": '{"text": "a"}\n'}
    ),
    "held-out rows of one row": Bad("--eval_fraction 0.5 --max_samples 1", "--eval_fraction 0.5"),
    # ── flags ──
    "a flag of a neighbour": Bad("--load_in_8bit", "--load_in_8bit"),
    "a flag with a space in its value": Bad("--lora_target_modules q_proj --seed a b", "--seed"),
    "a share as max_samples": Bad("--max_samples 0.5", "--max_samples"),
    "a dropout of more than 1": Bad("--lora_dropout 5", "--lora_dropout 5"),
    "a rate that is no number": Bad("--learning_rate nan", "--learning_rate nan"),
    "a rate of nothing": Bad("--learning_rate 0", "--learning_rate 0"),
    "no epochs": Bad("--num_train_epochs -1", "--num_train_epochs -1"),
    "a batch of less than one": Bad("--per_device_train_batch_size -2", "--per_device_train_batch_size -2"),
    "every row dropped from the batch": Bad(
        "--per_device_train_batch_size 64 --dataloader_drop_last", "--dataloader_drop_last"
    ),
    "a loss of another method": Bad("--loss_type simpo", "--loss_type simpo"),
    "a mode that is none": Bad("--train_mode peft", "--train_mode"),
    "an engine by its flag": Bad("--fsdp full_shard", "--fsdp"),
    "a model by its keyword arguments": Bad("""--model_init_kwargs {"a":1}""", "--model_init_kwargs"),
    "a checkpoint that is not there": Bad(
        "--resume_from_checkpoint DIR/out/checkpoint-9", "--resume_from_checkpoint DIR/out"
    ),
    "a reward for DPO": Bad("--reward_model_path DIR/model", "--reward_model_path"),
    "the reference's values of several processes": Bad(
        "--precompute_ref_log_probs", "--precompute_ref_log_probs", env={"LAUNCH_PROCESSES": "2"}
    ),
    "DoRA in pieces": Bad("--use_dora --train_mode qlora", "--use_dora", env={"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    "no reward for PPO": Bad("", "--reward_funcs", "PPO"),
    "a temperature of 0": Bad("--temperature 0", "--temperature 0", "RLOO"),
    "a KL below 0": Bad("--beta -1", "--beta -1", "GRPO"),
    "weights of rewards that are not there": Bad("--reward_weights 1 2", "--reward_weights", "GRPO"),
    "an answer longer than the model": Bad("--max_completion_length 9999", "--max_completion_length 9999", "GRPO"),
    "a group of one": Bad("--num_generations 1", "num_generations", "GRPO"),
    "prompts that do not fill a rollout": Bad(
        "--per_device_train_batch_size 64", "--per_device_train_batch_size", "RLOO"
    ),
    "a critic that is not there": Bad("--train_mode full --value_model_path DIR/gone", "--value_model_path", "PPO"),
    "a reward function that is not there": Bad("--reward_funcs data/rewards.py:brevty", "--reward_funcs", "PPO"),
    "a reward function with a typo": Bad(
        "--reward_funcs DIR/judge.py:judge",
        "DIR/judge.py:1",
        "PPO",
        files={"judge.py": "def judge(completions, **_:\n"},
    ),
    "a reward function that cannot be imported": Bad(
        "--reward_funcs DIR/judge.py:judge",
        ["--reward_funcs", "gone"],
        "RLOO",
        rows=[GOOD["RLOO"]] * 3,
        files={"judge.py": "import gone\n\n\ndef judge(**_):\n    return []\n"},
    ),
    "no teacher": Bad("--teacher_model_name_or_path", "--teacher_model_name_or_path", "GKD"),
    "the student as its teacher": Bad("--teacher_model_name_or_path DIR/model", "--teacher_model_name_or_path", "GKD"),
    "a share of the student's own above 1": Bad("--lmbda 1.5", "lmbda", "GKD"),
    "SeqKD of no step": Bad("--seq_kd True --lmbda 1", "--seq_kd", "GKD"),
    "prompts alone where answers are learnt from": Bad("--lmbda 0", ROW, "GKD", rows=[{"prompt": MESSAGES[:1]}]),
    "a recipe with a tab": Bad("--config DIR/a.yaml", "DIR/a.yaml:2", files={"a.yaml": "seed: 1\n\tbeta: 2\n"}),
    # ── models ──
    "an empty folder as a model": Bad(named="--model_name_or_path DIR/model", model=be_empty),
    "a file as a model": Bad(named="--model_name_or_path DIR/model", model=be_a_file),
    "weights that are cut": Bad(named="DIR/model/model.safetensors", model=cut),
    "weights that are cut in their header": Bad(
        named="DIR/model/model.safetensors", model=lambda at: cut(at, 330_000)
    ),
    "a header that is none": Bad(
        named="DIR/model/model.safetensors",
        model=lambda at: (at / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"not JSON!"),
    ),
    "a shard that is missing": Bad(named="DIR/model/model.safetensors.index.json", model=name_a_shard),
    "an index that is broken": Bad(
        named="DIR/model/model.safetensors.index.json",
        model=write("model.safetensors.index.json", '{"weight_map": 3}'),
    ),
    "a tokenizer that is broken": Bad(named="--model_name_or_path DIR/model", model=write("tokenizer.json", "{}")),
    "a config of another size": Bad(named="vocab_size 99,", model=change("config.json", vocab_size=99)),
    "a token without an embedding": Bad(
        named="token 261 ('<new>')", model=add_token, rows=[PAIR | {"prompt": "<new>"}]
    ),
    "a model in 8 bits": Bad(
        named="DIR/model: ", model=change("config.json", quantization_config={"quant_method": "bnb"})
    ),
    "a language model as a reward": Bad("--reward_model_path DIR/model", "--reward_model_path DIR/model", "PPO"),
    "an adapter of prompts": Bad(named="DIR/model: ", model=be_of_prompts),
    "chats without a template": Bad("", "chat_template.jinja", "SFT", model=drop("chat_template.jinja")),
    "a template that refuses the data": Bad(
        "",
        "DIR/rows.jsonl:1",
        "SFT",
        rows=[{"messages": [{"role": "system", "content": "a"}, *MESSAGES]}],
        model=write(
            "chat_template.jinja",
            "{% for m in messages %}{{ m.content }}{% if m.role == 'system' or m.content == 'Say hi.' %}"
            "{{ raise_exception('no') }}{% endif %}<|im_end|>{% endfor %}",
        ),
    ),
    # ── the output folder ──
    "an output folder with other files": Bad("--output_dir DIR/model", "--output_dir DIR/model"),
    "an output folder that is the model's": Bad(
        "--output_dir DIR/model --overwrite_output_dir", "--output_dir DIR/model", model=write("thesis.tex", "")
    ),
    "a run that would delete its own data": Bad(
        "--output_dir DIR/done --overwrite_output_dir --train_data_path DIR/done/rows.jsonl",
        "--overwrite_output_dir",
        files={"done/run_card.json": "{}", "done/rows.jsonl": json.dumps(PAIR) + "\n"},
    ),
    # ── several ──
    "flags and rows": Bad("--lora_rank 0 --eval_fraction 2", ["--lora_rank 0", "--eval_fraction 2", ROW], rows=["{"]),
    "a model, rows and held-out rows": Bad(
        "--eval_data_path DIR/gone.jsonl",
        ["DIR/model: ", ROW, "--eval_data_path DIR/gone"],
        rows=["{"],
        model=drop("tokenizer.json"),
    ),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("teacher"), make_tokenizer(), seed=1)


@pytest.fixture
def type_it(tmp_path, tiny_model, teacher, monkeypatch, capsys):
    """type_it(case, further words) is (status, stdout, stderr) of the case's command; DIR as in the case."""

    def load(*args, **kwargs):
        raise Loaded

    for module, name in ((models_load, "load_policy"), (models_load, "load_model"), (models, "load_reward")):
        monkeypatch.setattr(module, name, load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)

    def type_it(case, *further):
        for name, value in case.env.items():
            monkeypatch.setenv(name, value)
        words = words_of(case, tmp_path, tiny_model, teacher)
        status = SCRIPTS["gkd" if case.method == "GKD" else "rlhf"].main([*words, *further])
        said = capsys.readouterr()
        return status, said.out, said.err

    return type_it


def words_of(case, folder, tiny_model, teacher):
    """Writes a case's files into the folder, and returns its command line."""
    if not (folder / "model").exists():
        good = GOOD[SAMPLE.get(case.method, case.method)]
        lines = [row if isinstance(row, str) else json.dumps(row) for row in (good, *case.rows)]
        (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
        for name, content in case.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
        shutil.copytree(tiny_model, folder / "model")
        if case.model:
            case.model(folder / "model")
    words = [] if case.method == "GKD" else ["--rlhf_type", case.method]
    words += ["--model_name_or_path", "DIR/model", "--output_dir", "DIR/out"]
    words += ["--train_data_path", case.data] if case.data else []
    words += ["--teacher_model_name_or_path", teacher] if case.method == "GKD" else []
    words += REWARD.get(case.method, "").split() if case.takes_reward() else []
    return [word.replace("DIR", str(folder)) for word in [*words, *case.flags.split()]]


def listing(folder):
    return {
        file: file.stat().st_mtime_ns for file in folder.rglob("*") if "cache" not in file.relative_to(folder).parts
    }


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_refused_and_named(name, type_it, tmp_path, tiny_model, teacher):
    case = CASES[name]
    words_of(case, tmp_path, tiny_model, teacher)
    before, started = listing(tmp_path), time.monotonic()
    for further in ((), ("--check",)):
        status, _, err = type_it(case, *further)
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert status == 2, err
        assert lines and all(line.startswith("refused: ") for line in lines), err
        for part in [case.named] if isinstance(case.named, str) else case.named:
            assert part and part.replace("DIR", str(tmp_path)) in err, err
        assert len(lines) == len(set(lines)), lines
        assert listing(tmp_path) == before
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("method", [*GOOD, *SAMPLE])
def test_the_commands_of_these_tests_are_sound_but_for_what_each_adds(method, type_it):
    rows = [GOOD["KTO"] | {"label": False}] if method == "KTO" else [GOOD[SAMPLE.get(method, method)]] * 7
    status, out, err = type_it(Bad(method=method, rows=rows), "--check")
    assert (status, err) == (0, "") and "nothing stands in the way" in out


def test_there_are_enough_of_them():
    assert len(CASES) >= 60 and len({repr(case) for case in CASES.values()}) == len(CASES)


# ── the commands themselves ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("script, flags", [("rlhf_run.sh", ""), ("rlhf_run.sh", "--check"), ("gkd_run.sh", "--check")])
def test_the_run_scripts_pass_refusals_on(script, flags, warm, tiny_model, teacher, tmp_path):
    cut(Path(shutil.copytree(tiny_model, tmp_path / "model")))
    env = {"MODEL": str(tmp_path / "model"), "TEACHER": teacher, "OUTPUT_DIR": str(tmp_path / "out"), "PYTHON": warm}
    words = ["bash", script, "--learning_rate", "0", *flags.split()]
    kwargs = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **env}, **kwargs)
    assert done.returncode == 2
    assert bool(done.stdout) == bool(flags)  # with --check, what else is found of the rows is told beside the refusals
    found = done.stderr.splitlines()
    assert [line.split(":")[1] for line in found] == [" --learning_rate 0", f" {tmp_path}/model/model.safetensors"]
    assert not (tmp_path / "out").exists()
