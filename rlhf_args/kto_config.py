from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class KTOConfig(trl.KTOConfig, MethodConfig):
    """KTO as TRL has it: `--desirable_weight` and `--undesirable_weight` balance unequal numbers of labels."""
