"""The report on the scored answers: reward and KL bound of best-of-n, lengths, duplicates."""

import collections
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.rejection.folder import Line

SHOWN = 10_000  # random answers in histogram and scatter plot; the means are over all answers


def best_of(scores: list[float]) -> list[float]:
    """The mean of the best of n scores, for n from 1 to N, over all C(N, n) draws of n from these N scores.

    The i-th lowest score is the best in C(i - 1, n - 1) draws. Source: the estimator of pass@k, arXiv 2107.03374.
    """
    ranked, best = sorted(scores), []
    for n in range(1, len(ranked) + 1):
        share, parts = n / len(ranked), []  # share of the draws whose best is the highest score
        for place in range(len(ranked) - 1, n - 2, -1):
            parts.append(ranked[place] * share)
            share *= (place - n + 1) / max(place, 1)
        best.append(math.fsum(parts))
    return best


def kl_bound(n: int) -> float:
    """Upper bound on KL(best-of-n, model), in nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


class Pool:
    """Sums over prompts, added one at a time, and a random sample of answers for the plots."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.random = samples, random.Random(seed)
        self.curve, self.full = [0.0] * samples, 0
        self.prompts = self.answers = self.cut = self.failed = 0
        self.scores = 0.0
        self.shown: list[tuple[float, int]] = []  # score, length in tokens
        self.dropped: collections.Counter[str | None] = collections.Counter()
        self.gone: collections.Counter[str] = collections.Counter()

    def add(self, answers: list[Line], why: str | None, gone: Mapping[str, int]) -> None:
        """Add the answers to one prompt. why: reason that none was chosen. gone: answers left out by reason."""
        self.prompts += 1
        self.dropped[why] += why is not None
        self.gone.update(gone)
        sampled = [answer for answer in answers if answer["sample"] < self.samples]
        scored = [answer for answer in sampled if "failed" not in answer]
        self.failed += sum("failed" in answer for answer in answers)
        if len(scored) == self.samples:
            self.full += 1
            best = best_of([answer["score"] for answer in scored])
            self.curve = [have + more for have, more in zip(self.curve, best, strict=True)]
        for answer in scored:
            self.answers += 1
            self.cut += not answer["ended"]
            self.scores += answer["score"]
            point = answer["score"], answer["tokens"] or len(answer["completion"].split())
            if len(self.shown) < SHOWN:
                self.shown.append(point)
            elif (place := self.random.randrange(self.answers)) < SHOWN:
                self.shown[place] = point

    def report(self, counts: dict[str, int]) -> dict[str, Any]:
        """The content of report.json. counts: rows written by file."""
        scores, lengths = [s for s, _ in self.shown], [n for _, n in self.shown]
        varies = len(set(scores)) > 1 and len(set(lengths)) > 1
        curve = [
            {"n": n, "reward": total / self.full, "kl_bound": kl_bound(n)}
            for n, total in enumerate(self.curve, 1)
            if self.full
        ]
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "mean_reward": self.scores / self.answers if self.answers else None,
            "best_of_n": curve,
            "prompts_in_best_of_n": self.full,
            "failed": self.failed,
            "cut": self.cut,
            "left_out": {reason: count for reason, count in self.gone.items() if count},
            "prompts_dropped": {reason: count for reason, count in self.dropped.items() if count},
            "score_length_correlation": statistics.correlation(scores, lengths) if varies else None,
            "written": counts,
        }


def say_report(found: dict[str, Any], keep_cut: bool, say: Callable[[str], None]) -> None:
    """Print the summary at the end of a run."""
    curve = found["best_of_n"]
    if curve:
        shown = [point for point in curve if point["n"] & (point["n"] - 1) == 0 or point is curve[-1]]
        say("best of   " + "".join(f"{point['n']:>9}" for point in shown))
        say("reward    " + "".join(f"{point['reward']:>9.4f}" for point in shown))
        say("KL bound  " + "".join(f"{point['kl_bound']:>9.4f}" for point in shown))
    left = ", ".join(f"{count} {reason}" for reason, count in found["left_out"].items()) or "none"
    dropped = ", ".join(f"{count} {reason}" for reason, count in found["prompts_dropped"].items()) or "none"
    mean = "none" if found["mean_reward"] is None else f"{found['mean_reward']:.4f}"
    say(f"scored    {found['answers']} sampled answers to {found['prompts']} prompts, mean reward {mean}")
    if found["cut"]:
        kept = "and can be chosen (--keep_cut)" if keep_cut else "and can be rejected, not chosen (--keep_cut would)"
        say(f"cut       {found['cut']} answers never ended, at --max_new_tokens, {kept}")
    say(f"left out  answers: {left}; prompts: {dropped}")


def write_report(folder: Path, found: dict[str, Any]) -> None:
    file = Path(folder) / "report.json"
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
