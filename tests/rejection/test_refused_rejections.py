"""What is refused. `pytest tests/rejection/test_refused_rejections.py`"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    Qwen2ForSequenceClassification,
)

import rejection_sampling
from tests.conftest import ROOT, make_model, write_rows
from tests.rejection.conftest import CHATS, FAST, REWARD, TEXTS, Loaded, files_in, line_with, read, says, stamps
from utils.models import load as models_load
from utils.rejection import folder as rejection_folder, stages

# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(flags, ...) is the list of problems, said before a model is loaded and with nothing written."""

    def load(*args, **kwargs):
        raise Loaded

    def refused(*args, out=tmp_path / "out", **kwargs):
        before = stamps(out)
        status, said, lines = run(*args, out=out, **kwargs)
        assert (status, said) == (2, []), lines
        assert lines and all(one.startswith("refused: ") for one in lines), lines
        assert stamps(out) == before
        return [one.removeprefix("refused: ") for one in lines]

    monkeypatch.setattr(models_load, "load_model", load)
    return refused


def test_the_command_of_these_tests_is_sound_but_for_what_each_adds(run, refused):
    with pytest.raises(Loaded):
        run()


# flags -> the beginning of each problem … further facts in it
BAD = [
    ("--num_completions 0", ["--num_completions 0: … at least 1"]),
    ("--max_new_tokens 0", ["--max_new_tokens 0: … at least 1"]),
    ("--max_prompt_length 0", ["--max_prompt_length 0: … at least 1"]),
    ("--temperature -1", ["--temperature -1: … at least 0"]),
    ("--temperature nan", ["--temperature nan: … at least 0"]),
    ("--temperature 0", ["--temperature 0 with --num_completions 4: … --temperature 1 … --num_completions 1"]),
    ("--top_p 0", ["--top_p 0: … above 0 … 1"]),
    ("--top_p 1.1", ["--top_p 1.1: … above 0 … 1"]),
    ("--top_k -1", ["--top_k -1: … at least 0"]),
    ("--generate_batch_size 0", ["--generate_batch_size 0: … at least 1"]),
    ("--score_batch_size 0", ["--score_batch_size 0: … at least 1"]),
    ("--max_failed_fraction 2", ["--max_failed_fraction 2: … at least 0 … at most 1"]),
    ("--reward_weights 1 2", ["--reward_weights: 2 … 1 rewards"]),
    ("--reward_weights nan", ["--reward_weights nan: … finite"]),
    ("--stages generate,judge", ["--stages generate,judge: … generate, score, select"]),
    ("--stages ,", ["--stages : … generate, score, select", "--output_dir "]),
    ("--write SFT,PPO", ["--write PPO: … SFT, "]),
    ("--write ,", ["--write: … SFT, "]),
    ("--select worst", ["--select: invalid choice: 'worst' (choose from"]),
    ("--select threshold", ["--select threshold and --threshold … both, or neither"]),
    ("--threshold 3", ["--select threshold and --threshold … both, or neither"]),
    ("--select threshold --threshold nan", ["--threshold nan: … finite"]),
    ("--select_k 0", ["--select_k 0: … at least 1"]),
    ("--min_margin -1", ["--min_margin -1: … at least 0"]),
    ("--chunk_size 0", ["--chunk_size 0: … at least 1"]),
    ("--max_samples 0", ["--max_samples 0: … 1"]),
    ("--held_out_prompts True", ["--held_out_prompts: … --eval_fraction 0.1"]),
    ("--reference_column chosen", ["--reference_column chosen: no such column"]),
    ("--then PPO", ["--then PPO: … train_rlhf.py … DPO, CPO, SimPO, "]),
    ("--then DPOO", ["--then DPOO: no such method … DPO, "]),
    ("--then SFT --rounds 0", ["--rounds 0: … at least 1"]),
    ("--then SFT --stages generate", ["--then with --stages generate: … Remove --stages"]),
    ("--then Reward --rounds 2", ["--then Reward with --rounds: … --rounds 1"]),
    ("--rounds 2", ["--rounds 2: … --then DPO"]),
    ("--lora_rank 8", ["--lora_rank: … --then"]),
    ("--lora-rank 8", ["--lora_rank: … --then"]),
    ("--train_mode full", ["--train_mode: … --then"]),
    ("--eval_data_path data/prompts.jsonl", ["--eval_data_path: … --then"]),
    ("--num_completion 4", ["--num_completion: no such flag … Did you mean --num_completions?"]),
    ("--learning_rate 1", ["--learning_rate: no such flag … DPO, "]),
    ("--seed 1 4", ["4: not a flag"]),
    ("--judge_template x.txt", ["--judge_template: … --judge_model NAME"]),
    ("--api_model x", ["--api_model: … transformers … --engine openai"]),
    ("--num_completions 0 --top_p 2 --select_k 0", ["--num_completions 0:", "--top_p 2:", "--select_k 0:"]),
]


@pytest.mark.parametrize("flags, problems", BAD, ids=[flags for flags, _ in BAD])
def test_a_flag_that_is_wrong_is_refused(flags, problems, refused):
    for said, problem in zip(refused(flags), problems, strict=True):
        start, *facts = problem.split(" … ")
        assert said.startswith(start) and all(fact in said for fact in facts), said


def test_no_scorer_is_refused_unless_nothing_is_scored(refused, run):
    (line,) = refused(reward=None)
    assert all(
        flag in line for flag in ("--reward_funcs data/rewards.py:brevity", "--reward_model_path", "--judge_model")
    )
    with pytest.raises(Loaded):
        run("--stages generate", reward=None)


def test_model_and_data_that_are_missing_are_refused(tmp_path, capsys):
    assert rejection_sampling.main(["--output_dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = ["no scorer", "--train_data_path: missing", "--model_name_or_path: missing"]
    assert [one.removeprefix("refused: ")[: len(start)] for one, start in zip(lines, starts, strict=True)] == starts


def test_a_system_prompt_for_data_that_are_plain_text_is_refused(refused, tmp_path):
    lines = refused("--system_prompt Hi.", rows=TEXTS[:2])
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path / 'rows.jsonl'}:{n}" for n in (1, 2)]
    assert all("--system_prompt" in line for line in lines)


# ── a folder of other settings ───────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_a_run_with_other_settings_is_refused_by_what_differs(done, refused):
    for flags, facts in (
        ("--max_samples 3 --temperature 0.5", [("temperature 1.0", "0.5")]),
        (
            "--seed 1 --max_samples 5 --system_prompt Hi.",
            [("max_samples 3", "5"), ("seed 42", "1"), ("system_prompt null", '"Hi."')],
        ),
    ):
        for line, (kept, new) in zip(refused(flags), facts, strict=True):
            assert line.startswith(f"--output_dir {done}: ") and kept in line and f" {new}. " in line
            assert "another --output_dir" in line and "--overwrite_output_dir" in line


def test_other_data_and_another_model_are_other_settings(done, refused, tmp_path):
    (problem,) = refused("--max_samples 3", rows=CHATS[:5])
    assert problem.startswith(f'--output_dir {done}: holds a run with data {{"{tmp_path / "rows.jsonl"}": ')
    other = make_model(tmp_path / "other", seed=3)
    starts = [f"--output_dir {done}: holds a run with {name} " for name in ("model", "weights")]
    found = refused("--max_samples 3", model=other)
    assert [one[: len(start)] for one, start in zip(found, starts, strict=True)] == starts


def test_an_edited_reward_function_and_other_scorers_are_refused(done, refused, run, tmp_path, monkeypatch):
    file = tmp_path / "reward.py"
    fix = f"rm -r {done}/scores.*"
    (problem,) = refused("--max_samples 3 --reward_weights 2")
    assert "reward_weights null" in problem and " [2.0]. " in problem and fix in problem
    file.write_text(REWARD.replace("% 11", "% 7"))
    (problem,) = refused("--max_samples 3")
    assert problem.startswith(f'--output_dir {done}: holds a run with reward_funcs {{"{file}:total": ')
    assert fix in problem
    # which does what it says
    subprocess.run(f"rm -r {done}/scores.*", shell=True, check=True)
    before = (done / "completions.jsonl").read_bytes()
    assert run("--max_samples 3")[0] == 0 and (done / "completions.jsonl").read_bytes() == before
    totals = [sum(map(ord, one["completion"])) % 7 for one in read(done / "completions.jsonl")]
    assert [one["score"] for one in read(done / "scores.jsonl")] == totals


def test_what_is_selected_may_change(done, run):
    assert run("--max_samples 3 --select top_k --select_k 3 --write SFT")[0] == 0
    assert len(read(done / "sft.jsonl")) == 9


def test_stages_that_find_nothing_of_those_before_are_refused(refused, tmp_path):
    out = tmp_path / "out"
    for stage in ("score", "select"):
        (line,) = refused(f"--stages {stage}")
        assert line.startswith(f"--output_dir {out}: ") and "completions" in line and "generate to --stages" in line


def test_a_folder_that_holds_something_else_is_refused(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    for flags in ("", "--overwrite_output_dir", "--then SFT"):
        (line,) = refused(flags)
        assert line.startswith(f"--output_dir {tmp_path / 'out'}: ") and "another folder" in line


def test_an_output_folder_that_is_a_file_or_is_missing_is_refused(refused, tmp_path, capsys):
    (tmp_path / "out").write_text("dear")
    assert refused() == [f"--output_dir {tmp_path / 'out'}: a file of that name is there. Name a folder"]
    assert rejection_sampling.main("--reward_funcs data/rewards.py:brevity".split()) == 2
    assert "refused: --output_dir: missing." in capsys.readouterr().err


def test_overwriting_starts_afresh(done, run):
    (done / "left.txt").write_text("over")
    status, out, _ = run("--max_samples 3 --temperature 0.5 --overwrite_output_dir")
    assert status == 0 and not (done / "left.txt").exists()
    assert line_with(out, "generate ") == "generate  12 answers to sample, 0 are there"


def test_overwriting_works_behind_a_link(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert run(rows=[*CHATS[:3], {"prompt": "text among chats"}])[0] == 2
    assert (tmp_path / "out").is_symlink() and not any((tmp_path / "disk").iterdir())
    (tmp_path / "disk" / "settings.json").write_text("{}")
    (tmp_path / "disk" / "old").symlink_to(tmp_path)
    assert run("--max_samples 3 --overwrite_output_dir")[0] == 0
    assert (tmp_path / "out").is_symlink() and not (tmp_path / "disk" / "old").exists() and tmp_path.exists()


def test_overwriting_does_not_delete_what_the_run_needs(done, refused):
    data_path = shutil.copy(done / "prompts.jsonl", done / "mine.jsonl")
    (problem,) = refused("--overwrite_output_dir", rows=str(data_path))
    assert problem.startswith(f"--overwrite_output_dir: would delete {data_path}, which --train_data_path reads")


def test_overwriting_does_not_delete_a_recipe_a_reward_function_or_a_judges_template(done, refused):
    template = Path("data/judge_score.txt").read_text()
    judged = f"--judge_model m --judge_base_url http://127.0.0.1:9/v1 --judge_template {done}/mine.txt"
    cases = [
        ("mine.yaml", "seed: 1", "--config", f"--config {done}/mine.yaml"),
        ("mine.txt", template, "--judge_template", judged),
        ("mine.py", REWARD, "--reward_funcs", f"--reward_funcs {done}/mine.py:total"),
    ]
    for name, content, flag, given in cases:
        (done / name).write_text(content)
        reward = None if flag == "--reward_funcs" else "total"
        problem = refused(f"--overwrite_output_dir {given}", reward=reward)[
            -1
        ]  # a server that is not there is another
        assert f"would delete {done}/{name}" in problem and flag in problem


OVER = pytest.param("--overwrite_output_dir")


@pytest.mark.parametrize("flags", ["", OVER])
def test_a_folder_in_which_another_process_works_is_left_as_it_is(flags, done, refused, monkeypatch):
    monkeypatch.setattr(rejection_folder, "LOCK_SECONDS", 0)
    with rejection_folder.locked(done):
        assert refused(f"--max_samples 3 {flags}") == [
            f"--output_dir {done}: process {os.getpid()} is at work in it. Wait, or end it"
        ]


def test_a_refusal_in_a_folder_of_rounds_deletes_none_of_them(refused, tmp_path):
    out = tmp_path / "out"
    (out / "round-1" / "trained").mkdir(parents=True)
    (out / "round-1" / "trained" / "model.safetensors").write_text("hours")
    (out / "rounds.json").write_text("[]")
    refused("--max_prompt_length 1")  # every prompt is too long
    assert (out / "round-1" / "trained" / "model.safetensors").exists()


# ── scorers that cannot score ────────────────────────────────────────────────────────────────────────────────────────


def test_a_language_model_as_reward_model_is_refused(refused, tiny_model):
    assert refused(f"--reward_model_path {tiny_model}", reward=None) == [
        f"--reward_model_path {tiny_model}: a language model, whose score head would be random. Train one with "
        "--rlhf_type Reward"
    ]


def make_classifier(folder, tiny_model, head):
    """A sequence classifier on the tiny model's tokenizer, with its head's weights or without."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    torch.manual_seed(1)
    model = Qwen2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    if not head:
        tensors = load_file(folder / "model.safetensors")
        del tensors["score.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_reward_model_without_its_head_is_refused_before_anything_is_sampled(run, tiny_model, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise Loaded

    folder = make_classifier(tmp_path / "judge", tiny_model, head=False)
    monkeypatch.setattr(models_load, "load_model", load)  # of the one that answers
    status, _, lines = run(f"--reward_model_path {folder}", reward=None)
    assert (status, lines) == (
        2,
        [
            f"refused: --reward_model_path {folder}: no weights for score.weight in it. A reward model has a trained "
            "head"
        ],
    )
    assert not (tmp_path / "out").exists()


def test_a_reward_model_scores_beside_a_function_each_by_its_weight(run, tiny_model, tmp_path):
    folder = make_classifier(tmp_path / "judge", tiny_model, head=True)
    assert run(f"--reward_model_path {folder} --reward_weights 0.5 -2 --score_batch_size 3")[0] == 0
    lines = read(tmp_path / "out" / "scores.jsonl")
    assert len(lines) == 32 and len({one["scores"]["judge"] for one in lines}) > 16
    for one in lines:
        assert set(one["scores"]) == {"total", "judge"}
        assert one["score"] == pytest.approx(0.5 * one["scores"]["total"] - 2 * one["scores"]["judge"])


RAISES = REWARD.replace("    return", '    if len(texts) > 4:\n        raise KeyError("no such answer")\n    return')


def test_a_reward_function_that_raises_ends_the_run_in_one_line_and_the_answers_stay(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES)  # not on the four that it is tried on
    status, _, lines = run()
    assert (status, len(lines)) == (1, 1)
    said = f"failed: total raised KeyError: 'no such answer' at {tmp_path / 'reward.py'}:7"
    assert lines[0].startswith(said)
    answers = (tmp_path / "out" / "completions.jsonl").read_bytes()
    (tmp_path / "reward.py").write_text(REWARD)
    status, out, _ = run()
    assert status == 0 and line_with(out, "generate ") == "generate  0 answers to sample, 32 are there"
    assert (tmp_path / "out" / "completions.jsonl").read_bytes() == answers


def test_the_reason_of_a_failure_stands_on_a_line_of_its_own(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES)
    assert run()[0] == 1 and "failed: total raised" in run.err
    assert any(line.startswith("failed: ") for line in re.split(r"[\r\n]+", run.err))


def test_a_reward_function_that_raises_on_what_it_is_tried_on_is_refused(run, tmp_path):
    (tmp_path / "reward.py").write_text(RAISES.replace("> 4", "> 0"))
    status, _, lines = run()
    assert status == 2 and lines[0].startswith("refused: --reward_funcs: tried on the first 4 rows, total raised KeyE")
    assert len(lines) == 1 and not (tmp_path / "out").exists()


def test_scores_that_do_not_apply_are_failed_and_tried_again(run, tmp_path):
    # None: the function does not judge this answer. Of 32, those whose total is above 5
    (tmp_path / "reward.py").write_text(REWARD.replace("[float(", "[None if sum(map(ord, text)) % 11 > 5 else float("))
    status, out, lines = run()
    scores = read(tmp_path / "out" / "scores.jsonl")
    failed = sum("failed" in one for one in scores)
    assert 4 <= failed < 32 and len(scores) == 32 and all(one["score"] <= 5 for one in scores if "score" in one)
    share = f"{failed / 32:.0%}"
    assert (status, lines) == (1, [f"failed: {share} failed, more than --max_failed_fraction 0.1"])
    assert line_with(out, "failed ").startswith(f"failed    {failed} of 32 in {tmp_path / 'out' / 'scores.jsonl'}: ")
    status, out, _ = run("--max_failed_fraction 1")
    assert status == 0 and line_with(out, "score ") == f"score     {failed} answers to score, {32 - failed} are there"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["failed"], report["answers"]) == (failed, 32 - failed)


def test_an_interrupted_run_is_told_how_it_goes_on(run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "prepare_folder", interrupt)
    status, _, lines = run()
    assert status == 130 and len(lines) == 1 and "--resume_from_checkpoint" not in lines[0]


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def value_of(words, flag):
    return words[words.index(flag) + 1]


def test_each_round_samples_from_the_last_ones_model_and_what_is_done_is_not_done_again(
    run, parts, tiny_model, tmp_path
):
    flags = "--then SFT --rounds 2 --eval_fraction 0.25 --train_mode full --learning_rate 1e-3"
    assert run(flags)[0] == 0
    out, first, second = (tmp_path / "out" / name for name in ("", "round-1", "round-2"))
    samplings = [words for words in parts if words[0] == "rejection_sampling.py"]
    trainings = [words for words in parts if words[0] == "SFT"]
    asked = [tuple(value_of(words, flag) for flag in ("--model_name_or_path", "--output_dir")) for words in samplings]
    assert asked == [
        (tiny_model, str(out / "held-out-0")),
        (tiny_model, str(first)),
        (str(first / "trained"), str(out / "held-out-1")),
        (str(first / "trained"), str(second)),
        (str(second / "trained"), str(out / "held-out-2")),
    ]
    assert [words[1:3] for words in trainings] == [
        [tiny_model, str(first / "sft.jsonl")],
        [str(first / "trained"), str(second / "sft.jsonl")],
    ]
    assert all(words[-2:] == ["--learning_rate", "1e-3"] for words in trainings)
    table = json.loads((out / "rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1, 2] and all("held_out_reward" in row for row in table)
    for row in table:
        scores = [one["score"] for one in read(out / f"held-out-{row['round']}" / "scores.jsonl")]
        assert len(scores) == 2 * 4 and row["held_out_reward"] == pytest.approx(sum(scores) / 8)

    parts.clear()
    assert run(flags)[0] == 0
    assert not [words for words in parts if words[0] == "SFT"]
    assert json.loads((out / "rounds.json").read_text()) == table


def test_reference_answers_are_not_measured_as_the_models(run, parts, tmp_path):
    rows = [{**row, "chosen": says("zzz")} for row in CHATS]  # 3 * 122 = 366 = 33 * 11 + 3
    assert run("--then SFT --eval_fraction 0.25 --reference_column chosen --train_mode full", rows=rows)[0] == 0
    for row in json.loads((tmp_path / "out" / "rounds.json").read_text()):
        folder = tmp_path / "out" / f"held-out-{row['round']}"
        scores = [one["score"] for one in read(folder / "scores.jsonl") if one["sample"] < 4]
        assert row["held_out_reward"] == pytest.approx(sum(scores) / 8)


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--learning_rate 5e-3", "flags of the training"),
        ("--learning_rate 1e-3 --select top_k", "select"),
        ("--learning_rate 1e-3 --then DPO", "then"),
        ("--learning_rate 1e-3 --train_mode lora", "train_mode"),
    ],
)
def test_rounds_that_were_trained_otherwise_are_refused_by_what_differs(flags, name, run, parts, tmp_path):
    assert run("--then SFT --train_mode full --learning_rate 1e-3")[0] == 0
    before = files_in(tmp_path / "out")
    status, _, lines = run(f"--then SFT --train_mode full {flags}")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"refused: --output_dir {tmp_path / 'out'}: holds a run with {name} ")
    assert files_in(tmp_path / "out") == before


def test_a_round_that_selects_nothing_fails_and_says_where_to_look(run, parts, tmp_path):
    status, _, lines = run("--then SFT --keep_cut False")
    ((line,), here) = lines, tmp_path / "out" / "round-1"
    assert status == 1 and line.startswith(f"failed: {here / 'sft.jsonl'}: ") and f"{here}/report.json" in line


def test_a_training_flag_that_is_mistyped_is_refused_before_anything_is_sampled(refused, warm, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm)  # of the training's own check
    assert refused("--then SFT --learning_rat 1e-3") == [
        "--then SFT: --learning_rat: no such flag for SFT. Did you mean --learning_rate?"
    ]


@pytest.mark.slow
def test_two_rounds_of_training_end_to_end(warm, tiny_model, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", CHATS), tmp_path / "out"
    (tmp_path / "reward.py").write_text(REWARD)
    words = f"--model_name_or_path {tiny_model} --train_data_path {rows} "
    words += f"--reward_funcs {tmp_path / 'reward.py'}:total "
    words += f"{FAST} --then SFT --rounds 2 --eval_fraction 0.25 --train_mode full --max_steps 3 --learning_rate 1e-2 "
    command = [warm, "rejection_sampling.py", *f"{words} --output_dir {out}".split()]

    def run():
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    folders = {"round-1", "round-2", "held-out-0", "held-out-1", "held-out-2"}
    assert {file.name for file in out.iterdir()} == folders | {"rounds.json", "settings.json", ".lock"}
    table = json.loads((out / "rounds.json").read_text())
    assert [row["model"] for row in table] == [
        tiny_model,
        str(out / "round-1" / "trained"),
        str(out / "round-2" / "trained"),
    ]
    assert [row.get("rows") for row in table] == [None, 6, 6]
    made_with = json.loads((out / "round-2" / "settings.json").read_text())["generate"]
    assert made_with["model"] == str(out / "round-1" / "trained")
    answers = [(out / name / "completions.jsonl").read_bytes() for name in ("round-1", "round-2")]
    assert answers[0] != answers[1]  # the model has changed
    held = [{one["prompt"] for one in read(out / f"held-out-{n}" / "scores.jsonl")} for n in range(3)]
    sampled = [{one["prompt"] for one in read(out / f"round-{n}" / "scores.jsonl")} for n in (1, 2)]
    assert held[0] == held[1] == held[2] and sampled[0] == sampled[1] and held[0] | sampled[0] == set(range(8))
    assert not held[0] & sampled[0]
    for row in table:
        shown = next(one.split() for one in done.stdout.splitlines() if re.match(f" +{row['round']} ", one))
        assert shown[-2:] == [f"{row['held_out_reward']:.4f}", row["model"]]
    for number in (1, 2):
        card = json.loads((out / f"round-{number}" / "trained" / "run_card.json").read_text())
        assert card["method"] == "SFT"

    before = {name: content for name, content in files_in(out).items() if not name.endswith(".lock")}
    done = run()
    assert done.returncode == 0 and "trains " not in done.stdout, done.stderr
    assert {name: content for name, content in files_in(out).items() if not name.endswith(".lock")} == before
