"""A language model as judge, behind a server: a number for each answer, or the best of a prompt's answers.

Its verdict stands in double brackets at the end of what it says: [[7]], [[B]]. A reply without one, with two different
ones or outside what was asked is no verdict: it is asked again, and in the end counted as failed.
"""

import random
import re
import string
from pathlib import Path

from utils.pool import text_key
from utils.server import GivenUp, Server, Unusable

TEMPLATES = {"score": "data/judge_score.txt", "pick": "data/judge_pick.txt"}
PLACES = {"score": ("{prompt}", "{completion}"), "pick": ("{prompt}", "{completions}")}
VERDICT = re.compile(r"\[\[(.*?)\]\]")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)
LABELS = string.ascii_uppercase


def check_template(path, mode):
    """Problems of a judge's template file."""
    try:
        written = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield f"--judge_template {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        return
    for place in PLACES[mode]:
        if place not in written:
            yield (
                f"--judge_template {path}: no {place} in it. With --judge_mode {mode} it has "
                f"{' and '.join(PLACES[mode])}, as {TEMPLATES[mode]} has"
            )


class Judge:
    """Scores the answers of a prompt; `least` and `most` bound the numbers of the mode "score"."""

    def __init__(self, config):
        self.mode, self.seed = config.judge_mode, config.seed
        self.least, self.most = config.judge_scale
        self.template = Path(config.judge_template or TEMPLATES[self.mode]).read_text(encoding="utf-8")
        self.max_tokens = config.judge_max_tokens
        self.server = Server(
            config.judge_base_url or config.api_base_url,
            config.judge_model,
            config.judge_key_variable or config.api_key_variable,
            concurrency=config.api_concurrency,
            timeout=config.api_timeout,
            retries=config.api_retries,
        )

    def score(self, groups):
        """Of [(prompt, [completion text])] for each a list of numbers, GivenUp in place of what failed."""
        return (self.score_each if self.mode == "score" else self.pick)(groups)

    def score_each(self, groups):
        asks = [
            (self.write(prompt=say_conversation(prompt), completion=answer), self.read_number, self.sampling)
            for prompt, answers in groups
            for answer in answers
        ]
        found = iter(self.server.ask_all(asks))
        return [[next(found) for _ in answers] for _, answers in groups]

    def pick(self, groups):
        """Each group is shown twice, in an order that its prompt gives and in reverse: a place wins nothing."""
        orders = []
        for prompt, answers in groups:
            order = list(range(len(answers)))
            random.Random(text_key(self.seed, prompt)).shuffle(order)
            orders += [order, order[::-1]]
        asks = []
        for place, order in enumerate(orders):
            prompt, answers = groups[place // 2]
            shown = "\n\n".join(f"[{LABELS[n]}]\n{answers[who]}" for n, who in enumerate(order))
            asks.append(
                (
                    self.write(prompt=say_conversation(prompt), completions=shown),
                    lambda *reply, order=order: self.read_label(*reply, order),
                    self.sampling,
                )
            )
        found = self.server.ask_all(asks)
        scores = []
        for place, (_, answers) in enumerate(groups):
            wins = found[2 * place : 2 * place + 2]
            failed = next((win for win in wins if isinstance(win, GivenUp)), None)
            if len(answers) < 2:
                failed = GivenUp("one answer is left, and nothing to pick from")
            scores.append([failed or wins.count(who) / 2 for who in range(len(answers))])
        return scores

    def write(self, **values):
        """The template as one message; what is put in is not looked at for places again."""
        written = re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), self.template)
        return [{"role": "user", "content": written}]

    def sampling(self, refused):
        """The likeliest reply first; after a reply that was no verdict another one is to come."""
        return {"temperature": float(refused > 0), "max_tokens": self.max_tokens, "seed": self.seed + refused}

    def read_number(self, written, tokens, ended):
        said = read_verdict(written, ended)
        if not NUMBER.fullmatch(said):
            raise Unusable("the judge's verdict is no number")
        number = float(said)
        if not self.least <= number <= self.most:
            raise Unusable(f"the judge's verdict is not within {self.least:g} to {self.most:g}")
        return number

    def read_label(self, written, tokens, ended, order):
        """Which answer was picked."""
        said = read_verdict(written, ended)
        if len(said) != 1 or said not in LABELS[: len(order)]:
            raise Unusable("the judge's verdict is none of the letters")
        return order[LABELS.index(said)]


def read_verdict(written, ended):
    if not ended:
        raise Unusable("the judge's reply was cut at --judge_max_tokens")
    said = {verdict.strip() for verdict in VERDICT.findall(written)}
    if len(said) != 1:
        raise Unusable("the judge gave no verdict" if not said else "the judge gave two verdicts")
    return said.pop()


def say_conversation(prompt):
    """A plain prompt or a single question as it is, a longer chat with its roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
