"""What RLOO, GRPO and PPO share beside TRL's flags: a few limits, and the arithmetic of rollouts, checked early."""

import math
import os
from dataclasses import dataclass, field

from rlhf_args.judge_config import JudgeConfig
from utils.runtime import environment

COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations_eval",
    "num_mini_batches",
    "num_iterations",
    "total_episodes",
    "steps_per_generation",
    "generation_batch_size",
)


@dataclass
class OnlineConfig(JudgeConfig):
    """Mixin before TRL's config. `notes`: what was translated, for the plan that a run prints."""

    length_flag = "max_prompt_length"

    # TRL's None asks num_generations answers to each held-out prompt, and an evaluation batch that divides by them.
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Answers to each held-out prompt when the policy is measured, 1 or more."}
    )
    # With dropout the policy that learns is not the one that sampled: with lora_dropout 0.05 the ratio of an answer of
    # 37 tokens is off by 0.07 before any update. TRL 1.12's PPO switched it off too.
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "No dropout, neither in the base nor in the adapter (lora_dropout): the policy computes the "
            "log-probabilities that it sampled with."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of more tokens are dropped and counted; unset: those that leave no room for "
            "max_completion_length in the model."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the reward of an answer that max_completion_length cut short; unset: nothing."},
    )
    num_mini_batches: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps over one rollout and pass, 1 or more: sets steps_per_generation to so many times "
            "gradient_accumulation_steps. Unset: 1, or what steps_per_generation says."
        },
    )
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Answers to sample in the whole run: sets max_steps. Unset: num_train_epochs decides."},
    )
    local_rollout_forward_batch_size: int | None = field(
        default=None, metadata={"help": "Accepted from older scripts; has no effect any more."}
    )

    def __post_init__(self):
        self.notes = []
        if self.local_rollout_forward_batch_size is not None:
            self.notes.append("--local_rollout_forward_batch_size has no effect any more")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise ValueError(f"--missing_eos_penalty {self.missing_eos_penalty:g}: it is taken off, so 0 or more")
        for flag in COUNTS:
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: 1 or more")
        # The loss of a policy on its own answers says nothing about them, and TRL's is 0 in an evaluation.
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"
        self.split_rollout()
        self.check_groups()
        if self.rollout_size() < 32:
            self.notes.append(
                f"a rollout of {self.rollout_size()} answers says little about what is good; a hundred and more is "
                "usual (--gradient_accumulation_steps, --per_device_train_batch_size, more processes)"
            )
        if self.total_episodes is not None:
            self.max_steps = self.steps_in_all()
            self.notes.append(
                f"--total_episodes {self.total_episodes} is --max_steps {self.max_steps} here: steps of "
                f"{self.step_size()} answers, each answer used {self.num_iterations} times"
            )
        super().__post_init__()

    @property
    def world_size(self):
        """Processes that share a rollout: those asked for, also before they met, or where one checks for them all."""
        met = "LOCAL_RANK" in os.environ and hasattr(self, "distributed_state")
        return super().world_size if met else environment.processes_asked()

    def split_rollout(self):
        if self.num_mini_batches is None:
            return
        if self.steps_per_generation is not None or self.generation_batch_size is not None:
            raise ValueError(
                "--num_mini_batches beside --steps_per_generation or --generation_batch_size: they say the same. "
                "Keep one of them"
            )
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps
        self.notes.append(
            f"--num_mini_batches {self.num_mini_batches} is --steps_per_generation {self.steps_per_generation} here "
            f"({self.num_mini_batches} x {self.gradient_accumulation_steps} gradient_accumulation_steps)"
        )

    def rollout_size(self):
        """Answers in one rollout, over all processes: TRL's generation_batch_size."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.generation_batch_size or self.per_device_train_batch_size * self.world_size * steps

    def step_size(self):
        """Answers in one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    def steps_in_all(self):
        """Optimizer steps that total_episodes come to: whole rollouts, each used num_iterations times."""
        rollouts = math.ceil(self.total_episodes / self.rollout_size())
        return math.ceil(rollouts * self.rollout_size() * self.num_iterations / self.step_size())

    def describe_rollouts(self, prompts):
        """One line: what a rollout is and how many optimizer steps come of it."""
        size, answers = self.rollout_size(), self.num_generations
        rollouts, left = divmod(prompts, size // answers)
        steps = (
            f"{size * self.num_iterations / self.step_size():g} optimizer steps ({self.num_iterations} x the rollout)"
        )
        return (
            f"{size} answers of up to {self.max_completion_length} tokens to {size // answers} prompts, then {steps}; "
            f"{rollouts} rollouts an epoch" + (f", {left} prompts (others each time) left over" if left else "")
        )

    def check_groups(self):
        """Raises ValueError where a prompt has too few answers, or no whole number of prompts fills a rollout."""
        answers, rollout = self.num_generations, self.rollout_size()
        if answers < self.least_generations:
            raise ValueError(
                f"--num_generations {answers}: answers to a prompt are compared with each other, and "
                f"{self.least_generations} are the fewest. Type --num_generations {self.least_generations}"
            )
        if self.steps_per_generation:
            one, other = sorted((self.steps_per_generation, self.gradient_accumulation_steps))
            if other % one:
                raise ValueError(
                    f"--steps_per_generation {self.steps_per_generation} with --gradient_accumulation_steps "
                    f"{self.gradient_accumulation_steps}: a step would learn from parts of two rollouts. One is a "
                    f"multiple of the other; type --steps_per_generation {self.gradient_accumulation_steps}"
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
            f"--num_generations {answers}: a rollout has {rollout} answers ({made_of}), which is no whole number of "
            f"prompts. Type {' or '.join(ways)}"
        )

    def critic_kind(self, train_mode):
        """Which critic is trained; None without one."""
        return None

    def describe_critic(self, train_mode):
        """One line about the critic; None without one."""
        return None

    @property
    def least_generations(self):
        return 2  # an advantage is the difference to the other answers
