from dataclasses import dataclass

from rlhf_args.flag import flag
from rlhf_args.simpo_config import SimPOConfig


@dataclass
class CPOSimPOConfig(SimPOConfig):
    """CPO-SimPO: SimPO's loss plus CPO's likelihood of the chosen answer."""

    # Between SimPO (0) and CPO (1, TRL's default): a weight of 0.5 already keeps the chosen answer likely.
    cpo_alpha: float = flag(0.5, "Weight of CPO's likelihood term; 0: SimPO.")
