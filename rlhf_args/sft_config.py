from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class SFTConfig(trl.SFTConfig, MethodConfig):
    """SFT as TRL has it. utils/data/template.py labels the rows: only the assistant's turns enter the loss."""
