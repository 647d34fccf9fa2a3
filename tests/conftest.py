"""Tiny models made offline, and one way to run the commands a user types. `pytest` runs all but the slow part."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrix.cells import Outcome, width
from tests.matrix.page import write_page
from tests.matrix.warm_python import warm_python
from utils.results import proof

MATRIX = {}  # (method, mode, launch) -> Outcome
ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # two threads on a tiny model wait for each other
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what needs a GPU is not tested here

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=TEMPLATE, bos=None, pad="<|im_end|>"):
    """A byte-level tokenizer that never saw a file; pad = eos = end of turn, as SmolLM2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<pad>", "<s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<|im_end|>", pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, tokenizer=None, seed=0, width=64, layers=2):
    """A Qwen2 of 0.1M parameters with its tokenizer in `folder`; `width` is that of its MLP."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model_for(tmp_path_factory):
    """A tiny model, as wide as a cell of the matrix needs it, with a teacher for it beside it."""

    @functools.cache
    def make(wide):
        layers = 2 if wide == 64 else 1  # a CPU multiplies bfloat16 at a fiftieth of its speed
        folder = tmp_path_factory.mktemp(f"width-{wide}")
        make_model(folder / "teacher", seed=1, width=wide, layers=layers)
        return make_model(folder / "model", width=wide, layers=layers)

    return lambda mode, launch: make(width(mode, launch))


@pytest.fixture(autouse=True)
def reopened_here(request, monkeypatch):
    """A run within a test has its result reopened in the test's process, which takes a tenth of the time.

    In a process of its own in tests/results/test_verify.py, and in whatever runs the command.
    """
    if request.module.__name__ != "tests.results.test_verify":
        monkeypatch.setattr(proof, "verify_in_fresh_process", proof.verify)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A Python to give to the run scripts as PYTHON, whose libraries are imported already."""
    with warm_python(tmp_path_factory.mktemp("warm")) as path:
        yield path


def pytest_runtest_logreport(report):
    """Collects what the cells of the matrix came to, of all workers."""
    cell = dict(report.user_properties).get("cell") if report.when == "call" else None
    if cell:
        MATRIX[tuple(cell[:3])] = Outcome(*cell[3:])


def pytest_sessionfinish(session):
    if MATRIX and not hasattr(session.config, "workerinput"):
        page = ROOT / "docs" / "matrix.md"
        page.parent.mkdir(exist_ok=True)
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        page.write_text(write_page(MATRIX, before), encoding="utf-8")


def command(*words, env=None, timeout=900):
    """Run `python ...` in the project's folder as a user does; the finished process, output as text."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def undocumented(name, folder):
    """Metrics in `folder`'s metrics.jsonl and eval.jsonl without a row in the method's page in docs/methods/.

    The page names a metric in backticks, one of eval.jsonl with or without its `eval_`; a reward's own name is NAME.
    """
    page = (ROOT / "docs" / "methods" / f"{name.lower()}.md").read_text(encoding="utf-8")
    ticked = set(re.findall("`[^`]+`", page))
    logged = {key for file in ("metrics.jsonl", "eval.jsonl") for line in read_rows(folder / file) for key in line}
    assert {"loss", "eval_loss"} <= logged
    names = {key: re.sub("rewards/[^/]+/(?=mean$|std$|cut$)", "rewards/NAME/", key) for key in logged}
    return sorted(
        key for key, known in names.items() if not {f"`{known}`", f"`{known.removeprefix('eval_')}`"} & ticked
    )


def slow_but(fast, cells):
    """The cells as parameters of a test, those that are not among `fast` in the slow part."""
    return [pytest.param(*cell, marks=[pytest.mark.slow] * (cell not in fast)) for cell in cells]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
