"""The command. `pytest tests/rejection/test_rejection.py`"""

import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time

import filelock
import pytest

import rejection_sampling
import train_rlhf
from rlhf_args.methods import METHODS
from tests.conftest import ROOT, make_tokenizer, write_rows
from tests.rejection.conftest import (
    CHATS,
    FAST,
    NAMES,
    QUESTIONS,
    REWARD,
    TEXTS,
    Loaded,
    files_in,
    line_with,
    read,
    says,
)
from utils.data.rows import load_rows, make_rows
from utils.models import load as models_load
from utils.rejection import selection
from utils.results import plots

# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


FINAL = ("prompts", "completions", "scores", "sft", "dpo", "kto", "reward")  # .jsonl, with report.json


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Collections of garbage, which a run asks for between its stages, need not look at what the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """{"chat" or "text": folder with a scored pool}, and beside each its words of command."""
    made = {}
    folder = tmp_path_factory.mktemp("scored")
    (folder / "reward.py").write_text(REWARD)
    for kind, rows in (("chat", CHATS), ("text", TEXTS)):
        words = f"--model_name_or_path {tiny_model} --train_data_path {write_rows(folder / f'{kind}.jsonl', rows)} "
        words += f"--reward_funcs {folder / 'reward.py'}:total {FAST} "
        (folder / kind).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "draw_rewards", lambda *args: None)
            assert rejection_sampling.main(f"{words} --output_dir {folder / kind}".split()) == 0
        made[kind] = folder / kind, words
    return made


def test_one_command_samples_scores_and_writes_all_files(run, tmp_path, monkeypatch):
    monkeypatch.undo()  # the picture is drawn
    status, out, lines = run("--num_completions 3 --max_samples 4")
    assert (status, lines) == (0, [])
    files = {f"{name}.jsonl" for name in (*FINAL, "dropped")} | {"report.json", "report.png", "settings.json", ".lock"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert line_with(out, "generate ") == "generate  12 answers to sample, 0 are there"
    assert line_with(out, "prompts ") == "prompts   4; refused: none"


def test_the_lines_and_rows_are_those_of_the_model_and_of_the_scorer(scored):
    folder, _ = scored["chat"]
    answers, scores = read(folder / "completions.jsonl"), read(folder / "scores.jsonl")
    keys = [(n, s) for n in range(8) for s in range(4)]
    assert [(one["prompt"], one["sample"]) for one in answers] == keys
    assert [(one["prompt"], one["sample"]) for one in scores] == keys
    assert all(one["tokens"] == 12 and one["ended"] is False for one in answers)
    totals = [float(sum(map(ord, one["completion"])) % 11) for one in answers]
    assert [one["score"] for one in scores] == totals and len(set(totals)) > 5
    assert [one["scores"] for one in scores] == [{"total": total} for total in totals]
    # the best of each prompt's four, the worst of them, and whence
    for number, (row, pair) in enumerate(zip(read(folder / "sft.jsonl"), read(folder / "dpo.jsonl"), strict=True)):
        mine = totals[4 * number : 4 * number + 4]
        best, worst = mine.index(max(mine)), 3 - mine[::-1].index(min(mine))
        texts = [one["completion"] for one in answers[4 * number : 4 * number + 4]]
        assert row["messages"] == CHATS[number]["prompt"] + says(texts[best])
        assert (pair["chosen"], pair["rejected"]) == (says(texts[best]), says(texts[worst]))
        assert pair["provenance"]["answer"]["rejected"] == {
            "sample": worst, "score": mine[worst], "scores": {"total": mine[worst]},
        }  # fmt: skip


def test_every_row_says_where_it_comes_from(scored, tiny_model):
    folder, _ = scored["text"]
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "seed": 42}
    seen = 0
    for name in NAMES:
        for row in read(folder / f"{name.lower()}.jsonl"):
            whence = row["provenance"]
            assert (whence["model"], whence["engine"], whence["sampling"]) == (tiny_model, "transformers", drawn)
            file, _, number = whence["source"].rpartition(":")
            assert read(file)[int(number) - 1]["prompt"] == row["prompt"]
            traces = whence["answer"].values() if name in ("DPO", "Reward") else [whence["answer"]]
            assert all(set(trace) == {"sample", "score", "scores"} for trace in traces)
            seen += 1
    assert seen == 8 + 8 + 16 + 8


def test_the_report_is_that_of_the_pool(scored):
    folder, _ = scored["chat"]
    report = json.loads((folder / "report.json").read_text())
    totals = [one["score"] for one in read(folder / "scores.jsonl")]
    groups = [totals[start : start + 4] for start in range(0, 32, 4)]
    assert report["mean_reward"] == pytest.approx(sum(totals) / 32)
    curve = [
        sum(max(c) for g in groups for c in itertools.combinations(g, n)) / 8 / math.comb(4, n) for n in (1, 2, 3, 4)
    ]  # noqa: E501
    assert [point["reward"] for point in report["best_of_n"]] == pytest.approx(curve)
    assert [point["n"] for point in report["best_of_n"]] == [1, 2, 3, 4]
    assert report["written"] == {"SFT": 8, "DPO": 8, "KTO": 16, "Reward": 8}
    assert (report["prompts"], report["answers"], report["cut"], report["failed"]) == (8, 32, 32, 0)


def test_the_same_command_again_samples_nothing_and_changes_no_byte(run, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise Loaded

    assert run()[0] == 0
    before = files_in(tmp_path / "out")
    monkeypatch.setattr(models_load, "load_model", load)
    status, out, _ = run()
    assert status == 0 and {**before, ".lock": b""} == {**files_in(tmp_path / "out"), ".lock": b""}
    assert line_with(out, "generate ") == "generate  0 answers to sample, 32 are there"
    assert line_with(out, "score ") == "score     0 answers to score, 32 are there"
    # and of a seed of its own everything is another
    with pytest.raises(Loaded):
        run("--seed 7", out=tmp_path / "other")


def test_the_stages_one_by_one_come_to_the_same(run, scored, tmp_path):
    folder, words = scored["chat"]
    for stage in ("generate", "score", "select"):
        assert rejection_sampling.main(f"{words} --output_dir {tmp_path / 'out'} --stages {stage}".split()) == 0
    found, expected = files_in(tmp_path / "out"), files_in(folder)
    assert {name: found[f"{name}.jsonl"] for name in FINAL} == {name: expected[f"{name}.jsonl"] for name in FINAL}


def test_batches_of_another_size_answer_the_same(run, scored, tmp_path):
    folder, words = scored["chat"]
    words += f"--output_dir {tmp_path / 'out'} --generate_batch_size 5 --score_batch_size 3"
    assert rejection_sampling.main(words.split()) == 0
    for name in FINAL:
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes(), name


def test_one_answer_at_temperature_0_is_the_likeliest_one(run, tmp_path, tiny):
    assert run("--num_completions 1 --temperature 0 --write SFT,DPO")[0] == 0
    tokenizer = make_tokenizer()
    prompts = [tokenizer(f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for a in QUESTIONS]
    likeliest = tiny(prompts, None, temperature=0, max_new_tokens=12)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in likeliest]
    assert [one["completion"] for one in read(tmp_path / "out" / "completions.jsonl")] == texts
    rows = read(tmp_path / "out" / "sft.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == texts and len(set(texts)) > 4
    assert read(tmp_path / "out" / "dpo.jsonl") == []  # one answer is no pair


SELECTIONS = ["best", "top_k", "threshold --threshold 5", "pairs --min_margin 2"]


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_every_written_file_is_accepted_by_every_method_without_a_dropped_row(
    select, kind, chunked, scored, no_picture, tiny_model, tmp_path, capsys
):
    folder, words = scored[kind]
    shutil.copytree(folder, tmp_path / "out")
    words += f"--stages select --select {select} {'--chunk_size 3' if chunked else ''} --output_dir {tmp_path / 'out'}"
    assert rejection_sampling.main(words.split()) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())["written"]
    fed = [method for method in METHODS if selection.file_for(method)]
    assert fed == ["DPO", "CPO", "SimPO", "CPOSimPO", "ORPO", "KTO", "Reward", "SFT"]
    for method in fed:
        file = selection.file_for(method)
        path = tmp_path / "out" / (file.lower() if chunked else f"{file.lower()}.jsonl")
        rows = load_rows([str(path)], None, METHODS[method].columns, method)
        assert (len(rows.train), rows.dropped) == (written[file], []) and written[file] >= 4
        capsys.readouterr()
        flags = f"--rlhf_type {method} --model_name_or_path {tiny_model} --train_data_path {path} --check "
        assert train_rlhf.main([*flags.split(), "--output_dir", str(tmp_path / "trained")]) == 0
        said = line_with(capsys.readouterr().out.splitlines(), "data ")
        assert said.startswith(f"data      {written[file]} rows to train on") and said.endswith("refused: none")


@pytest.mark.parametrize("kind, method", [("chat", "SFT"), ("text", "DPO"), ("chat", "KTO"), ("text", "Reward")])
def test_a_method_trains_on_its_file(kind, method, scored, tiny_model, tmp_path):
    folder, _ = scored[kind]
    flags = f"--rlhf_type {method} --model_name_or_path {tiny_model} --max_steps 1 --train_mode full "
    flags += f"--train_data_path {folder / f'{method.lower()}.jsonl'} "
    flags += "--per_device_train_batch_size 2 --save_strategy no"
    assert train_rlhf.main([*flags.split(), "--output_dir", str(tmp_path / "trained")]) == 0
    card = json.loads((tmp_path / "trained" / "run_card.json").read_text())
    assert (tmp_path / "trained" / "dropped.jsonl").read_text() == "" and card["method"] == method


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_kto_is_given_no_neighbours_of_one_prompt(kind, scored):
    # TRL gives each prompt of a batch its neighbour's answer to estimate the KL, in the order of the file, as
    # utils/data.py says of pairs: keep_apart
    folder, _ = scored[kind]
    rows, _ = make_rows([("", row) for row in read(folder / "kto.jsonl")], METHODS["KTO"].columns, [])
    asked = [row["prompt"] for _, row in rows]
    assert len(asked) == 16 and not [one for one, two in itertools.pairwise(asked) if one == two]


def test_files_of_chunk_size_rows_hold_what_the_one_file_holds(scored, no_picture, tmp_path):
    folder, words = scored["chat"]
    shutil.copytree(folder, tmp_path / "out")
    words += f"--output_dir {tmp_path / 'out'} --stages select"
    assert rejection_sampling.main(f"{words} --chunk_size 3".split()) == 0
    for name, count in (("sft", 8), ("dpo", 8), ("kto", 16), ("reward", 8)):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == [f"{number:05d}.jsonl" for number in range(math.ceil(count / 3))]
        assert [len(read(file)) for file in files] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
        assert b"".join(file.read_bytes() for file in files) == (folder / f"{name}.jsonl").read_bytes()
        assert not (tmp_path / "out" / f"{name}.jsonl").exists()  # of the selection before
    assert rejection_sampling.main(f"{words} --write SFT".split()) == 0
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert "sft.jsonl" in left and not left & {"sft", "dpo", "kto", "reward", "dpo.jsonl", "selected.part"}


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reference_answer_joins_the_candidates(run, tmp_path):
    rows = [{**row, "chosen": says(f"Because {n}.")} for n, row in enumerate(CHATS)]
    rows[3]["chosen"] = None
    assert run("--reference_column chosen --keep_cut False", rows=rows)[0] == 0
    answers = read(tmp_path / "out" / "completions.jsonl")
    references = [one for one in answers if one["sample"] == 4]
    assert [(one["prompt"], one["completion"]) for one in references] == [
        (n, f"Because {n}.") for n in range(8) if n != 3
    ]
    assert all(one["ended"] and one["reference"] for one in references) and len(answers) == 8 * 4 + 7
    # what was sampled is cut: of each prompt the reference alone can be chosen
    rows = read(tmp_path / "out" / "sft.jsonl")
    assert {row["messages"][-1]["content"] for row in rows} <= {f"Because {n}." for n in range(8)} and len(rows) >= 5
    assert {row["provenance"]["answer"]["sample"] for row in rows} == {4}
    # and the curve is of the model's own
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["answers"] == 32 and len(report["best_of_n"]) == 4


def test_the_reference_answer_of_a_pair_that_repeats_its_prompt_is_the_answer(run, tmp_path):
    rows = [{"chosen": f"Q: {asked} A: Yes.", "rejected": f"Q: {asked} A: No."} for asked in QUESTIONS]
    assert run("--reference_column chosen --keep_cut False", rows=rows)[0] == 0
    assert read(tmp_path / "out" / "prompts.jsonl")[3]["prompt"] == "Q: Why? A: "
    references = [one for one in read(tmp_path / "out" / "completions.jsonl") if one["sample"] == 4]
    assert {one["completion"] for one in references} == {"Yes."}


@pytest.mark.parametrize("value", [3, True, ["So.", "Thus."], {"text": "So."}], ids=str)
def test_a_reference_column_that_holds_no_answers_is_refused(value, run):
    rows = [{**row, "best": value} for row in CHATS]
    status, _, lines = run("--reference_column best", rows=rows)
    assert status == 2 and lines and all('"best" ' in line for line in lines)


def test_a_system_prompt_is_in_every_row_that_has_none(run, tmp_path):
    own = [{"role": "system", "content": "Be long."}]
    rows = [*CHATS[:3], {"prompt": own + CHATS[3]["prompt"]}]
    assert run("--system_prompt 'Be brief.'", rows=rows)[0] == 0
    given = [{"role": "system", "content": "Be brief."}] + CHATS[0]["prompt"]
    assert read(tmp_path / "out" / "prompts.jsonl")[0]["prompt"] == given
    first = read(tmp_path / "out" / "sft.jsonl")[0]["messages"]
    assert first[:2] == given and first[2]["role"] == "assistant" and len(first) == 3
    assert read(tmp_path / "out" / "dpo.jsonl")[3]["prompt"] == own + CHATS[3]["prompt"]


def test_max_samples_takes_the_first_rows(run, tmp_path):
    assert run("--max_samples 3")[0] == 0
    assert [one["prompt"] for one in read(tmp_path / "out" / "prompts.jsonl")] == [row["prompt"] for row in CHATS[:3]]


def test_a_prompt_that_stands_twice_is_taken_once_and_that_is_said(run, tmp_path):
    rows = [CHATS[0], CHATS[1], CHATS[0], {**CHATS[1]}, {**CHATS[2]}]
    status, out, _ = run(rows=rows)
    assert status == 0 and line_with(out, "prompts ") == "prompts   3; refused: none; 2 repeated prompts left out"
    assert [one["prompt"] for one in read(tmp_path / "out" / "prompts.jsonl")] == [row["prompt"] for row in CHATS[:3]]
    # the same question with another column is another row, as for a reward function it is
    rows = [{**CHATS[0], "answer": "1"}, {**CHATS[0], "answer": "2"}, {**CHATS[0], "answer": "1"}]
    assert line_with(run(rows=rows, out=tmp_path / "other")[1], "prompts ").startswith("prompts   2;")


# 60 bytes and 19 more tokens around them (test_gkd.py counts them); the others have 24 bytes at most
LONG = {"prompt": [{"role": "user", "content": "Say it. " * 7 + "Now!"}]}


def test_prompts_that_are_too_long_are_counted(run, tmp_path):
    status, out, _ = run("--max_prompt_length 60 --max_drop_fraction 0.2", rows=[*CHATS, LONG])
    assert status == 0
    assert line_with(out, "prompts ") == "prompts   8; refused: 1 prompt leaves no room for an answer"
    assert len(read(tmp_path / "out" / "prompts.jsonl")) == 8
    (dropped,) = read(tmp_path / "out" / "dropped.jsonl")
    assert LONG["prompt"][0]["content"] in json.dumps(dropped)


def test_more_prompts_than_max_drop_fraction_that_are_too_long_are_refused(run, tmp_path):
    status, out, lines = run("--max_prompt_length 60", rows=[*CHATS, LONG])
    assert (status, out, len(lines)) == (2, [], 1)
    said = f"refused: 1 of 9 rows cannot be used (1 prompt leaves no room for an answer). The first: {tmp_path}"
    assert lines[0].startswith(said) and not (tmp_path / "out").exists()


def test_a_prompt_may_be_as_long_as_what_the_model_holds_beside_an_answer(run, tmp_path):
    # the model holds 2048 tokens; 79 of the prompt leave room for 1969
    assert run("--max_new_tokens 1969 --check", rows=[LONG])[0] == 0
    status, _, lines = run("--max_new_tokens 1970 --check", rows=[LONG])
    assert status == 2 and "1 of 1 rows cannot be used (1 prompt leaves no room for an answer)" in lines[0]
    status, _, lines = run("--max_new_tokens 2048 --check", rows=[LONG])
    said = "--max_new_tokens 2048: the model holds 2048 tokens, prompt and answer. Type --max_new_tokens 1024"
    assert (status, lines) == (2, [f"refused: {said}"])


def test_held_out_prompts_and_the_others_are_apart_and_together_all(run, tmp_path):
    assert run("--eval_fraction 0.25")[0] == 0
    assert run("--eval_fraction 0.25 --held_out_prompts True", out=tmp_path / "held")[0] == 0
    sampled, held = ({one["prompt"] for one in read(tmp_path / out / "scores.jsonl")} for out in ("out", "held"))
    assert not sampled & held and sampled | held == set(range(8)) and len(held) == 2
    assert {row["provenance"]["source"] for row in read(tmp_path / "out" / "sft.jsonl")} == {
        f"{tmp_path / 'rows.jsonl'}:{number + 1}" for number in sampled
    }


def test_check_looks_at_everything_and_writes_nothing(run, tmp_path):
    status, out, _ = run("--check")
    assert (status, out) == (0, ["checked   nothing stands in the way; no model was loaded, nothing was written"])
    assert not (tmp_path / "out").exists()


# ── killed, and several processes ────────────────────────────────────────────────────────────────────────────────────


MANY = [{"prompt": [{"role": "user", "content": f"{asked} {n}"}]} for n in range(5) for asked in QUESTIONS]


SLOW = """import os
import time


def total(completions, **columns):
    time.sleep(0.004 * len(completions))
    if len(completions) > 4:  # more than it is tried on
        with open({ranks!r}, "a") as handle:
            handle.write(os.environ.get("RANK", "0"))
    return [float(sum(map(ord, answer[0]["content"])) % 11) for answer in completions]
"""


BEGUN = {"generate": "prompts.jsonl", "score": "completions.jsonl", "select": "scores.jsonl"}


@pytest.fixture
def slow_command(tiny_model, tmp_path):
    """command(out): words of a run of 40 prompts, 4 answers each, that takes its time over each stage."""
    rows = write_rows(tmp_path / "rows.jsonl", MANY)
    (tmp_path / "reward.py").write_text(SLOW.format(ranks=str(tmp_path / "ranks")))
    words = f"--model_name_or_path {tiny_model} --train_data_path {rows} "
    words += f"--reward_funcs {tmp_path / 'reward.py'}:total "
    return lambda out: f"{words} {FAST} --generate_batch_size 8 --output_dir {out}".split()


def finished(words, folder, **env):
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **env}, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return {f"{name}.jsonl": (folder / f"{name}.jsonl").read_bytes() for name in FINAL} | {
        "report.json": (folder / "report.json").read_bytes()
    }, done


def wait_until_free(folder):
    """Until the killed process is gone: it holds the folder's lock to its end."""
    with filelock.FileLock(folder / ".lock"):
        pass


def stage_of(folder):
    """The stage that was at work, by what is there."""
    if (folder / "scores.jsonl").exists() and not (folder / "scores.parts").exists():
        return "select"
    if (folder / "completions.jsonl").exists() and not (folder / "completions.parts").exists():
        return "score"
    return "generate"


def answers_kept(folder, name):
    """How many answers there are whole lines of, merged or not."""
    files = [*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.parts/*.jsonl")]
    whole = [json.loads(one) for file in files for one in file.read_bytes().split(b"\n")[:-1]]
    return len({(one["prompt"], one["sample"]) for one in whole})


def kill_in(stage, after, words, folder):
    """Starts a run and kills it `after` seconds into a stage; the stage that it was in, None where it had ended."""
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not (folder / BEGUN[stage]).exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(after)
        process.kill()
        status = process.wait()
    wait_until_free(folder)
    return stage_of(folder) if status == -signal.SIGKILL else None


# How long a stage takes, in seconds, about: as long a kill in it is waited with
TAKES = {"generate": 1.0, "score": 0.7, "select": 0.7}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_run_that_was_killed_at_any_moment_ends_as_one_that_was_not(kills, warm, slow_command, tmp_path):
    whole, _ = finished([warm, "rejection_sampling.py", *slow_command(tmp_path / "whole")], tmp_path / "whole")
    assert whole["completions.jsonl"].count(b"\n") == whole["scores.jsonl"].count(b"\n") == 160
    moments, hit, begun = random.Random(0), dict.fromkeys(TAKES, 0), 0
    for number in range(3 * kills):
        folder, stage = tmp_path / str(number), min(TAKES, key=hit.get)
        words = [warm, "rejection_sampling.py", *slow_command(folder)]
        met = kill_in(stage, moments.random() * TAKES[stage], words, folder)
        if met is None:
            continue  # it had ended
        hit[met] += 1
        begun += any(folder.glob("*.parts"))  # in the midst of a stage's lines
        kept = [answers_kept(folder, name) for name in ("completions", "scores")]
        found, done = finished(words, folder)
        said = [line_with(done.stdout.splitlines(), start) for start in ("generate ", "score ")]
        assert said == [  # what was written stays
            f"generate  {160 - kept[0]} answers to sample, {kept[0]} are there",
            f"score     {160 - kept[1]} answers to score, {kept[1]} are there",
        ]
        assert {name for name in whole if found[name] != whole[name]} == set(), (number, stage)
        assert not any(folder.glob("*.part*"))
        if sum(hit.values()) >= kills and min(hit.values()) > kills // 5:
            break
    assert sum(hit.values()) >= kills and min(hit.values()) > kills // 5 <= begun, (hit, begun)


def test_two_processes_write_what_one_does(warm, slow_command, tmp_path):
    one, _ = finished([warm, "rejection_sampling.py", *slow_command(tmp_path / "one")], tmp_path / "one")
    assert set((tmp_path / "ranks").read_text()) == {"0"}
    (tmp_path / "ranks").unlink()
    words = ["bash", "rejection_run.sh", *slow_command(tmp_path / "two")]
    two, done = finished(words, tmp_path / "two", LAUNCH="cpu", NUM_PROCESSES="2", PYTHON=warm)
    assert {name for name in one if one[name] != two[name]} == set()
    assert set((tmp_path / "ranks").read_text()) == {"0", "1"}  # both scored
    assert "| 80/80 " in done.stderr and "| 160/160 " not in done.stderr  # and the first answered half
    assert done.stdout.count("generate  160 answers to sample, 0 are there") == 1  # one of them speaks
