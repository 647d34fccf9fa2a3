"""Reward models as reward functions: any family, read in their own template, tried before they are trusted."""

import math
from pathlib import Path

from utils.checks import Refused, check_folder, is_reward_model, read_header
from utils.rewards import TRIED, RewardFailed, example_answers


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

    def __init__(self, path, model, tokenizer, batch_size):
        self.__name__ = Path(path).name
        self.path, self.model, self.tokenizer, self.batch_size = path, model, tokenizer, batch_size
        held = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        self.longest = min(held, tokenizer.model_max_length)

    def __call__(self, prompts, completions, **columns):
        return self.score([self.tokens(p, c) for p, c in zip(prompts, completions, strict=True)])

    def tokens(self, prompt, completion):
        from utils.text import render, tokenize

        text, (answer,), _ = render(self.tokenizer, {"prompt": prompt, "completion": completion})
        return tokenize(self.tokenizer, text + answer)[-self.longest :]

    def score(self, rows):
        """Scores of token rows, in their order; as many forward passes on every process that has as many rows."""
        import torch

        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(len(rows[row]) for row in batch)
            ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
                mask[place, : len(rows[row])] = 1
            for row, score in zip(batch, self.forward(ids, mask).tolist(), strict=True):
                scores[row] = score
        return scores

    def forward(self, ids, mask):
        """Scores (B,) of right-padded token ids (B, L)."""
        import torch

        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()

    def attach(self, trainer):
        """Puts the model where the trainer's are; under ZeRO-3 in pieces, as the policy."""
        from trl.models import prepare_deepspeed

        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        else:
            self.model.to(trainer.accelerator.device)


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
        text = model.get_base_model().config.get_text_config()
        self.longest = min(getattr(text, "max_position_embeddings", None) or 10**9, self.tokenizer.model_max_length)

    def __call__(self, prompts, completions, **columns):
        if self.rows:  # tried now, at the first rollout: the base is there, in whatever pieces
            rows, self.rows = self.rows, None
            try:
                try_reward_model(self, rows, str(self.trainer.model.dtype).removeprefix("torch."))
            except Refused as refusal:
                raise RewardFailed(str(refusal)) from None
        return super().__call__(prompts, completions, **columns)

    def forward(self, ids, mask):
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
                trainer.model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=1)
        finally:
            hook.remove()
            wrapped.train(training)
        # where transformers puts a score: on the last token that is not the pad, which an end of turn may be
        place = (torch.arange(ids.shape[1]) * (ids != self.tokenizer.pad_token_id)).argmax(1)
        last = states[0][torch.arange(len(ids)), place]
        return (last.float() @ self.head.to(device).T)[:, 0]


def shares_base(path, policy_path, train_mode, revision=None):
    """Whether the reward model is an adapter on the very base that the policy's adapter is trained on."""
    from utils.models import read_adapter, same_path

    adapter, other = read_adapter(path), read_adapter(policy_path)
    base, at = (other["base_model_name_or_path"], other.get("revision")) if other else (policy_path, revision)
    if not adapter or train_mode == "full" or adapter.get("revision") != at:
        return False
    return same_path(adapter["base_model_name_or_path"], base)


def load_reward_model(path, rows, dtype, device, batch_size, trust_remote_code=False):
    """A whole RewardModel on `device`, never in pieces yet. Raises Refused without a trained head of one label."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from utils.models import first_line, fit_config, read_adapter, unsharded

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
    return RewardModel(path, model.to(device).eval().requires_grad_(False), tokenizer, batch_size)


def load_reward_tokenizer(path, rows, trust_remote_code=False):
    """The reward model's tokenizer, able to write every row's prompt. Raises Refused where its template cannot."""
    from utils.data import is_chat, refuse_rows
    from utils.models import load_tokenizer
    from utils.text import fit_tokenizer, render, say_error

    tokenizer = load_tokenizer(path, None, trust_remote_code, flag="--reward_model_path")
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


def load_model(
    path, rows, *, policy_path, policy_revision, train_mode, dtype, device, batch_size, trust_remote_code=False
):
    """The reward model, tried on a few rows; on the policy's own base it can be tried only once that is there."""
    if shares_base(path, policy_path, train_mode, policy_revision):
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
