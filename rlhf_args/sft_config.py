from dataclasses import dataclass

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """SFT as TRL has it, on rows that utils/text.py has labelled: the assistant's turns are trained, nothing else."""
