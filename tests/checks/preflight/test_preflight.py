"""What is found before a model is loaded: `pytest tests/checks/preflight`."""

import collections
import importlib.metadata
import json
import os
import shutil
import types
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import train_gkd
import train_rlhf
from rlhf_args.methods import DIALOGUE, PAIR
from tests.checks.preflight.conftest import PAIRS, pair, thumbs
from tests.conftest import TEMPLATE, command, make_model, make_tokenizer, write_rows
from utils.checks import findings, schedule
from utils.checks.folders import check_folders
from utils.data import prepare as data_prepare, template as data_template
from utils.models import folders
from utils.models.folders import AGAIN
from utils.runtime.errors import Refused, collecting


@pytest.fixture
def check(tmp_path, tiny_model, capsys):
    """check(flags, rows, ...) types a sound command with --check but for `flags`; (status, stdout, stderr), lines."""

    def check(flags="", rows=PAIRS, method="DPO", model=tiny_model, out=tmp_path / "out", held=None):
        words = ["--rlhf_type", method, "--output_dir", str(out), "--model_name_or_path", str(model), "--check"]
        words += ["--train_data_path", write_rows(tmp_path / "rows.jsonl", rows)]
        words += ["--eval_data_path", write_rows(tmp_path / "held.jsonl", held)] if held else []
        status = train_rlhf.main([*words, *flags.split()])
        said = capsys.readouterr()
        assert not out.exists()
        return status, said.out.splitlines(), said.err.splitlines()

    return check


@pytest.fixture
def warnings(check):
    """warnings(flags, rows, ...) are those that --check says, of which the last line gives the number."""

    def warnings(*args, **kwargs):
        status, out, err = check(*args, **kwargs)
        assert (status, err) == (0, [])
        found = [line.removeprefix("warning   ") for line in out if line.startswith("warning ")]
        counted = f"; {len(found)} warning{'s' * (len(found) > 1)}" if found else ""
        assert out[-1] == f"checked   nothing stands in the way; no model was loaded, nothing was written{counted}"
        return found

    return warnings


@pytest.fixture
def refused(check):
    def refused(*args, **kwargs):
        status, _, err = check(*args, **kwargs)
        assert status == 2 and all(line.startswith("refused: ") for line in err), err
        return [line.removeprefix("refused: ") for line in err]

    return refused


def test_a_sound_run_has_no_warning(warnings):
    assert warnings() == []


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


TURNS = [{"role": role, "content": said} for role, said in (("user", "hi"), ("assistant", "ok"), ("user", "<pad> so"))]


TOKENIZERS = {
    "no BOS": make_tokenizer,
    "a BOS": lambda: make_tokenizer(bos="<s>"),
    "a BOS in the template": lambda: make_tokenizer("{{ bos_token }}" + TEMPLATE, "<s>"),
    "no template": lambda: make_tokenizer(template=None),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_turn_is_trained_from_its_prefix_in_tokens_to_its_end_of_turn(case, monkeypatch):
    """The code finds tokens by their characters; here the text before a place is tokenised alone and counted."""
    monkeypatch.setattr(data_prepare, "CHUNK", 2)
    tokenizer = TOKENIZERS[case]()
    talk = [*TURNS, {"role": "assistant", "content": "ok ok"}]
    chats = [{"messages": talk}, {"messages": talk[:2]}, {"messages": [*talk, TURNS[0]]}]
    texts = [{"messages": "ok so"}, {"messages": "a<|im_end|>"}, {"messages": "<pad> ok<|im_end|>"}]
    rows = list(enumerate(chats if tokenizer.chat_template else texts))
    prepared = data_prepare.prepare_rows(rows, tokenizer, DIALOGUE, 1024)
    assert len(prepared.rows) == 3
    for (_, values), row in zip(rows, prepared.rows, strict=True):
        prompt, (answer,), _ = data_template.render(tokenizer, values)
        whole = tokenizer(prompt + answer)["input_ids"]
        labels = [-100] * len(whole)
        for start, end in data_template.assistant_spans(tokenizer, values, prompt + answer):
            before, after = (tokenizer((prompt + answer)[:place])["input_ids"] for place in (start, end))
            first, last = data_template.shared_length(before, whole), len(after)
            labels[first:last] = whole[first:last]
        assert row == {"input_ids": whole, "labels": labels} and max(labels) >= 0
    assert prepared.highest == max(token for row in prepared.rows for token in row["input_ids"])


def test_a_character_that_the_tokenizer_drops_does_not_move_a_turn():
    # "(ok)" as tokens 5 6 of "o" and "k": the brackets at characters 0 and 3 have none
    row = data_template.label_turns([4, 5, 6, 7], {1: 1, 2: 2}.get, [(0, 4)])
    assert row == {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, -100]}
    assert data_template.label_turns([4], {}.get, [(0, 4)])["labels"] == [-100]


def test_a_dialogue_needs_a_fast_tokenizer():
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(Refused, match="tokenizer.json"):
        data_prepare.prepare_rows([("a:1", {"messages": TURNS})], slow, DIALOGUE, 64)


def test_a_template_that_refuses_the_first_chunk_of_rows_names_each_of_them(monkeypatch):
    monkeypatch.setattr(data_prepare, "CHUNK", 2)
    refusing = "{% if 'No' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}" + TEMPLATE
    rows = [(f"rows.jsonl:{n}", pair(n, prompt="Say." if n == 4 else "No {}.")) for n in (1, 2, 3, 4, 5)]
    with pytest.raises(Refused) as refusal:
        data_prepare.prepare_rows(rows, make_tokenizer(refusing), PAIR, 64)
    assert [line.split(": ")[0] for line in refusal.value.problems] == [f"rows.jsonl:{n}" for n in (1, 2, 3, 5)]
    assert all("chat template" in line and "not this" in line for line in refusal.value.problems)


def test_lengths_are_counted_in_tokens_of_every_row_that_was_read(check):
    # a token a byte. "<|im_start|>user\nSay 10.<|im_end|>\n<|im_start|>assistant\n" is 3 special tokens,
    # 5 + 7 + 1 + 10 bytes: 26. The answers "Yes 10." and "No 10." are 7 and 6 bytes and an end of turn: 8, 7
    _, out, _ = check(rows=[*PAIRS[:9], pair(10, chosen="Yes, very much so {}.")])  # 21 bytes, 22 tokens
    assert "lengths   prompt 26, 26, 26; chosen 8, 22, 22; rejected 7, 7, 7 tokens (median, 95 %, longest)" in out


def test_percentiles_are_those_of_the_rows():
    assert findings.percentiles(range(1, 101)) == [50, 95, 100]
    assert findings.percentiles([3]) == [3, 3, 3]
    assert findings.percentiles([9, 1]) == [1, 9, 9]  # half of the rows have 1 or less


def test_max_length_that_cuts_rows_is_named_with_the_one_that_does_not(warnings):
    rows = [*PAIRS, pair(10, chosen="Yes, very much so {}.")]
    # the longest is 26 + 22 = 48; of the others the prompt and the longer answer are 26 + 8 = 34
    (warning,) = warnings("--max_length 40", rows)
    assert warning == "--max_length 40 drops 0 and cuts 1 of 17 rows; --max_length 48 would keep all rows whole"
    assert warnings("--max_length 48", rows) == []
    (warning,) = warnings("--max_length 47", rows)
    assert "cuts 1 of 17" in warning
    long = [*PAIRS, pair(10, prompt="Say {}." + "!" * 20)]  # a prompt of 46
    (warning,) = warnings("--max_length 40", long)
    assert warning == "--max_length 40 drops 1 and cuts 0 of 17 rows; --max_length 54 would keep all rows whole"


def test_a_row_that_no_model_of_that_size_holds_is_said_so(warnings, refused):
    rows = [*PAIRS, pair(10, chosen="Yes " * 600 + "{}.")]  # 2403 bytes and more; the tiny model holds 2048
    (warning,) = warnings("--max_length 1024", rows)
    assert "--max_length 2048" in warning


def test_a_token_that_spans_prompt_and_answer_is_counted():
    from tokenizers import Tokenizer, decoders, models as cores, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<|im_end|>", "Ġ", "a", "b", "Ġb"])}
    core = Tokenizer(cores.BPE(vocabulary, [("Ġ", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    sides = {"chosen": "b", "rejected": "a"}
    rows = [("rows:1", {"prompt": "a ", **sides}), ("rows:2", {"prompt": "a", "chosen": " b", "rejected": "a"})]
    prepared = data_prepare.prepare_rows(rows, tokenizer, PAIR, 64)
    assert prepared.spanned == 1  # "a", " " alone, "a", " b" with the answer
    (warning,) = findings.check_row_tokens(prepared, data_prepare.Prepared())
    assert warning.startswith("in 1 of 2 rows (50%) a token spans prompt and answer")


def test_the_templates_own_tokens_in_the_data_are_found(warnings, tmp_path):
    rows = [*PAIRS, pair(1, chosen="Yes.<|im_end|>"), pair(2, rejected="No<|im_end|>no.")]
    (warning,) = warnings(rows=rows)
    assert warning.startswith("2 rows ") and f"{tmp_path}/rows.jsonl:17 (2 ends of turn after the answer)" in warning


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_that_stand_twice_or_against_each_other_are_found(warnings, tmp_path):
    file, swapped = (
        tmp_path / "rows.jsonl",
        PAIRS[1] | {"chosen": PAIRS[1]["rejected"], "rejected": PAIRS[1]["chosen"]},
    )
    again, against = warnings(rows=[*PAIRS, PAIRS[0], swapped])
    assert again.startswith(f"1 of 18 rows repeat another, as {file}:17 and {file}:1. ")
    assert against.startswith(f"1 of 18 rows contradict another, as {file}:18 and {file}:2. ")


def test_held_out_rows_that_are_trained_on_are_found(warnings, tmp_path):
    (warning,) = warnings(held=[PAIRS[3], pair(99)])
    assert warning.startswith(
        f"1 of 2 held-out rows are also training rows, as {tmp_path}/held.jsonl:1 and {tmp_path}/rows"
    )
    assert warnings(held=[pair(98), pair(99)]) == []


@pytest.mark.parametrize(
    "true, false, flags, said",
    [
        (10, 10, "", None),  # 1:1
        (12, 9, "", None),  # 4:3
        (12, 8, "", "12 to 8"),  # 3:2, too many good ones
        (12, 8, "--undesirable_weight 1.2", None),  # 12 to 9.6 is 5:4
        (8, 12, "", "8 to 12"),
        (8, 12, "--desirable_weight 1.5", None),  # 12 to 12
        (10, 10, "--desirable_weight 2", "20 to 10"),
    ],
)
def test_kto_is_weighed_between_1_to_1_and_4_to_3(true, false, flags, said, warnings):
    found = warnings(flags, thumbs(true, false), "KTO")
    if said is None:
        assert found == []
    else:
        (warning,) = found
        assert f" the ratio is {said}, " in warning
        assert warning.endswith("remove both weights") == (true == false)
        assert (" type --" in warning) == (true != false)


# ── the training ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--learning_rate 0.011", "--learning_rate 0.011 is above 0.01. AdamW usually takes 1e-6 to 5e-5 for full"),
        ("--learning_rate 0.0011 --train_mode full", "--learning_rate 0.0011 is above 0.001. "),
        ("--learning_rate 0.01", None),
        ("--learning_rate 0.001 --train_mode full", None),
        ("--learning_rate 0.02 --optim sgd", None),
        # 16 rows, 8 a step: 2 steps an epoch, 6 in all
        ("--warmup_steps 6", "--warmup_steps 6: all 6 steps "),
        ("--warmup_steps 5", None),
        ("--gradient_accumulation_steps 3", "a step takes 24 rows, but the data have 16"),
        ("--gradient_accumulation_steps 2", None),
    ],
)
def test_what_hardly_trains_is_warned_of(flags, said, warnings):
    found = warnings(f"--per_device_train_batch_size 8 --num_train_epochs 3 {flags}")
    assert [warning[: len(said or "")] for warning in found] == ([said] if said else [])


def test_no_step_at_all_is_refused(refused):
    assert refused("--per_device_train_batch_size 17 --dataloader_drop_last") == [
        "--dataloader_drop_last: would drop all 16 rows, which do not fill a batch of 17. Remove it, or lower "
        "--per_device_train_batch_size"
    ]


# ── the installation and the weights ─────────────────────────────────────────────────────────────────────────────────


def test_a_package_of_another_version_than_the_pinned_one_is_named(monkeypatch, tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("one==1.2.0  # why\ntwo==2.0\nthree==3.0\nfour==4.0\n", encoding="utf-8")
    versions = {"one": "1.2.0+cpu", "two": "2.1", "four": "4.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert list(findings.check_versions(pins)) == [
        "two 2.1 is installed, pinned 2.0. Type pip install -r requirements.txt",
        "three is not installed, pinned 3.0. Type pip install -r requirements.txt",
    ]


def test_a_library_that_is_too_old_is_refused_before_it_is_imported(monkeypatch, refused):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else version(name)
    )
    (line,) = refused()
    assert line.startswith("transformers 4.57.1") and "pip install" in line


def shard(folder, source, parts):
    """The model of `source` in `folder`, its weights in `parts` files with an index."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    file.unlink()
    names, weights = [f"model-{n:05}-of-{parts:05}.safetensors" for n in range(1, parts + 1)], {}
    for place, name in enumerate(tensors):
        weights[name] = names[place % parts]
    for name in names:
        save_file({key: tensors[key] for key in tensors if weights[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_weights_are_described_by_their_headers(check, tiny_model, tmp_path):
    size = sum(file.stat().st_size for file in Path(tiny_model).glob("*.safetensors"))
    assert f"weights   {size / 1e6:.2g} MB float32 safetensors in 1 file" in check()[1]
    folder = shard(tmp_path / "model", tiny_model, 3)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert f"weights   {size / 1e6:.2g} MB float32 safetensors in 3 files" in check(model=folder)[1]


def test_a_shard_that_is_missing_or_cut_is_refused(refused, tiny_model, tmp_path):
    folder = shard(tmp_path / "model", tiny_model, 3)
    missing, cut = folder / "model-00002-of-00003.safetensors", folder / "model-00003-of-00003.safetensors"
    missing.unlink()
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-4])
    assert refused(model=folder) == [
        f"{cut}: not a whole safetensors file ({len(whole) - 4} bytes). {AGAIN}, or type git lfs pull",
        f"{folder}/model.safetensors.index.json: names {missing.name}, which does not exist. {AGAIN}",
    ]


def make_adapter(folder, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base) / name, folder)
    return folder


def test_the_base_of_an_adapter_is_looked_at_too(refused, check, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    capsys.readouterr()
    assert any(line.startswith("weights ") and ", the adapter " in line for line in check(model=adapter)[1])
    (file,) = base.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = refused(model=adapter)
    assert problem.startswith(f"{file}: not a whole safetensors file")


def test_a_teacher_and_a_reward_model_are_looked_at_too(tmp_path, tiny_model):
    cut = shutil.copytree(tiny_model, tmp_path / "cut")
    (file,) = cut.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for flag in ("reward_model_path", "teacher_model_name_or_path", "value_model_path"):
        both = [types.SimpleNamespace(**{"model_name_or_path": tiny_model, flag: str(cut)})] * 2
        (problem,) = check_folders(*both)
        assert problem.startswith(f"{file}: not a whole safetensors file")


OPENED = """
import collections, sys
import safetensors

opened, safe_open = collections.Counter(), safetensors.safe_open
sys.addaudithook(lambda event, args: opened.update([str(args[0])] if event == "open" else []))
safetensors.safe_open = lambda file, **kwargs: opened.update([str(file)]) or safe_open(file, **kwargs)
import train_rlhf

status = train_rlhf.main(sys.argv[2:])
print(status, *(opened[f"{sys.argv[1]}/{name}"] for name in ("model.safetensors", "config.json", "tokenizer.json")))
"""


def test_a_check_opens_the_weights_once_and_the_config_once_more_than_transformers(tiny_model, tmp_path):
    """transformers' AutoTokenizer reads config.json twice, and tokenizer.json itself (5.23.0)."""
    flags = ["--model_name_or_path", tiny_model, "--train_data_path", "data/preference.jsonl", "--check"]
    done = command("-c", OPENED, tiny_model, *flags, "--output_dir", tmp_path / "out")
    assert done.stdout.splitlines()[-1:] == ["0 1 3 2"], done.stdout + done.stderr


def test_a_folder_is_read_again_once_a_file_in_it_has_changed(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    before = folders.ModelFolder.at(folder)
    assert folders.ModelFolder.at(folder) is before and before.vocabulary_rows == 260 and before.numbers
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": 999}))
    os.truncate(folder / "model.safetensors", 4)
    now = folders.ModelFolder.at(folder)
    assert now.vocabulary_rows == 999 and not now.numbers and [*now.check_weights()]


def test_a_base_with_a_broken_config_is_refused(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    (base / "config.json").write_text("{")
    (problem,) = folders.ModelFolder.at(adapter).check("--model_name_or_path")
    assert problem.startswith(f"{base}/config.json: not valid JSON")


def test_a_tokenizer_of_another_model_is_refused_where_the_data_need_its_tokens(refused, warnings, tmp_path, capsys):
    tokenizer = make_tokenizer()  # 4 special tokens and 256 bytes: 260
    folder = make_model(tmp_path / "model", tokenizer)
    tokenizer.add_tokens(["<tool>"])  # number 260, for which there is no embedding
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert warnings(model=folder) == []
    (problem,) = refused(rows=[*PAIRS, pair(1, prompt="<tool>{}")], model=folder)
    assert problem.startswith(f"{folder}: ") and "token 260 ('<tool>')" in problem and "260 rows" in problem


def test_a_config_of_another_size_than_the_weights_is_refused(refused, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": 999}))
    (problem,) = refused(model=folder)
    assert problem.startswith(f"{folder}: ") and "vocab_size 999" in problem and "260 rows" in problem


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "flags", ["--train_mode full", "", "--lora_rank 3", "--use_dora", "--lora_target_modules q_proj"]
)
def test_trained_numbers_are_those_of_the_model_that_would_be_trained(flags, tiny_model):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from utils.cli import arguments
    from utils.cli.run import Run
    from utils.training import chapters

    words = f"--model_name_or_path {tiny_model} --train_data_path x --output_dir x {flags}".split()
    common, config = arguments.parse(words, "DPO")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = chapters.new_lora(Run([], "DPO", common, config, []))
    model = get_peft_model(model, lora) if lora else model
    assert folders.count_trained(common) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def free(monkeypatch):
    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(size))

    return free


@pytest.mark.parametrize("flags, kept", [
    ("", 1),  # save_steps is 500: one, of the last step
    ("--save_steps 2", 8),
    ("--save_steps 3", 6),  # of steps 3, 6, 9, 12, 15 and the last
    ("--save_steps 2 --save_total_limit 3", 4),  # the fourth is written before the first is deleted
    ("--save_strategy epoch", 1),
    ("--save_strategy no", 0),
])  # fmt: skip
def test_checkpoints_are_counted_as_they_are_kept(flags, kept, check):
    _, out, _ = check(f"--per_device_train_batch_size 1 --num_train_epochs 1 {flags}")  # 16 steps
    (line,) = [line for line in out if line.startswith("disk ")]
    assert line.split()[1] == str(kept)


def test_a_disk_without_room_is_warned_of_and_one_without_room_for_a_checkpoint_refused(
    warnings, refused, free, tiny_model
):
    # full: each of the numbers takes 4 bytes, and Adam two of 4
    numbers = folders.ModelFolder.at(tiny_model).numbers
    small = sum(file.stat().st_size for file in Path(tiny_model).glob("*.json"))
    one, result = numbers * 12 + small, numbers * 4 + small
    flags = "--train_mode full --per_device_train_batch_size 1 --num_train_epochs 1 --save_steps 4"  # 4 checkpoints
    free(4 * one + result)
    assert warnings(flags) == []
    free(4 * one + result - 1)
    (warning,) = warnings(flags)
    assert warning.startswith("the disk would fill up: 4 checkpoints of ")
    free(one)
    assert len(warnings(flags)) == 1
    free(one - 1)
    (problem,) = refused(flags)
    assert "4 checkpoints of " in problem and "--save_total_limit 1" in problem
    free(result)
    assert warnings(f"{flags} --save_strategy no") == []


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_checkpoint_is_as_large_as_was_said(mode, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "gigabytes", lambda size: f"{size} bytes")
    words = ["--rlhf_type", "DPO", "--output_dir", str(tmp_path / "out"), "--model_name_or_path", tiny_model]
    words += ["--train_data_path", write_rows(tmp_path / "rows.jsonl", PAIRS), "--max_steps", "1"]
    assert train_rlhf.main([*words, "--train_mode", mode]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk ")]
    said = int(line.removeprefix("disk      1 checkpoint of ").split()[0])
    real = sum(file.stat().st_size for file in (tmp_path / "out" / "checkpoint-1").iterdir())
    assert said == pytest.approx(real, rel=0.1)  # a scheduler's, a log's and a manifest's kilobytes


# ── all at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_names_the_refusals_of_all_stages_in_one_list(check, refused, tmp_path):
    rows = [*PAIRS, {"prompt": 3, "chosen": "a", "rejected": "b"}, pair(1, prompt="!" * 100)]
    found = refused("--lora_rank 0 --eval_strategy steps --max_length 100 --max_drop_fraction 0.01", rows)
    assert [line.split(":")[0] for line in found[:-1]] == [
        "--lora_rank 0",
        str(tmp_path / "rows.jsonl"),
        "--eval_strategy steps",
    ]
    assert "prompt longer than max_length" in found[-1]
    assert refused("--lora_rank 0 --zzz 1", rows)[:3] == [
        found[0],
        found[1],
        "--zzz: no such flag for DPO. `python train_rlhf.py --rlhf_type DPO --help` lists them",
    ]


def test_without_check_the_first_stage_is_enough(tmp_path, tiny_model, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": 3}])
    words = f"--model_name_or_path {tiny_model} --train_data_path {rows} --output_dir {tmp_path / 'out'}".split()
    assert train_rlhf.main([*words, "--per_device_train_batch_size", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"refused: {rows}:17: ")


def test_gkd_names_the_refusals_of_all_stages_in_one_list(tmp_path, tiny_model, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS[:2]}, {"messages": 3}])
    words = f"--model_name_or_path {tiny_model} --teacher_model_name_or_path {tiny_model} --train_data_path {rows}"
    words = f"{words} --output_dir {tmp_path / 'out'} --lora_rank 0 --eval_strategy steps --check"
    assert train_gkd.main(words.split()) == 2
    found = [line.removeprefix("refused: ") for line in capsys.readouterr().err.splitlines()]
    assert [line.split(":")[0] for line in found] == [
        "--lora_rank 0",
        rows,
        "--eval_strategy steps",
        f"--teacher_model_name_or_path {tiny_model}",
    ]


def test_collecting_goes_on_after_a_refusal_and_hides_no_other_error():
    problems = []
    with collecting(problems):
        raise Refused(["a", "b"])
    with collecting(problems):
        raise Refused(["b", "c"])
    with pytest.raises(ZeroDivisionError), collecting(problems):
        1 / 0  # noqa: B018
    assert problems == ["a", "b", "c"]
    with pytest.raises(Refused), collecting(None):
        raise Refused(["a"])
