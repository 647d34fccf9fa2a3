"""What the tests of this room share."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import train_gkd
from tests.conftest import make_tokenizer, write_rows
from utils.models import load as models_load
from utils.training import chapters


def make_qwen(seed, vocabulary=264, hidden=16, sharp=10):
    """A Qwen2 in memory, whose head is `sharp` times that of a new one: a distribution, where that has hardly any."""
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    positions = {"num_key_value_heads": 1, "max_position_embeddings": 2048}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, eos_token_id=1, bos_token_id=None, **shape, **positions)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


def save_qwen(folder, model):
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    models_load.load_tokenizer(folder).save_pretrained(
        folder
    )  # with <|endoftext|>, which transformers adds to a Qwen2's
    return str(folder)


def answers_logits(model, rows):
    """Logits at each place of each answer, row by row and so without padding: (N, V)."""
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        found.append(model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1])
    return torch.cat(found)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(folder of a student, folder of a teacher that is surer of itself)."""
    folder = tmp_path_factory.mktemp("pair")
    return save_qwen(folder / "student", make_qwen(1, hidden=32)), save_qwen(
        folder / "teacher", make_qwen(2, hidden=32, sharp=40)
    )


def says(asked, answer=None):
    messages = [{"role": "user", "content": asked}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer else [])}


CHATS = [says(f"Say {n}.", f"{n} it is.") for n in range(6)]


FAST = "--dtype float32 --train_mode full --save_strategy no --logging_steps 1 --max_completion_length 8"


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded a model."""


@pytest.fixture
def run(tmp_path, pair, capsys):
    """run(flags, ...) types a whole command; (status, lines of stdout, lines of stderr without bars)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(flags="", rows=CHATS, model=pair[0], teacher=pair[1], out=tmp_path / "out"):
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        words = f"--model_name_or_path {model} --train_data_path {path} --output_dir {out} "
        words += f"--answers_dir {tmp_path / 'answers'} {FAST} "
        words += f"--teacher_model_name_or_path {teacher} " if teacher else ""
        capsys.readouterr()
        status = train_gkd.main(f"{words} {flags}".split())
        said = capsys.readouterr()
        lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.strip()]
        bars = ("step/s", "prompt/s", "warning   step ")
        return status, said.out.splitlines(), [line for line in lines if not any(bar in line for bar in bars)]

    return run


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...) is the list of problems, said before a model is loaded and with nothing written."""

    def load(*args, **kwargs):
        raise Loaded

    def refused(*args, **kwargs):
        status, out, lines = run(*args, **kwargs)
        assert (status, out) == (2, [])
        assert lines and all(line.startswith("refused: ") for line in lines), lines
        assert not (tmp_path / "out").exists() and not (tmp_path / "answers").exists()
        return [line.removeprefix("refused: ") for line in lines]

    monkeypatch.setattr(models_load, "load_model", load)
    return refused


def line_with(lines, begin):
    (line,) = [line for line in lines if line.startswith(begin)]
    return line


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the commands of a test made."""
    made, make = [], chapters.make_trainer

    def keep(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(chapters, "make_trainer", keep)
    return made
