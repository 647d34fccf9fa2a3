from dataclasses import dataclass
from pathlib import Path

import trl

from rlhf_args.flag import flag
from rlhf_args.method_config import MethodConfig
from rlhf_args.online_config import OnlineConfig

OWN_TRUNK = ("lora", "model")  # critics that read tokens, not the policy's hidden states
SCALE = "return_scale"  # the name of the values' scale in critic.safetensors


@dataclass
class PPOConfig(OnlineConfig, trl.GRPOConfig, MethodConfig):
    """PPO on GRPO's rollouts. The other flags are GRPO's; defaults are those of TRL 1.12, the last with PPO."""

    # The critic estimates the expected reward, so a second answer to the same prompt is not needed as a baseline.
    num_generations: int | None = flag(1, "Answers per prompt in a rollout.", range="at least 1")
    # Rollouts are expensive, and clipping allows several passes over each (TRL 1.12: num_ppo_epochs 4).
    num_iterations: int = flag(4, "Passes over each rollout (PPO epochs).")
    # PPO stays near the reference through a penalty in the reward; GRPO's default has none (TRL 1.12: kl_coef 0.05).
    beta: float = flag(0.05, "KL penalty per token, in the reward; 0: none, and no reference model is loaded.")
    # The flags below come from TRL 1.12; GRPO does not have them.
    kl_estimator: str = flag(
        "k1",
        "Estimator of the KL per token. k1: log p/q, unbiased; k3: q/p - 1 - log q/p, never negative.",
        choices=["k1", "k3"],
    )
    # No discount: answers are short and the reward comes at their end (TRL 1.12).
    gamma: float = flag(1.0, "Discount of later rewards; 1: none.", range="at least 0 and at most 1")
    # Mostly observed rewards, smoothed a little by the critic (TRL 1.12).
    lam: float = flag(
        0.95,
        "Lambda of GAE; 0: trust the critic's values, 1: trust the observed rewards.",
        range="at least 0 and at most 1",
    )
    # The same as for the policy's ratio (TRL 1.12).
    cliprange_value: float = flag(
        0.2,
        "Maximum change of a value from its value in the rollout, before clipping; in standard deviations of the "
        "returns (with --normalize_values False in units of the reward).",
        range="at least 0",
    )
    # Adam is invariant to the scale of a loss, but clipping is not: the head's gradients must not dominate (TRL 1.12).
    vf_coef: float = flag(0.1, "Weight of the value loss.", range="at least 0")
    # Off because the advantages are whitened anyway (TRL 1.12).
    whiten_rewards: bool = flag(False, "Scale the token rewards of a rollout to variance 1, with the same mean.")
    critic: str | None = flag(
        None,
        "The network that values the tokens. head: a linear layer on the policy's last hidden states. mlp: a small "
        "network on the hidden states of --critic_layer. Neither sends gradients into the policy. lora: its own "
        "adapter on the policy's frozen base (with lora and qlora). model: its own model; with lora and qlora it "
        "trains an adapter and needs --value_model_path. Unset: model with full, else lora.",
        choices=["head", "mlp", "lora", "model"],
    )
    critic_layer: int | None = flag(
        None,
        "With --critic head or mlp: the decoder layer whose hidden states the critic reads, from 0. Unset: the last "
        "one, after the final norm.",
    )
    value_model_path: str | None = flag(
        None,
        "Initial weights of --critic model or lora: a reward model with the policy's tokenizer, or, for lora, a "
        "reward model's adapter on the policy's base. Unset: the policy.",
    )
    critic_path: str | None = flag(None, "Initial weights: critic.safetensors of a run with the same --critic.")
    critic_learning_rate: float | None = flag(
        None,
        "Learning rate of the critic. Unset: its trunk has learning_rate (with full at least 1e-5); its head has the "
        "larger of that and 0.1 / hidden size; layers on the policy's hidden states have 1 / hidden size.",
        range="above 0, like 1e-5",
    )
    # The critic's initial values are the mean return, which is a usable baseline from the first step.
    critic_warmup_steps: int = flag(0, "Optimizer steps at the start that train only the critic.", range="at least 0")
    critic_lam: float | None = flag(
        None, "Lambda of GAE for the critic's targets. Unset: lam.", range="at least 0 and at most 1, like 0.95"
    )
    # With raw returns the critic first learns the mean reward, and until then its errors train the policy.
    normalize_values: bool = flag(
        True,
        "The critic predicts returns normalised by their running mean and standard deviation: offset and scale of the "
        "reward do not matter. False: raw returns, as in TRL 1.12.",
    )
    # The result is the policy; checkpoints hold the critic in any case.
    save_critic: bool = flag(False, "Also save the critic, as critic.safetensors in output_dir.")

    def __post_init__(self) -> None:
        if self.critic_warmup_steps and self.weight_decay:
            raise ValueError(
                "--critic_warmup_steps with --weight_decay: the decay would change the policy while only the critic "
                "trains. Type --weight_decay 0"
            )
        if self.scale_rewards not in ("group", True) or self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "--scale_rewards and --multi_objective_aggregation: not used by PPO, which whitens advantages over "
                "the rollout. Remove them; --whiten_rewards scales rewards"
            )
        if self.sync_ref_model:
            raise ValueError("--sync_ref_model: PPO's reference stays the initial policy. Remove it")
        if self.vllm_importance_sampling_cap:
            raise ValueError("--vllm_importance_sampling_cap: type --vllm_importance_sampling_clip_max with PPO")
        try:
            super().__post_init__()
        except ValueError as error:  # GRPO needs two answers per prompt; only checks of vLLM's clipping follow
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise

    def critic_kind(self, train_mode: str) -> str:
        """The critic to train: --critic, or the default for the train mode and --value_model_path."""
        whole = self.value_model_path and not (Path(self.value_model_path) / "adapter_config.json").exists()
        return self.critic or ("model" if train_mode == "full" or whole else "lora")

    def describe_critic(self, train_mode: str) -> str:
        kind, start = self.critic_kind(train_mode), self.value_model_path or "the policy"
        layer = self.critic_layer
        states = "the policy's last hidden states" if layer is None else f"the states of the policy's layer {layer}"
        said = {
            "head": f"a linear layer on {states}",
            "mlp": f"a small network on {states}",
            "lora": f"its own adapter on the policy's base, from {start}",
            "model": f"its own model, from {start}",
        }[kind]
        return f"--critic {kind}: {said}" + (f"; loaded from {self.critic_path}" if self.critic_path else "")

    def critic_rates(self, kind: str, hidden_size: int) -> dict[str, float]:
        """Learning rates {"trunk": rate, "head": rate} of a critic with this hidden size.

        Adam changes each weight by about the learning rate per step, so with 1 / hidden_size a value changes by about
        1 at most. With a trainable trunk that is ten times too much (docs/methods/ppo.md).
        """
        typed = self.critic_learning_rate
        trunk = max(self.learning_rate, 1e-5) if kind == "model" else self.learning_rate
        head = max(trunk, 0.1 / hidden_size) if kind in OWN_TRUNK else 1 / hidden_size
        return {"trunk": trunk if typed is None else typed, "head": head if typed is None else typed}

    @property
    def least_generations(self) -> int:
        return 1
