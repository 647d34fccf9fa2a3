"""TRL's experimental CPO trainer, tokenising as TRL's DPO does. The one file that touches trl.experimental.cpo."""

from trl.experimental.cpo import CPOConfig, CPOTrainer as TRLCPOTrainer

from utils.text import tokenize_pair

__all__ = ["CPOConfig", "CPOTrainer", "PairRows"]


class PairRows:
    """Mixin: a row of texts becomes the token ids that every preference method trains on.

    Upstream's `tokenize_row` adds a second end of turn behind chat templates, adds a BOS that the tokenizer itself
    does not, and fails on rows whose prompt and answer merge into one token.
    Source: trl 1.16.0, experimental/cpo/cpo_trainer.py; differs: the ids come from `tokenize_pair`.
    """

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


class CPOTrainer(PairRows, TRLCPOTrainer):
    pass
