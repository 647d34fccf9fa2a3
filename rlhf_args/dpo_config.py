from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class DPOConfig(trl.DPOConfig, MethodConfig):
    """DPO as TRL has it: `--loss_type` also takes ipo, hinge, robust, exo_pair, apo_zero, ... and combinations."""
