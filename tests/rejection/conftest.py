"""What the tests of this room share."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import rejection_sampling
from tests.conftest import write_rows
from utils.models import load as models_load, sampling
from utils.rejection import rounds
from utils.results import plots


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """sample(prompts, seeds, ...) of a tiny Qwen2, in float32."""
    tokenizer = models_load.load_tokenizer(tiny_model)
    model = models_load.load_model(tiny_model, "CAUSAL_LM", "float32", tokenizer=tokenizer, seed=0).eval()

    def sample(prompts, seeds, **how):
        return sampling.sample(model, tokenizer, prompts, sampling.Sampling(**{"max_new_tokens": 16, **how}), seeds)

    return sample


NAMES = ("SFT", "DPO", "KTO", "Reward")  # of the files


def says(text):
    return [{"role": "assistant", "content": text}]


def trace(sample, score):
    return {"sample": sample, "score": score, "scores": {"length": score}}


def line(prompt, sample, **more):
    return {"prompt": prompt, "sample": sample, **(more or {"completion": f"{prompt}.{sample}\u2028é"})}


def read(file):
    """Rows of a file whose texts may hold any line separator but \\n."""
    return [json.loads(one) for one in Path(file).read_text(encoding="utf-8").split("\n")[:-1]]


QUESTIONS = ["Say hi.", "What is 2 + 2?", "Name a colour.", "Why?", "Sing!", "Who?", "Spell cat.", "Tell me a tale."]


CHATS = [{"prompt": [{"role": "user", "content": asked}]} for asked in QUESTIONS]


TEXTS = [{"prompt": f"Q: {asked} A: "} for asked in QUESTIONS]


ALL = "SFT,DPO,KTO,Reward"


FAST = f"--num_completions 4 --max_new_tokens 12 --keep_cut True --write {ALL}"  # a random model hardly ever ends


REWARD = '''"""How much the answers' characters add up to, up to 10."""


def total(completions, **columns):
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [float(sum(map(ord, text)) % 11) for text in texts]
'''


class Loaded(Exception):
    """Nothing stood in the way: a model would be loaded."""


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(plots, "draw_rewards", lambda *args: None)


@pytest.fixture
def run(tmp_path, tiny_model, capsys, no_picture):
    """run(flags, ...) types a whole command; (status, lines of stdout, lines of stderr without bars)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(flags="", rows=CHATS, model=tiny_model, out=tmp_path / "out", reward="total", fast=FAST):
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        words = f"--model_name_or_path {model} --train_data_path {path} --output_dir {out} {fast} {flags} "
        if reward:
            if not (tmp_path / "reward.py").exists():
                (tmp_path / "reward.py").write_text(REWARD)
            words += f"--reward_funcs {tmp_path / 'reward.py'}:{reward}"
        capsys.readouterr()
        status = rejection_sampling.main(shlex.split(words))
        said = capsys.readouterr()
        run.err = said.err
        lines = re.sub(r"\r?(generate|score): [^]]*\]", "", said.err).splitlines()
        return status, said.out.splitlines(), [line for line in lines if line.strip()]

    return run


def files_in(folder):
    """{name: bytes} of all below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stamps(folder):
    return {str(file): file.stat().st_mtime_ns for file in [folder, *folder.rglob("*")] if file.exists()}


def line_with(lines, start):
    (found,) = (one for one in lines if one.startswith(start))
    return found


@pytest.fixture
def done(run, tmp_path):
    assert run("--max_samples 3")[0] == 0
    return tmp_path / "out"


@pytest.fixture
def parts(monkeypatch, tiny_model):
    """What the rounds started, [words]; samplings run in this process, and a training copies the model."""
    started = []

    def start(part, what):
        (program, *words), env = part
        if program == "bash":
            started.append([env["RLHF_TYPE"], env["MODEL"], env["TRAIN_DATA"], *words])
            shutil.copytree(tiny_model, env["OUTPUT_DIR"])
            (Path(env["OUTPUT_DIR"]) / "run_card.json").write_text("{}")
        else:
            started.append(words[2:])
            assert rejection_sampling.main(words[3:]) == 0

    monkeypatch.setattr(rounds, "run_part", start)
    monkeypatch.setattr(rounds, "check_training", lambda *args: None)
    return started
