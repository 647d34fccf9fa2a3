"""A language model as judge, behind a server: a number for each answer, or the best of a prompt's answers.

Its verdict stands in double brackets at the end of its reply: [[7]], [[B]], and with a rubric [[helpfulness: 7]] for
each criterion. A reply without one, with two different ones or outside the scale is no verdict: the judge is asked
again, and in the end the answer is counted as failed.
"""

import math
import random
import re
import string
from dataclasses import fields
from pathlib import Path

from rlhf_args.judge_config import JudgeConfig
from utils.data.rows import text_key
from utils.rewards import judge
from utils.rewards.functions import name_rewards
from utils.rewards.server import GivenUp, Unusable, check_server

TEMPLATES = {"score": "data/judge_score.txt", "pick": "data/judge_pick.txt"}
PLACES = {"score": ("{prompt}", "{completion}"), "pick": ("{prompt}", "{completions}")}
VERDICT = re.compile(r"\[\[(.*?)\]\]")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)
LABELS = string.ascii_uppercase
CRITERION = re.compile(r"criterion[ \t]+([\w-]+)[ \t]+(\S+?)[ \t]*:[ \t]*(\S.*)", re.IGNORECASE)


# ── the template ─────────────────────────────────────────────────────────────────────────────────────────────────────


def template_of(config):
    """The path of the template in use."""
    return config.judge_template or TEMPLATES[config.judge_mode]


def check_template(path, mode):
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


def read_rubric(written):
    """({criterion: weight}, [(line, problem)], the text that is sent) of a template.

    A rubric begins with lines `criterion NAME WEIGHT: QUESTION`; {criteria} in the text below lists their questions.
    Any other template has no criteria, and is sent as it is.
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
                problems.append((number, "a criterion below other text. Criteria stand at the top, one a line"))
        elif not line.strip():
            continue
        elif not (found and NUMBER.fullmatch(found[2])):
            problems.append((number, 'not "criterion NAME WEIGHT: QUESTION", as "criterion brevity 1: Is it brief?"'))
        elif found[1].casefold() in names:
            problems.append((number, f"the criterion {found[1]} again. Give each a name of its own"))
        else:
            names.add(found[1].casefold())
            weights[found[1]] = float(found[2])
            asked.append(f"- {found[1]}: {found[3]}")
    if weights and not any(weights.values()):
        problems.append((head, "every criterion has the weight 0. Give one of them another"))
    if not weights:
        return {}, problems, written
    return weights, problems, "".join(lines[head:]).replace("{criteria}", "\n".join(asked))


def name_judge(config):
    """The judge's name in logs: the last part of its model's, which may be a path; None without a judge."""
    return Path(config.judge_model).name if config.judge_model else None


def name_numbers(config):
    """The names of the judge's numbers in logs: its criteria, or its own; [] without a judge."""
    if not config.judge_model:
        return []
    try:
        return [*read_rubric(Path(template_of(config)).read_text(encoding="utf-8-sig"))[0]] or [name_judge(config)]
    except (OSError, UnicodeDecodeError):  # check_template says it
        return [name_judge(config)]


def check_judge(config, flag, answers, unused=""):
    """Problems of the judge's flags. `answers`: those to one prompt, which pick compares, by --`flag`.

    `unused`: how the names of flags begin that have no effect without a judge.
    """
    if not config.judge_model:
        defaults = JudgeConfig()
        for one in fields(JudgeConfig):
            value = getattr(config, one.name)
            if one.name.startswith(unused) and value != getattr(defaults, one.name):
                yield f"--{one.name}: without --judge_model there is no judge. Type --judge_model NAME"
        return
    if not config.judge_server()[1]:
        yield "--judge_model: no server. Type --judge_base_url http://localhost:8000/v1"
    yield from check_server(config, *config.judge_server())
    yield from check_template(template_of(config), config.judge_mode)
    if config.judge_max_tokens < 1:
        yield f"--judge_max_tokens {config.judge_max_tokens}: 1 or more"
    least, most = config.judge_scale if len(config.judge_scale) == 2 else (1, 0)
    if not -math.inf < least < most < math.inf:
        yield f"--judge_scale {' '.join(map(str, config.judge_scale))}: the least number and the highest, like 1 10"
    elif config.judge_mode == "pick" and config.judge_scale != JudgeConfig().judge_scale:
        yield "--judge_scale with --judge_mode pick: a pick has no scale. Leave it out, or type --judge_mode score"
    if config.judge_mode == "pick" and not 2 <= answers <= len(LABELS):
        asked = getattr(config, flag)
        fits = asked + min(max(answers, 2), len(LABELS)) - answers
        yield (
            f"--judge_mode pick: picks of 2 to {len(LABELS)} answers, and there are {answers} to a prompt (--{flag} "
            f"{asked}). Type --{flag} {fits}, or --judge_mode score"
        )


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    """Scores the answers of a prompt; `least` and `most` bound the numbers of the mode "score".

    `weights`: {name: weight} of the numbers in one verdict: the criteria of a rubric, or the judge's one number.
    """

    def __init__(self, config):
        from utils.rewards import client

        self.mode, self.seed = config.judge_mode, config.seed
        self.least, self.most = config.judge_scale
        self.criteria, _, self.template = read_rubric(Path(template_of(config)).read_text(encoding="utf-8-sig"))
        self.weights = self.criteria or {name_judge(config): 1.0}
        self.max_tokens = config.judge_max_tokens
        _, url, key = config.judge_server()
        self.server = client.Server(
            url,
            config.judge_model,
            key,
            concurrency=config.api_concurrency,
            timeout=config.api_timeout,
            retries=config.api_retries,
        )

    def score(self, groups):
        """Of [(prompt, [completion text])] for each a list of verdicts, GivenUp in place of what failed.

        A verdict is a number, with a rubric {criterion: number}.
        """
        pick = self.mode == "pick"
        asked = [group for group in groups if not pick or len(set(group[1])) > 1]  # a single text needs no comparison
        found = iter(self.server.ask_all([ask for group in asked for ask in self.asks(*group)]))
        if not pick:
            return [[next(found) for _ in answers] for _, answers in groups]
        return [self.count_wins(answers, found) for _, answers in groups]

    def asks(self, prompt, answers):
        """The requests [(messages, read, sampling)] of a prompt's answers: one each, or the two passes of a pick.

        A group is shown twice, in an order that its prompt gives and in reverse: a place wins nothing.
        """
        prompt_text = say_conversation(prompt)
        if self.mode == "score":
            read = self.read_criteria if self.criteria else self.read_number
            return [(self.fill(prompt=prompt_text, completion=answer), read, self.sampling) for answer in answers]
        order = list(range(len(answers)))
        random.Random(text_key(self.seed, prompt)).shuffle(order)
        asks = []
        for shown in order, order[::-1]:
            written = "\n\n".join(f"[{LABELS[n]}]\n{answers[who]}" for n, who in enumerate(shown))
            messages = self.fill(prompt=prompt_text, completions=written)
            asks.append((messages, lambda *reply, shown=shown: self.read_label(*reply, shown), self.sampling))
        return asks

    def count_wins(self, answers, found):
        """The scores of one group, from its two passes, the next of `found`; equal shares if all are one text."""
        if len(answers) < 2:
            return [GivenUp("one answer is left, and nothing to pick from")] * len(answers)
        if len(set(answers)) == 1:
            return [1 / len(answers)] * len(answers)
        wins = [next(found), next(found)]
        failed = next((win for win in wins if isinstance(win, GivenUp)), None)
        return [failed or wins.count(who) / 2 for who in range(len(answers))]

    def by_name(self, verdict):
        """A verdict as {name: number}, by the names of `weights`."""
        return verdict if self.criteria else dict.fromkeys(self.weights, verdict)

    def fill(self, **values):
        """The template as one message; what is put in is not looked at for places again."""
        written = re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), self.template)
        return [{"role": "user", "content": written}]

    def sampling(self, refused):
        """The likeliest reply first; after a reply that was no verdict another one is to come."""
        return {"temperature": float(refused > 0), "max_tokens": self.max_tokens, "seed": self.seed + refused}

    def read_number(self, written, tokens, ended):
        return self.read_rating(single(find_verdicts(written, ended)))

    def read_criteria(self, written, tokens, ended):
        """{criterion: number}, each of them once; letter case is not looked at."""
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

    def read_rating(self, said):
        if not NUMBER.fullmatch(said):
            raise Unusable("the judge's verdict is no number")
        number = float(said)
        if not self.least <= number <= self.most:
            raise Unusable(f"the judge's verdict is not within {self.least:g} to {self.most:g}")
        return number

    def read_label(self, written, tokens, ended, order):
        """Which answer was picked."""
        said = single(find_verdicts(written, ended))
        if len(said) != 1 or said not in LABELS[: len(order)]:
            raise Unusable("the judge's verdict is none of the letters")
        return order[LABELS.index(said)]


def find_verdicts(written, ended):
    """What stands in double brackets, behind the judge's thoughts. Raises Unusable where there is nothing."""
    said = written.rpartition("</think>")[2]
    if not ended or "<think>" in said:
        raise Unusable("the judge's reply was cut at --judge_max_tokens")
    verdicts = [verdict.strip() for verdict in VERDICT.findall(said)]
    if not verdicts:
        raise Unusable("the judge gave no verdict")
    return verdicts


def single(verdicts):
    if len(set(verdicts)) != 1:
        raise Unusable("the judge gave two verdicts")
    return verdicts[0]


def say_conversation(prompt):
    """A plain prompt or a single question as it is, a longer chat with its roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def name_scorers(common, config):
    """The names of what judges, in the order of --reward_weights."""
    return name_rewards(common) + ([judge.name_judge(config)] if config.judge_model else [])
