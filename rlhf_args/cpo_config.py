from dataclasses import dataclass

from trl.experimental.cpo import CPOConfig as TRLCPOConfig

from rlhf_args.method_config import MethodConfig


@dataclass
class CPOConfig(TRLCPOConfig, MethodConfig):
    """CPO as TRL has it: `--loss_type` sigmoid, hinge, ipo or simpo, `--cpo_alpha` weighs the likelihood term."""
