"""The rewards of an online method: functions, a reward model, a judge. Other methods have none."""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.cli.run import Run
from utils.rewards import functions, judge_reward, models


@dataclass
class Rewards:
    """Reward functions and the judge, tried on the first rows. The reward model is loaded with the other models."""

    functions: list = field(default_factory=list)
    judge: judge_reward.OnlineJudge | None = None

    def load_all(self, run: Run) -> dict[str, list]:
        """{"reward_funcs": all rewards in the log's order} for the trainer; {} for a method without any."""
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
        if self.judge:
            self.judge.say_failures()


def load(run: Run) -> Rewards:
    """The functions and the judge. Without a tokenizer, or in a run that is refused, what cannot be tried is left."""
    rewards, common = Rewards(), run.common
    if run.method.sample_reward and run.tokenizer:
        with run.collecting():
            rows, limit = run.rows.train, common.reward_timeout
            rewards.functions = functions.load_functions(common.reward_funcs, rows, run.tokenizer, limit)
    if run.method.sample_reward and not run.problems:
        with run.collecting():
            rewards.judge = judge_reward.load_judge(run.config, run.rows.train)
    return rewards
