"""Flags that RLOO, GRPO and PPO share beyond TRL's, and the sizes of rollouts and steps, checked early."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_args.flag import flag
from rlhf_args.judge_config import JudgeConfig
from utils.runtime import environment

if TYPE_CHECKING:
    from trl import GRPOConfig as Base  # has the fields used here, as RLOOConfig does
else:
    Base = object


@dataclass
class OnlineConfig(JudgeConfig, Base):
    """Mixin, placed before TRL's config. `notes`: lines that a run prints at its start."""

    length_flag = "max_prompt_length"

    # With TRL's default (None) each held-out prompt gets num_generations answers, which must divide the eval batch.
    num_generations_eval: int | None = flag(1, "Answers per held-out prompt in an evaluation.", range="at least 1")
    # With dropout the policy that is trained differs from the one that sampled: with lora_dropout 0.05 the ratio of an
    # answer of 37 tokens is off by 0.07 before any update. TRL 1.12's PPO turned dropout off too.
    disable_dropout: bool = flag(
        True,
        "Turn off dropout in the base and in the adapter (lora_dropout), so that training computes the same "
        "log-probabilities as sampling.",
    )
    max_prompt_length: int | None = flag(
        None,
        "Maximum tokens of a prompt; longer ones are dropped and counted. Unset: the model's context less "
        "max_completion_length.",
        range="at least 1, like 512",
    )
    missing_eos_penalty: float | None = flag(
        None,
        "Subtracted from the reward of an answer truncated at max_completion_length. Unset: nothing.",
        range="at least 0, like 1",
    )
    num_mini_batches: int | None = flag(
        None,
        "Optimizer steps per pass over a rollout: sets steps_per_generation to num_mini_batches x "
        "gradient_accumulation_steps. Unset: 1, or as steps_per_generation says.",
        range="at least 1",
    )
    total_episodes: int | None = flag(
        None,
        "Answers to sample in the whole run: sets max_steps. Unset: num_train_epochs decides.",
        range="at least 1, like 10000",
    )
    local_rollout_forward_batch_size: int | None = flag(None, "Ignored; accepted so that older scripts still run.")

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        if self.local_rollout_forward_batch_size is not None:
            self.notes.append("--local_rollout_forward_batch_size has no effect any more")
        # TRL's loss is 0 in an evaluation of sampled answers
        chosen = self.load_best_model_at_end or self.save_strategy == "best"
        if chosen and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "eval_reward"
        self.split_rollout()
        self.check_groups()
        if self.rollout_size() < 32:
            self.notes.append(
                f"a rollout of {self.rollout_size()} answers is small and its gradient noisy; 100 or more are "
                "usual (--gradient_accumulation_steps, --per_device_train_batch_size, more processes)"
            )
        if self.total_episodes is not None:
            self.max_steps = self.steps_for(self.total_episodes)
            self.notes.append(
                f"--total_episodes {self.total_episodes} is --max_steps {self.max_steps} here: steps of "
                f"{self.step_size()} answers, each answer used {self.num_iterations} times"
            )
        super().__post_init__()

    @property
    def world_size(self) -> int:
        """Processes that share a rollout: the requested number if they have not joined yet."""
        met = "LOCAL_RANK" in os.environ and hasattr(self, "distributed_state")
        return super().world_size if met else environment.processes_asked()

    def samples_answers(self) -> bool:
        return True

    def split_rollout(self) -> None:
        if self.num_mini_batches is None:
            return
        if self.generation_batch_size is not None or self.steps_per_generation is not None:  # type: ignore[has-type]
            raise ValueError(
                "--num_mini_batches with --steps_per_generation or --generation_batch_size: they set the same "
                "number. Keep one of them"
            )
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps
        self.notes.append(
            f"--num_mini_batches {self.num_mini_batches} is --steps_per_generation {self.steps_per_generation} here "
            f"({self.num_mini_batches} x {self.gradient_accumulation_steps} gradient_accumulation_steps)"
        )

    def rollout_size(self) -> int:
        """Answers in one rollout, over all processes: TRL's generation_batch_size."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.generation_batch_size or self.per_device_train_batch_size * self.world_size * steps

    def step_size(self) -> int:
        """Answers in one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    def steps_for(self, episodes: int) -> int:
        """Optimizer steps for this many answers, in whole rollouts of num_iterations passes each."""
        rollouts = math.ceil(episodes / self.rollout_size())
        return math.ceil(rollouts * self.rollout_size() * self.num_iterations / self.step_size())

    def describe_rollouts(self, prompts: int) -> str:
        """One line: answers and prompts of a rollout, and its optimizer steps."""
        size, answers = self.rollout_size(), self.num_generations
        rollouts, left = divmod(prompts, size // answers)
        steps = f"{size * self.num_iterations / self.step_size():g} optimizer steps ({self.num_iterations} passes)"
        return (
            f"{size} answers of up to {self.max_completion_length} tokens to {size // answers} prompts, then {steps}; "
            f"{rollouts} rollouts an epoch"
            + (f", {left} prompts left over (different ones each time)" if left else "")
        )

    def check_groups(self) -> None:
        """Raises ValueError if a rollout is not a whole number of prompts, or steps mix answers of two rollouts."""
        answers, rollout = self.num_generations, self.rollout_size()
        if self.steps_per_generation:
            one, other = sorted((self.steps_per_generation, self.gradient_accumulation_steps))
            if other % one:
                raise ValueError(
                    f"--steps_per_generation {self.steps_per_generation} with --gradient_accumulation_steps "
                    f"{self.gradient_accumulation_steps}: a step would mix answers of two rollouts. One must be "
                    f"a multiple of the other: type --steps_per_generation {self.gradient_accumulation_steps}"
                )
        if rollout % answers == 0:
            return
        fitting = [n for n in range(self.least_generations, rollout + 1) if rollout % n == 0]
        near = min(fitting, key=lambda n: abs(n - answers), default=None)
        ways = [f"--num_generations {near}"] * (near is not None)
        if self.generation_batch_size:
            made_of = "generation_batch_size"
            fits = math.lcm(answers, self.per_device_train_batch_size * self.world_size)
            ways.append(f"--generation_batch_size {math.ceil(rollout / fits) * fits}")
        else:
            batch, others = self.per_device_train_batch_size, rollout // self.per_device_train_batch_size
            made_of = f"per_device_train_batch_size {batch} x {others} processes and steps"
            batch = next(b for b in range(batch, 10**9) if b * others % answers == 0)
            ways.append(f"--per_device_train_batch_size {batch}")
        raise ValueError(
            f"--num_generations {answers}: a rollout has {rollout} answers ({made_of}), not a whole number of "
            f"prompts. Type {' or '.join(ways)}"
        )

    def critic_kind(self, train_mode: str) -> str | None:
        """The kind of critic to train; None without one."""
        return None

    def describe_critic(self, train_mode: str) -> str | None:
        """One line about the critic; None without one."""
        return None

    @property
    def least_generations(self) -> int:
        return 2  # an advantage is the difference from the other answers
