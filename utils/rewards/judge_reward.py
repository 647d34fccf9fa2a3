"""The judge as reward functions of the online methods: one for its number, or one for each criterion of a rubric."""

import collections
from typing import TYPE_CHECKING, Any

from rlhf_args.judge_config import JudgeConfig
from utils.data.columns import text_of
from utils.rewards.functions import RewardFailed, example_answers
from utils.rewards.judge import Judge, Verdict
from utils.rewards.server import GivenUp, Prompt, Row, Unusable
from utils.runtime import output
from utils.runtime.errors import Failed, Refused

if TYPE_CHECKING:
    from transformers import Trainer

FEW = 8  # fewer failed answers do not end a run, unless they are a whole rollout
LATEST = 1000  # answers over which the failed share is taken


def load_judge(config: JudgeConfig, rows: list[Row]) -> "OnlineJudge | None":
    """The OnlineJudge of a run, after one trial request; None without a judge. Raises Refused without a reply."""
    if not config.judge_model:
        return None
    judge = OnlineJudge(config)
    output.say(f"judge     {config.judge_model}, tried on the first row: {judge.try_on(rows[0][1])}")
    return judge


class OnlineJudge:
    """Asks the judge about a rollout, and counts the answers without a verdict.

    trainer: set when the trainer is built.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.judge, self.config = Judge(config), config
        self.trainer: Any = None
        self.asked: list[Any] | None = None
        self.verdicts: list[Verdict] = []
        self.rollouts: collections.deque[tuple[int, int]] = collections.deque()
        self.failed = self.total = 0
        self.reasons: collections.Counter[str] = collections.Counter()  # in this process

    def try_on(self, row: dict[str, Any]) -> str:
        """The result of one request about a row, for the log. Raises Refused without a reply."""
        answers = [text_of(answer) for answer in example_answers(row)]
        messages, read, sampling = self.judge.asks(row["prompt"], answers)[0]
        found: Any
        try:
            (found,) = self.judge.server.ask_all([(messages, lambda *reply: reply, sampling)])
        except Failed as error:
            found = error
        if isinstance(found, Exception):
            raise Refused(
                [
                    f"--judge_model {self.config.judge_model}: no reply from --judge_base_url "
                    f"{self.config.judge_base_url} ({found}). Start the server, or correct the address, the model's "
                    "name or the key"
                ]
            )
        try:
            read(*found)
            return "it gave a verdict"
        except Unusable as error:
            return f"no verdict ({error}). It began with {found[0][:60]!r}"

    def rewards(self) -> "list[JudgeReward]":
        """A reward function for each of the judge's numbers."""
        return [JudgeReward(self, name) for name in self.judge.weights]

    def spread_weights(self, weights: list[float] | None, others: int) -> list[float]:
        """--reward_weights for TRL: those of `others` rewards, then one for each of the judge's numbers."""
        *given, own = weights or [1.0] * (others + 1)
        return [*given, *(own * weight for weight in self.judge.weights.values())]

    def takes_part(self) -> bool:
        """True if the judge scores now. pick leaves out held-out answers: its scores add up to 1 per prompt."""
        return self.judge.mode == "score" or self.trainer.model.training

    def judge_rollout(self, prompts: list[Prompt], completions: list[Any]) -> list[Any]:
        """{name: number} or GivenUp for each answer. The functions of a rollout share one request per answer."""
        if self.asked is not completions:
            answers = [text_of(completion) for completion in completions]
            pick = self.judge.mode == "pick"
            found = self.pick(prompts, answers) if pick else self.score(prompts, answers)
            self.reasons.update(str(one).split(":")[0] for one in found if isinstance(one, GivenUp))
            self.asked, self.verdicts = completions, found
        return [one if isinstance(one, GivenUp) else self.judge.by_name(one) for one in self.verdicts]

    def score(self, prompts: list[Prompt], answers: list[str]) -> list[Verdict]:
        groups = [(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        return [verdict for (verdict,) in self.judge.score(groups)]

    def pick(self, prompts: list[Prompt], answers: list[str]) -> list[Verdict]:
        """Verdicts on this process's answers. A group of num_generations consecutive answers may span processes.

        Then the process of a group's first answer judges the group, and the verdicts are gathered.
        Source: trl 1.16.0, grpo_trainer.py, _get_train_sampler: groups are consecutive across the processes' batches.
        """
        from accelerate.utils import gather_object

        size, count = self.trainer.num_generations, len(answers)
        first, spans = 0, bool(count % size)
        rows = list(zip(prompts, answers, strict=True))
        if spans:
            first, rows = self.trainer.accelerator.process_index * count, gather_object(rows)
        starts = [start for start in range(0, len(rows), size) if not spans or first <= start < first + count]
        groups = [rows[start : start + size] for start in starts]
        scores = self.judge.score([(group[0][0], [answer for _, answer in group]) for group in groups])
        found = [verdict for group in scores for verdict in group]
        if not spans:
            return found
        mine = [(start + n, verdict) for start, group in zip(starts, scores, strict=True)
                 for n, verdict in enumerate(group)]  # fmt: skip
        everyone = dict(gather_object(mine))
        return [everyone[place] for place in range(first, first + count)]

    def count_failures(self, failed: int, total: int, evaluating: bool = False) -> None:
        """Add a rollout or an evaluation batch of all processes: `failed` of its `total` answers got no verdict.

        Raises RewardFailed if more than max_failed_fraction of the latest answers failed. All processes call it with
        the same numbers, so all raise.
        """
        from accelerate.utils import gather_object

        self.failed, self.total = self.failed + failed, self.total + total
        self.rollouts.append((failed, total))
        while sum(total for _, total in self.rollouts) - self.rollouts[0][1] >= LATEST:
            self.rollouts.popleft()
        bad, seen = (sum(column) for column in zip(*self.rollouts, strict=True))
        limit, whole = self.config.max_failed_fraction, failed == total and not evaluating
        if bad <= limit * seen or (limit and bad < FEW and not whole):
            return
        reasons: collections.Counter[str] = sum(gather_object([self.reasons]), collections.Counter())
        raise RewardFailed(
            f"--judge_model {self.config.judge_model}: no verdict on {bad} of the latest {seen} answers "
            f"({bad / seen:.0%}), more than --max_failed_fraction {limit:g}. Most: {reasons.most_common(1)[0][0]}",
            "\n".join(
                [
                    f"Answers without a verdict, of {self.total} in the whole run:",
                    *(f"{number:>6}  {reason}" for reason, number in reasons.most_common()),
                    "Requests that failed in this process, each asked again up to --api_retries times:",
                    *(f"{number:>6}  {reason}" for reason, number in self.judge.server.failures.most_common()),
                ]
            ),
        )

    def say_failures(self) -> None:
        """Print at the end of a run what failed."""
        self.judge.server.say_failures()
        if self.failed:
            output.say(f"failed    {self.failed} of {self.total} answers got no verdict, and gave no signal")


class JudgeReward:
    """One of the judge's numbers as a reward function; None for an answer without a verdict."""

    def __init__(self, judge: OnlineJudge, name: str) -> None:
        self.judge, self.name, self.__name__ = judge, name, name

    def attach(self, trainer: "Trainer") -> None:
        self.judge.trainer = trainer

    def __call__(self, prompts: list[Prompt], completions: list[Any], **columns: Any) -> list[float | None]:
        if not self.judge.takes_part():
            return [None] * len(prompts)
        found = self.judge.judge_rollout(prompts, completions)
        return [None if isinstance(verdict, GivenUp) else verdict[self.name] for verdict in found]
