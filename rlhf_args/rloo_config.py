from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig
from rlhf_args.online_config import OnlineConfig


@dataclass
class RLOOConfig(OnlineConfig, trl.RLOOConfig, MethodConfig):
    """RLOO as TRL has it: `--num_generations` answers a prompt (2), `--beta` the KL penalty in the reward (0.05)."""
