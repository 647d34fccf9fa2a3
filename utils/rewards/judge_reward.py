"""The judge as reward functions of the online methods: one for its number, or one for each criterion of a rubric."""

import collections

from utils.data.columns import text_of
from utils.rewards.functions import RewardFailed, example_answers
from utils.rewards.judge import Judge
from utils.rewards.server import GivenUp, Unusable
from utils.runtime import output
from utils.runtime.errors import Failed, Refused

FEW = 8  # fewer failed answers than this end no run, unless they are a whole rollout
LATEST = 1000  # answers over which the failed share is taken


def load_judge(config, rows):
    """The OnlineJudge of a run, asked once; None without a judge. Raises Refused where its server does not answer."""
    if not config.judge_model:
        return None
    judge = OnlineJudge(config)
    output.say(f"judge     {config.judge_model}, tried on the first row: {judge.try_on(rows[0][1])}")
    return judge


class OnlineJudge:
    """Asks the judge about a rollout, and counts the answers that it gave no verdict on.

    `trainer`: set when the trainer is built; it says whose turn it is and how many answers a prompt has.
    """

    def __init__(self, config):
        self.judge, self.config, self.trainer = Judge(config), config, None
        self.asked, self.verdicts = None, []
        self.rollouts, self.failed, self.total = collections.deque(), 0, 0
        self.reasons = collections.Counter()  # of this process

    def try_on(self, row):
        """What one request about a row brings: a verdict, or why it is none. Raises Refused without a reply."""
        answers = [text_of(answer) for answer in example_answers(row)]
        messages, read, sampling = self.judge.asks(row["prompt"], answers)[0]
        try:
            (found,) = self.judge.server.ask_all([(messages, lambda *reply: reply, sampling)])
        except Failed as error:
            found = error
        if isinstance(found, Exception):
            raise Refused(
                [
                    f"--judge_model {self.config.judge_model}: no reply from --judge_base_url "
                    f"{self.config.judge_base_url} ({found}). Start the server, or mend the address, the model's name "
                    "or the key"
                ]
            )
        try:
            read(*found)
            return "it gave a verdict"
        except Unusable as error:
            return f"no verdict ({error}). It began with {found[0][:60]!r}"

    def rewards(self):
        """The reward functions, in the order of the judge's numbers."""
        return [JudgeReward(self, name) for name in self.judge.weights]

    def spread_weights(self, weights, others):
        """--reward_weights for TRL, of `others` further rewards and of each of the judge's numbers."""
        *given, own = weights or [1.0] * (others + 1)
        return [*given, *(own * weight for weight in self.judge.weights.values())]

    def takes_part(self):
        """True if the judge takes part now: pick compares answers to one prompt, so held-out reward is not its own."""
        return self.judge.mode == "score" or self.trainer.model.training

    def judge_rollout(self, prompts, completions):
        """{name: number} of each answer, or GivenUp; asked once for all the functions of a rollout."""
        if self.asked is not completions:
            answers = [text_of(completion) for completion in completions]
            pick = self.judge.mode == "pick"
            found = self.pick(prompts, answers) if pick else self.score(prompts, answers)
            self.reasons.update(str(one).split(":")[0] for one in found if isinstance(one, GivenUp))
            self.asked, self.verdicts = completions, found
        return [one if isinstance(one, GivenUp) else self.judge.by_name(one) for one in self.verdicts]

    def score(self, prompts, answers):
        groups = [(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        return [verdict for (verdict,) in self.judge.score(groups)]

    def pick(self, prompts, answers):
        """Verdicts on this process's answers. A group, num_generations answers in a row, may span processes.

        Then each group is judged by the process of its first answer, and the verdicts are handed round.
        Source: trl 1.16.0, grpo_trainer.py, _get_train_sampler: groups lie in a row over the processes' batches.
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
        found = [(start + n, verdict) for start, group in zip(starts, scores, strict=True)
                 for n, verdict in enumerate(group)]  # fmt: skip
        everyone = dict(gather_object(found))
        return [everyone[place] for place in range(first, first + count)]

    def count_failures(self, failed, total, evaluating=False):
        """Adds a rollout or an evaluation batch of all processes: `failed` of its `total` answers got no verdict.

        Raises RewardFailed where more than max_failed_fraction of the latest answers failed. All processes call it
        alike, and so raise alike.
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
        reasons = sum(gather_object([self.reasons]), collections.Counter())
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

    def say_failures(self):
        """Says at the end of a run what failed and was left out."""
        self.judge.server.say_failures()
        if self.failed:
            output.say(f"failed    {self.failed} of {self.total} answers got no verdict, and gave no signal")


class JudgeReward:
    """One of the judge's numbers as a reward function; None for an answer that it gave no verdict on."""

    def __init__(self, judge, name):
        self.judge, self.name, self.__name__ = judge, name, name

    def attach(self, trainer):
        self.judge.trainer = trainer

    def __call__(self, prompts, completions, **columns):
        if not self.judge.takes_part():
            return [None] * len(prompts)
        found = self.judge.judge_rollout(prompts, completions)
        return [None if isinstance(verdict, GivenUp) else verdict[self.name] for verdict in found]
