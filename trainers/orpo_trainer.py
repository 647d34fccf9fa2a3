"""TRL's experimental ORPO trainer, tokenising like TRL's DPO. The only file that imports trl.experimental.orpo."""

from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from trainers.cpo_trainer import LikeCore


class ORPOTrainer(LikeCore, TRLORPOTrainer):
    pass
