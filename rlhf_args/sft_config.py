from dataclasses import dataclass

import trl

from rlhf_args.method_config import MethodConfig


@dataclass
class SFTConfig(trl.SFTConfig, MethodConfig):
    """TRL's own. utils/data/template.py labels the rows beforehand: only the assistant's turns are trained."""
