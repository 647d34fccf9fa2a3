from dataclasses import dataclass

from trl.experimental.orpo import ORPOConfig as TRLORPOConfig

from rlhf_args.method_config import MethodConfig


@dataclass
class ORPOConfig(TRLORPOConfig, MethodConfig):
    """ORPO as TRL has it: `--beta` is the paper's lambda, the weight of the odds ratio."""
