"""What is said. `pytest tests/data/test_doctor_reports.py`"""

import pytest

from tests.conftest import command, read_rows, write_rows
from tests.data.conftest import TALKS, THUMBS, others, said
from tests.data.test_data import CHATS, TEXTS, WRITERS, assistant, user


def test_problems_are_named_by_file_and_line_and_all_counted(doctor):
    status, lines, _ = doctor([{"prompt": "q", "chosen": "a", "rejectd": "b"}] * 25)
    problems = said(lines, "")
    assert (status, said(lines, "DPO")) == (2, ["refuses the data:"])
    assert problems[0].startswith('in.jsonl:1: no "rejected". Rename "rejectd"?')
    assert problems[19].startswith("in.jsonl:20: ") and problems[20:] == ["... and 5 more, 25 in all"]


def test_rows_that_training_would_drop_are_counted_by_reason_and_a_tenth_is_too_many(doctor):
    empty, same = {**TEXTS[0], "chosen": ""}, {**TEXTS[0], "rejected": TEXTS[0]["chosen"]}
    many = [{**TEXTS[0], "prompt": f"Q{n}"} for n in range(18)]
    status, lines, _ = doctor([*many, empty, same])  # 2 of 20 are the tenth that is allowed
    assert (status, said(lines, "dropped")) == (
        0,
        [
            "1 empty answer, as in.jsonl:19. Fix them, or drop them with --fix",
            "1 chosen equals rejected, as in.jsonl:20. Fix them, or drop them with --fix",
        ],
    )
    status, lines, _ = doctor([*many, empty, same, same])
    assert status == 2 and said(lines, "")[0].startswith("3 of 21 rows cannot be used")


def test_rows_are_counted_by_file_and_notes_are_passed_on(doctor, tmp_path):
    more = WRITERS[".csv"](tmp_path / "more.csv", [{**row, "id": "7"} for row in CHATS])
    status, lines, _ = doctor(CHATS[:1], more)
    assert (status, said(lines, "rows")) == (0, ["1 of in.jsonl; 2 of more.csv"])
    assert said(lines, "note") == ["columns not used: id"]
    _, lines, _ = doctor(CHATS, tmp_path / "in.jsonl", tmp_path)  # each file once, however often it is named
    assert said(lines, "rows") == ["2 of in.jsonl; 2 of more.csv"]


def test_repeated_rows_and_pairs_the_other_way_round_are_found(doctor, tmp_path):
    turned = {**CHATS[1], "chosen": CHATS[1]["rejected"], "rejected": CHATS[1]["chosen"]}
    rows = [*CHATS, {**CHATS[0], "id": 7}, turned]  # a column that is not trained on makes no difference
    _, lines, _ = doctor(rows, "--fix", tmp_path / "out.jsonl")
    assert said(lines, "repeated") == ["1 of 4 rows, as in.jsonl:3 and in.jsonl:1. --fix keeps the first of each"]
    assert said(lines, "against") == [
        "1 of 4 rows contradict another, as in.jsonl:4 and in.jsonl:2. Remove the wrong one"
    ]
    assert read_rows(tmp_path / "out.jsonl") == [*CHATS, turned]
    _, lines, _ = doctor(CHATS)
    assert said(lines, "repeated") == said(lines, "against") == []


def test_a_thumb_up_and_down_for_one_answer_is_found(doctor):
    _, lines, _ = doctor([*THUMBS, {**THUMBS[1], "label": True}], "--rlhf_type", "kto")
    assert said(lines, "against") == [
        "1 of 3 rows contradict another, as in.jsonl:3 and in.jsonl:2. Remove the wrong one"
    ]


def test_a_prompt_with_another_reference_answer_is_no_repetition(doctor):
    rows = [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": "b"}, {"prompt": "q", "answer": "a"}]
    _, lines, _ = doctor(rows, "--rlhf_type", "GRPO")
    assert said(lines, "repeated") == ["1 of 3 rows, as in.jsonl:3 and in.jsonl:1. --fix keeps the first of each"]


def test_held_out_rows_in_the_training_data_are_found_in_any_form(doctor, tmp_path):
    whole = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS]
    held = write_rows(tmp_path / "held.jsonl", whole)
    _, lines, _ = doctor(CHATS[1:], "--eval", held)
    assert said(lines, "--eval") == [
        "1 of 2 rows are in the training data, as held.jsonl:2 and in.jsonl:1. Remove them from one file"
    ]
    _, lines, _ = doctor([{**CHATS[0], "chosen": assistant("new")}], "--eval", held)
    assert said(lines, "--eval") == ["0 of 2 rows are in the training data"]
    held = write_rows(tmp_path / "held.jsonl", [{**THUMBS[0], "label": False}, {**THUMBS[1], "prompt": user("new")}])
    _, lines, _ = doctor(THUMBS, "--rlhf_type", "KTO", "--eval", held)  # an answer is known, whatever its label
    assert said(lines, "--eval")[0].startswith("1 of 2 rows are in the training data, as held.jsonl:1")


@pytest.mark.parametrize(
    "true, false, advice",
    [
        (4, 4, "within KTO's 1:1 to 4:3; no weights are needed"),
        (8, 6, "within KTO's 1:1 to 4:3; no weights are needed"),  # 8:6 is 4:3
        # w x 2 : 6 is 1:1 at 3 and 4:3 at 4
        (2, 6, "type --desirable_weight 3 (3 to 4 bring them within 1:1 to 4:3)"),
        # 6 : w x 2 is 4:3 at 2.25 and 1:1 at 3
        (6, 2, "type --undesirable_weight 3 (2.25 to 3 bring them within 1:1 to 4:3)"),
        # w x 3 : 7 is 1:1 at 2.333.., so 2.34 up, and 4:3 at 3.111.., so 3.11 down
        (3, 7, "type --desirable_weight 2.34 (2.34 to 3.11 bring them within 1:1 to 4:3)"),
        # 10 : w x 7 is 4:3 at 1.0714.., so 1.08 up, and 1:1 at 1.428.., so 1.42 down
        (10, 7, "type --undesirable_weight 1.42 (1.08 to 1.42 bring them within 1:1 to 4:3)"),
    ],
)
def test_labels_are_weighed_as_kto_wants_them(true, false, advice, doctor):
    rows = [{"prompt": "q", "completion": f"a{n}", "label": n < true} for n in range(true + false)]
    status, lines, _ = doctor(rows, "--rlhf_type", "KTO")
    assert (status, said(lines, "labels")) == (0, [f"{true} true, {false} false: {advice}"])


def test_one_label_alone_is_refused(doctor):
    status, lines, _ = doctor([THUMBS[0]], "--rlhf_type", "KTO")
    assert status == 2 and said(lines, "")[0].startswith("FILE: all 1 labels are true")


def test_lengths_roles_and_form_are_told(doctor):
    rows = [{"prompt": user("x" * n), "completion": assistant("y" * 2 * n)} for n in range(1, 41)]
    status, lines, _ = doctor(rows, "--rlhf_type", "SFT")
    # of 1 to 40: the 20th and the 38th (0.95 x 40) in order; answers are twice as long
    assert (status, said(lines, "length")) == (
        0,
        [
            "prompt: median 20, 95 % within 38, longest 40 characters",
            "completion: median 40, 95 % within 76, longest 80 characters",
        ],
    )
    assert (said(lines, "roles"), said(lines, "form")) == (["user 40, assistant 40"], ["100% chats, 0% plain text"])


def test_rows_that_rules_can_mend_are_told_as_they_leave_them(doctor, tmp_path):
    rows = [{"conversations": others(talk)} for talk in (*TALKS, TALKS[0])]
    held = write_rows(tmp_path / "held.jsonl", [{"messages": TALKS[1]}])
    for words in (["--eval", held], ["--eval", write_rows(tmp_path / "held.jsonl", rows[1:2])]):
        status, lines, _ = doctor(rows, "--rlhf_type", "SFT", *words)
        assert (status, said(lines, "roles")) == (2, ["human 3, gpt 3"])  # as they stand in the file
        assert said(lines, "length")[0] == "prompt: median 2, 95 % within 2, longest 2 characters"  # q1, q2, q1
        assert said(lines, "repeated")[0].startswith("1 of 3 rows, as in.jsonl:3 and in.jsonl:1.")
        assert said(lines, "--eval")[0].startswith(
            "1 of 1 rows are in the training data, as held.jsonl:1 and in.jsonl:2"
        )


def test_prompts_without_answers_name_what_distils_from_them(doctor):
    status, lines, _ = doctor([{"prompt": "q"}, {"prompt": "r", "completion": "a"}], "--rlhf_type", "gkd")
    assert (status, said(lines, "answers")) == (0, ["1 of 2 rows have none. Type --lmbda 1 or --seq_kd True"])


def test_the_command_reads_every_kind_of_file_and_imports_no_library(tmp_path):
    for ending, make in WRITERS.items():
        file, out = make(tmp_path / f"rows{ending}", TEXTS), tmp_path / f"out{ending}.jsonl"
        done = command("-X", "importtime", "-m", "utils.doctor_data", file, "--fix", out)
        assert (done.returncode, read_rows(out)) == (0, TEXTS), done.stderr
        assert "utils.data.repairs" in done.stderr and " torch\n" not in done.stderr
