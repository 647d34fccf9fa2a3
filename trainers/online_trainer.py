"""TRL's RLOO and GRPO trainers with the project's reference model, prompts, rewards and log of completions."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import trl
from torch.utils.data import Sampler
from transformers import GenerationConfig, PreTrainedModel, Trainer
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from utils.data.template import template, tokenize
from utils.rewards.functions import RewardFailed, ticking
from utils.rewards.judge_reward import JudgeReward


class SamplesAnswers(Trainer):
    """Mixin before a TRL trainer whose policy samples answers.

    The progress bar sets two callbacks: `generating(tokens, limit)` after each sampled token of a rollout, and
    `scoring(reward name, seconds)` once a second while a reward function runs (seconds None: it has finished).
    """

    generating: Callable[[int, int], None] = staticmethod(lambda tokens, limit: None)
    scoring: Callable[[str, float | None], None] = staticmethod(lambda name, seconds: None)
    stop_strings: StopStringCriteria | None = None  # the stop strings of --generation_kwargs

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        strings = (self.args.generation_kwargs or {}).get("stop_strings")
        if strings and not self.args.use_vllm:
            self.stop_strings = StopStringCriteria(self.processing_class, strings)
            self.generation_config.stop_strings = None  # generate() would need a tokenizer; TRL passes none

    def policy(self) -> PreTrainedModel:
        """The causal language model, without the wrappers of the engine and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def rehearsed(self, prompt: int, completion: int) -> dict[str, torch.Tensor]:
        """A dummy batch with these numbers of prompt and completion tokens, for utils/plan/rehearsal.py."""
        rows = self.args.per_device_train_batch_size
        prompts, answers = (torch.ones(rows, width, dtype=torch.int64) for width in (prompt, completion))
        given = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": answers, "completion_mask": answers}
        given |= {name: torch.zeros(rows, completion) for name in ("old_per_token_logps", "ref_per_token_logps")}
        given |= {name: torch.zeros(rows) for name in ("old_logps", "ref_logps", "advantages")}
        return given | {"num_items_in_batch": torch.ones(())}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Sample with the run's settings only, not the model's generation_config; a forward hook reports progress."""
        policy, sampled = self.policy(), count(1)
        hook = policy.register_forward_hook(
            lambda model, inputs, outputs: self.generating(next(sampled), self.max_completion_length)
        )
        try:
            with own_settings_unused(policy):
                if self.stop_strings is None:
                    return super()._generate_single_turn(*args, **kwargs)
                with stopping_at(self.stop_strings, policy) as stops:
                    found = super()._generate_single_turn(*args, **kwargs)
            answers, *rest = found if isinstance(found, tuple) else (found,)  # GRPO adds vLLM's log-probabilities
            # generate() pads after a stop string, and TRL would count the padding as sampled tokens
            answers = [ids[:length] for ids, length in zip(answers, stops.lengths, strict=True)]
            return (answers, *rest) if rest else answers
        finally:
            hook.remove()
            self.generating(self.max_completion_length, self.max_completion_length)

    def _generate(self, prompts: list) -> Any:
        """TRL's method, with corrected metrics: an answer that ends with a stop string is not truncated."""
        found = super()._generate(prompts)
        if self.stop_strings is not None:
            metrics, device = self._metrics["train" if self.model.training else "eval"], self.accelerator.device
            counted = [[len(ids), not self.has_ended(ids)] for ids in found[1]]
            lengths, cut = self.accelerator.gather(torch.tensor(counted, device=device)).float().T
            ended = lengths[cut == 0] if (cut == 0).any() else torch.zeros(1)
            metrics["completions/clipped_ratio"][-1] = cut.mean().item()
            for name, value in (("mean", ended.mean()), ("min", ended.min()), ("max", ended.max())):
                metrics[f"completions/{name}_terminated_length"][-1] = value.item()
        return found

    def has_ended(self, ids: list[int]) -> bool:
        """True if the answer with these token ids ends with an end token or a stop string."""
        if ids and ids[-1] in self.eos_token_ids:
            return True
        if self.stop_strings is None or not ids:
            return False
        return bool(self.stop_strings(torch.tensor([ids], device=self.accelerator.device), None))


class Online(SamplesAnswers):
    """Mixin before a TRL trainer that samples answers and scores them.

    ref_model: the reference of a full-weight policy; None with an adapter. TRL would load it by the name in the
    config, without the revision and without a merged adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: list[Callable],
        args: trl.GRPOConfig | trl.RLOOConfig,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        judges, reward_funcs = reward_funcs, [self.shown(reward) for reward in reward_funcs]
        if args.missing_eos_penalty:
            reward_funcs.append(self.missing_eos)
            if args.reward_weights:
                args.reward_weights = [*args.reward_weights, 1.0]
        beta, sync = args.beta, args.sync_ref_model
        if ref_model is not None:
            args.beta, args.sync_ref_model = 0.0, False  # TRL must not load a reference
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        args.beta, args.sync_ref_model, self.beta = beta, sync, beta
        if ref_model is not None:
            self.ref_model = self.prepare_reference(ref_model)
            if sync:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        self.judged = [place for place, reward in enumerate(judges) if isinstance(reward, JudgeReward)]
        self.judge = next((reward.judge for reward in judges if isinstance(reward, JudgeReward)), None)
        for reward in judges:
            if hasattr(reward, "attach"):
                reward.attach(self)

    def shown(self, reward: Callable) -> Callable:
        """The reward function, reported to `scoring` while it runs."""

        def called(**columns: Any) -> list:
            with ticking(lambda seconds: self.scoring(reward.__name__, seconds)):
                return reward(**columns)

        called.__name__ = reward.__name__
        return called

    def prepare_reference(self, model: PreTrainedModel) -> Any:
        """Source: trl 1.16.0, trainer/grpo_trainer.py, __init__."""
        if self.args.disable_dropout:
            disable_dropout(model)
        add_fused_lm_head(model, self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        return share_out(self, model)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return FromEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _calculate_rewards(
        self, inputs: Any, prompts: list, completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        """TRL's rewards (answers of all processes, functions); nan for an answer without a verdict of the judge.

        TRL excludes a row of nan from the baseline and sets its advantage to 0. Raises RewardFailed if all functions
        returned None for an answer.
        """
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        failed = torch.zeros_like(rewards[:, 0], dtype=torch.bool)
        if self.judge and self.judge.takes_part():
            failed = rewards[:, self.judged].isnan().any(dim=1)
            self.judge.count_failures(int(failed.sum()), len(failed), evaluating=not self.model.training)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["judge/failed"].append(failed.float().mean().item())
        names = [name for name in self.reward_func_names if name != "missing_eos"]
        if (rewards[:, : len(names)].isnan().all(dim=1) & ~failed).any():
            judges = " and ".join(names)
            raise RewardFailed(f"{judges} returned None for one answer: each answer needs a number from one of them")
        return rewards.masked_fill(failed[:, None], math.nan)

    def missing_eos(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """A reward function, so that the log shows it: -missing_eos_penalty for each truncated answer."""
        return [0.0 if self.has_ended(ids) else -self.args.missing_eos_penalty for ids in completion_ids]

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """Tokenise as in all methods here: one BOS if the tokenizer adds a BOS, regardless of the template.

        Returns (ids of each prompt, images: None, further inputs: {}), in TRL's form.
        """
        tokenizer, settings = self.processing_class, {"add_generation_prompt": True, **self.chat_template_kwargs}
        texts = [text if isinstance(text, str) else template(tokenizer, text, **settings) for text in prompts]
        return [tokenize(tokenizer, text) for text in texts], None, {}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's method; also append each answer with its rewards to completions.jsonl."""
        output = super()._generate_and_score_completions(inputs)
        if self.judge and not self.judge.takes_part():
            for name in self.judge.judge.weights:  # a mean of no numbers
                for kind in ("mean", "std"):
                    self._metrics["eval"].pop(f"rewards/{name}/{kind}", None)
        if self.model.training and self.accelerator.is_main_process:
            rows = len(inputs) * self.accelerator.num_processes
            newest = [list(self._logs[name])[-rows:] for name in ("prompt", "completion")]
            rewards = {name: list(values)[-rows:] for name, values in self._logs["rewards"].items()}
            with open(Path(self.args.output_dir) / "completions.jsonl", "a", encoding="utf-8") as handle:
                for place, (prompt, completion) in enumerate(zip(*newest, strict=True)):
                    line = {"step": self.state.global_step + 1, "prompt": prompt, "completion": completion}
                    given = {name: values[place] for name, values in rewards.items()}
                    line["rewards"] = {name: None if math.isnan(value) else value for name, value in given.items()}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        return output


class FromEpoch(Sampler):
    """TRL's sampler, with the right order after a resume: it draws all epochs from one random stream.

    epoch: returns the number of the epoch that begins; the orders of the earlier epochs are drawn and discarded.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Lengths(StoppingCriteria):
    """`criterion`; `lengths` holds each answer's number of tokens when it first stopped (None: not yet)."""

    def __init__(self, criterion: StoppingCriteria):
        self.criterion, self.sampled = criterion, 0
        self.lengths: list[int | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        found = self.criterion(input_ids, scores, **kwargs)
        self.sampled += 1
        self.lengths = self.lengths or [None] * len(found)
        for answer in found.nonzero().flatten().tolist():
            self.lengths[answer] = self.lengths[answer] or self.sampled
        return found


class RLOOTrainer(Online, trl.RLOOTrainer):
    pass


class GRPOTrainer(Online, trl.GRPOTrainer):
    pass


def share_out(trainer: Any, model: PreTrainedModel) -> Any:
    """A frozen model, prepared for the trainer's engine. Source: trl 1.16.0, trainer/grpo_trainer.py, __init__."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0. TRL's helper misses the rates that attention layers pass to a function."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def own_settings_unused(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation_config: generate() would use its values for every setting that is unset."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def stopping_at(criterion: StoppingCriteria, model: PreTrainedModel) -> Iterator[Lengths]:
    """Make model.generate() also stop at `criterion`; yields the Lengths of its answers."""
    generate, stops = model.generate, Lengths(criterion)
    model.generate = partial(generate, stopping_criteria=StoppingCriteriaList([stops]))
    try:
        yield stops
    finally:
        del model.generate
