"""What the tests of this room share."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForSequenceClassification

import train_rlhf
from tests.conftest import read_rows, write_rows
from utils import score_reward_model
from utils.models import load

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


@pytest.fixture(scope="module")
def lora_judge(tiny_model, tmp_path_factory):
    """An adapter that our Reward method trained on the very model that the policy starts from."""
    folder = tmp_path_factory.mktemp("lora") / "preferred"
    words = f"--rlhf_type Reward --model_name_or_path {tiny_model} --train_data_path data/reward.jsonl --max_steps 2 "
    words += f"--output_dir {folder} --learning_rate 2e-2 --dtype float32 --save_strategy no --lora_dropout 0.2"
    words += " --disable_dropout False"
    assert train_rlhf.main(words.split()) == 0
    return str(folder)


TWO = """
def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

def question(prompts, **columns):
    return [float(len(prompt)) if SOMETIMES else None for prompt in prompts]
"""


def change(folder, to, change):
    """A copy of a model's folder whose tensors are `change`d."""
    shutil.copytree(folder, to)
    file = next(to.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return to


def zero_head(tensors):
    tensors[next(name for name in tensors if name.endswith("score.weight"))].zero_()


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
