from dataclasses import dataclass

from rlhf_args.cpo_config import CPOConfig
from rlhf_args.flag import flag


@dataclass
class SimPOConfig(CPOConfig):
    """SimPO: TRL's CPO trainer with the simpo loss and no likelihood term."""

    # TRL trains SimPO with CPO's trainer and this loss.
    loss_type: str = flag("simpo", "Keep simpo: with another value the method is CPO.")
    # TRL's 1.0 would make this CPO-SimPO: the paper's loss has no likelihood term.
    cpo_alpha: float = flag(0.0, "Weight of CPO's likelihood term; 0: SimPO.")
    # The reward is a mean per token, not a sum: TRL's 0.1 is too small for it. The paper uses 2.0 to 2.5.
    beta: float = flag(2.0, "Scale of the mean log-probability per token, usually 2 to 10.", range="above 0")
