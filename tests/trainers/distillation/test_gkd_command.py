"""The command. `pytest tests/trainers/distillation/test_gkd_command.py`"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_args.methods import ANSWERED, DISTILLATION
from tests.conftest import ROOT, make_tokenizer, read_rows, undocumented, write_rows
from tests.trainers.distillation.conftest import (
    CHATS,
    FAST,
    Loaded,
    answers_logits,
    line_with,
    make_qwen,
    save_qwen,
    says,
)
from trainers.gkd_trainer import HELD_OUT
from utils.data.prepare import prepare_rows
from utils.data.rows import make_rows
from utils.models import load as models_load, sampling

# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


ASKED = [says(f"Say {n}.") for n in range(6)]


def answers_in(folder):
    """{file: lines} of all that is in the folder that answers are kept in."""
    return {file: file.read_text().splitlines() for file in sorted(folder.glob("*/answers-*.jsonl"))}


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert before == []
    status, out, lines = run("--check --seq_kd True --eval_fraction 0.2")
    assert (status, lines) == (0, [])
    assert out[-1] == "checked   nothing stands in the way; no model was loaded, nothing was written; 1 warning"
    assert line_with(out, "warning ").startswith("warning   a step takes ")
    assert f"answers   5 by the teacher, kept in {tmp_path / 'answers'}" in out
    assert "data      5 rows to train on, 1 held out; refused: none" in out
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "rows.jsonl"]


def test_a_student_comes_nearer_to_its_teacher_and_the_run_says_how_much(run, tmp_path):
    status, out, _ = run("--lmbda 0 --beta 0 --max_steps 12 --learning_rate 1e-2 --eval_fraction 0.34")
    assert status == 0
    before, after = read_rows(tmp_path / "out" / "eval.jsonl")
    assert {f"eval_{name}" for name in HELD_OUT} <= set(before)
    assert (before["step"], after["step"]) == (0, 12)
    assert after["eval_forward_kl"] < 0.8 * before["eval_forward_kl"]
    assert after["eval_teacher_loss"] == before["eval_teacher_loss"]  # nobody trained the teacher
    for line in (before, after):
        assert line["eval_loss"] == pytest.approx(line["eval_forward_kl"], rel=1e-5)  # of beta 0, in one batch
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())["held_out"]
    labels = {label: name for label, name in DISTILLATION["GKD"].metrics}
    assert set(labels.values()) == set(HELD_OUT)
    for label, name in labels.items():
        assert card["before"][label] == before[f"eval_{name}"] and card["after"][label] == after[f"eval_{name}"]
    shown = line_with(out, "forward KL").split()
    assert shown[2:] == [f"{line['eval_forward_kl']:.4f}" for line in (before, after)]
    assert f"continue  TEACHER={card_teacher(tmp_path)} LMBDA=0 BETA=0 " in line_with(out, "continue")


def card_teacher(tmp_path):
    return json.loads((tmp_path / "out" / "run_card.json").read_text())["arguments"]["teacher_model_name_or_path"]


@pytest.mark.parametrize("ours, theirs", [(151936, 152064), (152064, 151936)])
def test_qwens_two_sizes_of_vocabulary_train_together(ours, theirs, run, tmp_path):
    student = save_qwen(tmp_path / "student", make_qwen(1, ours, hidden=4))
    teacher = save_qwen(tmp_path / "teacher", make_qwen(2, theirs, hidden=4))
    status, out, _ = run("--lmbda 0 --max_steps 1 --eval_fraction 0.2", model=student, teacher=teacher)
    assert status == 0
    note = line_with(out, "note      the student has")
    assert f"student has {ours}" in note and f"teacher {theirs}" in note and " 151936 tokens" in note
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.get_input_embeddings().weight.shape == saved.lm_head.weight.shape == (ours, 4)
    assert read_rows(tmp_path / "out" / "metrics.jsonl")[0]["loss"] > 0


@pytest.mark.parametrize(
    "ours, theirs, flags", [(600, 264, "--lmbda 1"), (264, 600, "--seq_kd True")], ids=["student", "teacher"]
)
def test_whoever_answers_says_nothing_that_the_other_has_no_row_for(ours, theirs, flags, run, tmp_path):
    # more than half of what the larger one would say are rows that no token stands for, and the other would not have
    student = save_qwen(tmp_path / "student", make_qwen(1, ours, sharp=1))
    teacher = save_qwen(tmp_path / "teacher", make_qwen(2, theirs, sharp=1))
    status, _, _ = run(f"{flags} --max_steps 1", model=student, teacher=teacher)
    assert status == 0


# ── a teacher that is the student's own base ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_teacher_that_is_what_the_student_starts_from_is_refused(mode, refused, pair):
    (line,) = refused(f"--train_mode {mode}", teacher=pair[0])
    assert line.startswith(f"--teacher_model_name_or_path {pair[0]}: ") and "--model_name_or_path" in line


def test_an_adapter_learns_from_its_base_as_from_a_copy_of_it(run, pair, trainers, tmp_path):
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), shape).save_pretrained(tmp_path / "adapter")
    models_load.load_tokenizer(pair[0]).save_pretrained(tmp_path / "adapter")
    shutil.copytree(pair[0], tmp_path / "copy")
    logs = []
    for teaching, said in ((pair[0], "no second copy"), (tmp_path / "copy", "held in float32")):
        out = tmp_path / f"out-{len(logs)}"
        flags = "--lmbda 0 --train_mode lora --max_steps 2 --learning_rate 1e-2 --eval_fraction 0.34"
        status, lines, _ = run(flags, model=tmp_path / "adapter", teacher=teaching, out=out)
        assert status == 0 and said in line_with(lines, "teacher   ")
        assert undocumented("GKD", out) == []
        logs.append(read_rows(out / "metrics.jsonl") + read_rows(out / "eval.jsonl"))
    assert trainers[0].teacher_model is None and trainers[1].teacher_model is not None
    assert logs[0][0]["loss"] > 1e-3
    names = ["loss", "eval_forward_kl", "eval_teacher_loss"]
    mine, copied = ([line[name] for line in log for name in names if name in line] for log in logs)
    assert mine == pytest.approx(copied, rel=1e-4)  # float32, and an adapter's product merged into no weight
    assert len(mine) == 2 + 2 * 2


# ── SeqKD, and a run that is killed ──────────────────────────────────────────────────────────────────────────────────


MANY = [says(f"Say {'much ' * (n % 7)}{n}.") for n in range(48)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pair):
    """A folder in which SeqKD was killed while its teacher answered: (folder, its lines then)."""
    folder = tmp_path_factory.mktemp("killed")
    rows = write_rows(folder / "rows.jsonl", MANY)
    flags = f"--model_name_or_path {pair[0]} --teacher_model_name_or_path {pair[1]} --train_data_path {rows} "
    flags += f"--output_dir {folder / 'out'} --answers_dir {folder / 'answers'} {FAST} --max_completion_length 64 "
    words = [sys.executable, "train_gkd.py", *flags.split(), "--seq_kd", "True", "--answers_batch_size", "2"]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said)
    until = time.monotonic() + 120
    while sum(map(len, answers_in(folder / "answers").values())) < 6:
        assert process.poll() is None and time.monotonic() < until, (folder / "said").read_text()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (file,) = answers_in(folder / "answers")
    with open(file, "a") as handle:
        handle.write('{"prompt": "0a')  # as a kill in the midst of a line leaves it
    lines = answers_in(folder / "answers")[file][:-1]
    assert 6 <= len(lines) < len(MANY) and not (folder / "out").exists()
    return folder, file, lines


def test_a_killed_seqkd_goes_on_and_nothing_is_answered_twice(killed, run):
    folder, file, lines = killed
    flags = f"--seq_kd True --answers_dir {folder / 'answers'} --max_completion_length 64 --answers_batch_size 2"
    status, out, _ = run(f"{flags} --max_steps 1", rows=MANY)
    assert status == 0
    assert f"answers   {48 - len(lines)} to sample, {len(lines)} in {file.parent} already" in out
    found = answers_in(folder / "answers")
    assert found.pop(file)[:-1] == lines
    (others,) = found.values()
    keys = [json.loads(line)["prompt"] for line in lines + others]
    assert len(keys) == len(set(keys)) == 48

    # once more: the teacher is not even loaded
    status, out, _ = run(f"{flags} --max_steps 1 --overwrite_output_dir", rows=MANY)
    assert status == 0 and f"answers   0 to sample, 48 in {file.parent} already" in out
    assert answers_in(folder / "answers")[file][:-1] == lines and len(answers_in(folder / "answers")) == 2


def test_what_is_trained_on_are_the_teachers_answers(run, tmp_path, trainers):
    assert run("--seq_kd True --max_steps 1 --eval_fraction 0.34")[0] == 0
    (lines,) = answers_in(tmp_path / "answers").values()
    answers = {line["prompt"]: line["ids"] for line in map(json.loads, lines)}
    rows = list(trainers[0].train_dataset)
    assert len(rows) == len(answers) == 4
    assert [row["completion_ids"] for row in rows] == [answers[sampling.prompt_key(row["prompt_ids"])] for row in rows]
    # the held-out rows keep the answers of the data
    decode = trainers[0].processing_class.decode
    held = {decode(row["completion_ids"]) for row in trainers[0].eval_dataset}
    assert held <= {f"{n} it is.<|im_end|>" for n in range(6)} and len(held) == 2


def test_other_settings_and_other_weights_have_answers_of_their_own(run, pair, tmp_path, monkeypatch):
    def load_policy(**source):
        raise Loaded

    monkeypatch.setattr(models_load, "load_policy", load_policy)
    teaching = tmp_path / "teacher"
    shutil.copytree(pair[1], teaching)
    rows = ASKED[:1]
    for count, flags in enumerate(("", "", "--temperature 0.7", "--max_completion_length 9", "--seed 7")):
        with pytest.raises(Loaded):
            run(f"--seq_kd True {flags}", rows=rows, teacher=teaching)
        assert len(answers_in(tmp_path / "answers")) == max(count, 1)
    save_qwen(teaching, make_qwen(3, hidden=32, sharp=40))
    with pytest.raises(Loaded):
        run("--seq_kd True", rows=rows, teacher=teaching)
    assert len(answers_in(tmp_path / "answers")) == 5


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(rows, **limits):
    """[(prompt, answer)] as text, of rows as they come to the trainer, and what became of the others."""
    tokenizer = make_tokenizer()
    made, dropped = make_rows([(f"row {n}", row) for n, row in enumerate(rows, 1)], ANSWERED, [])
    assert not dropped
    prepared = prepare_rows(made, tokenizer, ANSWERED, **{"max_length": 1024} | limits)
    return [
        tuple(map(tokenizer.decode, (row["prompt_ids"], row["completion_ids"]))) for row in prepared.rows
    ], prepared


ASKS, ANSWERS = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>"


@pytest.mark.parametrize(
    "row, expected",
    [
        (says("Why?", "So."), (ASKS, ANSWERS)),
        (
            {"prompt": says("Why?")["messages"], "completion": [{"role": "assistant", "content": "So."}]},
            (ASKS, ANSWERS),
        ),
        ({"prompt": "Why? ", "completion": "So."}, ("Why? ", ANSWERS)),
        ({"prompt": says("Why?")["messages"]}, (ASKS, "")),
        ({"prompt": "Why? "}, ("Why? ", "")),
        (says("Why?"), (ASKS, "")),
    ],
    ids=["messages", "chat", "text", "asked as a chat", "asked as text", "messages without an answer"],
)
def test_a_row_is_a_prompt_and_its_answer_with_one_end_of_turn(row, expected):
    assert prepare([row])[0] == [expected]


def test_the_answer_of_a_dialogue_is_the_assistants_last_turn():
    dialogue = {"messages": says("Who?", "I.")["messages"] + says("Why?", "So.")["messages"]}
    before = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n"
    assert prepare([dialogue])[0] == [(before + ASKS, ANSWERS)]


def test_an_answer_that_is_too_long_is_cut_and_counted():
    # the prompt: 4 special tokens and 5 + 4 + 1 + 10 bytes ("user\n", "Why?", "\n", "assistant\n"), 23 in all
    rows, prepared = prepare([says("Why?", "So it is."), says("Why?", "So.")], max_length=28)
    assert [len(row["prompt_ids"]) for row in prepared.rows] == [23, 23]
    assert rows == [(ASKS, "So it"), (ASKS, ANSWERS)] and prepared.cut == 1


def test_a_cut_answer_is_said(run):
    assert (
        "          1 answers are cut at --max_length 28"
        in run("--lmbda 0 --check --max_length 28", rows=[says("Why?", "So it is."), says("Why?", "So.")])[1]
    )


PROMPTS_ALONE = {
    "chats": [CHATS[0], CHATS[1], says("Why?"), says("Who?")],
    "text": [{"prompt": "Say. ", "completion": "So."}, {"prompt": "Say. ", "completion": None}, {"prompt": "Why? "}],
}


@pytest.mark.parametrize("lmbda", ["0", "0.5"])
@pytest.mark.parametrize("rows, line, lacking", [("chats", 3, "2 of 4"), ("text", 2, "2 of 3")])
def test_rows_without_an_answer_are_refused_where_it_is_learnt_from(rows, line, lacking, lmbda, refused, tmp_path):
    (problem,) = refused(f"--lmbda {lmbda}", rows=PROMPTS_ALONE[rows])
    assert problem.startswith(f"{tmp_path / 'rows.jsonl'}:{line}: no answer")
    assert all(fact in problem for fact in (f"{lacking} rows", f"--lmbda {lmbda}", "--seq_kd True", "--lmbda 1"))


@pytest.mark.parametrize("flags", ["--lmbda 1", "--seq_kd True"])
@pytest.mark.parametrize("rows", PROMPTS_ALONE)
def test_rows_without_an_answer_serve_where_a_model_answers(rows, flags, run):
    status, out, _ = run(f"{flags} --check", rows=PROMPTS_ALONE[rows])
    assert status == 0 and f"data      {len(PROMPTS_ALONE[rows])} rows to train on" in line_with(out, "data ")


LONG = says("Say it. " * 10, "It.")  # 80 bytes, 19 more tokens around them; and 16 at most of the others


@pytest.mark.parametrize(
    "flags, dropped", [("--lmbda 1", True), ("--lmbda 0.5", True), ("--seq_kd True", True), ("--lmbda 0", False)]
)
def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_where_one_is_sampled(flags, dropped, run):
    # the models hold 2048 tokens
    flags += " --check --max_completion_length 1990 --max_drop_fraction 0.5"
    status, out, _ = run(flags, rows=[*CHATS, LONG])
    counts = "6 rows", "1 prompt leaves no room for an answer" if dropped else "none"
    counts = counts if dropped else ("7 rows", "none")
    said = f"data      {counts[0]} to train on, none held out (--eval_fraction 0.1 would); refused: {counts[1]}"
    assert (status, line_with(out, "data ")) == (0, said)


def test_a_held_out_prompt_that_leaves_no_room_for_the_teachers_answer_is_dropped(run, tmp_path):
    # nothing is sampled for training, and the teacher answers what is held out without an answer
    held = write_rows(tmp_path / "held.jsonl", [*ASKED, {"messages": LONG["messages"][:1]}])
    flags = f"--lmbda 0 --check --max_completion_length 1990 --max_drop_fraction 0.5 --eval_data_path {held}"
    status, out, _ = run(flags)
    assert status == 0
    assert line_with(out, "answers ").startswith("answers   6 by the teacher")
    assert line_with(out, "data ") == (
        "data      6 rows to train on, 6 held out; refused: 1 prompt leaves no room for an answer"
    )


def test_held_out_prompts_are_answered_by_the_teacher(run, tmp_path, trainers):
    held = write_rows(tmp_path / "held.jsonl", [says("Who?"), says("What is it?")])
    status, out, _ = run(f"--lmbda 1 --max_steps 1 --eval_data_path {held}", rows=ASKED)
    assert status == 0
    (lines,) = answers_in(tmp_path / "answers").values()
    answers = {line["prompt"]: line["ids"] for line in map(json.loads, lines)}
    rows = list(trainers[0].eval_dataset)
    assert len(answers) == len(rows) == 2 and line_with(out, "answers   2 to sample, 0 in ")
    assert [row["completion_ids"] for row in rows] == [answers[sampling.prompt_key(r["prompt_ids"])] for r in rows]
    before, after = read_rows(tmp_path / "out" / "eval.jsonl")
    assert before["eval_completions/mean_length"] == sum(map(len, answers.values())) / 2
    # what the teacher says of its own answers, by a model that the trainer never had
    model = AutoModelForCausalLM.from_pretrained(trainers[0].args.teacher_model_name_or_path).eval()
    with torch.no_grad():
        logs = answers_logits(model, rows).log_softmax(-1)
    tokens = torch.tensor([token for row in rows for token in row["completion_ids"]])
    by_hand = -logs.gather(1, tokens[:, None]).mean().item()
    assert before["eval_teacher_loss"] == pytest.approx(by_hand, rel=1e-5)  # float32
