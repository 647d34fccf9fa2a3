from dataclasses import dataclass

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """SFT as TRL has it, on rows whose tokens utils/data/template.py has labelled: only the assistant's turns are trained."""
