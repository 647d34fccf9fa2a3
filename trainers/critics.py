"""The critics of PPO: the modules that value tokens, the scale of the values, and their place in the policy's module.

(B, L): rows x tokens of prompt and answer; (B, T): rows x tokens of the answers. A critic predicts normalised values;
ReturnScale converts them to units of the reward. So an offset or a factor on all rewards does not change the critic's
task. Source: van Hasselt et al. 2016 (arXiv 1602.07714); differs: the head's weights are not corrected, because the
scale moves slowly.
"""

import copy
import sys
import types
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_args.ppo_config import OWN_TRUNK
from utils.models.folders import first_difference
from utils.models.load import keep_trainable
from utils.runtime.errors import Refused

EXACT = {"mps": torch.float32}  # MPS has no float64
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


# ── the scale of the values ──────────────────────────────────────────────────────────────────────────────────────────


class ReturnScale:
    """Running mean and standard deviation (spread) of the returns: value = mean + spread * critic's output.

    The first rollout with unequal returns sets both; each later rollout moves them by `rate`. A `guess` is the output
    of a reward model's head; the first rollout fits its conversion to normalised units: gain * guess + shift.
    """

    rate = 0.1
    kind = 0.0  # distinguishes ReturnScale from FixedScale in a saved state

    def __init__(self) -> None:
        self.mean, self.spread, self.gain, self.shift, self.begun = 0.0, 1.0, 0.0, 0.0, False

    def values(self, normalised: Tensor) -> Tensor:
        return self.mean + self.spread * normalised

    def normalise(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.spread

    def update(self, returns: Tensor, mask: Tensor, reduce: Reduce) -> None:
        """Update the scale with the returns (B, T) of a rollout."""
        if not reduce(mask.sum()[None]).item():  # every answer is masked
            return
        mean, variance = masked_moments(returns, mask, reduce)
        spread = variance**0.5
        rate = self.rate if self.begun else 1.0
        self.mean += rate * (mean - self.mean)
        if spread > 1e-6 * max(1.0, abs(mean)):  # equal returns have no spread: wait for a later rollout
            self.spread += rate * (spread - self.spread)
            self.begun = True

    def fit_guess(self, guesses: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce) -> None:
        """Fit the guesses (B, T) to the normalised returns by least squares, after `update` with these returns."""
        guess_mean, guess_variance = masked_moments(guesses, mask, reduce)
        mean, _ = masked_moments(returns, mask, reduce)
        product, _ = masked_moments((guesses - guess_mean) * (returns - mean), mask, reduce)
        slope = product / guess_variance if guess_variance > 1e-12 else 0.0
        self.gain, self.shift = slope / self.spread, (mean - self.mean - slope * guess_mean) / self.spread

    def state(self) -> Tensor:
        numbers = [self.mean, self.spread, self.gain, self.shift, float(self.begun), self.kind]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Raises ValueError if the state is from the other class."""
        *numbers, begun, kind = state.tolist()
        if kind != self.kind:
            raise ValueError(f"saved with --normalize_values {kind == ReturnScale.kind}")
        self.mean, self.spread, self.gain, self.shift = numbers
        self.begun = bool(begun)


class FixedScale(ReturnScale):
    """Values in units of the reward, as in TRL 1.12."""

    kind = 1.0

    def update(self, returns: Tensor, mask: Tensor, reduce: Reduce) -> None:
        super().update(returns, mask, reduce)
        self.mean, self.spread = 0.0, 1.0


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce, correction: int = 0) -> tuple[float, float]:
    """Mean and variance of x (B, T) where the mask is 1, over all processes; the divisor is n - correction."""
    x = x.to(EXACT.get(x.device.type, torch.float64)) * mask
    count, total = reduce(torch.stack([mask.sum().to(x.dtype), x.sum()])).tolist()
    mean = total / max(count, 1)
    (squares,) = reduce((((x - mean) ** 2) * mask).sum()[None]).tolist()
    return mean, squares / max(count - correction, 1)


# ── the critics ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Critic(nn.Module):
    """Predicts a normalised value for each token (B, L).

    backbone: None: the critic reads the policy's hidden states (B, L, H) and sends no gradient into them.
    layer: the decoder layer of these states; None: the last layer, after the final norm.
    guess (1, H): the frozen head of a reward model. The trained head starts at zero and corrects its output.
    """

    def __init__(
        self,
        hidden_size: int,
        backbone: nn.Module | None = None,
        mlp: bool = False,
        layer: int | None = None,
        guess: Tensor | None = None,
    ):
        super().__init__()
        self.backbone, self.layer, self.off = backbone, layer, False
        self.scale = ReturnScale()
        last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # states of middle layers have no final norm: some entries are hundreds of times larger than others
        norm = [nn.LayerNorm(hidden_size, elementwise_affine=False)] if mlp or layer is not None else []
        hidden = [nn.Linear(hidden_size, hidden_size), nn.GELU()] if mlp else []
        self.score = nn.Sequential(*norm, *hidden, last)
        self.register_buffer("guess", guess)
        self.guesses: Tensor | None = None  # (B, L) of the latest call, for ReturnScale.fit_guess

    def forward(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.backbone is None:
            hidden = hidden.detach()
        else:
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            hidden = hidden.last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # the head computes in its own dtype
            values = self.score(hidden.to(self.score[-1].weight.dtype)).squeeze(-1).float()
            if self.guess is not None:
                guesses = self.guesses = (hidden.float() @ self.guess.float().T).squeeze(-1)
                values = values + self.scale.gain * guesses + self.scale.shift
        return values


def make_critic(
    kind: str, policy: PreTrainedModel, path: str | None, layer: int | None, lora: LoraConfig | None, shares: bool
) -> Critic:
    """The critic of this kind for a policy (causal language model) that already has its adapter.

    path: the folder of the critic's initial weights; None: copy the policy. lora: the policy's adapter config.
    shares: False if two modules cannot share parameters (FSDP2): the base is then in memory twice.
    Raises Refused if the weights in `path` do not fit.
    """
    trunk, size = policy.base_model, policy.config.get_text_config().hidden_size
    if kind not in OWN_TRUNK:
        return Critic(size, mlp=kind == "mlp", layer=layer)
    if kind == "lora":
        critic = Critic(size, share_frozen(trunk) if shares else copy.deepcopy(trunk), guess=read_head(path))
        if path:
            load_reward_adapter(critic.backbone, path, policy.base_model_prefix)
        return critic
    if path is None:
        return Critic(size, copy_whole(trunk))
    backbone = AutoModel.from_pretrained(
        path,
        dtype=policy.dtype,
        attn_implementation=policy.config._attn_implementation,
        quantization_config=getattr(policy.config, "quantization_config", None),
        use_safetensors=True,
        trust_remote_code=False,
    )
    keep_trainable(backbone)
    if lora is not None:
        shape = copy.copy(lora)
        shape.task_type, shape.modules_to_save, shape.target_modules = None, None, "all-linear"
        backbone = inject_adapter_in_model(shape, backbone.requires_grad_(False))
    return Critic(backbone.config.get_text_config().hidden_size, backbone, guess=read_head(path))


def check_value_tokens(path: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises Refused if the value model in `path` lacks tokens of the policy, which has `rows` embeddings.

    An adapter is not checked: it uses the policy's own base, and its folder may have no tokenizer.
    """
    if (Path(path) / "adapter_config.json").exists():
        return
    theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    different = first_difference(tokenizer.get_vocab(), theirs.get_vocab())
    size = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size
    highest = max(
        number for number in tokenizer.get_vocab().values() if number < rows
    )  # a tokenizer may have tokens without an embedding
    if different or highest >= size:
        different = different or f"it has {size} embeddings, but the policy uses token {highest}"
        raise Refused([f"--value_model_path {path}: {different}. The value model must have the policy's tokenizer"])


def share_frozen(trunk: nn.Module) -> nn.Module:
    """A copy of the trunk: frozen parameters and buffers are shared, the trained adapter is copied."""
    held = {id(one): one for one in (*trunk.parameters(), *trunk.buffers()) if not one.requires_grad}
    return copy.deepcopy(trunk, held)


def copy_whole(trunk: PreTrainedModel) -> PreTrainedModel:
    """A copy of a fully trained trunk; under ZeRO-3 each process copies its own shards."""
    if not any(hasattr(one, "ds_tensor") for one in trunk.parameters()):
        return copy.deepcopy(trunk)
    twin = AutoModel.from_config(trunk.config, dtype=trunk.dtype)  # sharded in the same way
    for ours, theirs in zip(twin.parameters(), trunk.parameters(), strict=True):
        ours.ds_tensor.data.copy_(theirs.ds_tensor.data)
    return twin


def read_head(path: str | None) -> Tensor | None:
    """The score head (1, H) in the safetensors of a reward model's folder; None if there is none."""
    if path is None:
        return None
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith("score.weight"):
                    head = tensors.get_tensor(name)
                    if len(head) != 1:
                        raise Refused(
                            [f"--value_model_path {path}: scores {len(head)} labels. A value model must have 1"]
                        )
                    return head
    return None


def load_reward_adapter(backbone: nn.Module, path: str, prefix: str) -> None:
    """Copy a reward model's adapter on the same base into the critic's adapter. Raises Refused if it does not fit."""
    own = dict(backbone.named_parameters())
    left = {name for name in own if ".default." in name}
    for name, tensor in load_file(Path(path) / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").removeprefix(f"{prefix}.")
        if name.endswith("score.weight"):
            continue
        key = f"{name.removesuffix('.weight')}.default.weight"
        held = own.get(key)
        if held is None or held.shape != tensor.shape:
            shape = "no such layer" if held is None else f"{tuple(held.shape)}"
            raise Refused([
                f"--value_model_path {path}: {name} has shape {tuple(tensor.shape)}, in the critic's adapter {shape}. "
                "Both need the same --lora_rank and --lora_target_modules"
            ])  # fmt: skip
        held.data.copy_(tensor)
        left.discard(key)
    if left:
        raise Refused([
            f"--value_model_path {path}: has no {min(left)}. Both need the same --lora_target_modules and --use_dora"
        ])  # fmt: skip


# ── inside the policy ────────────────────────────────────────────────────────────────────────────────────────────────


def add_critic(model: PreTrainedModel, critic: Critic, output_class: type) -> None:
    """Make the critic a submodule of `model`, so that one wrapped module trains both; the fused forward adds values.

    output_class: PolicyOutput. Call this after PEFT has wrapped the model: PEFT would freeze the critic and add LoRA.
    """
    model.critic = critic
    policy_forward = model.forward
    source = model.base_model if critic.layer is None else find_layers(model.base_model)[critic.layer]

    @wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or self.critic.off:
            return policy_forward(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        states: list[Any] = []
        hook = source.register_forward_hook(lambda *call: states.append(call[-1]))
        try:
            outputs = policy_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        last = states[0]
        last = last if isinstance(last, Tensor) else getattr(last, "last_hidden_state", None)
        values = self.critic(states[0][0] if last is None else last, kwargs["input_ids"], kwargs["attention_mask"])
        return output_class(**outputs, token_values=values[:, :-1])

    model.forward = types.MethodType(forward, model)


def find_layers(trunk: nn.Module) -> nn.ModuleList:
    """The decoder layers of a trunk: its longest ModuleList."""
    return max((one for one in trunk.modules() if isinstance(one, nn.ModuleList)), key=len)


# ── separate clipping ────────────────────────────────────────────────────────────────────────────────────────────────


def clip_apart(zero: Any) -> None:
    """Make DeepSpeed's ZeRO optimizer clip the gradients of critic and policy by separate norms.

    The critic's parameter groups have "critic": True. DeepSpeed computes a norm per group (ZeRO-3: per part of a
    group) and passes the total norm to `unscale_and_clip_grads`. Source: deepspeed 0.19.8,
    runtime/zero/stage_1_and_2.py and stage3.py, step.
    """
    module: Any = sys.modules[type(zero).__module__]
    combine = getattr(module.combine_grad_norm_groups, "of_deepspeed", module.combine_grad_norm_groups)
    unscale = zero.unscale_and_clip_grads
    zero.norms_apart = {}  # norms of the latest step: {True: the critic's, False: the policy's}

    def is_critics(part: int) -> bool:
        group = zero.sub_group_to_group_id[part] if hasattr(zero, "sub_group_to_group_id") else part
        return zero.optimizer.param_groups[group].get("critic", False)

    def combine_and_keep(norms: Any, *args: Any, **kwargs: Any) -> Any:
        norms = list(norms)
        sides = [is_critics(part) for part in range(len(norms))]
        zero.norms_apart = {
            side: combine([norm for norm, here in zip(norms, sides, strict=True) if here is side]) / zero.loss_scale
            for side in set(sides)
        }
        return combine(norms, *args, **kwargs)

    def unscale_apart(part: Any, total: Any) -> Any:
        if isinstance(part, list):  # ZeRO-1 and 2 pass the gradient itself
            held = zero.single_partition_of_fp32_groups
            number = next(number for number, one in enumerate(held) if one.grad is part[0])
        else:
            number = part
        return unscale(part, zero.norms_apart[is_critics(number)] * zero.loss_scale)

    vars(combine_and_keep)["of_deepspeed"] = combine  # a module function: another trainer wraps it again
    module.combine_grad_norm_groups, zero.unscale_and_clip_grads = combine_and_keep, unscale_apart
