from dataclasses import dataclass

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """SFT as TRL has it. utils/data/template.py labels the rows: only the assistant's turns enter the loss."""
