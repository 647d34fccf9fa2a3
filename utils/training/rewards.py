"""The rewards of an online method: reward functions, a reward model, a judge. Other methods have none."""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.cli.run import Run
from utils.rewards import functions, judge_reward, models


@dataclass
class Rewards:
    """Reward functions and judge, already tried on the first rows. The reward model is loaded later, by load_all."""

    functions: list = field(default_factory=list)
    judge: judge_reward.OnlineJudge | None = None

    def load_all(self, run: Run) -> dict[str, list]:
        """The trainer's keyword reward_funcs: all rewards in the order of the log. {} for a method without rewards."""
        if not run.method.sample_reward:
            return {}
        common, config, found = run.common, run.config, list(self.functions)
        if common.reward_model_path:
            model = models.load_reward(
                common.reward_model_path,
                run.rows.train,
                policy_path=common.model_name_or_path,
                policy_revision=common.model_revision,
                train_mode=common.train_mode,
                dtype=common.dtype,
                device=config.device,
                batch_size=max(8, config.per_device_train_batch_size),
                trust_remote_code=config.trust_remote_code,
            )
            found.append(model)
        if self.judge:
            config.reward_weights = self.judge.spread_weights(config.reward_weights, len(found))
            found += self.judge.rewards()
        return {"reward_funcs": found}

    def say_failures(self) -> None:
        """Print how many answers got no verdict from the judge."""
        if self.judge:
            self.judge.say_failures()


def load_rewards(run: Run) -> Rewards:
    """Load the reward functions and the judge, and try each. The judge is not asked for a run that is refused."""
    rewards, common = Rewards(), run.common
    if run.method.sample_reward and run.tokenizer:
        with run.collecting():
            sound = [spec for spec in common.reward_funcs or () if not [*functions.check_reward_functions([spec])]]
            rewards.functions = functions.load_functions(sound, run.rows.train, run.tokenizer, common.reward_timeout)
    if run.method.sample_reward and not run.problems:
        with run.collecting():
            rewards.judge = judge_reward.load_judge(run.config, run.rows.train)
    return rewards
