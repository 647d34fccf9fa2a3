"""TRL's experimental CPO trainer, tokenising as TRL's DPO does. The one file that touches trl.experimental.cpo."""

from accelerate.utils import convert_to_fp32
from trl.experimental.cpo import CPOTrainer as TRLCPOTrainer

from utils.data.template import tokenize_pair

__all__ = ["CPOTrainer", "LikeCore"]


class LikeCore:
    """Mixin: what TRL's core trainers do and its experimental ones do not.

    `tokenize_row` upstream adds a second end of turn behind chat templates, adds a BOS that the tokenizer itself does
    not, and fails on rows whose prompt and answer merge into one token. And DeepSpeed hands out logits in bfloat16:
    summed up, log-probabilities around -600 come in steps of 4, and the margin is noise.
    Source: trl 1.16.0, experimental/cpo/cpo_trainer.py; differs: ids from `tokenize_pair`, logits in float32.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.register_forward_hook(lambda model, inputs, outputs: convert_to_fp32(outputs))

    def tokenize_row(self, feature, model=None):
        prompt, chosen, rejected = tokenize_pair(
            self.processing_class, **{k: feature[k] for k in ("prompt", "chosen", "rejected")}
        )
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            ids = (prompt + answer)[: self.max_length]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = ([-100] * len(prompt) + answer)[: self.max_length]
        return row


class CPOTrainer(LikeCore, TRLCPOTrainer):
    pass
