"""Reward models as reward functions: any family, in their own chat template, tried on a few rows first."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.columns import text_of
from utils.models.folders import ModelFolder, same_path
from utils.rewards.functions import TRIED, RewardFailed, example_answers
from utils.rewards.server import Row
from utils.runtime import environment
from utils.runtime.errors import Refused, refuse_if

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Trainer


def check_reward_model(path: str) -> list[str]:
    """Problems of --reward_model_path, from the files in its folder."""
    folder = ModelFolder.at(path)
    problems = folder.check("--reward_model_path")
    if folder.described is not None and not folder.is_reward_model:
        problems.append(
            f"--reward_model_path {path}: a language model, whose score head would be random. Train one with "
            "--rlhf_type Reward"
        )
    elif folder.adapter and not problems:
        problems += check_adapters_head(path)
    return problems


def check_adapters_head(path: str) -> Iterator[str]:
    """Problems of an adapter's score head. Without it the base's head would be random."""
    shapes = [tensor.shape for name, tensor in ModelFolder.at(path).tensors.items() if name.endswith("score.weight")]
    if not shapes:
        yield f"--reward_model_path {path}: no weights for score.weight in it. A reward model has a trained head"
    for shape in shapes:
        if shape[0] != 1:
            yield f"--reward_model_path {path}: scores {shape[0]} labels. A reward model has one"


class RewardModel:
    """A sequence classifier of one label as a reward function, whatever its family, tokenizer and template.

    Prompt and completion are written in the model's own template, as in the Reward method, cut at the front to the
    model's context, padded on the right, and scored in batches of similar length.
    """

    cut = 0  # texts so far that were longer than the context
    said = False  # True after the warning about them

    def __init__(self, path: str, model: Any, tokenizer: "PreTrainedTokenizerBase", batch_size: int) -> None:
        self.__name__ = Path(path).name
        self.path, self.model, self.tokenizer, self.batch_size = path, model, tokenizer, batch_size
        self.longest = longest_row(model, tokenizer)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_metric: Callable[[str, float], object] | None = None,
        **columns: Any,
    ) -> list[float]:
        before = self.cut
        rows = [self.tokens(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        if log_metric:
            log_metric(f"rewards/{self.__name__}/cut", (self.cut - before) / len(rows))
        if self.cut > before and not self.said:
            self.say_cut(self.cut - before, len(rows))
        return self.score(rows)

    def say_cut(self, cut: int, count: int) -> None:
        from tqdm import tqdm

        self.said = True
        said = f"--reward_model_path {self.path} holds {self.longest} tokens: {cut} of {count} answers with their "
        said += "prompts are longer. The front of the prompt is cut. The log has the share of each step: "
        if environment.is_main():
            tqdm.write(f"warning   {said}rewards/{self.__name__}/cut", file=sys.stderr)

    def tokens(self, prompt: Any, completion: Any) -> dict[str, list[int]]:
        """{"input_ids": at most `longest` tokens}. A longer text is cut at the front; the BOS stays."""
        from utils.data.template import render, tokenize

        text, (answer,), _ = render(self.tokenizer, {"prompt": prompt, "completion": completion})
        ids = tokenize(self.tokenizer, text + answer)
        if len(ids) <= self.longest:
            return {"input_ids": ids}
        self.cut += 1
        begin = [ids[0]] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        return {"input_ids": begin + ids[len(begin) - self.longest :]}

    def score(self, rows: list[dict[str, list[int]]]) -> list[float]:
        """Scores of rows from `tokens`, in order. The number of forward passes depends on the number of rows alone."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            padded = self.tokenizer.pad([rows[row] for row in batch], return_attention_mask=True, return_tensors="pt")
            for row, score in zip(batch, self.forward(**padded).tolist(), strict=True):
                scores[row] = score
        return scores

    def forward(self, **inputs: "Tensor") -> "Tensor":
        """Scores (B,) of right-padded input_ids, attention_mask (and token_type_ids), each (B, L)."""
        import torch

        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(**{name: value.to(device) for name, value in inputs.items()}).logits[:, 0].float()

    def attach(self, trainer: "Trainer") -> None:
        """Move the model to the trainer's device; under ZeRO-3 shard it."""
        from trl.models import prepare_deepspeed

        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        else:
            self.model.to(trainer.accelerator.device)


class EncoderRewardModel(RewardModel):
    """An encoder (BERT, RoBERTa, DeBERTa) that reads prompt and answer as a pair of texts.

    A prompt of several turns is their contents joined by line breaks, without roles.
    """

    def tokens(self, prompt: Any, completion: Any) -> dict[str, list[int]]:
        """input_ids (and token_type_ids) of the pair with special tokens, at most `longest`.

        A longer pair is cut at the front of the prompt, then at the end of the answer.
        """
        prompt = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        answer, limit = text_of(completion), self.longest
        found = self.encode_pair(prompt, answer)
        if len(found["input_ids"]) <= limit:
            return found
        self.cut += 1
        if len(self.encode_pair("", answer)["input_ids"]) < limit:
            return self.encode_pair(prompt, answer, truncation="only_first", max_length=limit)
        return self.encode_pair("", answer, truncation="only_second", max_length=limit)

    def encode_pair(self, prompt: str, answer: str, **cut: Any) -> dict[str, list[int]]:
        self.tokenizer.truncation_side = "left" if cut.get("truncation") == "only_first" else "right"
        return dict(self.tokenizer(prompt, answer, return_attention_mask=False, **cut))


class SharedRewardModel(RewardModel):
    """A LoRA reward model on the policy's base: its adapter and head join the policy, without a second base."""

    def __init__(self, path: str, tokenizer: "PreTrainedTokenizerBase", batch_size: int, rows: list[Row]) -> None:
        self.__name__ = Path(path).name
        self.path, self.tokenizer, self.batch_size, self.rows = path, tokenizer, batch_size, rows

    def attach(self, trainer: "Trainer") -> None:
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        model = trainer.accelerator.unwrap_model(trainer.model)
        shape = LoraConfig.from_pretrained(self.path)
        shape.task_type, shape.modules_to_save, shape.inference_mode = None, None, True
        model.add_adapter("reward", shape)
        tensors = load_file(Path(self.path) / "adapter_model.safetensors")
        head = [name for name in tensors if name.endswith("score.weight")]
        rest = {name: tensor for name, tensor in tensors.items() if name not in head}
        loaded = set_peft_model_state_dict(model, rest, adapter_name="reward")
        strange = [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".reward." in name)]
        if strange:
            raise Refused([f"--reward_model_path {self.path}: its weights do not fit this base ({strange[0]})"])
        for name, parameter in model.named_parameters():
            if ".reward." in name:
                parameter.requires_grad_(False)
        self.head = tensors[head[0]].float()
        self.trainer = trainer
        save = model.save_pretrained

        def save_without_judge(*args: Any, **kwargs: Any) -> None:
            """Save without the reward adapter: on resume it would replace another --reward_model_path."""
            kept = [name for name in model.peft_config if name != "reward"]
            return save(*args, **{"selected_adapters": kept, **kwargs})

        model.save_pretrained = save_without_judge
        self.longest = longest_row(model.get_base_model(), self.tokenizer)

    def __call__(self, prompts: list[Any], completions: list[Any], *args: Any, **columns: Any) -> list[float]:
        if self.rows:  # tried at the first rollout, when the base is loaded and maybe sharded
            rows, self.rows = self.rows, []
            try:
                try_reward_model(self, rows, str(self.trainer.model.dtype).removeprefix("torch."))
            except Refused as refusal:
                raise RewardFailed(str(refusal)) from None
        return super().__call__(prompts, completions, *args, **columns)

    def forward(self, **inputs: "Tensor") -> "Tensor":
        """Scores (B,): the last hidden state of each row under the reward adapter, times the head."""
        import torch
        from trl.trainer.utils import use_adapter

        input_ids, trainer = inputs["input_ids"], self.trainer
        device = trainer.accelerator.device
        wrapped = trainer.accelerator.unwrap_model(trainer.model)
        states, training = [], wrapped.training
        wrapped.eval()  # no dropout while scoring
        trunk = wrapped.get_base_model().base_model
        hook = trunk.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            with torch.no_grad(), use_adapter(wrapped, adapter_name="reward"), trainer.accelerator.autocast():
                trainer.model(**{name: value.to(device) for name, value in inputs.items()}, logits_to_keep=1)
        finally:
            hook.remove()
            wrapped.train(training)
        # as in transformers: the last token that is not the pad token, even if that ends the turn
        place = (torch.arange(input_ids.shape[1]) * (input_ids != self.tokenizer.pad_token_id)).argmax(1)
        last = states[0][torch.arange(len(input_ids)), place]
        return (last.float() @ self.head.to(device).T)[:, 0]


def longest_row(model: Any, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Maximum tokens of a row."""
    held = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    embedded = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedded, "padding_idx", None)  # RoBERTa's positions begin after its pad id
    return min(held if padding is None else held - padding - 1, tokenizer.model_max_length)


def is_encoder(path: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the reward model reads a pair of texts: an encoder, without a chat template."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = ModelFolder.at(path).config
    masked = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    return not tokenizer.chat_template and bool(masked or config.get("is_encoder_decoder"))


def on_policy_base(path: str, policy_path: str | None, train_mode: str, revision: str | None = None) -> bool:
    """True if the reward model is an adapter on the base of the policy's adapter."""
    adapter, other = ModelFolder.at(path).adapter, policy_path and ModelFolder.at(policy_path).adapter
    base, at = (other["base_model_name_or_path"], other.get("revision")) if other else (policy_path, revision)
    if not adapter or not base or train_mode == "full" or adapter.get("revision") != at:
        return False
    return same_path(adapter["base_model_name_or_path"], base)


def load_reward_model(
    path: str, rows: list[Row], dtype: str, device: Any, batch_size: int, trust_remote_code: bool = False
) -> RewardModel:
    """A RewardModel on `device`, not sharded. Raises Refused without a trained head of one label."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from utils.models.load import fit_config, unsharded
    from utils.runtime.output import first_line

    adapter = ModelFolder.at(path).adapter
    tokenizer = load_reward_tokenizer(path, rows, trust_remote_code)
    kwargs = {"num_labels": 1, "revision": adapter.get("revision")} if adapter else {}
    with unsharded():
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                adapter["base_model_name_or_path"] if adapter else path,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, ValueError) as error:
            raise Refused([f"--reward_model_path {path}: cannot be loaded ({first_line(error)})"]) from None
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        elif loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise Refused(
                [f"--reward_model_path {path}: no weights for {missing} in it. A reward model has a trained head"]
            )
    if model.config.num_labels != 1:
        raise Refused([f"--reward_model_path {path}: scores {model.config.num_labels} labels. A reward model has one"])
    fit_config(model, tokenizer)
    kind = EncoderRewardModel if is_encoder(path, tokenizer) else RewardModel
    return kind(path, model.to(device).eval().requires_grad_(False), tokenizer, batch_size)


def load_reward_tokenizer(path: str, rows: list[Row], trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The reward model's tokenizer. Raises Refused if its chat template refuses a row."""
    from utils.data.columns import is_chat
    from utils.data.rows import refuse_rows
    from utils.data.template import fit_tokenizer, render, say_error
    from utils.models.load import load_tokenizer

    tokenizer = load_tokenizer(path, None, trust_remote_code, flag="--reward_model_path")
    if is_encoder(path, tokenizer):
        missing = ["pad_token"] if tokenizer.pad_token is None else []
        if not tokenizer.num_special_tokens_to_add(pair=True):
            missing.append("post-processor that puts [CLS] and [SEP] around a pair of texts")
        refuse_if([f"--reward_model_path {path}: an encoder, whose tokenizer has no {what}" for what in missing])
        return tokenizer
    try:
        fit_tokenizer(tokenizer, chat=is_chat(rows[0][1]))
    except Refused as refusal:
        raise Refused([f"--reward_model_path {path}: {problem}" for problem in refusal.problems]) from None
    problems = []
    for where, values in rows:
        try:
            render(tokenizer, {"prompt": values["prompt"], "completion": example_answers(values)[0]})
        except Exception as error:  # noqa: BLE001  templates raise what they like
            problems.append(f"{where}: the template of --reward_model_path {path} refuses it ({say_error(error)})")
    refuse_rows(problems)
    return tokenizer


# ── loading and trying ───────────────────────────────────────────────────────────────────────────────────────────────


def load_reward(
    path: str,
    rows: list[Row],
    *,
    policy_path: str | None,
    policy_revision: str | None,
    train_mode: str,
    dtype: str,
    device: Any,
    batch_size: int,
    trust_remote_code: bool = False,
) -> RewardModel:
    """The reward model, tried on a few rows. On the policy's base it is tried at the first rollout."""
    if on_policy_base(path, policy_path, train_mode, policy_revision):
        return SharedRewardModel(path, load_reward_tokenizer(path, rows, trust_remote_code), batch_size, rows)
    reward = load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code)
    try_reward_model(reward, rows, dtype)
    return reward


def try_reward_model(reward: RewardModel, rows: list[Row], dtype: str) -> None:
    """Raises Refused if a row's score alone differs from its score in a padded batch, or if all scores are equal."""
    tried = [values for _, values in rows[:TRIED]]
    pairs = [(values["prompt"], answer) for values in tried for answer in example_answers(values)]
    tokens = [reward.tokens(*pair) for pair in pairs]
    together = reward.score(tokens)
    alone = [reward.score([row])[0] for row in tokens]
    apart = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    allowed = (1e-3 if dtype == "float32" else 5e-2) * (1 + max(map(abs, alone)))
    if not all(map(math.isfinite, alone + together)):
        raise Refused(
            [f"--reward_model_path {reward.path}: scores {alone[0]} on the first rows. Its weights are broken"]
        )
    if apart > allowed:
        raise Refused(
            [
                f"--reward_model_path {reward.path}: a row's score alone and in a padded batch are {apart:.3g} apart. "
                "Its template contains its pad token, or it pads on the left: set another pad_token"
            ]
        )
    if max(alone) == min(alone):
        same = f"the same score {alone[0]:.3g} for all {len(alone)} answers"
        raise Refused([f"--reward_model_path {reward.path}: {same}"])
