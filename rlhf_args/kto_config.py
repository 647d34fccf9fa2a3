from dataclasses import dataclass

import trl


@dataclass
class KTOConfig(trl.KTOConfig):
    """KTO as TRL has it: `--desirable_weight` and `--undesirable_weight` balance unequal numbers of labels."""
