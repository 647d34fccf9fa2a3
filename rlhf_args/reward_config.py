from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class RewardConfig(trl.RewardConfig, MethodConfig):
    """Reward model training as TRL has it: `--center_rewards_coefficient 0.01` keeps scores around zero."""
