"""Warnings during training: each problem in the log is reported once, with the flag that helps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from rlhf_args.methods import Method, load

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Before the first update policy and reference give the same log-probabilities. With different batches (precomputed) or
# different rounding (a second QLoRA base) they differ by at most this share.
ROUNDED_HALF, ROUNDED = 1e-2, 1e-3  # bfloat16 and float16, float32
NO_KL = 1e-2  # nats per token: the dropout of an adapter that is trained further makes 0.002, which is harmless

BLOWN_UP = 10  # loss as a multiple of the first loss (plus 1, for a first loss near 0): more than noise
RISEN = 3  # the same for the median of SOME lines, plus 0.5
STEEP = 30  # gradient norm as a multiple of the earlier median, in the first EARLY lines: up to 7 is healthy
EARLY = 10
SPIKE = 100  # the same after EARLY lines: a pair not yet learned has a gradient tens of times larger
BEYOND = 10  # also above this multiple of --max_grad_norm: equal rewards make the earlier median tiny
FAR = 1.0  # KL in nats per token: each token is e times as likely as under the reference; 0.01 to 0.3 is usual
FALLEN = 2.0  # negative log-likelihood of chosen and rejected as a multiple of the first: some rise is usual
SURE = 20.0  # margin with a sigmoid loss of 2e-9 per pair
SAME = 1e-6  # standard deviation of equal rewards after rounding in float32
NO_CHOICE = 0.02, 0.1  # entropy: nats per token, and share of the first entropy
EMPTY = 2.0  # tokens: an answer of one token is only the end of turn
GROWN, CUT = 2.0, 0.5  # answer length as a multiple of the first, and share of truncated answers
FEW, SOME = 3, 5  # lines that must agree: a single odd rollout gives no warning
MANY = 20  # lines to compare when the rows differ in length

SUMMED = ("ipo", "sigmoid_norm")  # losses per token, but the logged margins are per answer


# ── values at step 0 ────────────────────────────────────────────────────────────────────────────────────────────────


def dpo_loss(config: TrainingArguments) -> float | None:
    """DPO's loss while policy and reference are equal; None if it depends on the data.

    Source: trl 1.16.0, trainer/dpo_trainer.py, _compute_loss with all log-ratios 0.
    """
    ln2, beta, flipped = math.log(2), config.beta, config.label_smoothing
    known = dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), ln2)
    known |= {"hinge": 1, "apo_zero": 1, "apo_down": 1, "nca_pair": 2 * ln2, "bco_pair": 2 * ln2}
    known |= {"discopop": (ln2 + 1) / 2}
    known |= {"ipo": 1 / (2 * beta) ** 2, "sppo_hard": 2 * (0.5 / beta) ** 2} if beta else {}
    known |= {"exo_pair": -ln2 - math.log(flipped * (1 - flipped)) / 2} if 0 < flipped < 1 else {}
    kinds = as_list(config.loss_type)
    if config.use_weighting or not set(kinds) <= set(known):
        return None
    weights = config.loss_weights or [1] * len(kinds)
    return sum(known[kind] * weight for kind, weight in zip(kinds, weights, strict=True))


def kto_loss(config: TrainingArguments) -> float | None:
    """KTO's loss while policy and reference are equal: half a row's weight; None if the labels weigh differently."""
    return config.desirable_weight / 2 if config.desirable_weight == config.undesirable_weight else None


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


class Watch:
    """Reads the log of a run. warnings: [{"step", "text"}], every warning given so far.

    from_reference: False if training starts from other weights than the reference's.
    """

    def __init__(self, method: Method, config: TrainingArguments, from_reference: bool = True) -> None:
        self.method, self.config, self.from_reference = method, config, from_reference
        self.warnings: list[dict] = []
        self.said: set[str] = set()
        self.values: dict[str, list[float]] = {}  # the log so far, by name
        self.rounded = ROUNDED_HALF if config.bf16 or config.fp16 else ROUNDED
        self.rate = f"--learning_rate {config.learning_rate:g}"
        self.too_high = f"{self.rate} is too high. Type a tenth of it, --learning_rate {config.learning_rate / 10:g}"

    def see(self, step: int, logs: dict[str, float]) -> list[str]:
        """The new warnings of one line of the log, from training or from an evaluation."""
        found = list(self.check_begin(step, logs))
        if "loss" in logs and "lost" not in self.said:
            for key, value in logs.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.values.setdefault(key, []).append(value)
            lost = next(self.find_lost(), None)  # later problems follow from it
            found += [("lost", lost)] if lost else self.find_odd()
        new = [text for name, text in found if name not in self.said]
        self.said |= {name for name, _ in found}
        self.warnings += [{"step": step, "text": text} for text in new]
        return new

    def replay(self, lines: list[dict]) -> None:
        """Read the log of an interrupted run, so that no warning is repeated on resume."""
        for line in lines:
            self.see(line["step"], line)

    def newest(self, key: str, lines: int = FEW) -> float:
        """Median of `key` over its newest lines; nan with fewer lines (every comparison with it is False)."""
        found = self.values.get(key, [])[-lines:]
        return median(found) if len(found) == lines else math.nan

    # ── before the first update ──────────────────────────────────────────────────────────────────────────────────────

    def check_begin(self, step: int, logs: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Compare policy and reference before the first update: in the first evaluation, or in the line of step 1."""
        training = "loss" in logs
        if step != int(training) or not self.from_reference:
            return
        logs = {key.removeprefix("eval_"): value for key, value in logs.items()}
        wrong = []
        for key, begins in self.method.begins:
            begins, found = load(begins)(self.config) if isinstance(begins, str) else begins, logs.get(key)
            if begins is not None and found is not None and abs(found - begins) > self.rounding(key, begins, logs):
                wrong.append(f"{key} is {found:.3g} and should be {begins:.3g}")
        if not wrong:
            return
        cause = "training and reference use different weights; the summary above names both"
        if training and not self.config.disable_dropout:
            cause = "dropout is on. Type --disable_dropout True"
        elif self.config.precompute_ref_log_probs:
            cause = "another model precomputed the log-probabilities. Remove --precompute_ref_log_probs"
        yield "begin", f"policy and reference differ before the first update ({', '.join(wrong)}): likely {cause}"

    def rounding(self, key: str, begins: float, logs: dict[str, float]) -> float:
        """The difference from the starting value that rounding explains."""
        if key == "kl":
            return NO_KL
        if key == "loss":  # a unit of reward changes none of these losses by more than twice their value
            rewards = sum(abs(logs.get(f"rewards/{side}") or 0) for side in ("chosen", "rejected"))
            return math.inf if "aux_loss" in logs else abs(begins) * (self.rounded + 2 * rewards)
        return self.config.beta * self.rounded * abs(logs.get(key.replace("rewards", "logps"), 0))

    # ── during training ──────────────────────────────────────────────────────────────────────────────────────────────

    def find_lost(self) -> Iterator[str]:
        """Warnings after which the run cannot recover."""
        *earlier, loss = self.values["loss"] if self.values.get("loss") else [0]
        first, late = median(earlier[:FEW] or [loss]), [*earlier[FEW:], loss][-SOME:]
        risen = len(late) == SOME and median(late) > RISEN * abs(first) + 0.5
        if not self.method.sample_reward and (risen or loss > BLOWN_UP * abs(first) + 1):
            yield f"the loss rose from {first:.3g} to {loss:.3g}: {self.too_high}"
        usual, norm, early = self.gradient()
        if early and norm > STEEP * usual:
            yield f"the gradient norm rose from {usual:.3g} to {norm:.3g}: {self.too_high}"
        chosen, rejected = self.cost("chosen"), self.cost("rejected")
        if min(chosen, rejected) > FALLEN:
            times = f"log-probabilities {chosen:.1f} and {rejected:.1f} times those at the start"
            yield f"chosen and rejected answers both became far less likely ({times}): {self.too_high}"
        if not self.method.sample_reward:
            return
        lower = f"a lower value than {self.rate} or a higher value than --beta {self.config.beta:g}"
        if self.newest("kl") > FAR:
            yield f"the policy is far from the reference (KL {self.newest('kl'):.2g} nats per token). Type {lower}"
        first, now = self.values.get("entropy", [0])[0], self.newest("entropy")
        if now < NO_CHOICE[0] and now < NO_CHOICE[1] * first:
            fell = f"entropy {now:.2g} nats per token, {first:.2g} at the start"
            yield f"the policy samples nearly the same answers ({fell}). Type {lower}, or a higher --temperature"

    def find_odd(self) -> Iterator[tuple[str, str]]:
        """(name, text) of problems from which the run may recover."""
        usual, norm, early = self.gradient()
        if not early and norm > SPIKE * usual:
            advice = f"If it happens again, check the rows or type a lower value than {self.rate}"
            yield "spike", f"the gradient norm is {norm:.3g}, its median {usual:.3g}. {advice}"
        kinds = as_list(self.config.loss_type)
        measures = self.method.begins or self.method.task == "SEQ_CLS" or kinds == ["simpo"]  # or depend on lengths
        margin = self.newest(dict(self.method.metrics).get("margin", ""), SOME)
        if measures and not set(kinds) & set(SUMMED) and margin > SURE:
            advice = f"Type fewer --num_train_epochs or a lower value than {self.rate}"
            yield "margin", f"the margin is {margin:.3g}: the loss is almost 0 and the policy may drift. {advice}"
        lengths, cuts = (self.values.get(f"completions/{key}", [0]) for key in ("mean_length", "clipped_ratio"))
        raised = "Raise --max_completion_length" + " or add --missing_eos_penalty 1" * bool(self.method.sample_reward)
        if len(cuts) >= SOME and min(cuts[-SOME:]) == 1:
            yield "unended", f"all answers are truncated. {raised}"
        if not self.method.sample_reward:
            return
        (length, longer), (cut, more) = ((median(lines[:FEW]), median(lines[-FEW:])) for lines in (lengths, cuts))
        if longer > GROWN * length and cut < CUT <= more:
            yield "longer", f"answers grew from {length:.0f} to {longer:.0f} tokens, {more:.0%} truncated. {raised}"
        if self.newest("completions/mean_length") < EMPTY:
            yield "empty", "answers are empty: the reward favours empty answers. Look at completions.jsonl"
        spread, equal = (self.values.get(key, [])[-FEW:] for key in ("reward_std", "frac_reward_zero_std"))
        groups = len(equal) == FEW and min(equal) == 1 and self.config.num_generations > 1  # each within itself
        if groups or len(spread) == FEW and max(spread) <= SAME * max(1, abs(self.newest("reward"))):
            whose = f"all answers{' to a prompt' * groups}"
            said = f"{whose} got the same reward, so there is nothing to learn from. Look at completions.jsonl; "
            yield "equal", f"{said}a reward that differs, a higher --temperature or more --num_generations would help"

    def gradient(self) -> tuple[float, float, bool]:
        """(median of the earlier norms, newest norm or 0 if clipping keeps most of it, True in EARLY lines)."""
        *earlier, norm = self.values["grad_norm"] if self.values.get("grad_norm") else [0]
        usual = median(earlier) if earlier else 0
        clipped = usual and norm > BEYOND * (self.config.max_grad_norm or 1)
        return usual, norm if clipped else 0, len(earlier) <= EARLY

    def cost(self, side: str) -> float:
        """Negative log-likelihood of these answers, as a multiple of the reference's, or of the first lines'."""
        logps, rewards = (self.values.get(f"{name}/{side}", []) for name in ("logps", "rewards"))
        if self.method.begins and self.config.beta:
            pairs = list(zip(logps, rewards, strict=False))[-FEW:]
            times = [logp / (logp - reward / self.config.beta or math.inf) for logp, reward in pairs]
            return median(times) if len(times) == FEW else 0
        return median(logps[-MANY:]) / median(logps[:MANY]) if len(logps) >= 2 * MANY else 0
