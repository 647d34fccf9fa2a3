from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig
from rlhf_args.online_config import OnlineConfig


@dataclass
class GRPOConfig(OnlineConfig, trl.GRPOConfig, MethodConfig):
    """GRPO as TRL has it: `--num_generations` answers a prompt (8), `--beta` the KL term of the loss (0: none)."""
