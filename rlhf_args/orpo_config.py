from dataclasses import dataclass

from trl.experimental.orpo import ORPOConfig as TRLORPOConfig


@dataclass
class ORPOConfig(TRLORPOConfig):
    """ORPO as TRL has it: `--beta` is the paper's lambda, the weight of the odds ratio."""
