"""The scorers of a rejection sampling and their weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common_args import CommonArgs
from rlhf_args.rejection_config import RejectionConfig
from utils.rejection.folder import Group, Line, Tokenizer
from utils.rewards import functions, judge, models
from utils.rewards.functions import name_rewards
from utils.rewards.judge import name_scorers
from utils.rewards.server import GivenUp, Prompt, Row

AT_ONCE = 64  # answers, or a few more, that are scored and written together


class Scorers:
    """Reward functions, a reward model and an LLM judge. The score of an answer is their weighted sum.

    show: called with the running function and its seconds, for the progress bar.
    """

    show: Callable[[str], object] = staticmethod(lambda text: None)

    def __init__(
        self, common: CommonArgs, config: RejectionConfig, rows: list[Row], tokenizer: Tokenizer, device: Any
    ) -> None:
        self.tokenizer, self.judge = tokenizer, None
        self.functions = functions.load_functions(
            common.reward_funcs, rows, tokenizer or no_tokens, common.reward_timeout
        )
        if common.reward_model_path:
            model = models.load_reward_model(
                common.reward_model_path,
                rows,
                common.dtype,
                device,
                config.score_batch_size,
                config.trust_remote_code,
            )
            models.try_reward_model(model, rows, common.dtype)
            self.functions.append(model)
        if config.judge_model:
            self.judge = judge.Judge(config)
        weights = config.reward_weights or [1.0] * len(name_scorers(common, config))
        self.weights = dict(zip(name_rewards(common), weights, strict=False))
        if self.judge:
            self.weights |= {name: weights[-1] * weight for name, weight in self.judge.weights.items()}

    def score(self, prompts: list[Line], groups: list[list[Line]]) -> list[Line]:
        """Score lines for groups of completion lines. prompts: the line of prompts.jsonl for each group."""
        lines = [(row, line) for row, group in zip(prompts, groups, strict=True) for line in group]
        asked = self.columns(lines) if self.functions else {}
        names = list(self.weights)[: len(self.functions)]
        columns: list[list[Any]] = [
            [{name: score} for score in self.call(function, asked)]
            for name, function in zip(names, self.functions, strict=True)
        ]
        if self.judge:
            judged = [
                (row["prompt"], [line["completion"] for line in group])
                for row, group in zip(prompts, groups, strict=True)
            ]
            verdicts = [verdict for group in self.judge.score(judged) for verdict in group]
            columns.append([one if isinstance(one, GivenUp) else self.judge.by_name(one) for one in verdicts])
        return [self.score_line(line, found) for (_, line), *found in zip(lines, *columns, strict=True)]

    def call(self, function: Callable[..., list[float | None]], columns: dict[str, Any]) -> list[float | None]:
        def tell(seconds: float | None) -> None:
            self.show("" if seconds is None else f"{function.__name__} {seconds:.0f} s")

        with functions.ticking(tell):
            return function(**columns)

    def columns(self, lines: list[tuple[Line, Line]]) -> dict[str, Any]:
        """The keyword arguments that TRL gives reward functions."""
        from transformers import TrainerState

        written = [line["completion"] for _, line in lines]
        further = {name: [row["further"].get(name) for row, _ in lines] for name in lines[0][0]["further"]}
        return {
            "prompts": [row["prompt"] for row, _ in lines],
            "completions": [as_completion(row["prompt"], line["completion"]) for row, line in lines],
            "completion_ids": (self.tokenizer or no_tokens)(written)["input_ids"],
            "trainer_state": TrainerState(),
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
            **further,
        }

    def score_line(self, line: Line, found: list[Any]) -> Line:
        """The score line of an answer. found: {name: number or None} of each scorer, or GivenUp if it failed."""
        key = {"prompt": line["prompt"], "sample": line["sample"]}
        failed = next((score for score in found if isinstance(score, GivenUp)), None)
        if failed is not None:
            return key | {"failed": str(failed)}
        scores = {name: score for one in found for name, score in one.items() if score is not None}
        if not scores:
            return key | {"failed": "no reward function applies to it"}
        total = math.fsum(self.weights[name] * score for name, score in scores.items())
        return key | {"score": total, "scores": scores}


def no_tokens(text: str | list[str]) -> dict[str, Any]:
    """Stands in for a tokenizer with a server: a reward function that needs completion_ids fails in one line."""
    return {"input_ids": None if isinstance(text, str) else [None] * len(text)}


def as_completion(prompt: Prompt, written: str) -> Prompt:
    """A completion in the format of reward functions: a list of one message for a chat."""
    return [{"role": "assistant", "content": written}] if isinstance(prompt, list) else written


def chunk_groups(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Chunks of groups with about AT_ONCE answers each."""
    chunk, count = [], 0
    for number, group in groups:
        chunk.append((number, group))
        count += len(group)
        if count >= AT_ONCE:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def as_rows(prompts: list[Line]) -> list[Row]:
    """Lines of prompts.jsonl as rows to try rewards on."""
    return [(row["where"], {"prompt": row["prompt"], "further": row["further"]}) for row in prompts]
