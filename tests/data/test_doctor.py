"""The doctor of data files: what it says, and what it mends: `pytest tests/data/test_doctor.py`."""

import json

import pytest

from rlhf_args.methods import ANSWERED, DIALOGUE, EVERY, PAIR, PROMPT, RANKED, UNPAIRED
from tests.conftest import ROOT, read_rows, write_rows
from tests.data.conftest import ANSWERS, TALKS, THUMBS, named, other, others, said
from tests.data.test_data import CHATS, TEXTS, assistant, thumbs, user, values
from utils.data.columns import ACCEPTED
from utils.data.repairs import RULES, repair
from utils.data.rows import load_rows

SYSTEM = [{"role": "system", "content": "Be kind."}]


# ── the shapes of others, and what they are ──────────────────────────────────────────────────────────────────────────


def hh(messages):
    return "".join(f"\n\n{ {'user': 'Human', 'assistant': 'Assistant'}[m['role']] }: {m['content']}" for m in messages)


def parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def of_pairs(make):
    """Two rows of the other shape, made of question, good and bad answer as plain text."""
    return [make(f"q{n}", f"good {n}", f"bad {n}") for n in (1, 2)]


BADS = [user(f"q{n}") + assistant(f"bad {n}") for n in (1, 2)]


WANTED = {  # what each kind of content is to a method of these columns
    "pairs": {
        PAIR: CHATS,
        RANKED: CHATS,
        UNPAIRED: [thumbs(CHATS[0])[0], thumbs(CHATS[1])[1], thumbs(CHATS[1])[0], thumbs(CHATS[0])[1]],
        PROMPT: [{"prompt": row["prompt"]} for row in CHATS],
    },
    "answers": {
        DIALOGUE: [{"messages": talk} for talk in TALKS],
        ANSWERED: ANSWERS,
        PROMPT: [{"prompt": row["prompt"]} for row in ANSWERS],
    },
    "thumbs": {UNPAIRED: THUMBS},
    "prompts": {PROMPT: [{"prompt": row["prompt"]} for row in CHATS]},
    "pairs under a system prompt": {
        columns: [{**row, "prompt": SYSTEM + row["prompt"]} for row in CHATS] for columns in (PAIR, RANKED)
    },
    "answers under a system prompt": {
        DIALOGUE: [{"messages": SYSTEM + talk} for talk in TALKS],
        ANSWERED: [{**row, "prompt": SYSTEM + row["prompt"]} for row in ANSWERS],
        PROMPT: [{"prompt": SYSTEM + row["prompt"]} for row in ANSWERS],
    },
    "thumbs under a system prompt": {UNPAIRED: [{**row, "prompt": SYSTEM + row["prompt"]} for row in THUMBS]},
    "texts": {DIALOGUE: [{"messages": "once"}, {"messages": "upon"}]},
}


BOTH = list(zip(TALKS, BADS, strict=True))


WHOLE = [{"chosen": talk, "rejected": bad} for talk, bad in BOTH]


# name: (what it is, rows of it)
SHAPES = {
    "messages as JSON text": ("pairs", [{k: json.dumps(v) for k, v in row.items()} for row in CHATS]),
    "messages as Python text": ("answers", [{"messages": str(talk)} for talk in TALKS]),
    "one message for a list": ("pairs", [{k: v[0] for k, v in row.items()} for row in CHATS]),
    "one message for a list, answers": ("answers", [{k: v[0] for k, v in row.items()} for row in ANSWERS]),
    "pairs of ShareGPT": (
        "pairs",
        [{"conversations": others(t[:1]), "chosen": other(t[1]), "rejected": other(b[1])} for t, b in BOTH],
    ),
    "ShareGPT": ("answers", [{"conversations": others(talk)} for talk in TALKS]),
    "thumbs of ShareGPT": (
        "thumbs",
        [{"conversations": others(t), "kto_tag": kind} for t, kind in zip(TALKS, (True, False), strict=True)],
    ),
    "content in parts, pairs": ("pairs", [{k: parts(v) for k, v in row.items()} for row in CHATS]),
    "content in parts, answers": ("answers", [{"messages": parts(talk)} for talk in TALKS]),
    "other roles, pairs": (
        "pairs",
        [{k: [other(m, ("role", "content")) for m in v] for k, v in row.items()} for row in CHATS],
    ),
    "other roles, answers": ("answers", [{"messages": [other(m, ("role", "content")) for m in t]} for t in TALKS]),
    "HH-RLHF": ("pairs", [{"chosen": hh(talk), "rejected": hh(bad)} for talk, bad in BOTH]),
    "HH-RLHF, prompt apart": (
        "pairs",
        of_pairs(
            lambda q, good, bad: {
                "prompt": f"\n\nHuman: {q}\n\nAssistant:",
                "chosen": f" {good}",
                "rejected": f" {bad}",
            }
        ),
    ),
    "HH-RLHF, one text": ("answers", [{"text": hh(talk)} for talk in TALKS]),
    "preferences of OpenAI": (
        "pairs",
        [
            {"input": {"messages": t[:1], "tools": []}, "preferred_output": t[1:], "non_preferred_output": b[1:]}
            for t, b in BOTH
        ],
    ),
    "fine-tuning of OpenAI": ("answers", [{"input": {"messages": t[:1]}, "output": t[1]["content"]} for t in TALKS]),
    "Alpaca": ("answers", of_pairs(lambda q, good, bad: {"instruction": q, "input": "", "output": good})),
    "thumbs of Alpaca": (
        "thumbs",
        [
            {"instruction": "q1", "input": "", "output": "good 1", "kto_tag": "true"},
            {"instruction": "q2", "input": None, "output": "good 2", "kto_tag": "false"},
        ],
    ),
    "pairs of Alpaca": (
        "pairs",
        of_pairs(lambda q, good, bad: {"instruction": q, "input": "", "chosen": good, "rejected": bad}),
    ),
    "question, response, rejected": (
        "answers",
        of_pairs(lambda q, good, bad: {"question": q, "response": good, "rejected": bad}),
    ),
    "question and response": ("answers", of_pairs(lambda q, good, bad: {"question": q, "response": good})),
    "question, response_j, response_k": (
        "pairs",
        of_pairs(lambda q, good, bad: {"question": q, "response_j": good, "response_k": bad}),
    ),
    "query, response, rejected_response": (
        "pairs",
        of_pairs(lambda q, good, bad: {"query": q, "history": [], "response": good, "rejected_response": bad}),
    ),
    "messages, rejected_response": (
        "pairs",
        [{"messages": talk, "rejected_response": bad[1]["content"]} for talk, bad in BOTH],
    ),
    "messages, rejected_messages": ("pairs", [{"messages": talk, "rejected_messages": bad} for talk, bad in BOTH]),
    "instruction, chosen_response": (
        "pairs",
        of_pairs(lambda q, good, bad: {"instruction": q, "chosen_response": good, "rejected_response": bad}),
    ),
    "UltraFeedback": (
        "pairs",
        of_pairs(
            lambda q, good, bad: {
                "instruction": q,
                "completions": [
                    {"response": "so-so", "overall_score": 6.5},
                    {"response": bad, "overall_score": 2},
                    {"response": good, "overall_score": "8"},
                ],
            }
        ),
    ),
    "UltraFeedback, binarized": (
        "pairs",
        [{"prompt": talk[0]["content"], "chosen": talk, "rejected": bad, "score_chosen": 9} for talk, bad in BOTH],
    ),
    "a text to ask, chats to answer": (
        "pairs",
        [{"prompt": t[0]["content"], "chosen": t[1:], "rejected": b[1:]} for t, b in BOTH],
    ),
    "a chat to ask, texts to answer": (
        "answers",
        [{"prompt": row["prompt"], "completion": row["completion"][0]["content"]} for row in ANSWERS],
    ),
    "thumbs as words": (
        "thumbs",
        [{**row, "label": word} for row, word in zip(THUMBS, ("Good", "bad"), strict=True)],
    ),
    "thumbs as scores": ("thumbs", [{**ANSWERS[0], "score": 1.0}, {**ANSWERS[1], "score": "0"}]),
    "thumbs of 1 and -1": ("thumbs", [{**ANSWERS[0], "label": 1}, {**ANSWERS[1], "label": -1}]),
    "some pairs whole, some not": ("pairs", [WHOLE[0], CHATS[1]]),
    "some pairs whole, some whole beside their prompt": ("pairs", [WHOLE[0], {**CHATS[1], **WHOLE[1]}]),
    "some answers apart, some not": ("answers", [{"messages": TALKS[0]}, ANSWERS[1]]),
    "system, question, chosen, rejected": (
        "pairs under a system prompt",
        of_pairs(lambda q, good, bad: {"system": "Be kind.", "question": q, "chosen": good, "rejected": bad}),
    ),
    "system beside texts": (
        "answers under a system prompt",
        of_pairs(lambda q, good, bad: {"system": "Be kind.", "prompt": q, "completion": good}),
    ),
    "system beside ShareGPT": (
        "answers under a system prompt",
        [{"conversations": others(talk), "system": "Be kind."} for talk in TALKS],
    ),
    "system beside whole pairs": (
        "pairs under a system prompt",
        [{"chosen": talk, "rejected": bad, "system": "Be kind."} for talk, bad in BOTH],
    ),
    "system beside thumbs": ("thumbs under a system prompt", [{**row, "system": "Be kind."} for row in THUMBS]),
    "text": ("texts", [{"text": "once"}, {"text": "upon"}]),
    "a column that TRL uses": ("prompts", [{"prompt": row["prompt"], "completion": "x"} for row in ANSWERS]),
}


def cases():
    found = [
        (shape, name)
        for shape, (kind, _) in SHAPES.items()
        for name, method in EVERY.items()
        if method.columns in WANTED[kind]
    ]
    assert len(found) > 100
    return found


def only(rows):
    return [{name: value for name, value in row.items() if name not in ("further", "margin")} for row in values(rows)]


@pytest.mark.parametrize("shape, name", cases())
def test_a_shape_of_others_is_repaired_for_every_method_that_can_use_it(shape, name, doctor, tmp_path):
    kind, written = SHAPES[shape]
    columns, out = EVERY[name].columns, tmp_path / "out.jsonl"
    status, lines, err = doctor(written, "--rlhf_type", name, "--fix", out)
    assert (status, err) == (0, ""), lines
    assert said(lines, "written") == ["out.jsonl: 2 of 2 rows"]
    assert only(load_rows([str(out)], None, columns, name).train) == WANTED[kind][columns]
    again = tmp_path / "again.jsonl"
    assert "nothing to repair: the rows are written unchanged" not in said(lines, "note")
    status, lines, _ = doctor(out, "--rlhf_type", name, "--fix", again)  # what is repaired needs no repair
    assert (status, said(lines, "repair")) == (0, []) and again.read_bytes() == out.read_bytes()


def test_every_rule_is_used_for_all_columns_that_it_names():
    fired = {(rule, c) for _, rows in SHAPES.values() for c in ACCEPTED for rule in repair(named(rows), c)[1]}
    assert fired == {(rule, columns) for rule, kinds, _ in RULES for columns in kinds}


@pytest.mark.parametrize("name", EVERY)
def test_the_sample_of_every_method_needs_no_repair(name, doctor, tmp_path):
    sample, out = ROOT / EVERY[name].sample_data, tmp_path / "out.jsonl"
    status, lines, _ = doctor(sample, "--rlhf_type", name.upper(), "--fix", out)
    assert (status, said(lines, "repair"), said(lines, "left out")) == (0, [], [])
    assert "nothing to repair: the rows are written unchanged" in said(lines, "note")
    assert read_rows(out) == read_rows(sample) and len(read_rows(out)) >= 100
    assert not (tmp_path / "out.jsonl.dropped.jsonl").exists()


def test_every_rule_is_counted_in_one_line_with_fix_and_without(doctor, tmp_path):
    rows = [{"conversations": others(talk)} for talk in TALKS]
    found = [
        "ShareGPT's from and value -> role and content: 2 rows",
        "other role names (human, gpt, bot, ...) -> user, assistant, tool: 2 rows",
        "ShareGPT's conversations -> messages: 2 rows",
    ]
    status, lines, _ = doctor(rows, "--rlhf_type", "SFT")
    assert (status, said(lines, "--fix")) == (2, found)
    status, lines, _ = doctor([*rows, {"messages": TALKS[0]}], "--rlhf_type", "SFT", "--fix", tmp_path / "out.jsonl")
    assert (status, said(lines, "repair")) == (0, found)


def test_alpaca_is_joined_as_alpaca_does_and_history_stands_before_it(doctor, tmp_path):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["q", "a"]], "system": "Be kind."}
    status, _, _ = doctor([row], "--rlhf_type", "SFT", "--fix", tmp_path / "out.jsonl")
    talk = SYSTEM + user("q") + assistant("a") + user("Add.\n\n1 and 2") + assistant("3")
    assert (status, read_rows(tmp_path / "out.jsonl")) == (0, [{"messages": talk}])


def test_calls_and_results_of_functions_have_their_roles(doctor, tmp_path):
    talk = [(" Human", "time?"), ("function_call", "now()"), ("observation", "noon"), ("GPT", "It is noon.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in talk]}
    assert doctor([row], "--rlhf_type", "SFT", "--fix", tmp_path / "out.jsonl")[0] == 0
    roles = [message["role"] for message in read_rows(tmp_path / "out.jsonl")[0]["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_columns_that_no_rule_takes_stay(doctor, tmp_path):
    row = {"question": "2+2?", "answer": "4", "level": 1, "id": "\u2028 \U0001f600"}
    assert doctor([row], "--rlhf_type", "GRPO", "--fix", tmp_path / "out.jsonl")[0] == 0
    rest = {name: row[name] for name in ("answer", "level", "id")}
    assert read_rows_of_json(tmp_path / "out.jsonl") == [{**rest, "prompt": user("2+2?")}]


def read_rows_of_json(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# name: (method, rows that no rule can tell, what is said of the first)
UNCLEAR = {
    "two columns that may be the answer": (
        "SFT",
        [{"prompt": "q", "response": "a", "output": "b"}],
        'no "messages". The row has prompt, response, output.',
    ),
    "two columns that may be the question": (
        "SFT",
        [{"question": "q", "query": "r", "output": "b"}],
        'no "messages". The row has question, query, output.',
    ),
    "ratings of five": (
        "KTO",
        [{**row, "rating": rating} for row, rating in zip(ANSWERS, (1, 5), strict=True)],
        'no "label". The row has prompt, completion, rating.',
    ),
    "a lone 1, which may be one of five": (
        "KTO",
        [{**row, "score": 1} for row in ANSWERS],
        'no "label". The row has prompt, completion, score.',
    ),
    "two columns that may be the label": (
        "KTO",
        [{**row, "score": n, "thumbs": 1 - n} for n, row in enumerate(ANSWERS)],
        'no "label". The row has prompt, completion, score, thumbs.',
    ),
    "ratings that are the same": (
        "DPO",
        [{"instruction": "q", "completions": [{"response": word, "score": 3} for word in "ab"]}],
        'no "chosen". The row has completions, prompt.',
    ),
    "a rating that is missing": (
        "DPO",
        [{"prompt": "q", "completions": [{"response": "a", "score": 3}, {"response": "b", "score": "N/A"}]}],
        'no "chosen". The row has prompt, completions.',
    ),
    "a role that nobody has": (
        "SFT",
        [{"messages": [{"role": "narrator", "content": "x"}, *assistant("a")]}],
        "\"messages\" has the role 'narrator'.",
    ),
    "a prompt that is not in its chats": (
        "DPO",
        [{"prompt": "another", "chosen": talk, "rejected": bad} for talk, bad in BOTH],
        '"prompt" is plain text, "chosen" is a chat, "rejected" is a chat.',
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_no_rule_can_tell_is_left_out_and_listed(case, doctor, tmp_path):
    name, rows, reason = UNCLEAR[case]
    status, lines, _ = doctor(rows, "--rlhf_type", name, "--fix", tmp_path / "out.jsonl")
    assert (status, read_rows(tmp_path / "out.jsonl")) == (2, [])
    dropped = read_rows(tmp_path / "out.jsonl.dropped.jsonl")
    assert [line["row"] for line in dropped] == rows  # as they were, to be mended by hand
    assert dropped[0]["where"].endswith("in.jsonl:1") and dropped[0]["reason"].startswith(reason)
    assert said(lines, "left out")[0].startswith(f"{len(rows)} {reason}")


SOUND = [  # (method, rows whose further columns are none of its business)
    ("SFT", [{"messages": SYSTEM + TALKS[0], "system": "Be brief.", "instruction": "w", "output": "x", "text": "y"}]),
    ("SFT", [{"messages": talk, **row} for talk, row in zip(TALKS, ANSWERS, strict=True)]),
    ("SFT", [{"prompt": "q", "completion": "a", "system": ""}]),
    ("SFT", ANSWERS),
    ("GKD", [{**row, "rejected": "x", "output": "y"} for row in ANSWERS]),
    ("KTO", [{**row, "score": n} for n, row in enumerate(THUMBS)]),
    ("DPO", [{**row, "question": "x", "response": "y"} for row in TEXTS]),
    ("DPO", [{**row, "question": "x"} for row in WHOLE]),
    ("DPO", [{"chosen": "Q: q A: good", "rejected": "Q: q A: bad"}]),
    ("Reward", CHATS),
    ("GRPO", [{"prompt": "q", "question": "x", "answer": "y"}]),
]


@pytest.mark.parametrize("name, rows", SOUND)
def test_rows_are_not_mended_where_they_are_sound(name, rows, doctor, tmp_path):
    status, lines, _ = doctor(rows, "--rlhf_type", name, "--fix", tmp_path / "out.jsonl")
    assert (status, said(lines, "repair"), read_rows(tmp_path / "out.jsonl")) == (0, [], rows)


@pytest.mark.parametrize("shape", ["HH-RLHF", "UltraFeedback, binarized"])
def test_whole_pairs_are_split_where_they_part_and_kept_whole_for_reward_functions(shape, doctor, tmp_path):
    out, names = tmp_path / "out.jsonl", ("prompt", "chosen", "rejected")
    assert doctor(SHAPES[shape][1], "--fix", out)[0] == 0
    assert [{name: row[name] for name in names} for row in read_rows(out)] == CHATS
    assert doctor(SHAPES[shape][1], "--rlhf_type", "GRPO", "--fix", out, "--overwrite")[0] == 0
    found = [{"prompt": row["prompt"], **whole} for row, whole in zip(CHATS, WHOLE, strict=True)]
    assert [{name: row[name] for name in names} for row in read_rows(out)] == found


def test_columns_of_images_are_left_to_be_refused(doctor, tmp_path):
    status, lines, _ = doctor(
        [{"prompt": "q", "image": "x.png"}], "--rlhf_type", "GRPO", "--fix", tmp_path / "o.jsonl"
    )
    assert (status, said(lines, "repair")) == (2, [])
    assert said(lines, "")[-1].startswith('o.jsonl:1: a column "image"')


# ── what is written, and what is not ─────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_lost_in_silence(doctor, tmp_path):
    """7 lines: 2 are written; 1 cannot be read, 1 has no answer, 1 is empty, 1 is no object, 1 stands there twice."""
    lines = [json.dumps(row) for row in (*CHATS, {"prompt": "q"}, CHATS[0], {**CHATS[0], "chosen": assistant(" ")})]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([lines[0], '{"prompt": "cut of', *lines[1:], "7"]) + "\n", encoding="utf-8")
    status, out, _ = doctor(file, "--fix", tmp_path / "out.jsonl")
    assert status == 0 and read_rows(tmp_path / "out.jsonl") == CHATS
    dropped = read_rows(tmp_path / "out.jsonl.dropped.jsonl")
    found = {line["where"].rpartition(":")[2]: (line["reason"], line["row"]) for line in dropped}
    assert found == {
        "2": ("not valid JSON (Unterminated string starting at, column 12)", '{"prompt": "cut of'),
        "7": ("a number, not an object with columns", "7"),
        "4": (found["4"][0], {"prompt": "q"}),
        "5": ("repeats an earlier row", CHATS[0]),
        "6": ("empty answer", {**CHATS[0], "chosen": assistant(" ")}),
    }
    assert found["4"][0].startswith('no "chosen". The row has prompt.')
    assert said(out, "written") == ["out.jsonl: 2 of 7 rows"]
    assert "mixed.jsonl:2: not valid JSON (Unterminated string starting at, column 12)" in said(out, "")
    assert "1 repeats an earlier row" in said(out, "left out") and len(said(out, "left out")) == 5


@pytest.mark.parametrize(
    "ending, content",
    [
        (".json", b'[{"prompt": 1}, {"pro'),
        (".csv", b"prompt,chosen\na,b,c\n"),
        (".jsonl", b'{"prompt": "\xff"}\n'),
        (".jsonl", b'[{"prompt": 1},\n{"pro'),
    ],
)
def test_a_file_of_which_more_than_a_line_may_be_lost_is_not_fixed(ending, content, doctor, tmp_path):
    file = tmp_path / f"broken{ending}"
    file.write_bytes(content)
    status, _, err = doctor(file, "--fix", tmp_path / "out.jsonl")
    assert status == 2 and err.startswith(f"refused: broken{ending}:") and "leave out the file" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_half_a_character_is_left_out_and_still_listed(doctor, tmp_path):
    bad = [{**TEXTS[0], "chosen": "cut \ud83d"}, {**TEXTS[0], "chosen": "whole", "id": "cut \ud83d"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*TEXTS, *bad)))
    status, _, _ = doctor(tmp_path / "in.jsonl", "--fix", tmp_path / "out.jsonl")
    assert (status, read_rows(tmp_path / "out.jsonl")) == (0, TEXTS)
    assert [line["row"] for line in read_rows(tmp_path / "out.jsonl.dropped.jsonl")] == bad


def test_chats_and_plain_text_together_are_written_and_refused(doctor, tmp_path):
    status, lines, _ = doctor([CHATS[0], TEXTS[0]], "--fix", tmp_path / "out.jsonl")
    assert (status, len(read_rows(tmp_path / "out.jsonl"))) == (2, 2)
    assert said(lines, "DPO") == ["refuses the data:", "refuses out.jsonl:"]
    assert said(lines, "form") == ["50% chats, 50% plain text"]


def test_a_file_that_is_there_is_kept_unless_overwrite_is_said(doctor, tmp_path):
    out, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.dropped.jsonl"
    for there in (out, beside):
        there.write_text("mine")
        status, lines, err = doctor(CHATS, "--fix", out)
        way_out = "Name another file, or add --overwrite\n"
        assert (status, lines) == (2, []) and there.read_text() == "mine"
        assert err == f"refused: --fix out.jsonl: {there.name} already exists. {way_out}"
        there.unlink()
    out.write_text("mine"), beside.write_text("of the run before")
    assert doctor(CHATS, "--fix", out, "--overwrite")[0] == 0
    assert read_rows(out) == CHATS and not beside.exists()


@pytest.mark.parametrize(
    "flags, problem",
    {
        "--fix in.jsonl --overwrite": "--fix in.jsonl: is also an input. Name another file",
        "--fix out.csv": "--fix out.csv: must end in .jsonl: one row per line",
        "--overwrite": "--overwrite: only used with --fix. Type --fix OUT.jsonl",
        "--rlhf_type simpoo": f"--rlhf_type simpoo: no such method. There are {', '.join(EVERY)}. Did you mean SimPO?",
        "--eval ni.jsonl": "--eval ni.jsonl: no such file or folder. Did you mean in.jsonl?",
    }.items(),
)
def test_bad_flags_are_refused_before_anything_is_read(flags, problem, doctor, tmp_path):
    words = [str(tmp_path / word) if ".jsonl" in word or ".csv" in word else word for word in flags.split()]
    before = write_rows(tmp_path / "in.jsonl", CHATS)
    assert doctor(CHATS, *words) == (2, [], f"refused: {problem}\n")
    assert read_rows(before) == CHATS and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
