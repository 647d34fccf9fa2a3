"""PPO on the rollouts of TRL's GRPO trainer: a critic, a KL penalty a token, GAE, clipped policy and value losses.

TRL's own PPO ended with 1.12. What samples, scores, batches, clips the policy's ratio and logs is GRPO's here; this
file adds what makes it PPO. Sources: Schulman et al. 2017 (arXiv 1707.06347, the clipped losses), Schulman et al. 2015
(arXiv 1506.02438, GAE), Ziegler et al. 2019 (arXiv 1909.08593, the KL penalty within the reward), Huang et al. 2024
(arXiv 2403.17031, the details). (B, T): answers x tokens of the longest; `mask` is 1 on an answer's tokens, its end
included.
"""

import types
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from trainers.online_trainer import GRPOTrainer
from utils.checks import Refused

# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def token_kl(logps, ref_logps, estimator):
    """KL to the reference, estimated from each sampled token (B, T). Source: joschu.net/blog/kl-approx.html."""
    log_ratio = ref_logps - logps
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(scores, kl, mask, kl_coef):
    """Rewards a token (B, T): the penalty on each, and the answer's score (B,) on its last.

    Source: Ziegler et al. 2019, eq. 2; differs from TRL 1.12, which puts the score one place behind a sampled end.
    """
    rewards = -kl_coef * kl * mask
    last = (mask.sum(1) - 1).clamp(min=0).long()
    return rewards.scatter_add(1, last[:, None], (scores * mask.any(1))[:, None])


def estimate_advantages(rewards, values, mask, gamma, lam):
    """GAE: (advantages, returns), both (B, T). Behind an answer's last token there is nothing to expect.

    Source: Schulman et al. 2015, eq. 16, and TRL 1.12, experimental/ppo/ppo_trainer.py.
    """
    advantages, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    values = values * mask
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t] = ahead
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True, reduce=lambda sums: sums):
    """`x` with variance 1 over the masked, and mean 0 unless not `shift_mean`; `reduce` sums over processes.

    Source: TRL 1.12, masked_whiten; differs: over the rollout of all processes, not of each by itself.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    count, total = reduce(torch.stack([mask.sum(), (x * mask).sum()]).to(exact))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(((x - mean) ** 2 * mask).sum().to(exact)[None])
    whitened = (x - mean) * torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(x.dtype)


def value_losses(values, old_values, returns, cliprange):
    """Half the squared error, the worse of the value and of the value kept near the rollout's: (losses, clipped).

    Source: Huang et al. 2024, detail 13, and TRL 1.12.
    """
    kept_near = values.clamp(old_values - cliprange, old_values + cliprange)
    free, near = (values - returns) ** 2, (kept_near - returns) ** 2
    return 0.5 * torch.max(free, near), near > free


# ── the critic ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Critic(nn.Module):
    """Values a token (B, L) from the policy's last hidden states, or from those of a `backbone` of its own.

    Upon the policy's states it is a linear head that begins at zero and sends no gradient into them: what the policy
    learns is decided by the policy's loss alone. It learns and computes in float32.
    """

    def __init__(self, hidden_size, backbone=None, score=None):
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        if score is not None:
            self.score.weight.data.copy_(score)

    def forward(self, hidden, input_ids, attention_mask):
        if self.backbone is not None:
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            hidden = hidden.last_hidden_state
        else:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


@dataclass
class PolicyOutput(FusedCausalLMOutput):
    """TRL's fused output and `token_values` (B, L - 1): what the critic expects before each token but the first."""

    token_values: torch.Tensor | None = None


def add_critic(model, critic):
    """Makes the critic a part of `model`, so that one wrapped module trains both; its fused forward gives values too.

    Only after PEFT has wrapped the model: before, it would freeze the critic and put LoRA into it.
    """
    model.critic = critic
    policy_forward = model.forward

    @wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return policy_forward(*args, **kwargs)
        states = []
        hook = self.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            outputs = policy_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        values = self.critic(states[0], kwargs["input_ids"], kwargs["attention_mask"])
        return PolicyOutput(**outputs, token_values=values[:, :-1])

    model.forward = types.MethodType(forward, model)


def load_critic(path, model):
    """The critic that `path` starts: its trunk, and its score head where it is a reward model's."""
    from safetensors import safe_open

    backbone = AutoModel.from_pretrained(path, dtype=model.dtype, use_safetensors=True, trust_remote_code=False)
    score = None
    for file in Path(path).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            score = tensors.get_tensor("score.weight") if "score.weight" in tensors.keys() else score
    if score is not None and len(score) != 1:
        raise Refused([f"--value_model_path {path}: scores {len(score)} labels. A value model has one"])
    return Critic(backbone.config.get_text_config().hidden_size, backbone, score)


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PPOTrainer(GRPOTrainer):
    """GRPO's trainer with a critic. Every answer counts by its tokens' advantages; groups play no part."""

    _tag_names = ["trl", "ppo"]
    _name = "PPO"

    def __init__(self, model, reward_funcs, args, **kwargs):
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        self.beta = 0.0  # GRPO would add the KL to the loss; PPO has it in the reward
        base = self.policy()
        trained = next(p for p in self.model.parameters() if p.requires_grad)
        if args.value_model_path:
            critic = load_critic(args.value_model_path, base)
        else:
            critic = Critic(base.config.get_text_config().hidden_size)
        # engines that share parameters out want one dtype; elsewhere the head learns in float32
        shared_out = self.is_deepspeed_enabled or self.is_fsdp_enabled
        add_critic(base, critic.to(trained.device, trained.dtype if shared_out else torch.float32))

    def create_optimizer(self, *args, **kwargs):
        """TRL's, with the critic in groups of its own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.critic_learning_rate
        if rate is None and self.args.value_model_path:
            rate = 10 * self.args.learning_rate
        elif rate is None:  # Adam moves each weight by the rate, and so a value by at most about one
            rate = 1 / self.policy().config.get_text_config().hidden_size
        critic = {parameter for name, parameter in self.model.named_parameters() if "critic." in name}
        for group in list(optimizer.param_groups):
            theirs = [parameter for parameter in group["params"] if parameter in critic]
            group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": rate})
        return optimizer

    # ── a rollout ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's (all processes' answers, functions), kept to make token rewards of."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        judged = ~rewards.isnan().all(1)
        scores = scores.where(judged, scores[judged].mean().nan_to_num())
        first = self.accelerator.process_index * len(prompts)
        self._scores, self._judged = (kept[first : first + len(prompts)] for kept in (scores, judged))
        return rewards

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """TRL's; the values of the same forward stay in `_values` (B, T)."""
        values = []

        def with_values(**inputs):
            outputs = model(**inputs)
            values.append(outputs.get("token_values"))
            return outputs

        found = super()._get_per_token_logps_and_entropies(with_values, *args, **kwargs)
        self._values = None if values[0] is None else torch.cat(values)[:, -found[0].shape[1] :]
        return found

    def rehearsed(self, prompt, completion):
        given = super().rehearsed(prompt, completion)
        values = torch.zeros_like(given["completion_mask"], dtype=torch.float32)
        return given | {"advantages": values, "old_values": values, "returns": values}

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout with advantages (B, T), and what the value loss compares with: values and returns (B, T)."""
        self._values = None
        output = super()._generate_and_score_completions(inputs)
        output["completion_mask"] = output["completion_mask"] * self._judged[:, None]  # no signal without a verdict
        mask, logps, values = output["completion_mask"], output.get("old_per_token_logps"), self._values
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if logps is None:
                logps = self.score_tokens(self.model, output)
                values = self._values
            ref_logps = logps
            if self.args.beta:
                with self.reference() as reference:
                    ref_logps = self.score_tokens(reference, output)
        values = values * mask
        kl = token_kl(logps, ref_logps, self.args.kl_estimator) * mask
        rewards = token_rewards(self._scores, kl, mask, self.args.beta)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self.sum_over_processes)
        advantages, returns = estimate_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        self.log_rollout(kl, values, returns, mask)
        output["advantages"] = whiten(advantages, mask, reduce=self.sum_over_processes)
        return output | {"old_per_token_logps": logps, "old_values": values, "returns": returns}

    def _generate_single_turn(self, *args, **kwargs):
        """TRL's; vLLM, which is given every weight of the model by its name, knows no critic."""
        if not self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        parts = self.policy()._modules
        critic = parts.pop("critic")
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            parts["critic"] = critic

    def score_tokens(self, model, output):
        """Log-probabilities (B, T) of the answers under `model`."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        batch = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        width = output["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, attention, width, batch)[0]

    @contextmanager
    def reference(self):
        """The frozen start: a model of its own, or the policy with its adapter off, or with that adapter's twin."""
        model = self.accelerator.unwrap_model(self.model)
        frozen = "ref" if "ref" in getattr(model, "peft_config", ()) else None
        with nullcontext() if self.ref_model is not None else use_adapter(model, adapter_name=frozen):
            yield self.model if self.ref_model is None else self.ref_model

    def sum_over_processes(self, sums):
        return self.accelerator.reduce(sums, reduction="sum")

    def log_rollout(self, kl, values, returns, mask):
        errors = returns - values
        per_answer = self.accelerator.gather((self._scores - self.args.beta * kl.sum(1)).mean()).mean()
        sums = [kl.sum(), mask.sum(), errors.sum(), (errors**2).sum(), returns.sum(), (returns**2).sum(), values.sum()]
        kls, count, error, errors2, total, total2, value = self.sum_over_processes(torch.stack(sums)).tolist()
        count = max(count, 1)  # none where mask_truncated_completions hides every answer
        left, spread = errors2 / count - (error / count) ** 2, total2 / count - (total / count) ** 2
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kl"].append(kls / count)
        metrics["rlhf_reward"].append(per_answer.item())
        metrics["value"].append(value / count)
        metrics["explained_variance"].append(1 - left / spread if spread > 1e-12 else float("nan"))

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute_loss(self, model, inputs):
        """GRPO's clipped policy loss, with advantages a token, plus vf_coef times the clipped value loss.

        Both are means over the tokens of a step, counted over processes and accumulation alike.
        """
        policy_loss = super()._compute_loss(model, inputs)
        mask, mode = inputs["completion_mask"], "train" if self.model.training else "eval"
        losses, clipped = value_losses(
            self._values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes  # of the rollout
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        sums = torch.stack([(losses * mask).sum(), (clipped * mask).sum(), mask.sum()]).detach()
        value_loss, clips, count = self.sum_over_processes(sums).tolist()
        self._metrics[mode]["value_loss"].append(value_loss / max(count, 1))
        self._metrics[mode]["clip_ratio/value_mean"].append(clips / max(count, 1))
        return policy_loss + self.args.vf_coef * (losses * mask).sum() / tokens

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _save(self, output_dir=None, state_dict=None):
        """The policy alone is the result; the critic lies beside it in checkpoints, and at the end if asked."""
        from safetensors.torch import save_file

        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        whole = self.model.state_dict() if state_dict is None else state_dict
        critic = {name.split("critic.")[-1]: tensor for name, tensor in whole.items() if "critic." in name}
        policy = {name: tensor for name, tensor in whole.items() if "critic." not in name}
        super()._save(output_dir, state_dict=policy)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.save_critic or folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            whole = {name: tensor.contiguous().cpu() for name, tensor in critic.items()}
            save_file(whole, folder / "critic.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """TRL's, and the critic, which a checkpoint of the policy alone would leave as new."""
        from safetensors.torch import load_file
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / "critic.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{file}: not there, so the critic would start anew")
        # FSDP2 holds it in pieces by then
        set_model_state_dict(self.policy().critic, load_file(file), options=StateDictOptions(full_state_dict=True))
