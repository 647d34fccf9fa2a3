"""What is refused. `pytest tests/trainers/distillation/test_refused_distillations.py`"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_gkd
import train_rlhf
from tests.conftest import write_rows
from tests.trainers.distillation.conftest import CHATS, line_with, make_qwen, save_qwen
from utils.models.folders import ModelFolder

TEMPERATURE = "--temperature 0: must be "


BAD = [
    ("--lmbda 1.5", ["--lmbda 1.5: must be "]),
    ("--lmbda -0.1", ["--lmbda -0.1: must be "]),
    ("--lmbda nan", ["--lmbda nan: must be "]),
    ("--beta 2", ["--beta 2: must be "]),
    ("--beta nan", ["--beta nan: must be "]),
    ("--lmbda 3 --beta 2", ["--beta 2: must be ", "--lmbda 3: must be "]),
    ("--temperature 0 --answers_batch_size 0", [TEMPERATURE, "--answers_batch_size 0: must be "]),
    (
        "--seq_kd True --lmbda 1",
        ["--seq_kd True with --lmbda 1: "],
    ),
    ("--temperature 0", [TEMPERATURE]),
    ("--answers_batch_size 0", ["--answers_batch_size 0: must be "]),
    ("--max_completion_length 0", ["--max_completion_length 0: must be "]),
    (
        "--max_completion_length 2048",
        ["--max_completion_length 2048: the model holds 2048 tokens. Type --max_completion_length 1024"],
    ),
    ("--reward_funcs data/rewards.py:brevity", ["--reward_funcs: no such flag for GKD. "]),
    ("--rlhf_type GKD", ["--rlhf_type: no such flag for GKD. "]),
    ("--lmbd 1", ["--lmbd: no such flag for GKD. Did you mean --lmbda?"]),
]


def test_overwriting_does_not_delete_the_teacher_or_a_recipe(run, pair, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pair[1], out / "teacher")
    (out / "run_card.json").write_text("{}")
    (out / "mine.yaml").write_text("seed: 1")
    status, _, lines = run(f"--overwrite_output_dir --config {out}/mine.yaml", teacher=out / "teacher")
    assert status == 2 and (out / "teacher" / "config.json").exists()
    says = [(f"{out}/teacher", "--teacher_model_name_or_path"), (f"{out}/mine.yaml", "--config")]
    assert all(path in line and flag in line for line, (path, flag) in zip(lines, says, strict=True)), lines


@pytest.mark.parametrize("flags, problems", BAD, ids=[flags for flags, _ in BAD])
def test_a_flag_that_is_wrong_is_refused(flags, problems, refused):
    found = refused(flags)
    assert [line[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


def test_no_teacher_is_refused(refused):
    assert refused(teacher=None) == [
        "--teacher_model_name_or_path: missing. Type a model folder or Hub id with the student's tokenizer"
    ]


def test_a_teacher_that_is_not_there_is_refused(refused, tmp_path):
    flag = f"--teacher_model_name_or_path {tmp_path / 'gone'}"
    (problem,) = refused(teacher=tmp_path / "gone")
    assert problem.startswith(f"{flag}: no such folder")
    (tmp_path / "gone").mkdir()
    (problem,) = refused(teacher=tmp_path / "gone")
    assert problem == f"{flag}: no config.json (nor adapter_config.json) in it, so not a model folder"


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "a reward model",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "already quantised",
        ),
    ],
    ids=["reward model", "quantised"],
)
def test_a_teacher_that_cannot_teach_is_refused(change, problem, refused, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    (found,) = refused(teacher=tmp_path / "teacher")
    assert found.startswith(f"--teacher_model_name_or_path {tmp_path / 'teacher'}: {problem}")


def test_a_teacher_that_is_an_adapter_without_its_base_is_refused(refused, pair, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(pair[1], folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    assert refused(teacher=folder) == [
        f"{folder}: its base model (unnamed) does not exist. Set base_model_name_or_path in its adapter_config.json"
    ]


def test_a_teacher_of_another_tokenizer_is_refused_by_the_first_token_that_differs(refused, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    assert (vocabulary["A"], vocabulary["B"]) == (36, 37)  # 4 special tokens, and "A" is the 32nd behind "!"
    vocabulary["A"], vocabulary["B"] = 37, 36
    file.write_text(json.dumps(described))
    assert refused(teacher=tmp_path / "teacher") == [
        f"--teacher_model_name_or_path {tmp_path / 'teacher'}: its tokenizer is not the student's: token 36 is 'B' in "
        "it and 'A' in the model that is trained. Use a teacher of the student's family"
    ]


def add_token(folder, token):
    """Gives a model's tokenizer one more token, behind the last row of its embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([*(f"<{number}>" for number in range(len(tokenizer), rows)), token])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def test_a_token_that_only_one_has_is_refused_where_the_rows_use_it(run, pair, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(pair[0], student)
    number = add_token(student, "<much>")
    larger = AutoModelForCausalLM.from_pretrained(student)
    larger.resize_token_embeddings(number + 1)
    larger.save_pretrained(student)
    plain, marked = ({"prompt": "How much?", "completion": text} for text in ("Two.", "<much>"))
    assert run("--lmbda 0 --check", [plain] * 4, student)[0] == 0
    status, _, said = run("--lmbda 0 --check", [plain, marked], student)
    assert status == 2
    assert f"has no token {number} ('<much>'), which the student's template or data use" in said[-1]


def test_a_smaller_teacher_is_wondered_at_and_not_refused(run, pair, tmp_path):
    save_qwen(tmp_path / "large", make_qwen(1, hidden=64))
    status, out, lines = run("--check", model=tmp_path / "large")
    assert (status, lines) == (0, [])
    assert any(line.startswith("warning   the teacher has 0M parameters, the student 0M") for line in out)
    status, out, _ = run("--check", teacher=tmp_path / "large")
    assert status == 0 and not [line for line in out if line.startswith("warning   the teacher")]


def test_the_other_script_says_which_one_distils(tmp_path, pair, capsys):
    words = f"--rlhf_type GKD --model_name_or_path {pair[0]} --output_dir {tmp_path / 'out'}"
    assert train_rlhf.main([*words.split(), "--train_data_path", "data/sft.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: --rlhf_type GKD: no such method. ") and line.endswith(". That is train_gkd.py")


# (what others type, what is said, where in the plan it is seen)
RENAMED = [
    ("--max_new_tokens 2047", "--max_new_tokens is read as --max_completion_length", None),
    ("--lora_r 5 --train_mode lora", "--lora_r is read as --lora_rank", "LoRA rank 5, alpha 16"),
    ("--torch_dtype float32", "--torch_dtype is read as --dtype", "full; float32"),
    ("--use_peft", "--use_peft is read as --train_mode lora", "lora, LoRA rank 32"),
    ("--use_peft True", "--use_peft is read as --train_mode lora", "lora, LoRA rank 32"),
    ("--use_peft False", "--use_peft is read as --train_mode full", "full; float32"),
]


@pytest.mark.parametrize("flags, note, seen", RENAMED, ids=[flags for flags, *_ in RENAMED])
def test_a_flag_is_read_by_the_name_that_others_have_for_it(flags, note, seen, run):
    status, out, lines = run(f"--check --lmbda 1 --max_drop_fraction 1 {flags}")
    assert lines[0] == f"note: {note}"
    if seen:
        assert (status, len(lines)) == (0, 1) and seen in line_with(out, "mode ")
    else:  # one token of 2048 is left for the prompt
        assert status == 2 and "6 prompt leaves no room for an answer" in lines[1]


def test_teacher_and_data_are_read_by_the_names_that_trls_script_has_for_them(pair, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", CHATS)
    words = f"--model_name_or_path {pair[0]} --teacher_model {pair[1]} --dataset_name {rows} --check"
    assert train_gkd.main([*words.split(), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "note: --dataset_name is read as --train_data_path",
        "note: --teacher_model is read as --teacher_model_name_or_path",
    ]
    assert "data      6 rows to train on" in said.out
    assert line_with(said.out.splitlines(), "teacher   ").startswith(f"teacher   {pair[1]}, held in ")


def test_the_plan_names_the_answers_to_train_on_and_the_divergence(run):
    own, data, teacher = "the student's own answers", "the answers in the data", "the teacher's answers"
    facts = {
        "": (own, "50%", data, "; Jensen-Shannon divergence (beta 0.5), temperature 1"),
        "--seq_kd True --beta 0": (teacher, "; forward KL (beta 0), temperature 1"),
        "--lmbda 1 --beta 1 --temperature 0.9": (own, "; reverse KL (beta 1), temperature 0.9"),
        "--lmbda 0.25 --beta 0.1": (own, "25%", data, "; generalized Jensen-Shannon divergence (beta 0.1)"),
    }
    for flags, expected in facts.items():
        line = line_with(run(f"--check {flags}")[1], "distils ")
        assert all(fact in line for fact in expected), line
        assert {fact for fact in (own, data, teacher, "%") if fact in line} == {
            fact for fact in (own, data, teacher, "%") if fact in " ".join(expected)
        }


def test_parameters_are_counted_from_the_headers_of_the_files(pair):
    assert ModelFolder.at(pair[0]).numbers == sum(p.numel() for p in make_qwen(1, hidden=32).parameters())
