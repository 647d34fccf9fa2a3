"""The critics of PPO: what values a token, the scale of its values, and how it joins the policy's module.

(B, L): rows x tokens of prompt and answer; (B, T): rows x tokens of the answers. A critic computes a value in
normalised units; ReturnScale turns it into units of the reward. So a constant added to every reward, or a factor, does
not change what the critic has to learn. Source: van Hasselt et al. 2016 (arXiv 1602.07714), without its correction of
the head's weights: the scale moves slowly instead.
"""

import copy
import sys
import types
from functools import wraps
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from rlhf_args.ppo_config import OWN_TRUNK
from utils.models.folders import first_difference
from utils.models.load import keep_trainable
from utils.runtime.errors import Refused

EXACT = {"mps": torch.float32}  # it has no float64


# ── the scale of the values ──────────────────────────────────────────────────────────────────────────────────────────


class ReturnScale:
    """Running mean and spread of the returns: value = mean + spread * what the critic computes.

    The first rollout whose returns differ sets both; each later one moves them by `rate`. A `guess` is the output of a
    reward model's head, which that rollout turns into normalised units by least squares: gain * guess + shift.
    """

    rate = 0.1
    kind = 0.0  # in a saved state, to tell ReturnScale and FixedScale apart

    def __init__(self):
        self.mean, self.spread, self.gain, self.shift, self.begun = 0.0, 1.0, 0.0, 0.0, False

    def values(self, normalised):
        return self.mean + self.spread * normalised

    def normalise(self, values):
        return (values - self.mean) / self.spread

    def update(self, returns, mask, reduce):
        """Takes in the returns (B, T) of a rollout; `reduce` sums over processes."""
        if not reduce(mask.sum()[None]).item():  # every answer is hidden
            return
        mean, variance = masked_moments(returns, mask, reduce)
        spread = variance**0.5
        rate = self.rate if self.begun else 1.0
        self.mean += rate * (mean - self.mean)
        if spread > 1e-6 * max(1.0, abs(mean)):  # equal returns do not tell the spread: it begins later
            self.spread += rate * (spread - self.spread)
            self.begun = True

    def fit_guess(self, guesses, returns, mask, reduce):
        """Fits the guesses (B, T) to the normalised returns by least squares, after `update` with these returns."""
        guess_mean, guess_variance = masked_moments(guesses, mask, reduce)
        mean, _ = masked_moments(returns, mask, reduce)
        product, _ = masked_moments((guesses - guess_mean) * (returns - mean), mask, reduce)
        slope = product / guess_variance if guess_variance > 1e-12 else 0.0
        self.gain, self.shift = slope / self.spread, (mean - self.mean - slope * guess_mean) / self.spread

    def state(self):
        numbers = [self.mean, self.spread, self.gain, self.shift, float(self.begun), self.kind]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, state):
        """Raises ValueError if the state is the other kind's."""
        *numbers, begun, kind = state.tolist()
        if kind != self.kind:
            raise ValueError(f"saved with --normalize_values {kind == ReturnScale.kind}")
        self.mean, self.spread, self.gain, self.shift = numbers
        self.begun = bool(begun)


class FixedScale(ReturnScale):
    """Values in units of the reward, as in TRL 1.12."""

    kind = 1.0

    def update(self, returns, mask, reduce):
        super().update(returns, mask, reduce)
        self.mean, self.spread = 0.0, 1.0


def masked_moments(x, mask, reduce):
    """(mean, variance) as Python floats of x (B, T) where the mask is 1, over all processes."""
    x = x.to(EXACT.get(x.device.type, torch.float64)) * mask
    count, total = reduce(torch.stack([mask.sum().to(x.dtype), x.sum()])).tolist()
    mean = total / max(count, 1)
    (squares,) = reduce((((x - mean) ** 2) * mask).sum()[None]).tolist()
    return mean, squares / max(count, 1)


# ── the critics ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Critic(nn.Module):
    """A value for each token (B, L), in normalised units.

    Without `backbone` it reads the policy's hidden states (B, L, H) and sends no gradient into them. `layer`: the
    decoder layer they come from; None: the last one, behind the final norm. `guess` (1, H): a reward model's head, as
    it was; the head that is trained starts at zero and corrects it.
    """

    def __init__(self, hidden_size, backbone=None, mlp=False, layer=None, guess=None):
        super().__init__()
        self.backbone, self.layer, self.off = backbone, layer, False
        self.scale = ReturnScale()
        last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # states of middle layers have no final norm: some of their numbers are hundreds of times the others
        norm = [nn.LayerNorm(hidden_size, elementwise_affine=False)] if mlp or layer is not None else []
        hidden = [nn.Linear(hidden_size, hidden_size), nn.GELU()] if mlp else []
        self.score = nn.Sequential(*norm, *hidden, last)
        self.register_buffer("guess", guess)
        self.guesses = None  # (B, L) of the newest call, for ReturnScale.fit_guess

    def forward(self, hidden, input_ids, attention_mask):
        if self.backbone is None:
            hidden = hidden.detach()
        else:
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            hidden = hidden.last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # the head learns and computes in its own dtype
            values = self.score(hidden.to(self.score[-1].weight.dtype)).squeeze(-1).float()
            if self.guess is not None:
                self.guesses = (hidden.float() @ self.guess.float().T).squeeze(-1)
                values = values + self.scale.gain * self.guesses + self.scale.shift
        return values


def make_critic(kind, policy, path=None, layer=None, lora=None, shares=True):
    """The critic of this kind for a policy, a causal language model whose adapter is there already.

    `path`: where its weights come from; None: from the policy as it is. `lora`: the policy's LoraConfig, or None.
    `shares`: False where two modules cannot hold the same parameters (FSDP2): then the base is there twice.
    Raises Refused where the weights in `path` do not fit.
    """
    trunk, size = policy.base_model, policy.config.get_text_config().hidden_size
    if kind not in OWN_TRUNK:
        return Critic(size, mlp=kind == "mlp", layer=layer)
    if kind == "lora":
        critic = Critic(size, share_frozen(trunk) if shares else copy.deepcopy(trunk), guess=read_head(path))
        if path:
            load_adapter(critic.backbone, path, policy.base_model_prefix)
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
        from peft import inject_adapter_in_model

        shape = copy.copy(lora)
        shape.task_type, shape.modules_to_save, shape.target_modules = None, None, "all-linear"
        backbone = inject_adapter_in_model(shape, backbone.requires_grad_(False))
    return Critic(backbone.config.get_text_config().hidden_size, backbone, guess=read_head(path))


def check_tokenizer(path, tokenizer, rows):
    """Raises Refused unless the model in `path` reads the policy's tokens, of which the policy embeds `rows`.

    An adapter stands on the policy's own base, whose tokenizer it may leave out.
    """
    if (Path(path) / "adapter_config.json").exists():
        return
    theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    different = first_difference(tokenizer.get_vocab(), theirs.get_vocab())
    size = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size
    highest = max(number for number in tokenizer.get_vocab().values() if number < rows)  # some tokens have no row
    if different or highest >= size:
        different = different or f"it has {size} embeddings, and the policy's token {highest} is beyond them"
        raise Refused([f"--value_model_path {path}: {different}. A critic reads the policy's tokens"])


def share_frozen(trunk):
    """A copy of the trunk that shares its frozen parameters and buffers; the adapter, which is trained, is copied."""
    held = {id(one): one for one in (*trunk.parameters(), *trunk.buffers()) if not one.requires_grad}
    return copy.deepcopy(trunk, held)


def copy_whole(trunk):
    """A copy of a fully trained trunk; under ZeRO-3, which holds it in pieces, each process copies its pieces."""
    if not any(hasattr(one, "ds_tensor") for one in trunk.parameters()):
        return copy.deepcopy(trunk)
    twin = AutoModel.from_config(trunk.config, dtype=trunk.dtype)  # in the same pieces
    for ours, theirs in zip(twin.parameters(), trunk.parameters(), strict=True):
        ours.ds_tensor.data.copy_(theirs.ds_tensor.data)
    return twin


def read_head(path):
    """The score head (1, H) in the safetensors of a reward model's folder; None where there is none."""
    if path is None:
        return None
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith("score.weight"):
                    head = tensors.get_tensor(name)
                    if len(head) != 1:
                        raise Refused([f"--value_model_path {path}: scores {len(head)} labels. A value model has one"])
                    return head
    return None


def load_adapter(backbone, path, prefix):
    """Puts the adapter of a reward model on the same base into the critic's. Raises Refused where it does not fit."""
    own = dict(backbone.named_parameters())
    left = {name for name in own if ".default." in name}
    for name, tensor in load_file(Path(path) / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").removeprefix(f"{prefix}.")
        if name.endswith("score.weight"):
            continue
        held = own.get(f"{name.removesuffix('.weight')}.default.weight")
        if held is None or held.shape != tensor.shape:
            shape = "no such layer" if held is None else f"{tuple(held.shape)}"
            raise Refused([
                f"--value_model_path {path}: {name} has shape {tuple(tensor.shape)}, in the critic's adapter {shape}. "
                "Both need the same --lora_rank and --lora_target_modules"
            ])  # fmt: skip
        held.data.copy_(tensor)
        left.discard(f"{name.removesuffix('.weight')}.default.weight")
    if left:
        raise Refused([
            f"--value_model_path {path}: no {min(left)} in it. Both need the same --lora_target_modules and --use_dora"
        ])  # fmt: skip


# ── within the policy ────────────────────────────────────────────────────────────────────────────────────────────────


def add_critic(model, critic, output_class):
    """Makes the critic a part of `model`, so that one wrapped module trains both; the fused forward gives values too.

    `output_class`: PolicyOutput.
    Only after PEFT has wrapped the model: before, it would freeze the critic and put LoRA into it.
    """
    model.critic = critic
    policy_forward = model.forward
    source = model.base_model if critic.layer is None else find_layers(model.base_model)[critic.layer]

    @wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head or self.critic.off:
            return policy_forward(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        states = []
        hook = source.register_forward_hook(lambda *call: states.append(call[-1]))
        try:
            outputs = policy_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        last = states[0]
        last = last if isinstance(last, torch.Tensor) else getattr(last, "last_hidden_state", None)
        values = self.critic(states[0][0] if last is None else last, kwargs["input_ids"], kwargs["attention_mask"])
        return output_class(**outputs, token_values=values[:, :-1])

    model.forward = types.MethodType(forward, model)


def find_layers(trunk):
    """The decoder layers of a trunk: its longest ModuleList."""
    return max((one for one in trunk.modules() if isinstance(one, nn.ModuleList)), key=len)


# ── gradients clipped apart ──────────────────────────────────────────────────────────────────────────────────────────


def clip_apart(zero):
    """Makes DeepSpeed's ZeRO optimizer clip the critic's gradient and the policy's by their own norms.

    The critic's parameter groups have "critic": True. DeepSpeed computes a norm for each group (ZeRO-3: for each part
    of one) and hands the norm of all to `unscale_and_clip_grads`. Source: deepspeed 0.19.8,
    runtime/zero/stage_1_and_2.py and stage3.py, step.
    """
    module = sys.modules[type(zero).__module__]
    combine = getattr(module.combine_grad_norm_groups, "of_deepspeed", module.combine_grad_norm_groups)
    unscale = zero.unscale_and_clip_grads
    zero.norms_apart = {}  # {is the critic's: norm} of the latest step

    def is_critics(part):
        group = zero.sub_group_to_group_id[part] if hasattr(zero, "sub_group_to_group_id") else part
        return zero.optimizer.param_groups[group].get("critic", False)

    def combine_and_keep(norms, *args, **kwargs):
        norms = list(norms)
        sides = [is_critics(part) for part in range(len(norms))]
        zero.norms_apart = {
            side: combine([norm for norm, here in zip(norms, sides, strict=True) if here is side]) / zero.loss_scale
            for side in set(sides)
        }
        return combine(norms, *args, **kwargs)

    def unscale_apart(part, total):
        if isinstance(part, list):  # ZeRO-1 and 2 hand over the gradient itself
            held = zero.single_partition_of_fp32_groups
            number = next(number for number, one in enumerate(held) if one.grad is part[0])
        else:
            number = part
        return unscale(part, zero.norms_apart[is_critics(number)] * zero.loss_scale)

    combine_and_keep.of_deepspeed = combine  # the function belongs to the module: another trainer wraps it anew
    module.combine_grad_norm_groups, zero.unscale_and_clip_grads = combine_and_keep, unscale_apart
