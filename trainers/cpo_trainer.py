"""TRL's experimental CPO trainer, tokenising like TRL's DPO. The only file that imports trl.experimental.cpo."""

from typing import Any

from accelerate.utils import convert_to_fp32
from transformers import Trainer
from trl.experimental.cpo import CPOTrainer as TRLCPOTrainer

from utils.data.template import tokenize_pair


class LikeCore(Trainer):
    """Mixin that gives TRL's experimental trainers two properties of its core trainers.

    Tokens: upstream's `tokenize_row` adds a second end of turn after chat templates, adds a BOS that the tokenizer
    does not add, and fails if prompt and answer merge into one token. Here the ids come from `tokenize_pair`.
    Precision: DeepSpeed returns logits in bfloat16. Summed log-probabilities around -600 then have steps of 4, and the
    margin is noise. Here the logits are float32. Source: trl 1.16.0, experimental/cpo/cpo_trainer.py.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.register_forward_hook(lambda model, inputs, outputs: convert_to_fp32(outputs))

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        texts = {name: feature[name] for name in ("prompt", "chosen", "rejected")}
        prompt, chosen, rejected = tokenize_pair(self.processing_class, **texts)
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            ids = (prompt + answer)[: self.max_length]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = ([-100] * len(prompt) + answer)[: self.max_length]
        return row


class CPOTrainer(LikeCore, TRLCPOTrainer):
    pass
