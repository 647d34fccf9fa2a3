"""Generalised knowledge distillation with the sampling, vLLM and chunked loss of TRL's stable DistillationTrainer."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import cycle, islice
from typing import Any

import torch
import trl
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, _compute_dtype, _project
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import RepeatSampler, maybe_gather_lm_head_ctx

from rlhf_args.gkd_config import GKDConfig
from trainers.online_trainer import SamplesAnswers, share_out
from utils.models.load import shard_layers
from utils.models.sampling import nameless_tokens

HELD_OUT = ("forward_kl", "reverse_kl", "token_agreement", "student_loss", "teacher_loss")
CHUNK = 256  # tokens per chunk when both models' full distributions are compared


class GKDTrainer(SamplesAnswers, trl.DistillationTrainer):
    """Trains on the student's own answers in a share `lmbda` of the steps, otherwise on the answers in the rows.

    Rows: {"prompt_ids": [...], "completion_ids": [...]}. teacher_model: frozen; None: the student without its adapter.
    Source: Agarwal et al. 2024, arXiv 2306.13649, algorithm 1 and equations (1) to (3); differs: the on-policy steps
    are evenly spaced, not random. TRL 1.16's GKDTrainer draws for each pass and process, samples without a KV cache,
    and does not apply the temperature to the loss.
    """

    def __init__(
        self, model: PreTrainedModel, args: GKDConfig, teacher_model: PreTrainedModel | None = None, **kwargs: Any
    ):
        super().__init__(model=model, args=args, **kwargs)  # without the teacher: TRL refuses another vocabulary size
        self.vocabulary = self.model.config.get_text_config().vocab_size
        if teacher_model is not None:
            self.vocabulary = min(self.vocabulary, teacher_model.config.get_text_config().vocab_size)
            self.teacher_model = self.prepare_teacher(teacher_model)
        spare = nameless_tokens(self.model, self.processing_class, self.vocabulary)
        self.generation_config.suppress_tokens = [*(self.generation_config.suppress_tokens or ()), *spare] or None
        self.compared: Any = 0  # (6,) sums over the held-out tokens of an evaluation

    def prepare_teacher(self, model: PreTrainedModel) -> Any:
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ValueError("the teacher's adapter changes its head: not with 4-bit weights. Merge the adapter first")
        if self.is_fsdp_enabled:
            shard_layers(model, self.accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy())
        return share_out(self, model)

    # ── student's or given answers ───────────────────────────────────────────────────────────────────────────────────

    def _get_train_sampler(self, dataset: Any = None) -> "EveryRow":
        """TRL's sampler drops the rows that do not fill a step; this sampler keeps them."""
        args = self.args
        rows = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        dataset = self.train_dataset if dataset is None else dataset
        return EveryRow(
            lambda: self.state.global_step // -(-len(dataset) // rows),
            dataset,
            mini_repeat_count=1,
            batch_size=rows,
            repeat_count=args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def is_on_policy(self) -> bool:
        """True if this step trains on the student's own answers: floor(n * lmbda) of the first n steps do.

        The steps are evenly spaced and the same on all processes. lmbda is used as an exact decimal: in floats
        100 * 0.29 is 28.999999999999996, one step too few.
        """
        step, share = self.state.global_step, Fraction(str(self.args.lmbda))
        return math.floor((step + 1) * share) > math.floor(step * share)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        on_policy = self.model.training and self.is_on_policy()
        self.given = None if on_policy else [row["completion_ids"] for row in inputs]
        if self.model.training:
            self._metrics["train"]["on_policy"].append(float(on_policy))
        return super()._generate_and_score_completions([{"prompt": row["prompt_ids"]} for row in inputs])

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict]:
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        return super()._generate_single_turn(prompt_ids, *args, **kwargs) if self.given is None else self.given

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute_loss(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, ...]:
        """(loss, summed entropy, tokens) of the answers, in chunks: the full logits are never in memory.

        Differs from TRL 1.16: projects only answer positions, over the shared vocabulary, under autocast (accelerate
        applies its autocast to `forward`, which is not called here).
        """
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, P + C)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        answered = inputs["completion_mask"].bool()  # (B, C)
        tokens = None  # FSDP2 rounds num_items_in_batch, a float, to bfloat16
        if self.model.training:
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        with self.accelerator.autocast():
            states = self._get_last_hidden_state(student, ids, mask, width)[answered]  # (N, H)
            with torch.no_grad():
                teacher, taught = self.teach(student, ids, mask, width)
                taught = taught[answered]  # (N, H of the teacher)
            ours, theirs = Head(student, self.vocabulary).cut(), Head(teacher, self.vocabulary)
            loss, entropy, count = _chunked_divergence_loss(
                states[None],
                taught[None],
                ours.weight,
                theirs.weight,
                torch.ones_like(states[None, :, 0]),
                self.beta,
                num_items_in_batch=tokens,
                student_lm_head_bias=ours.bias,
                teacher_lm_head_bias=theirs.bias,
                student_logit_scale=ours.scale,
                teacher_logit_scale=theirs.scale,
                student_final_logit_softcapping=ours.cap,
                teacher_final_logit_softcapping=theirs.cap,
                temperature=self.temperature,
            )
            if not self.model.training:
                heads = maybe_gather_lm_head_ctx(ours.weight, ours.bias, theirs.weight, theirs.bias)
                with torch.no_grad(), heads:
                    targets = inputs["completion_ids"][answered]
                    self.compared += sum_divergences(states, ours.gather(), taught, theirs.gather(), targets)
        return loss, entropy.detach(), count

    def teach(self, student: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Any, Tensor]:
        """The teacher and its last hidden states (B, C, H)."""
        if self.teacher_model is None:
            with student.disable_adapter():
                return student, self._get_last_hidden_state(student, ids, mask, width)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        call = teacher, ids, mask, width
        return teacher, self._forward_redirection(self.teacher_model, teacher, self._get_last_hidden_state, *call)

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.compared = 0
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            sums = self.accelerator.gather(self.compared[None]).sum(0).tolist()
            logs |= {f"eval_{name}": total / sums[-1] for name, total in zip(HELD_OUT, sums, strict=False)}
        super().log(logs, start_time)


class Head:
    """The head of a model: weight (V, H), bias (V) or None, logit scale, soft cap of the logits or None."""

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        self.weight, self.bias, self.vocabulary = layer.weight, layer.bias, vocabulary
        self.scale, self.cap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
        self.rows = config.vocab_size

    def cut(self) -> "Head":
        """Keep the rows of the shared vocabulary: TRL uses all rows of the student. Refused earlier under ZeRO-3."""
        if self.rows > self.vocabulary:
            self.gather()
            self.weight, self.bias = (p if p is None else p[: self.vocabulary] for p in (self.weight, self.bias))
        return self

    def gather(self) -> "Head":
        """Gather the shards under FSDP2, once and on all processes together, whatever their numbers of tokens."""
        whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in (self.weight, self.bias)]
        self.weight, self.bias = whole
        return self

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) in float32 of states (N, H), projected as in the loss."""
        logits = torch.empty(len(states), self.vocabulary, device=states.device)
        dtype = _compute_dtype(states)
        for start in range(0, self.vocabulary, VOCAB_CHUNK_SIZE):
            end = min(start + VOCAB_CHUNK_SIZE, self.vocabulary)
            _project(logits[:, start:end], states.to(dtype), self.weight, self.bias, start, end, dtype)
        logits *= self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def logit_scale(config: Any) -> float:
    """The factor on the logits; its name depends on the model family. Source: TRL 1.16.0, _compute_loss."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def sum_divergences(states: Tensor, student: Head, taught: Tensor, teacher: Head, targets: Tensor) -> Tensor:
    """Sums (6,) over N tokens: KL(t || s), KL(s || t), same argmax, -log s, -log t (as HELD_OUT), and N."""
    sums = torch.zeros(len(HELD_OUT) + 1, device=states.device, dtype=torch.float64)
    for start in range(0, len(states), CHUNK):
        part = slice(start, start + CHUNK)
        ours, theirs = (head.logits(h[part]).log_softmax(-1) for head, h in ((student, states), (teacher, taught)))
        forward = (theirs.exp() * (theirs - ours)).sum()
        reverse = (ours.exp() * (ours - theirs)).sum()
        agree = (ours.argmax(-1) == theirs.argmax(-1)).sum()
        losses = [-model.gather(1, targets[part, None]).sum() for model in (ours, theirs)]
        sums += torch.stack([forward, reverse, agree, *losses, torch.tensor(len(ours), device=sums.device)]).double()
    return sums


class EveryRow(RepeatSampler):
    """TRL's sampler, but the last batch of an epoch is filled with rows from the epoch's beginning, not dropped.

    epoch: returns the number of the epoch that begins, so that the order is the same after a resume.
    """

    def __init__(self, epoch: Callable[[], int], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_samples))
        if self.shuffle:
            generator = self.generator.manual_seed(self.seed + self.epoch())
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        rows = list(islice(cycle(order), len(self) // self.repeat_count))
        for start in range(0, len(rows), self.batch_size):
            for _ in range(self.repeat_count):
                yield from rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size) * self.batch_size * self.repeat_count
