"""What the tests of this room share."""

import shutil
from pathlib import Path

import pytest

import train_rlhf
from rlhf_args.methods import METHODS as TABLE
from tests.conftest import write_rows
from utils.models import load

GOOD = {"prompt": "Say hi. ", "chosen": "Hi there.", "rejected": "No."}


CHAT = {
    "prompt": [{"role": "user", "content": "Say hi."}],
    "chosen": [{"role": "assistant", "content": "Hi there."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


PAIRS = "Accepted: prompt, chosen, rejected or chosen, rejected, as in data/preference.jsonl"


class Loaded(Exception):
    """Nothing stood in the way: the next step would have loaded a model."""


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch, capsys):
    """run(flags, ...) types a whole, sound command but for `flags`; (status, stdout, lines of stderr)."""

    def load_policy(**source):
        raise Loaded

    def run(flags="", method="DPO", data=None, model=tiny_model, out=tmp_path / "out"):
        data = data or write_rows(tmp_path / "good.jsonl", [GOOD] * 4)
        words = ["--rlhf_type", method, "--output_dir", str(out)]
        words += ["--model_name_or_path", str(model)] if model else []
        words += ["--train_data_path", *([data] if isinstance(data, str) else data)] if data != "none" else []
        before = listing(out)
        status = train_rlhf.main(words + (flags if isinstance(flags, list) else flags.split()))
        said = capsys.readouterr()
        assert listing(out) == before
        return status, said.out, said.err.splitlines()

    monkeypatch.setattr(load, "load_policy", load_policy)
    return run


@pytest.fixture
def refused(run):
    """refused(flags, ...) is the list of problems, and fails where nothing is refused or anything else is said."""

    def refused(*args, **kwargs):
        status, out, lines = run(*args, **kwargs)
        assert (status, out) == (2, "")
        assert lines and all(line.startswith("refused: ") for line in lines), lines
        return [line.removeprefix("refused: ") for line in lines]

    return refused


def listing(folder):
    return sorted((str(file), file.stat().st_mtime_ns) for file in [folder, *folder.rglob("*")] if file.exists())


METHODS = ", ".join(TABLE)


FORM = 'Must be a string or a list of {"role", "content"}'


MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_folder(folder, source, without, written):
    folder.mkdir()
    for name in set(MODEL_FILES) - set(without):
        shutil.copy(Path(source) / name, folder)
    for name, content in written.items():
        (folder / name).write_text(content)
    return folder
