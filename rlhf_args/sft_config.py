from dataclasses import dataclass

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """SFT as TRL has it, on rows whose labels utils/text.py has set: the assistant's turns are trained, nothing else."""
