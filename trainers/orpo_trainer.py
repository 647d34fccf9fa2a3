"""TRL's experimental ORPO trainer, tokenising as TRL's DPO does. The one file that touches trl.experimental.orpo."""

from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from trainers.cpo_trainer import LikeCore

__all__ = ["ORPOTrainer"]


class ORPOTrainer(LikeCore, TRLORPOTrainer):
    pass
