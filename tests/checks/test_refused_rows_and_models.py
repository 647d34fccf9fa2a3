"""Rows. `pytest tests/checks/test_refused_rows_and_models.py`"""

import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.checks.conftest import CHAT, FORM, GOOD, PAIRS, Loaded, make_folder
from tests.conftest import command, write_rows
from utils.models.folders import ModelFolder

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def chat(**changed):
    return {**CHAT, **changed}


def message(**parts):
    return chat(prompt=[parts])


ROLES = "Accepted: system, developer, user, assistant, tool"


THUMB = {"prompt": "p", "completion": "c", "label": False}


# name: (method, a good row, the bad row after it, what is said of it)
ROWS = {
    "misspelt column": (
        "DPO",
        GOOD,
        {"prompt": "p", "choosen": "c", "rejected": "r"},
        f'no "chosen". Rename "choosen"? {PAIRS}',
    ),
    "missing column": (
        "DPO",
        GOOD,
        {"instruction": "p", "output": "c"},
        f'no "prompt". The row has instruction, output. {PAIRS}',
    ),
    "empty row": ("DPO", GOOD, {}, f'no "prompt". The row has nothing. {PAIRS}'),
    "null": ("DPO", GOOD, {**GOOD, "prompt": None}, f'"prompt" is null. {PAIRS}'),
    "prompt in some rows": (
        "DPO",
        GOOD,
        {"chosen": "p c", "rejected": "p r"},
        f'no "prompt". The row has chosen, rejected. {PAIRS}',
    ),
    "number": ("DPO", GOOD, {**GOOD, "prompt": 3}, f'"prompt" is a number. {FORM}'),
    "boolean": ("DPO", GOOD, {**GOOD, "chosen": True}, f'"chosen" is a boolean. {FORM}'),
    "object": ("DPO", CHAT, chat(prompt=CHAT["prompt"][0]), f'"prompt" is an object. {FORM}'),
    "no role": (
        "DPO",
        CHAT,
        message(content="p"),
        '"prompt" has a message with content. A message needs "role" and "content"',
    ),
    "other names": (
        "DPO",
        CHAT,
        message(**{"from": "human", "value": "p"}),
        '"prompt" has a message with from, value. A message needs "role" and "content"',
    ),
    "list of strings": (
        "DPO",
        CHAT,
        chat(prompt=["p"]),
        '"prompt" has a message with text. A message needs "role" and "content"',
    ),
    "unknown role": ("DPO", CHAT, message(role="human", content="p"), f"\"prompt\" has the role 'human'. {ROLES}"),
    "number as role": ("DPO", CHAT, message(role=1, content="p"), f'"prompt" has the role 1. {ROLES}'),
    "number as content": (
        "DPO",
        CHAT,
        message(role="user", content=3),
        '"prompt" has a message whose content is a number, not a string',
    ),
    "null as content": (
        "DPO",
        CHAT,
        message(role="user", content=None),
        '"prompt" has a message whose content is null, not a string',
    ),
    "parts as content": (
        "DPO",
        CHAT,
        message(role="user", content=[{"type": "text", "text": "p"}]),
        '"prompt" has a message whose content is a list, not a string',
    ),
    "answer in the prompt": (
        "DPO",
        CHAT,
        message(role="assistant", content="p"),
        'the "prompt" ends with the assistant\'s turn. It must end with the turn to answer',
    ),
    "answer of the user": (
        "DPO",
        CHAT,
        chat(chosen=CHAT["prompt"]),
        'the "chosen" ends with a turn of the user. It must end with the assistant\'s answer',
    ),
    "chat and plain": (
        "DPO",
        CHAT,
        chat(prompt="p"),
        '"prompt" is plain text, "chosen" is a chat, "rejected" is a chat. All must be lists of messages, '
        "or all strings",
    ),
    "chat as text": (
        "DPO",
        CHAT,
        chat(prompt=json.dumps(CHAT["prompt"])),
        '"prompt" is a list of messages as text. Write it as JSON (in csv: with json.dumps)',
    ),
    "half an emoji": (
        "DPO",
        GOOD,
        {**GOOD, "chosen": "smile \ud83d"},
        '"chosen" contains half of a surrogate pair (\\ud800 to \\udfff), as from a truncated emoji. Fix it',
    ),
    "label in words": (
        "KTO",
        THUMB,
        {**THUMB, "label": "good"},
        "\"label\" is 'good'. Must be true or false (1 or 0)",
    ),
    "label out of range": ("KTO", THUMB, {**THUMB, "label": 2}, '"label" is 2. Must be true or false (1 or 0)'),
    "no label": (
        "KTO",
        THUMB,
        {"prompt": "p", "completion": "c"},
        'no "label". The row has prompt, completion. Accepted: prompt, completion, label or prompt, chosen, '
        "rejected or chosen, rejected, as in data/kto.jsonl",
    ),
    "one answer": (
        "Reward",
        GOOD,
        {"prompt": "p", "chosen": "c"},
        'no "rejected". The row has prompt, chosen. '
        "Accepted: chosen, rejected or prompt, chosen, rejected, as in data/reward.jsonl",
    ),
    "margin in words": (
        "Reward",
        {**GOOD, "margin": 1},
        {**GOOD, "margin": "much"},
        "\"margin\" is 'much'. Must be a number: how much better chosen is",
    ),
    "other dialogue": (
        "SFT",
        {"messages": "m"},
        {"conversations": [{"from": "human", "value": "p"}]},
        'no "messages". The row has conversations. Accepted: messages or prompt, completion, as in data/sft.jsonl',
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_is_wrong_is_refused_with_its_line(case, refused, tmp_path):
    method, good, bad, problem = ROWS[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))  # \ud83d stays an escape
    assert refused(method=method, data=str(file)) == [f"{file}:2: {problem}"]


@pytest.mark.parametrize("ending, lines", {".json": (1, 2), ".csv": (2, 3), ".parquet": (1, 2)}.items())
def test_a_misspelt_column_is_refused_in_every_kind_of_file(ending, lines, refused, tmp_path):
    rows = [{"prompt": "p", "choosen": "c", "rejected": "r"}] * 2
    file = tmp_path / f"rows{ending}"
    if ending == ".json":
        file.write_text(json.dumps(rows))
    elif ending == ".csv":
        with open(file, "w", newline="") as handle:
            csv.writer(handle).writerows([rows[0], *(row.values() for row in rows)])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    said = f'no "chosen". Rename "choosen"? {PAIRS}'
    assert refused(data=str(file)) == [f"{file}:{line}: {said}" for line in lines]


def test_of_thirty_bad_rows_twenty_are_shown_and_all_are_counted(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, *[{**GOOD, "prompt": 3}] * 30])
    shown = [f'{file}:{line}: "prompt" is a number. {FORM}' for line in range(2, 22)]
    assert refused(data=file) == [*shown, "... and 10 more, 30 in all"]


def test_different_problems_of_a_file_are_shown_together(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": 3}, {"prompt": "p"}, GOOD, CHAT])
    assert refused(data=file) == [
        f'{file}:2: "prompt" is a number. {FORM}',
        f'{file}:3: no "chosen". The row has prompt. {PAIRS}',
        f"{file}:5 is a chat and {file}:1 is plain text. A run needs rows of one kind",
    ]


def test_chat_and_plain_rows_of_two_files_do_not_mix(refused, tmp_path):
    chats, texts = write_rows(tmp_path / "a.jsonl", [CHAT]), write_rows(tmp_path / "b.jsonl", [GOOD])
    assert refused(data=[texts, chats]) == [
        f"{chats}:1 is a chat and {texts}:1 is plain text. A run needs rows of one kind"
    ]


def test_a_margin_in_some_rows_only_is_refused(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "margin": 1}, GOOD])
    assert refused(method="Reward", data=file) == [
        f'{file}:2: no "margin", and {file}:1 has one. All rows need one, or none'
    ]


@pytest.mark.parametrize("label, said", [(True, "true"), (0, "false")])
def test_kto_refuses_labels_of_one_kind(label, said, refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**THUMB, "label": label}] * 4)
    assert refused(method="KTO", data=file) == [
        f"--train_data_path: all 4 labels are {said}. KTO needs rows of both labels, true and false, as in "
        "data/kto.jsonl"
    ]


def test_kto_refuses_a_batch_of_one(refused):
    (line,) = refused("--per_device_train_batch_size 1", method="KTO")
    assert line.startswith("--per_device_train_batch_size 1: KTO ") and "2" in line


def test_too_many_rows_that_cannot_be_used_are_refused_unless_allowed(refused, run, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "chosen": " "}] * 2 + [GOOD] * 8)
    assert refused(data=file) == [
        f"2 of 10 rows cannot be used (2 empty answer). The first: {file}:1 empty answer; {file}:2 empty answer. "
        "More than --max_drop_fraction 0.1. Fix them, or type --max_drop_fraction 1"
    ]
    status, out, _ = run("--max_drop_fraction 0.2 --check", data=file)
    assert status == 0 and "8 rows to train on" in out and "refused: 2 empty answer" in out


@pytest.mark.parametrize("flag", ["--train_data_path", "--eval_data_path"])
def test_a_file_with_no_usable_row_is_refused_whatever_is_allowed(flag, refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "rejected": GOOD["chosen"]}])
    assert refused(f"--max_drop_fraction 1 {flag} {file}") == [
        f"{flag}: 1 of 1 rows cannot be used (1 chosen equals rejected). The first: {file}:1 chosen equals rejected. "
        "Fix them"
    ]


def test_rows_longer_than_max_length_are_refused_with_the_flag_that_helps(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [GOOD])  # 8 bytes of prompt, a token each
    assert refused("--max_length 8", data=file) == [
        "1 of 1 rows cannot be used (1 prompt longer than max_length). "
        f"The first: {file}:1 prompt longer than max_length. Fix them, or raise --max_length"
    ]
    short = write_rows(tmp_path / "short.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert refused(f"--max_length 8 --max_drop_fraction 1 --eval_data_path {short}", data=file) == [
        "no rows are left to train on: all are longer than --max_length. Raise it"
    ]


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


REWARD_MODEL = "a trained reward model. DPO starts from a language model"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


# name: (files to leave out, files to write, the problems, FOLDER standing for the model's)
MODELS = {
    "no config": (
        ["config.json"],
        {},
        ["--model_name_or_path FOLDER: no config.json (nor adapter_config.json) in it, so not a model "],
    ),
    "no tokenizer": (
        ["tokenizer.json"],
        {},
        ["FOLDER: no tokenizer (tokenizer.json or tokenizer.model) in it. Copy it from the original "],
    ),
    "pickled weights": (
        ["model.safetensors"],
        {"pytorch_model.bin": "x", "training_args.bin": "x"},
        [
            "FOLDER: only pickled weights (pytorch_model.bin), which can run code when read. Needed: "
            "*.safetensors (model.save_pretrained writes them)"
        ],
    ),
    "no weights": (["model.safetensors"], {}, ["FOLDER: no weights. Needed: *.safetensors (model.save_pretrained "]),
    "a pointer for weights": (
        [],
        {"model.safetensors": POINTER},
        [
            f"FOLDER/model.safetensors: not a whole safetensors file ({len(POINTER)} bytes). Download or copy it "
            "again, or type git lfs pull"
        ],
    ),
    "a pointer for a tokenizer": (
        [],
        {"tokenizer.json": POINTER},
        ["--model_name_or_path FOLDER: its tokenizer cannot be loaded ("],
    ),
    "neither weights nor tokenizer": (
        ["model.safetensors", "tokenizer.json"],
        {},
        ["FOLDER: no tokenizer", "FOLDER: no weights"],
    ),
    "broken config": ([], {"config.json": "{"}, ["FOLDER/config.json: not valid JSON. Copy it from the original "]),
    "list as config": ([], {"config.json": "[]"}, ["FOLDER/config.json: not a JSON object. Copy it from the "]),
    "reward model": (
        [],
        {"config.json": '{"architectures": ["Qwen2ForSequenceClassification"]}'},
        [f"FOLDER: {REWARD_MODEL}"],
    ),
    "adapter of a reward model": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "a/b", "task_type": "SEQ_CLS"}'},
        [f"FOLDER: {REWARD_MODEL}"],
    ),
    "adapter without its base": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "/gone/base"}'},
        ["FOLDER: its base model /gone/base does not exist. Set base_model_name_or_path in its adapter_config.json"],
    ),
    "adapter of nothing": ([], {"adapter_config.json": "{}"}, ["FOLDER: its base model (unnamed) does not exist."]),
    "adapter of an empty folder": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "/tmp"}'},
        ["FOLDER: its base model /tmp does not exist."],
    ),
    "adapter of another kind": (
        [],
        {"adapter_config.json": '{"base_model_name_or_path": "a/b", "peft_type": "IA3"}'},
        ["FOLDER: an adapter of type IA3. Only LoRA adapters are supported"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_that_is_wrong_is_refused(case, refused, tiny_model, tmp_path):
    without, written, problems = MODELS[case]
    folder = make_folder(tmp_path / "model", tiny_model, without, written)
    found = refused(model=folder)
    problems = [problem.replace("FOLDER", str(folder)) for problem in problems]
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_a_model_folder_that_is_not_there_is_refused(refused, tmp_path):
    assert refused(model="/gone/model") == [
        "--model_name_or_path /gone/model: no such folder. "
        "`python -m utils.demo_model` makes models/SmolLM2-135M-Instruct"
    ]
    (tmp_path / "SmolLM2-135M").mkdir()
    assert refused(model=tmp_path / "SmolLM-135M") == [
        f"--model_name_or_path {tmp_path}/SmolLM-135M: no such folder. Did you mean {tmp_path}/SmolLM2-135M?"
    ]


@pytest.fixture
def hub(monkeypatch):
    """A Hub on 127.0.0.1 that has Qwen/Qwen9 alone."""
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/api/models/Qwen/Qwen9"
            body = b'{"id": "Qwen/Qwen9"}' if known else b"{}"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Other", "Qwen/Qwen9", "Else/Qwen9"])
def test_a_hub_id_is_left_to_the_loader_whatever_folders_there_are(name, hub, tmp_path, monkeypatch):
    """An owner's name may be a folder's too, with a model of nearly that name in it."""
    (tmp_path / "Qwen" / "Qwen8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = ModelFolder.at(name)
    assert folder.check("--model_name_or_path") == [] and folder.described is None


@pytest.mark.parametrize("name", ["Qwenn", "Qwen/Qwen7"])
@pytest.mark.parametrize("reached", [True, False])
def test_a_misspelt_folder_is_refused_whether_the_hub_is_reached_or_not(reached, name, hub, tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if not reached:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (problem,) = ModelFolder.at(name).check("--model_name_or_path")
    near = {"Qwenn": "Qwen", "Qwen/Qwen7": "Qwen/Qwen8"}[name]
    assert problem == f"--model_name_or_path {name}: no such folder. Did you mean {near}?"


def test_a_hub_id_that_cannot_be_reached_is_one_line(tmp_path):
    flags = ["--model_name_or_path", "gpt2", "--train_data_path", "data/preference.jsonl", "--output_dir", tmp_path]
    done = command("train_rlhf.py", *flags, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: --model_name_or_path gpt2: ") and "Not a local folder" in line


# what the template is: the beginning of what is said of it, for chats
TEMPLATES = {
    None: "the data are chats, and this model's tokenizer has no chat template. Use the instruct model, save a "
    "chat_template.jinja in its folder, or write the data as plain text",
    "{% for m in %}": "this model's chat template fails on a question and its answer (TemplateSyntaxError: "
    "Expected an expression",
    "{{ raise_exception('not today') }}": "this model's chat template fails on a question and its answer "
    "(TemplateError: not today). Fix chat_template.jinja in the model's folder",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_need_a_template_that_works(template, refused, run, tiny_model, tmp_path):
    written = {"chat_template.jinja": template} if template else {}
    folder = make_folder(tmp_path / "model", tiny_model, ["chat_template.jinja"], written)
    found = refused(model=folder, data=write_rows(tmp_path / "rows.jsonl", [CHAT]))
    assert len(found) == 1 and found[0].startswith(TEMPLATES[template])
    with pytest.raises(Loaded):
        run(model=folder)  # plain text needs none
