"""TRL's RLOO and GRPO trainers with the project's reference model, prompts, rewards and records of what was said."""

import json
import math
from pathlib import Path

import torch
import trl
from torch.utils.data import Sampler
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from utils.rewards import RewardFailed, ticking
from utils.text import template, tokenize


class SamplesAnswers:
    """Mixin before a TRL trainer whose policy answers prompts itself.

    For the progress bar: `generating` is called with the tokens sampled so far of a rollout, `scoring` once a second
    with the reward that is computed and the seconds it took so far (None: it is done).
    """

    generating = staticmethod(lambda tokens, limit: None)
    scoring = staticmethod(lambda name, seconds: None)

    def policy(self):
        """The causal language model inside whatever wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def rehearsed(self, prompt, completion):
        """A pass of a rollout without data, of so many tokens, for utils/rehearsal.py."""
        rows = self.args.per_device_train_batch_size
        prompts, answers = (torch.ones(rows, width, dtype=torch.int64) for width in (prompt, completion))
        given = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": answers, "completion_mask": answers}
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            given[name] = torch.zeros(rows, completion)
        for name in ("old_logps", "ref_logps", "advantages"):
            given[name] = torch.zeros(rows)
        return given | {"num_items_in_batch": torch.ones(())}

    def _generate_single_turn(self, *args, **kwargs):
        """TRL's, counting the steps of the model to show how far a rollout is."""
        sampled = [0]

        def count(model, inputs, outputs):
            sampled[0] += 1
            self.generating(sampled[0], self.max_completion_length)

        hook = self.policy().register_forward_hook(count)
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            hook.remove()
            self.generating(self.max_completion_length, self.max_completion_length)


class Online(SamplesAnswers):
    """Mixin before a TRL trainer that samples answers and scores them.

    `ref_model`: the frozen start of fully trained weights, as for DPO; TRL would load one from the name in the config
    alone, without its revision, and without the adapter that was merged into it. With an adapter there is none.
    """

    def __init__(self, model, reward_funcs, args, ref_model=None, **kwargs):
        judges, reward_funcs = reward_funcs, [self.shown(reward) for reward in reward_funcs]
        if args.missing_eos_penalty:
            reward_funcs.append(self.missing_eos)
            if args.reward_weights:
                args.reward_weights = [*args.reward_weights, 1.0]
        beta, sync = args.beta, args.sync_ref_model
        if ref_model is not None:
            args.beta, args.sync_ref_model = 0.0, False  # no reference of TRL's
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        args.beta, args.sync_ref_model, self.beta = beta, sync, beta
        if ref_model is not None:
            self.ref_model = self.prepare_reference(ref_model)
            if sync:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        for reward in judges:
            if hasattr(reward, "attach"):
                reward.attach(self)

    def shown(self, reward):
        """The reward function, with its name and its seconds shown while it runs."""

        def called(**columns):
            with ticking(lambda seconds: self.scoring(reward.__name__, seconds)):
                return reward(**columns)

        called.__name__ = reward.__name__
        return called

    def prepare_reference(self, model):
        """As TRL prepares its own. Source: trl 1.16.0, trainer/grpo_trainer.py, __init__."""
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        add_fused_lm_head(
            model,
            temperature=self.temperature,
            cast_lm_head_to_fp32=getattr(self.args, "cast_lm_head_to_fp32", False),
        )
        return share_out(self, model)

    def _get_train_sampler(self, dataset=None):
        return FromEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's, which takes an answer that no function judged for one without a signal, and goes on."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        names = [name for name in self.reward_func_names if name != "missing_eos"]
        if rewards[:, : len(names)].isnan().all(dim=1).any():
            judges = " and ".join(names)
            raise RewardFailed(f"{judges} returned None for one answer: each answer needs a number from one of them")
        return rewards

    def missing_eos(self, completion_ids, **kwargs):
        """A reward function of its own, so that the log shows it: missing_eos_penalty for each answer that was cut."""
        ended = [ids[-1] in self.eos_token_ids for ids in completion_ids]
        return [0.0 if end else -self.args.missing_eos_penalty for end in ended]

    def _tokenize_prompts(self, prompts):
        """Prompts as all methods here tokenise them: one BOS where the tokenizer adds one, whatever the template says.

        Returns (ids a prompt, no images, no further inputs), as TRL's does.
        """
        ids = [
            tokenize(
                self.processing_class,
                prompt
                if isinstance(prompt, str)
                else template(self.processing_class, prompt, add_generation_prompt=True, **self.chat_template_kwargs),
            )
            for prompt in prompts
        ]
        return ids, None, {}

    def _generate_and_score_completions(self, inputs):
        """TRL's, and each answer with its rewards as a line of completions.jsonl."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self.accelerator.is_main_process:
            count = len(inputs) * self.accelerator.num_processes
            newest = [list(self._logs[name])[-count:] for name in ("prompt", "completion")]
            rewards = {name: list(values)[-count:] for name, values in self._logs["rewards"].items()}
            with open(Path(self.args.output_dir) / "completions.jsonl", "a", encoding="utf-8") as handle:
                for place, (prompt, completion) in enumerate(zip(*newest, strict=True)):
                    line = {"step": self.state.global_step + 1, "prompt": prompt, "completion": completion}
                    given = {name: values[place] for name, values in rewards.items()}
                    line["rewards"] = {name: None if math.isnan(value) else value for name, value in given.items()}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        return output


class FromEpoch(Sampler):
    """TRL's sampler draws each epoch's order from one stream: where a run goes on, those of the epochs before as well.

    `epoch`: a function that says which one begins.
    """

    def __init__(self, sampler, epoch):
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class RLOOTrainer(Online, trl.RLOOTrainer):
    pass


class GRPOTrainer(Online, trl.GRPOTrainer):
    pass


def share_out(trainer, model):
    """A frozen model as the trainer's engine holds it. Source: trl 1.16.0, trainer/grpo_trainer.py, __init__."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)
