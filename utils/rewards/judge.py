"""An LLM judge behind a server: it rates each answer, or picks the best answer to a prompt.

The reply ends with a verdict in double brackets: [[7]], [[B]], or with a rubric [[helpfulness: 7]] for each criterion.
A reply with no verdict, two different verdicts or a number outside the scale is retried. After all attempts the answer
counts as failed.
"""

import functools
import random
import re
import string
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from common_args import RewardArgs
from rlhf_args.judge_config import JudgeConfig
from utils.data.rows import text_key
from utils.rewards.functions import name_rewards
from utils.rewards.server import GivenUp, Prompt, Request, Unusable, check_server

Verdict = float | dict[str, float] | GivenUp  # a number, with a rubric {criterion: number}

TEMPLATES = {"score": "data/judge_score.txt", "pick": "data/judge_pick.txt"}
PLACES = {"score": ("{prompt}", "{completion}"), "pick": ("{prompt}", "{completions}")}
VERDICT = re.compile(r"\[\[(.*?)\]\]")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)
LABELS = string.ascii_uppercase
CRITERION = re.compile(r"criterion[ \t]+([\w-]+)[ \t]+(\S+?)[ \t]*:[ \t]*(\S.*)", re.IGNORECASE)


# ── the template ─────────────────────────────────────────────────────────────────────────────────────────────────────


def template_of(config: JudgeConfig) -> str:
    """The path of the template in use."""
    return config.judge_template or TEMPLATES[config.judge_mode]


def check_template(path: str | Path, mode: str) -> Iterator[str]:
    """Problems of a judge's template file."""
    try:
        written = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield f"--judge_template {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        return
    listed = "{criteria}" in written
    criteria, problems, written = read_rubric(written)
    yield from (f"{path}:{line}: {problem}" for line, problem in problems)
    if criteria and mode == "pick":
        yield f"--judge_template {path}: a rubric rates each answer by itself. Type --judge_mode score"
        return
    if not problems and bool(criteria) != listed:
        yield (
            f"--judge_template {path}: a rubric has lines `criterion NAME WEIGHT: QUESTION` at its top, and "
            f"{{criteria}} below, where the questions go. It has {'no {criteria}' if criteria else 'no such line'}"
        )
    for place in PLACES[mode]:
        if place not in written:
            yield (
                f"--judge_template {path}: no {place} in it. With --judge_mode {mode} it has "
                f"{' and '.join(PLACES[mode])}, as {TEMPLATES[mode]} has"
            )


def read_rubric(written: str) -> tuple[dict[str, float], list[tuple[int, str]], str]:
    """({criterion: weight}, [(line, problem)], the text to send) of a template.

    A rubric begins with lines `criterion NAME WEIGHT: QUESTION`; {criteria} in the text below is replaced by their
    questions. Any other template has no criteria, and is sent unchanged.
    """
    lines = written.splitlines(keepends=True)
    head = next(
        (n for n, line in enumerate(lines) if line.strip() and not line.lower().startswith("criterion ")), len(lines)
    )
    weights, asked, problems, names = {}, [], [], set()
    for number, line in enumerate(lines, 1):
        found = CRITERION.fullmatch(line.strip())
        if number > head:
            if found:
                problems.append((number, "a criterion below other text. Put criteria at the top, one per line"))
        elif not line.strip():
            continue
        elif not (found and NUMBER.fullmatch(found[2])):
            problems.append((number, 'not "criterion NAME WEIGHT: QUESTION", as "criterion brevity 1: Is it brief?"'))
        elif found[1].casefold() in names:
            problems.append((number, f"a second criterion {found[1]}. Rename it"))
        else:
            names.add(found[1].casefold())
            weights[found[1]] = float(found[2])
            asked.append(f"- {found[1]}: {found[3]}")
    if weights and not any(weights.values()):
        problems.append((head, "every criterion has the weight 0. Type another weight"))
    if not weights:
        return {}, problems, written
    return weights, problems, "".join(lines[head:]).replace("{criteria}", "\n".join(asked))


def name_judge(config: JudgeConfig) -> str:
    """The judge's name in logs: the last part of its model's name, which may be a path; "" without a judge."""
    return Path(config.judge_model or "").name


def name_numbers(config: JudgeConfig) -> list[str]:
    """The names of the judge's numbers in logs: its criteria, or its own name; [] without a judge."""
    if not config.judge_model:
        return []
    try:
        return [*read_rubric(Path(template_of(config)).read_text(encoding="utf-8-sig"))[0]] or [name_judge(config)]
    except (OSError, UnicodeDecodeError):  # check_template reports it
        return [name_judge(config)]


def check_judge(config: JudgeConfig, flag: str, answers: int, unused: str = "") -> Iterator[str]:
    """Problems of the judge's flags. answers: number per prompt, set by --`flag`.

    unused: prefix of the flags that have no effect without a judge.
    """
    if not config.judge_model:
        defaults = JudgeConfig()
        for one in fields(JudgeConfig):
            value = getattr(config, one.name)
            if one.name.startswith(unused) and value != getattr(defaults, one.name):
                yield f"--{one.name}: only used with a judge. Add --judge_model NAME, or remove it"
        return
    if not config.judge_server()[1]:
        yield "--judge_model: no server. Type --judge_base_url http://localhost:8000/v1"
    yield from check_server(config, *config.judge_server())
    yield from check_template(template_of(config), config.judge_mode)
    least, most = config.judge_scale if len(config.judge_scale) == 2 else (1, 0)
    if least >= most:
        yield f"--judge_scale {' '.join(map(str, config.judge_scale))}: must be the lowest and the highest number"
    elif config.judge_mode == "pick" and config.judge_scale != JudgeConfig().judge_scale:
        yield "--judge_scale with --judge_mode pick: a pick has no scale. Remove it, or type --judge_mode score"
    if config.judge_mode == "pick" and not 2 <= answers <= len(LABELS):
        asked = getattr(config, flag)
        fits = asked + min(max(answers, 2), len(LABELS)) - answers
        yield (
            f"--judge_mode pick: needs 2 to {len(LABELS)} answers to a prompt, not {answers} (--{flag} {asked}). "
            f"Type --{flag} {fits}, or --judge_mode score"
        )


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    """Scores the answers to a prompt. least, most: the scale of --judge_mode score.

    weights: {name: weight} of the numbers in a verdict: the criteria of a rubric, or the judge's single number.
    """

    def __init__(self, config: JudgeConfig) -> None:
        from utils.rewards import client

        self.mode, self.seed = config.judge_mode, config.seed
        self.least, self.most = config.judge_scale
        self.criteria, _, self.template = read_rubric(Path(template_of(config)).read_text(encoding="utf-8-sig"))
        self.weights = self.criteria or {name_judge(config): 1.0}
        self.max_tokens = config.judge_max_tokens
        _, url, key = config.judge_server()
        self.server = client.Server(
            url or "",
            config.judge_model or "",
            key,
            concurrency=config.api_concurrency,
            timeout=config.api_timeout,
            retries=config.api_retries,
        )

    def score(self, groups: list[tuple[Prompt, list[str]]]) -> list[list[Verdict]]:
        """A list of verdicts for each (prompt, [completion text])."""
        pick = self.mode == "pick"
        asked = [group for group in groups if not pick or len(set(group[1])) > 1]  # a single text needs no comparison
        found = iter(self.server.ask_all([ask for group in asked for ask in self.asks(*group)]))
        if not pick:
            return [[next(found) for _ in answers] for _, answers in groups]
        return [self.count_wins(answers, found) for _, answers in groups]

    def asks(self, prompt: Prompt, answers: list[str]) -> list[Request]:
        """The requests for a prompt's answers: one each, or the two passes of a pick.

        A pick shows the answers twice, in an order drawn from the prompt and in reverse, against position bias.
        """
        prompt_text = say_conversation(prompt)
        if self.mode == "score":
            read = self.read_criteria if self.criteria else self.read_number
            return [(self.fill(prompt=prompt_text, completion=answer), read, self.sampling) for answer in answers]
        order = list(range(len(answers)))
        random.Random(text_key(self.seed, prompt)).shuffle(order)
        asks: list[Request] = []
        for shown in order, order[::-1]:
            written = "\n\n".join(f"[{LABELS[n]}]\n{answers[who]}" for n, who in enumerate(shown))
            messages = self.fill(prompt=prompt_text, completions=written)
            asks.append((messages, functools.partial(self.read_label, order=shown), self.sampling))
        return asks

    def count_wins(self, answers: list[str], found: Iterator[int | GivenUp]) -> list[Verdict]:
        """The scores of one group from its two passes, the next of `found`; equal shares if all texts are equal."""
        if len(answers) < 2:
            return [GivenUp("one answer is left: nothing to compare")] * len(answers)
        if len(set(answers)) == 1:
            return [1 / len(answers)] * len(answers)
        wins = [next(found), next(found)]
        failed = next((win for win in wins if isinstance(win, GivenUp)), None)
        return [failed or wins.count(who) / 2 for who in range(len(answers))]

    def by_name(self, verdict: Any) -> dict[str, float]:
        """A verdict as {name: number}, with the names of `weights`."""
        return verdict if self.criteria else dict.fromkeys(self.weights, verdict)

    def fill(self, **values: str) -> list[dict[str, str]]:
        """The template as one message. Inserted text is not searched for places."""
        written = re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), self.template)
        return [{"role": "user", "content": written}]

    def sampling(self, refused: int) -> dict[str, Any]:
        """Greedy at first. After a refused reply temperature 1 and another seed, for another reply."""
        return {"temperature": float(refused > 0), "max_tokens": self.max_tokens, "seed": self.seed + refused}

    def read_number(self, written: str, tokens: int | None, ended: bool) -> float:
        return self.read_rating(single(find_verdicts(written, ended)))

    def read_criteria(self, written: str, tokens: int | None, ended: bool) -> dict[str, float]:
        """{criterion: number}, each criterion once. Letter case is ignored."""
        names, found = {name.casefold(): name for name in self.criteria}, {}
        for verdict in find_verdicts(written, ended):
            said, _, number = verdict.partition(":")
            name = names.get(said.strip().casefold())
            if name is None:
                raise Unusable("the judge rated what is no criterion")
            if name in found:
                raise Unusable(f"the judge rated a criterion twice: {name}")
            found[name] = self.read_rating(number.strip())
        missing = [name for name in self.criteria if name not in found]
        if missing:
            raise Unusable(f"the judge left out a criterion: {', '.join(missing)}")
        return {name: found[name] for name in self.criteria}

    def read_rating(self, said: str) -> float:
        if not NUMBER.fullmatch(said):
            raise Unusable("the judge's verdict is no number")
        number = float(said)
        if not self.least <= number <= self.most:
            raise Unusable(f"the judge's verdict is not within {self.least:g} to {self.most:g}")
        return number

    def read_label(self, written: str, tokens: int | None, ended: bool, order: list[int]) -> int:
        """The index of the picked answer."""
        said = single(find_verdicts(written, ended))
        if len(said) != 1 or said not in LABELS[: len(order)]:
            raise Unusable("the judge's verdict is none of the letters")
        return order[LABELS.index(said)]


def find_verdicts(written: str, ended: bool) -> list[str]:
    """The verdicts in double brackets after </think>. Raises Unusable if there is none."""
    said = written.rpartition("</think>")[2]
    if not ended or "<think>" in said:
        raise Unusable("the judge's reply was cut at --judge_max_tokens")
    verdicts = [verdict.strip() for verdict in VERDICT.findall(said)]
    if not verdicts:
        raise Unusable("the judge gave no verdict")
    return verdicts


def single(verdicts: list[str]) -> str:
    if len(set(verdicts)) != 1:
        raise Unusable("the judge gave two verdicts")
    return verdicts[0]


def say_conversation(prompt: Prompt) -> str:
    """A plain prompt or a single question unchanged, a longer chat with its roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def name_scorers(common: RewardArgs, config: JudgeConfig) -> list[str]:
    """The names of the scorers, in the order of --reward_weights."""
    return name_rewards(common) + ([name_judge(config)] if config.judge_model else [])
