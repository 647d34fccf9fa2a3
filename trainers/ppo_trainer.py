"""PPO on the rollouts of TRL's GRPO trainer: a critic, a KL penalty per token, GAE, clipped policy and value losses.

TRL removed its own PPO after 1.12. GRPO's trainer samples, scores, batches, clips the policy's ratio and logs. This
file adds the PPO parts; trainers/critics.py has the critics. Sources: Schulman et al. 2017 (arXiv 1707.06347, the
clipped losses), Schulman et al. 2015 (arXiv 1506.02438, GAE), Ziegler et al. 2019 (arXiv 1909.08593, the KL penalty
within the reward), Huang et al. 2024 (arXiv 2403.17031, the details).

(B, T): answers x tokens of the longest answer; `mask` is 1 on an answer's tokens, including its end token.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import FusedCausalLMOutput, shuffle_sequence_dict, split_tensor_dict, use_adapter

from rlhf_args.ppo_config import SCALE, PPOConfig
from trainers import critics
from trainers.online_trainer import GRPOTrainer, disable_dropout
from utils.runtime.errors import Refused

# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def token_kl(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """KL to the reference, estimated at each sampled token (B, T). Source: joschu.net/blog/kl-approx.html."""
    log_ratio = ref_logps - logps
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards per token (B, T): the KL penalty on each token, plus the answer's score (B,) on its last token.

    Source: Ziegler et al. 2019, eq. 2; differs: TRL 1.12 puts the score one position after a sampled end token.
    """
    rewards = -kl_coef * kl * mask
    last = (mask.sum(1) - 1).clamp(min=0).long()
    return rewards.scatter_add(1, last[:, None], (scores * mask.any(1))[:, None])


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE: (advantages, returns), both (B, T). The value after an answer's last token is 0.

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


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: critics.Reduce = lambda sums: sums) -> Tensor:
    """Scale x (B, T) to variance 1 where the mask is 1, and to mean 0 with `shift_mean`; 0 elsewhere.

    Source: TRL 1.12, masked_whiten; differs: statistics over the rollout of all processes, not of each process.
    """
    mean, variance = critics.masked_moments(x, mask, reduce, correction=1)
    whitened = (x - mean) / math.sqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the value, or of the value clipped around the rollout's value, whichever is larger.

    Returns (losses, True where the clipped value has the larger error), both (B, T).
    Source: Huang et al. 2024, detail 13, and TRL 1.12.
    """
    clipped = values.clamp(old_values - cliprange, old_values + cliprange)
    free, near = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.max(free, near), near > free


@dataclass
class PolicyOutput(FusedCausalLMOutput):
    """TRL's fused output and `token_values` (B, L - 1): normalised values before each token but the first."""

    token_values: Tensor | None = None


def is_critics(name: str) -> bool:
    """True if this parameter of the wrapped model belongs to the critic."""
    return "critic." in name


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PPOTrainer(GRPOTrainer):
    """GRPO's trainer with a critic: advantages per token, no group baseline."""

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _buffered_inputs: Any  # TRL's: the parts of the rollout; None before the first

    def __init__(self, model: PreTrainedModel, reward_funcs: list[Callable], args: PPOConfig, **kwargs: Any):
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        self.beta = 0.0  # GRPO would add the KL to the loss; PPO has it in the reward
        base, lora = self.policy(), getattr(self.model, "peft_config", {}).get("default")
        trained = next(p for p in self.model.parameters() if p.requires_grad)
        self.critic_kind = args.critic_kind("lora" if lora else "full")
        path, shares = args.value_model_path, not self.is_fsdp_enabled
        if path:
            critics.check_value_tokens(path, self.processing_class, base.config.get_text_config().vocab_size)
        critic = critics.make_critic(self.critic_kind, base, path, args.critic_layer, lora, shares)
        if args.disable_dropout:
            disable_dropout(critic)
        if lora and critic.backbone is not None and args.gradient_checkpointing:
            critic.backbone.enable_input_require_grads()
        if not args.normalize_values:
            critic.scale = critics.FixedScale()
        self.scale = critic.scale
        # sharding engines need one dtype; otherwise the critic is trained in float32
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for parameter in critic.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained.dtype if sharded else torch.float32)
        self.critic = critic.to(trained.device)
        critics.add_critic(base, self.critic, PolicyOutput)
        if args.critic_path:
            self.load_critic(args.critic_path)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's optimizer, with parameter groups and learning rates for the critic's trunk and head."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self.args.critic_rates(self.critic_kind, self.critic.score[-1].in_features)
        named = {parameter: name for name, parameter in self.model.named_parameters() if is_critics(name)}
        for group in list(optimizer.param_groups):
            taken = [parameter for parameter in group["params"] if parameter in named]
            group["params"] = [parameter for parameter in group["params"] if parameter not in named]
            for part, rate in rates.items():
                theirs = [one for one in taken if ("critic.score." in named[one]) is (part == "head")]
                if theirs:
                    optimizer.add_param_group({**group, "params": theirs, "lr": rate, "critic": True})
        return optimizer

    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        zero = getattr(model, "optimizer", None) if self.is_deepspeed_enabled else None
        if zero is not None and not hasattr(zero, "norms_apart"):
            critics.clip_apart(zero)
        return super().training_step(model, *args, **kwargs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> float:
        """Clip the gradients of critic and policy separately. Returns the policy's norm before clipping."""
        if self.is_deepspeed_enabled:
            norms = [model.optimizer.norms_apart[side] for side in (False, True)]
        else:
            parts: list[list[Tensor]] = [[], []]
            for name, parameter in model.named_parameters():
                parts[is_critics(name)].append(parameter)
            norms = [self.accelerator.clip_grad_norm_(part, self.args.max_grad_norm) for part in parts]
        policy, critic = (float(norm) for norm in norms)
        self._metrics["train"]["critic_grad_norm"].append(critic)
        return policy if math.isfinite(critic) else critic  # Safe checks the returned norm

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Reshuffle the rollout for each pass, as in TRL 1.12; TRL's method shuffles a rollout once."""
        steps = self.args.steps_per_generation
        begins, several = self._step % steps == 0, steps > self.args.gradient_accumulation_steps
        later = self._step % (steps * self.num_iterations) and self._buffered_inputs is not None
        if self.model.training and begins and several and later:
            parts = self._buffered_inputs
            whole = {name: join([part[name] for part in parts]) for name in parts[0]}
            self._buffered_inputs = split_tensor_dict(shuffle_sequence_dict(whole), steps)
        return super()._prepare_inputs(inputs)

    # ── a rollout ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        """TRL's rewards (answers of all processes, functions); this process's sums stay in `_scores` (B,)."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        scores = scores.masked_fill(rewards.isnan().all(1), math.nan)  # no verdict
        first = self.accelerator.process_index * len(prompts)
        self._scores = scores[first : first + len(prompts)]
        return rewards

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's method; the values of the same forward pass stay in `_values`, the guesses in `_guesses` (B, T)."""
        seen: list[tuple] = []

        def with_values(**inputs: Any) -> Any:
            outputs = model(**inputs)
            seen.append((outputs.get("token_values"), self.critic.guesses))
            return outputs

        found = super()._get_per_token_logps_and_entropies(with_values, *args, **kwargs)
        width, (values, guesses) = found[0].shape[1], zip(*seen, strict=True)
        self._values = None if values[0] is None else torch.cat(values)[:, -width:]
        self._guesses = None if guesses[0] is None else torch.cat(guesses)[:, -width - 1 : -1]
        return found

    def rehearsed(self, prompt: int, completion: int) -> dict[str, Tensor]:
        given = super().rehearsed(prompt, completion)
        values = torch.zeros_like(given["completion_mask"], dtype=torch.float32)
        return given | {"advantages": values, "old_values": values, "returns": values}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollout with advantages, old values and returns (B, T); the latter two in normalised units."""
        self._values = None
        output = super()._generate_and_score_completions(inputs)
        judged, scores = ~self._scores.isnan(), self._scores.nan_to_num()
        output["completion_mask"] = (
            output["completion_mask"] * judged[:, None]
        )  # an answer without a verdict gives no signal
        output["num_items_in_batch"] = self.sum_over_processes(output["completion_mask"].sum())
        mask, logps, values = output["completion_mask"], output.get("old_per_token_logps"), self._values
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if logps is None:
                logps = self.score_tokens(self.model, output)
                values = self._values
            guesses, ref_logps = self._guesses, logps
            if self.args.beta:
                with self.reference() as reference:
                    ref_logps = self.score_tokens(reference, output)
        kl = token_kl(logps, ref_logps, self.args.kl_estimator) * mask
        rewards = token_rewards(scores, kl, mask, self.args.beta)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self.sum_over_processes)
        scale, old_values = self.scale, values
        if not scale.begun:
            scale, old_values = self.begin_scale(values, guesses, rewards, mask)
        values = scale.values(old_values) * mask
        advantages, returns = estimate_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        if self.args.critic_lam is not None:
            _, returns = estimate_advantages(rewards, values, mask, self.args.gamma, self.args.critic_lam)
        self.log_rollout(scores, judged, kl, values, returns, mask)
        if self.model.training:
            scale.update(returns, mask, self.sum_over_processes)
        output["advantages"] = whiten(advantages, mask, reduce=self.sum_over_processes)
        returns = scale.normalise(returns) * mask
        return output | {"old_per_token_logps": logps, "old_values": old_values * mask, "returns": returns}

    def begin_scale(
        self, values: Tensor, guesses: Tensor | None, rewards: Tensor, mask: Tensor
    ) -> tuple[critics.ReturnScale, Tensor]:
        """(scale, normalised values (B, T) with the fitted guess) of the first rollout.

        The returns are sums of rewards (lambda 1) and contain no values. A held-out rollout before training does not
        change the trained scale.
        """
        scale = self.scale if self.model.training else copy.copy(self.scale)
        _, returns = estimate_advantages(rewards, torch.zeros_like(rewards), mask, self.args.gamma, 1.0)
        scale.update(returns, mask, self.sum_over_processes)
        if guesses is not None and scale.begun:
            scale.fit_guess(guesses, returns, mask, self.sum_over_processes)
            values = values + scale.gain * guesses + scale.shift
        return scale, values

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Hide the critic: TRL sends all weights of the model to vLLM and gathers all parameters under ZeRO-3."""
        parts, engine = self.policy()._modules, self.model_wrapped
        critic = parts.pop("critic") if self.use_vllm else None
        if self.is_deepspeed_enabled:
            engine.parameters = lambda: [one for name, one in engine.named_parameters() if not is_critics(name)]
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            if critic is not None:
                parts["critic"] = critic
            if self.is_deepspeed_enabled:
                del engine.parameters

    def score_tokens(self, model: Any, output: dict[str, Any]) -> Tensor:
        """Log-probabilities (B, T) of the answers under `model`."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        batch = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        width = output["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, attention, width, batch)[0]

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference model: a separate model, the policy without its adapter, or the policy with adapter "ref"."""
        model, critic = self.accelerator.unwrap_model(self.model), self.critic
        frozen = "ref" if "ref" in getattr(model, "peft_config", ()) else None
        critic.off = True
        try:
            with nullcontext() if self.ref_model is not None else use_adapter(model, adapter_name=frozen):
                yield self.model if self.ref_model is None else self.ref_model
        finally:
            critic.off = False

    def sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def log_rollout(
        self, scores: Tensor, judged: Tensor, kl: Tensor, values: Tensor, returns: Tensor, mask: Tensor
    ) -> None:
        """Log a rollout's metrics, over all processes. `scores`, `judged`: (B,); the others (B, T)."""
        per_answer = (scores - self.args.beta * kl.sum(1)) * judged
        sums = [kl.sum(), mask.sum(), values.sum(), per_answer.sum(), judged.sum()]
        kls, count, value, reward, answers = self.sum_over_processes(torch.stack(sums)).tolist()
        _, left = critics.masked_moments(returns - values, mask, self.sum_over_processes)
        _, spread = critics.masked_moments(returns, mask, self.sum_over_processes)
        count = max(count, 1)  # 0 if mask_truncated_completions masks every answer
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kl"].append(kls / count)
        metrics["rlhf_reward"].append(reward / max(answers, 1))
        metrics["value"].append(value / count)
        metrics["explained_variance"].append(1 - left / spread if spread > 1e-12 else float("nan"))

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """GRPO's clipped policy loss, with advantages per token, plus vf_coef times the clipped value loss.

        Both: sum over the tokens of a step / tokens of the rollout * steps of the rollout. During the critic's
        warm-up the policy loss is 0.
        """
        policy_loss = super()._compute_loss(model, inputs)
        if self.state.global_step < self.args.critic_warmup_steps:
            policy_loss = policy_loss * 0.0
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

    # ── saving and loading ───────────────────────────────────────────────────────────────────────────────────────────

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the policy; in checkpoints and with --save_critic also the critic, in critic.safetensors."""
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        whole = self.model.state_dict() if state_dict is None else state_dict
        critic = {name.split("critic.")[-1]: tensor for name, tensor in whole.items() if is_critics(name)}
        policy = {name: tensor for name, tensor in whole.items() if not is_critics(name)}
        super()._save(output_dir, state_dict=policy)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.save_critic or folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            # frozen weights are the policy's or in --value_model_path; 4-bit weights add entries to the state dict
            trained = {name for name, parameter in self.critic.named_parameters() if parameter.requires_grad}
            kept = {n: tensor.contiguous().cpu() for n, tensor in critic.items() if n in trained or n == "guess"}
            save_file(kept | {SCALE: self.scale.state()}, folder / "critic.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_critic(Path(resume_from_checkpoint) / "critic.safetensors")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        file = Path(self.state.best_model_checkpoint) / "critic.safetensors"
        if self.is_deepspeed_enabled:
            self.load_scale(file)
        else:
            self.load_critic(file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also load the scale of the values. DeepSpeed itself loads the critic's weights."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            self.load_scale(Path(checkpoint) / "critic.safetensors")

    def load_scale(self, file: str | Path) -> dict[str, Tensor]:
        """Load the scale of the values; returns all tensors of the file. Raises Refused if it does not fit."""
        if not Path(file).exists():
            raise Refused([f"{file}: no such file, so the critic would start untrained"])
        held = load_file(file)
        try:
            self.scale.load(held[SCALE])
        except ValueError as error:
            raise Refused([f"--critic_path {file}: {error}. Type the same, or remove --critic_path"]) from None
        return held

    def load_critic(self, file: str | Path) -> None:
        """Load the critic and its scale. Raises Refused if the file is missing or has another kind of critic."""
        held, critic = self.load_scale(file), self.critic
        held.pop(SCALE)
        guess = held.pop("guess", None)
        critic.guess = guess if guess is None else guess.to(self.accelerator.device)
        trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
        if strange := sorted(trained ^ held.keys()):
            raise Refused([
                f"--critic_path {file}: another kind of critic ({strange[0]} is only in one of the two). Type the "
                "--critic of the run that saved it"
            ])  # fmt: skip
        if any(hasattr(parameter, "ds_tensor") for parameter in critic.parameters()):  # ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(critic.parameters()), modifier_rank=0):
                critic.load_state_dict(held, strict=False)
        else:  # under FSDP2 the critic is sharded by now
            set_model_state_dict(critic, held, options=StateDictOptions(full_state_dict=True, strict=False))


def join(parts: list[Any]) -> Any:
    """Join the parts of a batch, one entry of the batch at a time; a scalar is the same in all parts."""
    if not isinstance(parts[0], torch.Tensor):
        return parts[0] if parts[0] is None else [one for part in parts for one in part]
    return torch.cat(parts) if parts[0].ndim else parts[0]
