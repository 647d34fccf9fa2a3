"""What fails to the end. `pytest tests/rejection/servers/test_failing_servers.py`"""

import re

import pytest

from tests.conftest import ROOT, command, read_rows, write_rows
from tests.rejection.servers.conftest import (
    CHATS,
    FAULTS,
    KEPT,
    NO_VERDICT,
    TWO,
    answer,
    contents,
    dead_url,
    digest,
    every,
    identity,
    keys_in,
    lines_with,
    make_client,
    words_for,
)
from utils.data.rows import text_key
from utils.rewards import client, judge, server

# ── what fails to the end ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_fails_at_every_attempt_is_marked_and_tried_again_by_the_next_run(start, run, clients, tmp_path):
    out, fails = tmp_path / "out", lambda body, attempt: "status 500" if "Where" in str(body) else None
    api = start(plan=fails)
    completions = f"{out / 'completions.jsonl'}"
    summary = f"failed    3 of 12 in {completions}: 3 status 500. The same command tries them again"

    # 3 of 12 answers are a share of 0.25
    status, said, err = run(api, "--max_failed_fraction 0.25")
    assert status == 0 and lines_with(said, "failed ") == [summary]
    assert clients[-1].failures == {"status 500": 3 * 5}  # an attempt, and 4 more
    failed = [line for line in read_rows(completions) if "failed" in line]
    assert failed == [
        {"prompt": 2, "sample": sample, "failed": 'status 500: {"error": "busy"}'} for sample in range(3)
    ]
    assert keys_in(completions) == every(4, 3)
    assert keys_in(out / "scores.jsonl") == [(n, s) for n, s in every(4, 3) if n != 2]  # it went on
    assert len(read_rows(out / "sft.jsonl")) == 3

    # less than that: the run goes on just the same, and its exit status says it
    api.attempts.clear()
    status, said, err = run(api, "--max_failed_fraction 0.24")
    assert status == 1 and lines_with(said, "failed ") == [summary]
    assert err.splitlines()[-1] == "failed: 25% failed, more than --max_failed_fraction 0.24"
    assert keys_in(completions) == every(4, 3) and len(read_rows(out / "sft.jsonl")) == 3

    # the same command, when the server is well again
    api.calm()
    status, said, _ = run(api, "--max_failed_fraction 0.24")
    assert status == 0 and not lines_with(said, "failed ")
    assert lines_with(said, "generate ") == ["generate  3 answers to sample, 9 are there"]
    assert len(api.asked) == 3 and all("Where" in str(body["messages"]) for body in api.asked)

    # and all is as if nothing had happened
    assert run(api, out="sound")[0] == 0
    assert contents(out, *KEPT) == contents(tmp_path / "sound", *KEPT)


def test_the_next_run_may_find_the_model_at_another_address(start, run, tmp_path):
    gone, other = start(plan=lambda body, attempt: "broken JSON" if "Where" in str(body) else None), start()
    assert run(gone)[0] == 1
    assert run(other)[0] == 0 and len(other.asked) == 3
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 3)


def test_the_command_ends_with_status_1_where_too_much_failed(start, tmp_path):
    api = start(plan=lambda body, attempt: "finish_reason null" if "Where" in str(body) else None)
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    flags = "--api_retries 0 --stages generate"
    done = command("rejection_sampling.py", *words_for(api, prompts, tmp_path / "out", flags))
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "failed: 25% failed, more than --max_failed_fraction 0.1"
    )
    file = tmp_path / "out" / "completions.jsonl"
    assert f"failed    3 of 12 in {file}: 3 the reply is half an answer. The same" in done.stdout


def test_verdicts_that_fail_are_marked_and_asked_for_again_by_the_next_run(start, run, tmp_path):
    def fails(body, attempt):
        return "broken JSON" if body["model"] == "j" and "Where" in str(body) else None

    out, api = tmp_path / "out", start(plan=fails)
    flags = f"--judge_model j --judge_base_url {api.url} --max_failed_fraction 0.25"
    status, said, _ = run(api, flags)
    assert status == 0 and lines_with(said, "failed ") == [
        f"failed    3 of 12 in {out / 'scores.jsonl'}: 3 the reply is not JSON. The same command tries them again"
    ]
    assert [line for line in read_rows(out / "scores.jsonl") if "failed" in line] == [
        {"prompt": 2, "sample": sample, "failed": "the reply is not JSON"} for sample in range(3)
    ]
    assert run(api, flags.replace("0.25", "0.2"))[0] == 1
    api.calm()
    status, said, _ = run(api, flags)
    assert status == 0 and lines_with(said, "score ") == ["score     3 answers to score, 9 are there"]
    assert [body["model"] for body in api.asked] == ["j"] * 3
    assert run(api, flags, out="sound")[0] == 0
    assert contents(out, *KEPT) == contents(tmp_path / "sound", *KEPT)


@pytest.mark.parametrize("status, path", [(401, "/v1"), (404, "/v1"), (404, "/v2")])
def test_a_key_an_address_or_a_model_that_is_wrong_ends_the_run_at_once(status, path, start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": {"message": "no"}}, status))
    api = start(plan=lambda body, attempt: "no")
    url = api.url.replace("/v1", path)
    found, _, err = run(url, "--api_concurrency 2", samples=20)
    assert found == 1 and len(api.asked) <= 4  # of 80: those under way
    (line,) = [line for line in re.split("[\r\n]", err) if "failed: " in line]
    message = "no" if path == "/v1" else "no such path"
    assert line.endswith(f'failed: {url}/chat/completions: {status} {{"error": {{"message": "{message}"}}}}')


def test_the_command_says_in_one_line_that_the_key_is_wrong(start, tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    api = start(plan=lambda body, attempt: "no")
    prompts = write_rows(tmp_path / "prompts.jsonl", CHATS)
    done = command("rejection_sampling.py", *words_for(api, prompts, tmp_path / "out", "--stages generate"))
    assert done.returncode == 1 and "secret-word" not in done.stdout + done.stderr
    lines = re.split("[\r\n]+", done.stderr.strip())
    assert all(line.startswith(("generate: ", "failed: ")) for line in lines)  # the bar, and that: no traceback
    assert sum(f'failed: {api.url}/chat/completions: 401 {{"error": "wrong key"}}' in line for line in lines) == 1


def test_what_ends_the_run_stands_on_a_line_of_its_own(start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    assert lines_with(re.split("[\r\n]+", run(start(plan=lambda body, attempt: "no"))[2]), "failed: ")


def test_a_wrong_key_ends_the_run_also_while_other_requests_hang(start, run, monkeypatch):
    monkeypatch.setitem(FAULTS, "no", lambda handler, reply: handler.send({"error": "wrong key"}, 401))
    api = start(plan=lambda body, attempt: "no" if len(api.asked) == 4 else "a time-out")
    assert run(api, "--api_concurrency 4")[0] == 1
    assert len(api.asked) <= 8  # and not 3 * 5 + 1: the three that hung are not made again four times more


def test_a_server_that_is_gone_ends_the_run(run, waits, clients, tmp_path):
    url = dead_url()
    status, said, err = run(url, "--api_retries 1", samples=20)  # 80 answers, and 64 failures in a row are the end
    assert status == 1
    (line,) = [line for line in re.split("[\r\n]", err) if "failed: " in line]
    wanted = rf"failed: {url}/chat/completions: (\d+) requests failed one after another, the last: ConnectError: .+"
    failed = int(re.search(wanted + "$", line)[1])
    # as many as may be under way are failing at the same moment
    assert client.IN_A_ROW == 64 and 64 <= failed < 64 + 8 and len(waits) <= failed + 8
    assert not (tmp_path / "out" / "completions.jsonl").exists()


def test_one_reply_in_between_says_that_the_server_is_there(start, waits):
    # each tenth request is answered: 63 in a row never fail
    api = start(plan=lambda body, attempt: None if "9?" in body["prompt"] else "status 500")
    asker = make_client(api, retries=0)
    asks = [(f"Why {number}?", lambda written, *_: written, lambda attempt: {}) for number in range(130)]
    found = asker.ask_all(asks)
    assert sum(isinstance(one, server.GivenUp) for one in found) == asker.failures.total() == 117 > client.IN_A_ROW


def test_a_server_that_is_gone_before_a_few_answers_leaves_them_for_the_next_run(run, start, tmp_path):
    url = dead_url()  # 12 answers are less than 64 in a row
    status, said, err = run(url, "--api_retries 1")
    assert status == 1 and lines_with(said, "failed ") == [
        f"failed    12 of 12 in {tmp_path / 'out' / 'completions.jsonl'}: 12 ConnectError. "
        "The same command tries them again"
    ]
    assert err.splitlines()[-1] == "failed: 100% failed, more than --max_failed_fraction 0.1"


def test_a_judge_that_is_gone_leaves_the_answers_as_they_are(start, run, tmp_path):
    api = start()
    assert run(api, "--judge_model j --api_retries 0 --judge_base_url " + dead_url())[0] == 1
    assert keys_in(tmp_path / "out" / "completions.jsonl") == every(4, 3)
    assert len(api.asked) == 12


# ── the judge ────────────────────────────────────────────────────────────────────────────────────────────────────────


NO_NUMBER, NO_LETTER = "the judge's verdict is no number", "the judge's verdict is none of the letters"


OUTSIDE = "the judge's verdict is not within 1 to 10"


SCORES = [
    ("[[7]]", 7.0),
    ("It is brief and right. [[7.5]]", 7.5),
    ("[[ 3 ]]\n", 3.0),
    ("First [[4]], and so: [[4]]", 4.0),
    ("[[1]]", 1.0),
    ("[[10]]", 10.0),
    ("", NO_VERDICT),
    ("7", NO_VERDICT),
    ("7/10. I give it a [7].", NO_VERDICT),
    ("[[7]", NO_VERDICT),
    ("[[7\n]]", NO_VERDICT),
    ("[[7]] or [[8]]", TWO),
    ("[[7]], in words [[seven]]", TWO),
    ("[[seven]]", NO_NUMBER),
    ("[[7/10]]", NO_NUMBER),
    ("[[]]", NO_NUMBER),
    ("[[A]]", NO_NUMBER),
    ("[[rating]]", NO_NUMBER),
    ("[[[7]]]", NO_NUMBER),
    ("[[0]]", OUTSIDE),
    ("[[11]]", OUTSIDE),
    ("[[-7]]", OUTSIDE),
    ("[[nan]]", NO_NUMBER),
    ("[[inf]]", NO_NUMBER),
    ("[[1e400]]", NO_NUMBER),
    ("[[1_0]]", NO_NUMBER),
]


@pytest.mark.parametrize("written, expected", SCORES)
def test_a_verdict_is_a_number_of_the_scale_in_double_brackets_or_none(written, expected, make_judge):
    found = make_judge()
    if isinstance(expected, float):
        assert found.read_number(written, 3, True) == expected
    else:
        with pytest.raises(server.Unusable, match=f"^{re.escape(expected)}$"):
            found.read_number(written, 3, True)


def test_the_scale_is_that_of_the_flag(make_judge):
    found = make_judge(judge_scale=[0.0, 1.0])
    assert [found.read_number(f"[[{number}]]", 1, True) for number in ("0", "0.5", "1")] == [0.0, 0.5, 1.0]
    with pytest.raises(server.Unusable, match="^the judge's verdict is not within 0 to 1$"):
        found.read_number("[[7]]", 1, True)


def test_a_reply_that_was_cut_before_its_end_is_no_verdict(make_judge):
    found = make_judge()
    with pytest.raises(server.Unusable):
        found.read_number("You ask for a rating like [[3]]. The answer is brief and", 12, False)


LETTERS = [("[[B]]", "second"), ("It is [[A]].", "first"), ("[[ C ]]", "third")]


NO_LETTERS = [
    ("[[D]]", NO_LETTER),  # there are three
    ("[[Z]]", NO_LETTER),
    ("[[AB]]", NO_LETTER),
    ("[[]]", NO_LETTER),
    ("[[b]]", NO_LETTER),
    ("[[1]]", NO_LETTER),
    ("[[A]] or [[B]]", TWO),
    ("B", NO_VERDICT),
]


@pytest.mark.parametrize("written, expected", LETTERS + NO_LETTERS)
def test_a_pick_is_one_of_the_letters_that_were_shown_or_none(written, expected, make_judge):
    found, order = make_judge(mode="pick"), ["first", "second", "third"]
    if (written, expected) in LETTERS:
        assert found.read_label(written, 3, True, order) == expected
    else:
        with pytest.raises(server.Unusable, match=f"^{re.escape(expected)}$"):
            found.read_label(written, 3, True, order)


def by_attempt(verdicts):
    """A judge whose replies to a request follow its seed: 42 at first, one more at each attempt."""
    return lambda body: (verdicts[min(body["seed"] - 42, len(verdicts) - 1)], "stop")


def test_nonsense_is_asked_again_with_another_seed_and_at_a_temperature(make_judge):
    found = make_judge(by_attempt(["Nice!", "[[99]]", "Well: [[4]]"]))
    assert found.score([("Why?", ["So."])]) == [[4.0]]
    asked = [(body["temperature"], body["seed"], body["max_tokens"]) for body in found.api.asked]
    assert asked == [(0.0, 42, 512), (1.0, 43, 512), (1.0, 44, 512)]
    assert found.server.failures == {NO_VERDICT: 1, OUTSIDE: 1}


def test_nonsense_to_the_end_is_failed_and_counted_and_never_guessed(make_judge):
    found = make_judge(lambda body: ("7 of 10, I would say" if "Bad" in str(body) else "[[7]]", "stop"))
    ((good, bad), (alone,)) = found.score([("Why?", ["Good.", "Bad."]), ("Who?", ["Good."])])
    assert (good, alone) == (7.0, 7.0)
    assert isinstance(bad, server.GivenUp) and str(bad) == NO_VERDICT
    assert found.server.failures == {NO_VERDICT: 3}  # an attempt, and 2 more


def test_a_run_with_a_judge_that_talks_nonsense_goes_on_and_ends_with_status_1(start, run, tmp_path):
    def write(body):
        if body["model"] != "j":
            return answer(body)
        return ("It is nice." if "Where" in str(body) else f"[[{1 + digest(identity(body)) % 10}]]"), "stop"

    api = start(write=write)
    status, said, err = run(api, f"--judge_model j --judge_base_url {api.url} --api_retries 2")
    assert status == 1
    assert lines_with(said, "failed ") == [
        f"failed    3 of 12 in {tmp_path / 'out' / 'scores.jsonl'}: 3 {NO_VERDICT}. The same command tries them again"
    ]
    lines = read_rows(tmp_path / "out" / "scores.jsonl")
    assert [(line["prompt"], line["sample"]) for line in lines] == every(4, 3)
    assert [line["prompt"] for line in lines if "failed" in line] == [2, 2, 2]
    assert all("score" not in line for line in lines if "failed" in line)
    assert sum(body["model"] == "j" for body in api.asked) == 9 + 3 * 3
    # of the failed prompt nothing is selected
    assert len(read_rows(tmp_path / "out" / "sft.jsonl")) == 3


def test_a_verdict_after_a_failed_connection_is_the_likeliest_one_all_the_same(make_judge):
    fails_once = {"plan": lambda body, attempt: "status 500" if attempt == 0 else None}
    found = make_judge(lambda body: ("[[4]]", "stop"), **fails_once)
    assert found.score([("Why?", ["So."])]) == [[4.0]]
    first, second = found.api.asked
    assert second == first and first["temperature"] == 0.0


def shown(body):
    """{letter: answer} of what a judge was shown."""
    (message,) = body["messages"]
    return dict(re.findall(r"^\[([A-Z])\]\n(.*)$", message["content"], re.MULTILINE))


GROUPS = [(f"Why {number}?", [f"answer {number} {letter}" for letter in "xyz"[:count]])
          for number, count in enumerate([2, 2, 2, 2, 3, 2])]  # fmt: skip


def test_a_judge_that_always_says_a_gives_both_of_a_pair_a_half(make_judge):
    found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
    pairs = [group for group in GROUPS if len(group[1]) == 2]
    assert found.score(pairs) == [[0.5, 0.5]] * 5
    # of three one stands in the middle both times: the two others win once each
    ((scores),) = found.score([GROUPS[4]])
    assert sorted(scores) == [0.0, 0.5, 0.5]


def test_a_judge_that_knows_the_best_gives_it_one_wherever_it_stands(make_judge):
    def knows(body):
        return next(f"[[{letter}]]" for letter, text in shown(body).items() if text.endswith("y")), "stop"

    found = make_judge(knows, mode="pick")
    assert found.score(GROUPS) == [[0.0, 1.0] if len(answers) == 2 else [0.0, 1.0, 0.0] for _, answers in GROUPS]
    places = [list(shown(body).values()).index(f"answer {number} y")
              for number in range(6) for body in found.api.asked if f"Why {number}?" in str(body)]  # fmt: skip
    assert len(set(places)) > 1  # it was not always the same letter


def test_the_second_pass_shows_the_answers_in_exactly_the_reverse_order(make_judge):
    groups = [("Why?", [f"answer {number}" for number in range(7)]), ("Who?", ["one", "two", "three"])]
    found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
    found.score(groups)
    assert len(found.api.asked) == 4
    starts = set()
    for prompt, answers in groups:
        first, second = (shown(body) for body in found.api.asked if prompt in str(body))
        assert list(first) == list(second) == list("ABCDEFG"[: len(answers)])
        assert list(first.values()) == list(second.values())[::-1] and sorted(first.values()) == sorted(answers)
        starts |= {tuple(first.values()), tuple(second.values())}
    # in an order of the prompt's own, and not that of the samples
    assert not starts & {tuple(groups[0][1]), tuple(groups[0][1][::-1])}


def test_the_order_is_the_same_in_the_next_run(make_judge):
    asked = []
    for _ in range(2):
        found = make_judge(lambda body: ("[[A]]", "stop"), mode="pick")
        found.score(GROUPS)
        asked.append(sorted(str(shown(body)) for body in found.api.asked))
    assert asked[0] == asked[1] and len(asked[0]) == 12
    assert text_key(42, "Why 0?") == text_key(42, "Why 0?") != text_key(43, "Why 0?")


def test_a_pass_that_fails_fails_the_whole_prompt(make_judge):
    """Half a comparison would be biased by position."""

    def write(body):
        return ("[[C]]" if shown(body)["A"] == "answer 1 x" else "[[A]]"), "stop"  # of a pair: no such letter

    found = make_judge(write, mode="pick")
    scores = found.score(GROUPS[:3])
    assert scores[0] == scores[2] == [0.5, 0.5]
    assert [str(one) for one in scores[1]] == [NO_LETTER] * 2 and isinstance(scores[1][0], server.GivenUp)
    assert found.server.failures == {NO_LETTER: 3}


def test_a_run_picks_the_best_of_each_prompts_answers(start, run, tmp_path):
    """The judge likes the longest answer; brevity has no weight."""

    def write(body):
        if body["model"] != "j":
            return f"{'long ' * (1 + body['seed'] % 9)}{body['seed']}", "stop"
        texts = shown(body)
        return f"[[{max(texts, key=lambda letter: (len(texts[letter]), texts[letter]))}]]", "stop"

    api = start(write=write)
    assert run(api, f"--judge_model j --judge_mode pick --judge_base_url {api.url} --reward_weights 0 1")[0] == 0
    assert sum(body["model"] == "j" for body in api.asked) == 4 * 2
    texts = {(line["prompt"], line["sample"]): line["completion"]
             for line in read_rows(tmp_path / "out" / "completions.jsonl")}  # fmt: skip
    for number in range(4):
        group = [line for line in read_rows(tmp_path / "out" / "scores.jsonl") if line["prompt"] == number]
        assert sorted(line["scores"]["j"] for line in group) == [0.0, 0.0, 1.0]
        best = max(group, key=lambda line: line["score"])
        longest = max((texts[number, sample] for sample in range(3)), key=lambda text: (len(text), text))
        assert texts[number, best["sample"]] == longest


# ── the judge's template ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_places_of_a_template_are_filled_once(make_judge):
    template = "{prompt}|{completion}|{prompt}|{other}|{}|{{prompt}}|[[1]]"
    found = make_judge(lambda body: ("[[4]]", "stop"), template=template)
    found.score([("What is {completion}?", ["{prompt} and {completions}"])])
    ((message,),) = [body["messages"] for body in found.api.asked]
    question, said = "What is {completion}?", "{prompt} and {completions}"
    assert message == {"role": "user", "content": f"{question}|{said}|{question}|{{other}}|{{}}|{{{question}}}|[[1]]"}


def test_a_chat_is_shown_to_the_judge_with_its_roles_and_a_question_as_it_is(make_judge):
    found = make_judge(lambda body: ("[[4]]", "stop"), template="{prompt}|{completion}")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    found.score([([user], ["So."]), ([system, user], ["So."]), ("Why? ", ["So."])])
    assert sorted(body["messages"][0]["content"] for body in found.api.asked) == [
        "Why? |So.", "Why?|So.", "system: Be brief.\n\nuser: Why?|So.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "mode, written, missing",
    [
        ("score", "Rate it: {completion}", ["{prompt}"]),
        ("score", "Rate it for {prompt}", ["{completion}"]),
        ("score", "Rate {prompt} {completions}", ["{completion}"]),
        ("score", "Rate it.", ["{prompt}", "{completion}"]),
        ("pick", "Pick: {prompt} {completion}", ["{completions}"]),
    ],
)
def test_a_template_without_its_places_is_refused_with_their_names(mode, written, missing, refused, tmp_path):
    file = tmp_path / "template.txt"
    file.write_text(written, encoding="utf-8")
    needs = "{prompt} and {completion}" if mode == "score" else "{prompt} and {completions}"
    has = f"With --judge_mode {mode} it has {needs}, as data/judge_{mode}.txt has"
    assert refused(f"--judge_model j --judge_mode {mode} --judge_template {file}") == [
        f"--judge_template {file}: no {place} in it. {has}" for place in missing
    ]


def test_a_template_that_is_not_there_or_no_text_is_refused(refused, tmp_path):
    gone = tmp_path / "gone.txt"
    assert refused(f"--judge_model j --judge_template {gone}") == [
        f"--judge_template {gone}: No such file or directory"
    ]
    assert refused(f"--judge_model j --judge_template {tmp_path}") == [f"--judge_template {tmp_path}: Is a directory"]
    (tmp_path / "latin.txt").write_bytes("{prompt} {completion} ä".encode("latin-1"))
    assert refused(f"--judge_model j --judge_template {tmp_path / 'latin.txt'}") == [
        f"--judge_template {tmp_path / 'latin.txt'}: not UTF-8"
    ]


def test_the_shipped_templates_ask_for_what_is_read(make_judge):
    for mode, places in judge.PLACES.items():
        assert not list(judge.check_template(judge.TEMPLATES[mode], mode))
        written = (ROOT / judge.TEMPLATES[mode]).read_text(encoding="utf-8")
        (example,) = judge.VERDICT.findall(written)
        assert all(place in written for place in places)
        found = make_judge(mode=mode)
        assert (found.read_number(f"[[{example}]]", 1, True) if mode == "score" else
                found.read_label(f"[[{example}]]", 1, True, [0, 1])) in (3.0, 1)  # fmt: skip
