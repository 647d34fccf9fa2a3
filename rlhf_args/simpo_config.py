from dataclasses import dataclass, field

from rlhf_args.cpo_config import CPOConfig


@dataclass
class SimPOConfig(CPOConfig):
    """SimPO: TRL's CPO trainer with the simpo loss and no likelihood term."""

    # This loss is what makes CPO's trainer SimPO.
    loss_type: str = field(default="simpo", metadata={"help": "simpo; another value makes this plain CPO."})
    # TRL's 1.0 would make this CPO-SimPO: the paper's loss has no likelihood term.
    cpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the likelihood term; 0 is SimPO proper."})
    # The reward is a mean per token, not a sum: at TRL's 0.1 the loss hardly sees it. The paper uses 2.0 to 2.5.
    beta: float = field(default=2.0, metadata={"help": "Scale of the mean log-probability per token (2.0 to 10)."})
