"""The second time. `pytest tests/checks/preflight/test_prepared_again.py`"""

import os
import shutil

import pytest

from rlhf_args.methods import ANSWERED, DIALOGUE, PAIR, PROMPT, RANKED, UNPAIRED
from tests.checks.preflight.conftest import PAIRS, pair, thumbs
from tests.conftest import TEMPLATE, make_tokenizer, write_rows
from utils.data import cache, prepare as data_prepare, template as data_template
from utils.data.rows import load_rows

# ── the second time ──────────────────────────────────────────────────────────────────────────────────────────────────


KINDS = {
    "DPO": (PAIR, PAIRS),
    "Reward": (RANKED, PAIRS),
    "KTO": (UNPAIRED, thumbs(6, 6)),
    "SFT": (DIALOGUE, [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]),
    "GKD": (ANSWERED, [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]),
    "GRPO": (PROMPT, [{"prompt": row["prompt"], "answer": n} for n, row in enumerate(PAIRS)]),
}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(name, ...) is (what the cache says came of the rows of a method, whether it was made anew)."""
    made = []
    prepare_rows = data_prepare.prepare_rows
    monkeypatch.setattr(data_prepare, "prepare_rows", lambda *args: made.append(1) or prepare_rows(*args))

    def prepare(name="DPO", rows=None, max_length=40, template=TEMPLATE, file="rows.jsonl"):
        columns, sample = KINDS[name]
        path = write_rows(tmp_path / file, (rows or sample) + [long_row(columns)])
        read = load_rows([path], None, columns, name)
        tokenizer = make_tokenizer(template)
        data_template.fit_tokenizer(tokenizer, chat=True)
        made.clear()
        return cache.prepare_once(read.train, tokenizer, columns, max_length), bool(made)

    return prepare


def long_row(columns):
    """One that max_length drops, and whose answer has an end of turn in it."""
    row = pair(1, prompt="!" * 100, chosen="a<|im_end|>b", rejected="c")
    if columns == UNPAIRED:
        return {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
    if columns in (DIALOGUE, ANSWERED):
        return {"messages": row["prompt"] + row["chosen"]}
    return row | {"answer": 5} if columns in (PAIR, RANKED) else {"prompt": row["prompt"], "answer": 5}


@pytest.mark.parametrize("name", KINDS)
def test_the_second_start_gets_the_same_rows_without_a_tokenizer(name, prepare):
    first, anew = prepare(name)
    assert anew and len(first.dropped) == 1 and first.rows
    second, anew = prepare(name)
    assert not anew and second == first


def test_what_decides_the_rows_decides_whether_they_are_made_anew(prepare, monkeypatch):
    prepare()
    assert prepare(max_length=41)[1] and prepare(rows=PAIRS[:-1])[1] and prepare(file="other.jsonl")[1]
    assert prepare(template=TEMPLATE + " ")[1] and prepare("Reward")[1]
    dated = TEMPLATE + "{# strftime_now #}"  # a template that could write the date
    monkeypatch.setattr(cache.time, "strftime", lambda form: "2026-01-01")
    assert prepare(template=dated)[1] and not prepare(template=dated)[1]
    monkeypatch.setattr(cache.time, "strftime", lambda form: "2026-01-02")
    assert prepare(template=dated)[1]
    assert not prepare()[1]


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}", None], ids=["empty", "no hash", "wrong", "cut"])
def test_a_damaged_entry_is_made_anew(damage, prepare):
    first, _ = prepare()
    (entry,) = cache.folder().iterdir()
    entry.write_bytes(entry.read_bytes()[:-9] if damage is None else damage)
    assert prepare() == (first, True)
    assert prepare() == (first, False)  # and written anew


def test_a_cache_that_cannot_be_written_is_done_without(prepare, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert prepare()[1] and prepare()[1]


def test_an_entry_is_for_the_user_alone_and_nothing_is_left_beside_it(prepare):
    prepare()
    (entry,) = cache.folder().iterdir()
    assert entry.stat().st_mode & 0o77 == 0 and cache.folder().stat().st_mode & 0o77 == 0


def test_the_entry_used_longest_ago_makes_room(prepare, monkeypatch):
    for n, limit in enumerate((40, 41, 42)):
        prepare(max_length=limit)
        newest = max(cache.folder().iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (n, n))
    size = max(file.stat().st_size for file in cache.folder().iterdir())
    assert not prepare(max_length=40)[1]  # used now, so that 41 is the oldest
    monkeypatch.setattr(cache, "ROOM", 3 * size + 100)
    prepare(max_length=43)
    assert [prepare(max_length=limit)[1] for limit in (40, 42, 43)] == [False] * 3
    assert prepare(max_length=41)[1]
    monkeypatch.setattr(cache, "ROOM", size)  # of which an entry may take half
    shutil.rmtree(cache.folder())
    assert prepare()[1] and prepare()[1]


# ── where it goes ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_findings_stand_on_the_rows_for_the_run_card(tiny_model, tmp_path):
    from utils.cli import arguments
    from utils.cli.run import Run
    from utils.training import chapters

    path = write_rows(tmp_path / "rows.jsonl", [*PAIRS, PAIRS[0]])
    words = f"--model_name_or_path {tiny_model} --train_data_path {path} --output_dir {tmp_path / 'out'}"
    common, config = arguments.parse(words.split(), "DPO")
    rows = load_rows([path], None, PAIR, "DPO")
    chapters.prepare_text(Run([], "DPO", common, config, rows))
    assert [finding.kind for finding in rows.findings] == ["pace", "weights", "lengths", "disk", "warning"]
    assert rows.findings[-1].text.startswith("1 of 17 rows repeat another")
