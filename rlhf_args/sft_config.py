from dataclasses import dataclass

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's own. utils/data/template.py labels the rows beforehand: only the assistant's turns are trained."""
