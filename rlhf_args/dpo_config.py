from dataclasses import dataclass

import trl


@dataclass
class DPOConfig(trl.DPOConfig):
    """DPO as TRL has it: `--loss_type` also takes ipo, hinge, robust, exo_pair, apo_zero, ... and combinations."""
