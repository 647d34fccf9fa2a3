from dataclasses import dataclass

import trl


@dataclass
class RewardConfig(trl.RewardConfig):
    """Reward model training as TRL has it: `--center_rewards_coefficient 0.01` keeps scores around zero."""
