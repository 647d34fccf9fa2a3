from dataclasses import dataclass

from trl.experimental.cpo import CPOConfig as TRLCPOConfig


@dataclass
class CPOConfig(TRLCPOConfig):
    """CPO as TRL has it: `--loss_type` sigmoid, hinge, ipo or simpo, `--cpo_alpha` weighs the likelihood term."""
