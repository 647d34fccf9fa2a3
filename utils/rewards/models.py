"""Reward models as reward functions: any family, read in their own template, tried before they are trusted."""

import math
import sys
from pathlib import Path

from utils.data.columns import text_of
from utils.models.folders import check_folder, is_reward_model, read_header
from utils.rewards.functions import TRIED, RewardFailed, example_answers
from utils.runtime import environment
from utils.runtime.errors import Refused, refuse_if


def check_reward_model(path):
    """Problems of --reward_model_path that its folder's files show."""
    problems, described = check_folder(path, "--reward_model_path")
    if described is not None and not is_reward_model(described):
        problems.append(
            f"--reward_model_path {path}: a language model, whose score head would be random. Train one with "
            "--rlhf_type Reward"
        )
    elif described and not problems and described.get("task_type") == "SEQ_CLS":
        problems += check_adapters_head(path)
    return problems


def check_adapters_head(path):
    """Problems of an adapter's score head: loaded over its base, one that lacks it would score at random."""
    shapes = {}
    for file in Path(path).glob("*.safetensors"):
        header = read_header(file)
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name.endswith("score.weight")}
    if not shapes:
        yield f"--reward_model_path {path}: no weights for score.weight in it. A reward model has a trained head"
    for shape in shapes.values():
        if shape[0] != 1:
            yield f"--reward_model_path {path}: scores {shape[0]} labels. A reward model has one"


class RewardModel:
    """A sequence classifier of one label as a reward function, whatever its family, tokenizer and template.

    Prompt and completion are written in the model's own template, as our Reward method trains them, cut at the front
    to what the model holds, padded on the right, and scored in batches of like length.
    """

    cut = 0  # texts so far that were longer than the model holds
    said = False  # that there are such texts

    def __init__(self, path, model, tokenizer, batch_size):
        self.__name__ = Path(path).name
        self.path, self.model, self.tokenizer, self.batch_size = path, model, tokenizer, batch_size
        self.longest = longest_row(model, tokenizer)

    def __call__(self, prompts, completions, log_metric=None, **columns):
        before = self.cut
        rows = [self.tokens(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        if log_metric:
            log_metric(f"rewards/{self.__name__}/cut", (self.cut - before) / len(rows))
        if self.cut > before and not self.said:
            self.say_cut(self.cut - before, len(rows))
        return self.score(rows)

    def say_cut(self, cut, count):
        from tqdm import tqdm

        self.said = True
        said = f"--reward_model_path {self.path} holds {self.longest} tokens, and {cut} of {count} answers were longer"
        said += " with their prompts. The front of the prompt is cut. The log has the share of each step: "
        if environment.is_main():
            tqdm.write(f"warning   {said}rewards/{self.__name__}/cut", file=sys.stderr)

    def tokens(self, prompt, completion) -> dict:
        """{"input_ids": at most `longest` tokens}. Of a longer text the front goes, but for the BOS."""
        from utils.data.template import render, tokenize

        text, (answer,), _ = render(self.tokenizer, {"prompt": prompt, "completion": completion})
        ids = tokenize(self.tokenizer, text + answer)
        if len(ids) <= self.longest:
            return {"input_ids": ids}
        self.cut += 1
        begin = [ids[0]] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        return {"input_ids": begin + ids[len(begin) - self.longest :]}

    def score(self, rows):
        """Scores of what `tokens` returned, in order; as many forward passes on every process that has as many."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            padded = self.tokenizer.pad([rows[row] for row in batch], return_attention_mask=True, return_tensors="pt")
            for row, score in zip(batch, self.forward(**padded).tolist(), strict=True):
                scores[row] = score
        return scores

    def forward(self, **inputs):
        """Scores (B,) of right-padded token ids (B, L) and what else the model reads of each token."""
        import torch

        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(**{name: value.to(device) for name, value in inputs.items()}).logits[:, 0].float()

    def attach(self, trainer):
        """Puts the model where the trainer's are; under ZeRO-3 in pieces, as the policy."""
        from trl.models import prepare_deepspeed

        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        else:
            self.model.to(trainer.accelerator.device)


class EncoderRewardModel(RewardModel):
    """An encoder (BERT, RoBERTa, DeBERTa) that reads prompt and answer as the pair of texts of its tokenizer.

    A prompt of several turns is written without their roles, a line break between.
    """

    def tokens(self, prompt, completion):
        """input_ids (and token_type_ids) of the pair, special tokens included, at most `longest`.

        Of a longer pair the prompt loses its front, and only then the answer its end.
        """
        prompt = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        pair, longest = (prompt, text_of(completion)), {"max_length": self.longest}
        found = self.encode_pair(*pair)
        if len(found["input_ids"]) <= self.longest:
            return found
        self.cut += 1
        if len(self.encode_pair("", pair[1])["input_ids"]) < self.longest:
            return self.encode_pair(*pair, truncation="only_first", **longest)
        return self.encode_pair("", pair[1], truncation="only_second", **longest)

    def encode_pair(self, prompt, answer, **cut):
        self.tokenizer.truncation_side = "left" if cut.get("truncation") == "only_first" else "right"
        return dict(self.tokenizer(prompt, answer, return_attention_mask=False, **cut))


class SharedRewardModel(RewardModel):
    """A LoRA reward model on the policy's own base: its adapter beside the policy's, its head, and no second base."""

    def __init__(self, path, tokenizer, batch_size, rows):
        self.__name__ = Path(path).name
        self.path, self.tokenizer, self.batch_size, self.rows = path, tokenizer, batch_size, rows

    def attach(self, trainer):
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
            raise Refused([f"--reward_model_path {self.path}: its weights are not those of this base ({strange[0]})"])
        for name, parameter in model.named_parameters():
            if ".reward." in name:
                parameter.requires_grad_(False)
        self.head = tensors[head[0]].float()
        self.trainer = trainer
        save = model.save_pretrained

        def save_without_judge(*args, **kwargs):
            """Checkpoints hold what is trained; a judge in one would take the place of another one named on resume."""
            kept = [name for name in model.peft_config if name != "reward"]
            return save(*args, **{"selected_adapters": kept, **kwargs})

        model.save_pretrained = save_without_judge
        self.longest = longest_row(model.get_base_model(), self.tokenizer)

    def __call__(self, prompts, completions, **columns):
        if self.rows:  # tried now, at the first rollout: the base is there, in whatever pieces
            rows, self.rows = self.rows, None
            try:
                try_reward_model(self, rows, str(self.trainer.model.dtype).removeprefix("torch."))
            except Refused as refusal:
                raise RewardFailed(str(refusal)) from None
        return super().__call__(prompts, completions, **columns)

    def forward(self, input_ids, attention_mask):
        """The last state of each row under the reward's adapter, through the whole wrapped model, times the head."""
        import torch
        from trl.trainer.utils import use_adapter

        trainer = self.trainer
        device = trainer.accelerator.device
        wrapped = trainer.accelerator.unwrap_model(trainer.model)
        states, training = [], wrapped.training
        wrapped.eval()  # rollouts are judged in mid-training: no dropout, neither the base's nor the judge's
        trunk = wrapped.get_base_model().base_model
        hook = trunk.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            with torch.no_grad(), use_adapter(wrapped, adapter_name="reward"), trainer.accelerator.autocast():
                inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
                trainer.model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
            wrapped.train(training)
        # where transformers puts a score: on the last token that is not the pad, which an end of turn may be
        place = (torch.arange(input_ids.shape[1]) * (input_ids != self.tokenizer.pad_token_id)).argmax(1)
        last = states[0][torch.arange(len(input_ids)), place]
        return (last.float() @ self.head.to(device).T)[:, 0]


def longest_row(model, tokenizer):
    """Tokens that the model holds."""
    held = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    embedded = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedded, "padding_idx", None)  # RoBERTa counts positions from behind its pad's id
    return min(held if padding is None else held - padding - 1, tokenizer.model_max_length)


def is_encoder(path, tokenizer):
    """True if the reward model reads a pair of texts: an encoder, without a chat template."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from utils.models.folders import read_base_config

    config = read_base_config(path)
    masked = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    return not tokenizer.chat_template and bool(masked or config.get("is_encoder_decoder"))


def on_policy_base(path, policy_path, train_mode, revision=None):
    """Whether the reward model is an adapter on the very base that the policy's adapter is trained on."""
    from utils.models.folders import read_adapter, same_path

    adapter, other = read_adapter(path), read_adapter(policy_path)
    base, at = (other["base_model_name_or_path"], other.get("revision")) if other else (policy_path, revision)
    if not adapter or train_mode == "full" or adapter.get("revision") != at:
        return False
    return same_path(adapter["base_model_name_or_path"], base)


def load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code=False):
    """A whole RewardModel on `device`, never in pieces yet. Raises Refused without a trained head of one label."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from utils.models.folders import read_adapter
    from utils.models.load import fit_config, unsharded
    from utils.runtime.output import first_line

    adapter = read_adapter(path)
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


def load_reward_tokenizer(path, rows, trust_remote_code=False):
    """The reward model's tokenizer, able to write every row's prompt. Raises Refused where its template cannot."""
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
    path, rows, *, policy_path, policy_revision, train_mode, dtype, device, batch_size, trust_remote_code=False
):
    """The reward model, tried on a few rows; on the policy's own base it can be tried only once that is there."""
    if on_policy_base(path, policy_path, train_mode, policy_revision):
        return SharedRewardModel(path, load_reward_tokenizer(path, rows, trust_remote_code), batch_size, rows)
    reward = load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code)
    try_reward_model(reward, rows, dtype)
    return reward


def try_reward_model(reward, rows, dtype):
    """Raises Refused unless a row's score alone is its score in a padded batch, and scores differ at all."""
    rows = [values for _, values in rows[:TRIED]]
    pairs = [(values["prompt"], answer) for values in rows for answer in example_answers(values)]
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
                "Its pad token stands inside its template, or it pads on the left: set another pad_token"
            ]
        )
    if max(alone) == min(alone):
        raise Refused(
            [f"--reward_model_path {reward.path}: the same score {alone[0]:.3g} for every one of {len(alone)}"]
        )
