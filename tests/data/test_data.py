"""Every form of data that is read, and what becomes of its rows: `pytest tests/data/test_data.py`."""

import csv
import datetime
import decimal
import hashlib
import json
import math
import re

import pytest

from rlhf_args.methods import DIALOGUE, METHODS, PAIR, PROMPT, RANKED, UNPAIRED
from tests.conftest import ROOT, write_rows
from utils.data.rows import Rows, check_dropped, count_reasons, hash_rows, hold_out, load_rows
from utils.runtime.errors import Refused


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


# What the methods train on: chat and plain text.
CHATS = [
    {"prompt": user(f"q{n}"), "chosen": assistant(f"good {n}"), "rejected": assistant(f"bad {n}")} for n in (1, 2)
]
TEXTS = [{"prompt": f"Q: q{n} A:", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in (1, 2)]
DIALOGUES = [{"messages": user("q") + assistant("a") + user("more") + assistant("b")}]


def joined(row):
    """The row with its prompt written in front of both answers, as reward data often are."""
    return {side: row["prompt"] + row[side] for side in RANKED}


def thumbs(row):
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for side in RANKED]


# name: (columns of the method, what stands in the file, what comes of it)
FORMS = {
    "pairs, chat": (PAIR, CHATS, CHATS),
    "pairs, plain": (PAIR, TEXTS, TEXTS),
    "pairs with the prompt in both answers, chat": (PAIR, [joined(row) for row in CHATS], CHATS),
    "thumbs, chat": (UNPAIRED, thumbs(CHATS[0]), thumbs(CHATS[0])),
    "thumbs, plain": (UNPAIRED, thumbs(TEXTS[0]), thumbs(TEXTS[0])),
    "reward, prompt in both, chat": (RANKED, [joined(row) for row in CHATS], CHATS),
    "reward, prompt in both, plain": (
        RANKED,
        [{"chosen": "Q: q A: good one", "rejected": "Q: q A: good grief"}],
        [{"prompt": "Q: q A: good ", "chosen": "one", "rejected": "grief"}],  # cut at a space, never inside a word
    ),
    "reward, prompt beside them, chat": (RANKED, CHATS, CHATS),
    "reward, prompt beside them, plain": (RANKED, TEXTS, TEXTS),
    "reward, with margins": (RANKED, [{**TEXTS[0], "margin": 0.5}], [{**TEXTS[0], "margin": 0.5}]),
    "dialogue, messages": (DIALOGUE, DIALOGUES, DIALOGUES),
    "dialogue, plain": (DIALOGUE, [{"messages": "once upon a time"}], [{"messages": "once upon a time"}]),
    "dialogue, prompt and completion, chat": (
        DIALOGUE,
        [{"prompt": user("q"), "completion": assistant("a")}],
        [{"messages": user("q") + assistant("a")}],
    ),
    "dialogue, prompt and completion, plain": (
        DIALOGUE,
        [{"prompt": "2+2=", "completion": "4"}],
        [{"prompt": "2+2=", "completion": "4"}],
    ),
}


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values())
    return str(path)


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


WRITERS = {".jsonl": write_rows, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def load(*paths, columns=PAIR, name="any", **kwargs):
    return load_rows([str(path) for path in paths], kwargs.pop("held_out", None), columns, name, **kwargs)


def values(rows):
    return [row for _, row in rows]


# ── forms and files ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_kind_of_file(form, ending, tmp_path):
    columns, written, expected = FORMS[form]
    file = WRITERS[ending](tmp_path / f"rows{ending}", written)
    rows = load(file, columns=columns)
    assert values(rows.train) == expected
    assert (rows.total, rows.dropped, rows.held_out, rows.notes) == (len(written), [], [], [])


@pytest.mark.parametrize("ending", WRITERS)
def test_a_row_is_named_by_file_and_line(ending, tmp_path):
    file = WRITERS[ending](tmp_path / f"rows{ending}", TEXTS)
    first = 2 if ending == ".csv" else 1  # the header is line 1 of a csv file
    assert [where for where, _ in load(file).train] == [f"{file}:{first}", f"{file}:{first + 1}"]


def test_the_sample_of_every_method_is_read_whole():
    assert METHODS
    for name, method in METHODS.items():
        rows = load(ROOT / method.sample_data, columns=method.columns, name=name)
        assert len(rows.train) == rows.total >= 100 and not rows.dropped, name


def test_a_folder_a_glob_and_several_files_give_the_same_rows(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", TEXTS[:1])
    second = write_csv(tmp_path / "b.csv", TEXTS[1:])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "later.jsonl").mkdir()  # a folder in the folder is left alone, whatever its name
    for paths in ([first, second], [tmp_path], [tmp_path / "*"], [f"{tmp_path}/"]):
        assert values(load(*paths).train) == TEXTS, paths
    assert values(load(second, first).train) == TEXTS[::-1]


def test_held_out_files_are_read_in_the_same_way(tmp_path):
    train, held_out = write_rows(tmp_path / "a.jsonl", TEXTS[:1]), write_parquet(tmp_path / "b.parquet", TEXTS[1:])
    rows = load(train, held_out=[held_out])
    assert (values(rows.train), values(rows.held_out), rows.total) == (TEXTS[:1], TEXTS[1:], 2)


@pytest.mark.parametrize(
    "name, content",
    {
        "byte order mark": "\ufeff" + json.dumps(TEXTS[0]) + "\n",
        "Windows line ends": json.dumps(TEXTS[0]) + "\r\n\r\n",
        "no line end": json.dumps(TEXTS[0]),
        "a line separator in the text": json.dumps(TEXTS[0])[:-1] + ', "id": "\u2028"}\n',
    }.items(),
)
def test_files_of_other_systems_are_read(name, content, tmp_path):
    (tmp_path / "rows.JSONL").write_bytes(content.encode())
    rows = load(tmp_path / "rows.JSONL")
    assert values(rows.train) == TEXTS[:1]


def test_an_array_in_jsonl_and_lines_in_json_are_read_and_said(tmp_path):
    array = write_json(tmp_path / "array.jsonl", TEXTS)
    lines = write_rows(tmp_path / "lines.json", TEXTS)
    rows = load(array)
    assert values(rows.train) == TEXTS and rows.notes == [
        f"{array} contains one JSON array, not one row per line; read as an array"
    ]
    rows = load(lines)
    assert values(rows.train) == TEXTS
    assert rows.notes == [f"{lines} contains one JSON object per line, not an array; read as jsonl"]


def test_a_cell_of_csv_may_be_long_and_hold_line_ends_and_quotes(tmp_path):
    row = {**TEXTS[0], "chosen": 'She said "no",\nand left. ' * 10_000}  # Python's csv stops at 131072 characters
    assert values(load(write_csv(tmp_path / "rows.csv", [row])).train) == [row]


# ── what is read into something else ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "written, read", [(1, True), (0, False), (1.0, True), (0.0, False), ("1", True), ("0.0", False)]
)
def test_labels_of_one_and_zero_are_read_and_said(written, read, tmp_path):
    other = {"prompt": "p", "completion": "c", "label": not read}
    rows = load(write_rows(tmp_path / "rows.jsonl", [{**other, "label": written}, other]), columns=UNPAIRED)
    assert [row["label"] for row in values(rows.train)] == [read, not read]
    assert rows.notes == ["labels written as 1 and 0 are read as true and false"]


def test_pairs_become_two_thumbs_each_and_a_prompt_s_two_answers_stand_apart(tmp_path):
    (good_1, bad_1), (good_2, bad_2) = thumbs(CHATS[0]), thumbs(CHATS[1])
    rows = load(write_rows(tmp_path / "rows.jsonl", CHATS), columns=UNPAIRED)
    assert values(rows.train) == [good_1, bad_2, good_2, bad_1]
    assert [where.rsplit(":")[-1] for where, _ in rows.train] == ["1", "2", "2", "1"]
    assert rows.total == 2


def test_the_shared_pair_file_serves_every_preference_method():
    pairs = values(load(ROOT / "data/preference.jsonl").train)
    ranked = values(load(ROOT / "data/preference.jsonl", columns=RANKED).train)
    unpaired = values(load(ROOT / "data/preference.jsonl", columns=UNPAIRED, name="KTO").train)
    assert ranked == pairs and len(unpaired) == 2 * len(pairs)
    assert [row["label"] for row in unpaired] == [True, False] * len(pairs)
    for row in pairs:
        assert thumbs(row)[0] in unpaired and thumbs(row)[1] in unpaired


def test_answers_that_repeat_the_prompt_are_read_without_it_and_said(tmp_path):
    rows = load(write_rows(tmp_path / "rows.jsonl", [{**row, **joined(row)} for row in CHATS]))
    assert values(rows.train) == CHATS
    assert rows.notes == ["the prompt is removed from answers that repeat it"]


def test_messages_keep_role_and_content_only_and_other_columns_are_named(tmp_path):
    row = {**CHATS[0], "prompt": [{**CHATS[0]["prompt"][0], "name": "Ann"}], "source": "web", "id": 7}
    rows = load(write_rows(tmp_path / "rows.jsonl", [row]))
    assert values(rows.train) == CHATS[:1]
    assert rows.notes == [
        "columns not used: id, source",
        "message keys not used: name",
    ]


def test_null_columns_count_as_absent(tmp_path):
    row = {**joined(CHATS[0]), "prompt": None, "messages": None}
    assert values(load(write_rows(tmp_path / "rows.jsonl", [row]), columns=RANKED).train) == CHATS[:1]


# ── rows that cannot be used ─────────────────────────────────────────────────────────────────────────────────────────


def test_dropped_rows_are_counted_by_reason(tmp_path):
    bad = [
        {**TEXTS[0], "chosen": " \n"},
        {**TEXTS[0], "rejected": ""},
        {**TEXTS[0], "rejected": TEXTS[0]["chosen"]},
        {**TEXTS[0], "prompt": ""},
    ]
    file = write_rows(tmp_path / "rows.jsonl", TEXTS + bad)
    rows = load(file)
    assert (len(rows.train), rows.total) == (2, 6)
    assert count_reasons(rows.dropped) == {"empty answer": 2, "chosen equals rejected": 1, "no prompt": 1}
    assert rows.dropped[0] == (f"{file}:3", "empty answer", bad[0])
    check_dropped(rows, 4 / 6)
    with pytest.raises(Refused, match=r"^4 of 6 rows cannot be used \(2 empty answer, 1 chosen equals rejected, 1 no"):
        check_dropped(rows, 0.6)


def test_equal_answers_are_seen_where_the_prompt_stands_in_both(tmp_path):
    row = joined(CHATS[0])
    rows = load(write_rows(tmp_path / "rows.jsonl", [row, {**row, "rejected": row["chosen"]}]), columns=RANKED)
    assert count_reasons(rows.dropped) == {"chosen equals rejected": 1}


def test_a_dialogue_without_an_answer_is_dropped(tmp_path):
    rows = [{"messages": user("q") + assistant("a")}, {"messages": user("q")}, {"messages": []}]
    loaded = load(write_rows(tmp_path / "rows.jsonl", rows), columns=DIALOGUE)
    assert values(loaded.train) == rows[:1] and count_reasons(loaded.dropped) == {"empty answer": 2}


def test_max_samples_takes_the_first_rows_of_the_training_data_only(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**TEXTS[0], "chosen": f"answer {n}"} for n in range(9)])
    rows = load(file, held_out=[file], max_samples=3)
    assert [row["chosen"] for row in values(rows.train)] == ["answer 0", "answer 1", "answer 2"]
    assert (len(rows.held_out), rows.total) == (9, 12)
    assert len(load(file, max_samples=100).train) == 9


HALF = "cut \ud83d"  # JSON's \\ud83d without the other half of the emoji


@pytest.mark.parametrize(
    "named, further",
    [
        ('"id"', {"id": HALF}),
        ('"id"', {"id": {"source": ["web", {"by": HALF}]}}),
        ('"id"', {"id": {HALF: "a key"}}),
        (r"\\ud83d", {HALF: "a name of a column"}),
        ('"rejected"', {"rejected": [{**assistant("no")[0], "name": HALF}]}),  # a part that is not trained on
    ],
)
@pytest.mark.parametrize("columns", [PAIR, PROMPT])
def test_half_a_character_in_any_column_is_refused_with_its_line(columns, named, further, tmp_path):
    sound = {**CHATS[0], "id": "a whole one: \U0001f600"}
    file = write_rows(tmp_path / "rows.jsonl", [sound])
    assert load(file, columns=columns).total == 1
    unequal = {**sound, "id": "x"} | {"chosen": CHATS[0]["rejected"]}  # a row that is dropped is refused all the same
    with open(file, "w") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in (sound, sound | further, unequal | further))
    with pytest.raises(Refused) as refusal:
        load(file, columns=columns)
    assert len(refusal.value.problems) == 2
    for line, problem in zip((2, 3), refusal.value.problems, strict=True):
        assert re.match(rf"{re.escape(file)}:{line}: .*{named}.*ud800", problem), problem
        problem.encode()  # the refusal itself can be written


# ── what is held out ─────────────────────────────────────────────────────────────────────────────────────────────────


def held(rows, fraction, seed):
    rows = Rows(list(rows))
    hold_out(rows, fraction, seed)
    return rows


def test_hold_out_takes_the_share_and_loses_nothing():
    rows = [(f"rows.jsonl:{n}", {"n": n}) for n in range(40)]
    for fraction, count in ((0, 0), (0.25, 10), (0.001, 1), (0.999, 39)):  # one row at least on either side
        found = held(rows, fraction, seed=0)
        assert (len(found.held_out), len(found.train)) == (count, 40 - count)
        assert sorted(found.train + found.held_out, key=rows.index) == rows


def test_hold_out_is_the_same_for_the_same_seed_and_another_for_another():
    rows = [(f"rows.jsonl:{n}", {"n": n}) for n in range(40)]
    assert held(rows, 0.25, seed=1).held_out == held(rows, 0.25, seed=1).held_out
    assert held(rows, 0.25, seed=1).held_out != held(rows, 0.25, seed=2).held_out


def test_hold_out_keeps_both_answers_of_a_pair_on_one_side():
    rows = load(ROOT / "data/preference.jsonl", columns=UNPAIRED, name="KTO", max_samples=50)
    assert len(rows.train) == 100
    hold_out(rows, 0.2, seed=42)
    assert (len(rows.train), len(rows.held_out)) == (80, 20)
    assert not {where for where, _ in rows.train} & {where for where, _ in rows.held_out}
    assert [row["label"] for row in values(rows.held_out)].count(True) == 10


def test_one_row_cannot_be_held_out():
    with pytest.raises(Refused, match="^--eval_fraction 0.5: .*Type --eval_fraction 0"):
        held([("rows.jsonl:1", {})], 0.5, seed=0)


def test_the_hash_of_the_data_depends_on_its_rows_not_on_its_file(tmp_path):
    one, other = write_rows(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "b.parquet", TEXTS)
    assert hash_rows(load(one).train) == hash_rows(load(other).train)
    assert hash_rows(load(one).train) != hash_rows(load(one, max_samples=1).train)


# a further column of every type that parquet has and JSON has not, and of a number that JSON has not
UNWRITABLE = {
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "date": datetime.date(2026, 1, 2),
    "time": datetime.time(3, 4, 5),
    "duration": datetime.timedelta(seconds=1.5),
    "decimal": decimal.Decimal("1.50"),
    "bytes": b"\x00\xff",
    "nan": math.nan,
    "nested": {"days": [datetime.date(2026, 1, 2)], "price": decimal.Decimal("2.25")},
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_further_value_that_json_cannot_write_is_kept_and_hashed(name, tmp_path):
    row = {"prompt": "q", name: UNWRITABLE[name]}
    file = write_parquet(tmp_path / "rows.parquet", [row])
    first, again = (load(file, columns=PROMPT).train for _ in range(2))
    other = load(write_parquet(tmp_path / "other.parquet", [row | {name: None}]), columns=PROMPT).train
    assert str(first[0][1]["further"][name]) == str(UNWRITABLE[name])
    for in_order in (False, True):
        hashed = hash_rows(first, in_order)
        assert hashed == hash_rows(again, in_order)
        assert hashed != hash_rows(other, in_order)


def test_the_hash_of_ordinary_rows_stays_that_of_earlier_run_cards():
    """sha256 of the rows as JSON, names sorted, one a line in sorted order."""
    rows = [("rows.jsonl:1", {"prompt": "b 天", "chosen": "c"}), ("rows.jsonl:2", {"prompt": "a", "margin": 0.5})]
    one, two = '{"chosen": "c", "prompt": "b 天"}', '{"margin": 0.5, "prompt": "a"}'
    assert hash_rows(rows) == hash_rows(rows[::-1]) == hashlib.sha256(f"{one}\n{two}".encode()).hexdigest()
    assert hash_rows(rows[::-1], in_order=True) == hashlib.sha256(f"{two}\n{one}".encode()).hexdigest()
