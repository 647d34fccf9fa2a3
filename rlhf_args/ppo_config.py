import math
from dataclasses import dataclass, field
from pathlib import Path

import trl

from rlhf_args.method_config import MethodConfig
from rlhf_args.online_config import OnlineConfig

OWN_TRUNK = ("lora", "model")  # critics that read tokens themselves, and not the policy's hidden states
SCALE = "return_scale"  # the name of the values' scale in critic.safetensors


@dataclass
class PPOConfig(OnlineConfig, trl.GRPOConfig, MethodConfig):
    """PPO on GRPO's rollouts: what is not said here is GRPO's. Defaults are those of TRL 1.12's PPO, its last."""

    # A critic says what an answer should be worth, so no second answer to the same prompt is needed.
    num_generations: int | None = field(default=1, metadata={"help": "Answers to a prompt in a rollout, 1 or more."})
    # Each rollout is costly, and clipping allows to learn from it several times (TRL 1.12: num_ppo_epochs 4).
    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout: PPO's epochs, 1 or more."})
    # PPO keeps near the reference by a penalty within the reward, which GRPO leaves out (TRL 1.12: kl_coef 0.05).
    beta: float = field(
        default=0.05, metadata={"help": "KL penalty a token within the reward; 0: none, and no reference is held."}
    )
    # What follows is TRL 1.12's, which GRPO does not have.
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "KL of a token: k1 = log p/q, unbiased; k3 = q/p - 1 - log q/p, never negative.",
            "choices": ["k1", "k3"],
        },
    )
    # No discount: an answer is short and its reward comes at the end (TRL 1.12).
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards, 0 to 1; 1: none."})
    # Nearly all of what was really rewarded, the critic's part smoothing it (TRL 1.12).
    lam: float = field(
        default=0.95, metadata={"help": "GAE's lambda, 0 to 1: 0 trusts the critic, 1 what was really rewarded."}
    )
    # As far as the policy's ratio may (TRL 1.12).
    cliprange_value: float = field(
        default=0.2,
        metadata={
            "help": "How far a value may move from the rollout's before it is clipped, in spreads of the returns "
            "(with --normalize_values False in units of the reward)."
        },
    )
    # Under Adam it weighs in the clipping of gradients alone, where a head's must not drown the policy's (TRL 1.12).
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss, 0 or more."})
    # Advantages are whitened as it is (TRL 1.12).
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the token rewards of a rollout to variance 1; their mean is kept."}
    )
    critic: str | None = field(
        default=None,
        metadata={
            "help": "What values the tokens. head: a linear layer on the policy's last hidden states; mlp: a "
            "small network on those of --critic_layer; neither sends a gradient into the policy. lora: an adapter of "
            "its own on the policy's frozen base, with lora and qlora. model: a model of its own; with lora and qlora "
            "it has an adapter of its own and needs --value_model_path. Unset: model with full, else lora.",
            "choices": ["head", "mlp", "lora", "model"],
        },
    )
    critic_layer: int | None = field(
        default=None,
        metadata={
            "help": "With --critic head or mlp: the decoder layer whose states the critic reads, from 0. Unset: the "
            "last one, behind the final norm."
        },
    )
    value_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Where the weights of --critic model or lora come from: a reward model with the policy's "
            "tokenizer, or for lora a reward model's adapter on the policy's base. Unset: the policy itself."
        },
    )
    critic_path: str | None = field(
        default=None,
        metadata={"help": "A critic.safetensors that an earlier run with the same --critic saved, to start from."},
    )
    critic_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The critic's own. Unset: a critic's trunk has learning_rate, with full at least 1e-5; its head "
            "has that or 0.1 / hidden size, the larger; layers on the policy's states have 1 / hidden size."
        },
    )
    # The critic's first values are the mean return, from which the policy can learn at once.
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which the critic learns alone, 0 or more."}
    )
    critic_lam: float | None = field(
        default=None, metadata={"help": "GAE's lambda for the returns that the critic learns, 0 to 1; unset: lam."}
    )
    # Without it a constant in the reward is what the critic learns first, and its errors what the policy learns from.
    normalize_values: bool = field(
        default=True,
        metadata={
            "help": "The critic predicts returns less their running mean, by their running spread, so neither an "
            "offset nor a scale of the rewards matters. False: returns as they are, as in TRL 1.12."
        },
    )
    # The result is the policy; checkpoints hold the critic whatever this says.
    save_critic: bool = field(default=False, metadata={"help": "Save the critic too, as OUTPUT/critic.safetensors."})

    def __post_init__(self):
        for flag in ("gamma", "lam", "critic_lam"):
            if getattr(self, flag) is not None and not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--{flag} {getattr(self, flag):g}: from 0 to 1")
        for flag in ("cliprange_value", "vf_coef", "beta", "critic_warmup_steps"):
            if not 0 <= getattr(self, flag) < math.inf:
                raise ValueError(f"--{flag} {getattr(self, flag):g}: 0 or more")
        if self.critic_learning_rate is not None and not 0 < self.critic_learning_rate < math.inf:
            raise ValueError(f"--critic_learning_rate {self.critic_learning_rate:g}: above 0")
        if self.critic_warmup_steps and self.weight_decay:
            raise ValueError(
                "--critic_warmup_steps with --weight_decay: the decay would move the policy while the critic learns "
                "alone. Type --weight_decay 0"
            )
        if self.scale_rewards not in ("group", True) or self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "--scale_rewards and --multi_objective_aggregation: not PPO's, which whitens advantages over the "
                "rollout. --whiten_rewards scales rewards"
            )
        unused = {
            "sync_ref_model": "the reference has no critic to be synchronised with",
            "vllm_importance_sampling_cap": "type --vllm_importance_sampling_clip_max",
        }
        for flag, reason in unused.items():
            if getattr(self, flag):
                raise ValueError(f"--{flag}: not with PPO: {reason}")
        try:
            super().__post_init__()
        except ValueError as error:  # TRL's last check but those of vLLM's clipping
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise

    def critic_kind(self, train_mode):
        """The critic that is meant: --critic, else by the train mode and by what --value_model_path is."""
        whole = self.value_model_path and not (Path(self.value_model_path) / "adapter_config.json").exists()
        return self.critic or ("model" if train_mode == "full" or whole else "lora")

    def describe_critic(self, train_mode):
        kind, start = self.critic_kind(train_mode), self.value_model_path or "the policy"
        layer = self.critic_layer
        states = "the policy's last hidden states" if layer is None else f"the states of the policy's layer {layer}"
        said = {
            "head": f"a linear layer on {states}",
            "mlp": f"a small network on {states}",
            "lora": f"an adapter of its own on the policy's base, from {start}",
            "model": f"a model of its own, from {start}",
        }[kind]
        return f"--critic {kind}: {said}" + (f"; loaded from {self.critic_path}" if self.critic_path else "")

    def critic_rates(self, kind, hidden_size):
        """The learning rates of the critic's parts: {"trunk": rate, "head": rate}. hidden_size: the critic's own.

        Adam moves each weight of the head by its rate: with 1 / hidden size a value moves by at most about one. On a
        trunk that learns too, that is ten times too much (docs/methods/ppo.md).
        """
        typed = self.critic_learning_rate
        trunk = max(self.learning_rate, 1e-5) if kind == "model" else self.learning_rate
        head = max(trunk, 0.1 / hidden_size) if kind in OWN_TRUNK else 1 / hidden_size
        return {"trunk": trunk if typed is None else typed, "head": head if typed is None else typed}

    @property
    def least_generations(self):
        return 1
