"""TRL's RLOO and GRPO trainers with the project's reference model, prompts, rewards and records of what was said."""

import json
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import trl
from torch.utils.data import Sampler
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from utils.data.template import template, tokenize
from utils.rewards.functions import RewardFailed, ticking
from utils.rewards.judge_reward import JudgeReward


class SamplesAnswers:
    """Mixin before a TRL trainer whose policy answers prompts itself.

    For the progress bar: `generating` is called with the tokens sampled so far of a rollout, `scoring` once a second
    with the reward that is computed and the seconds it took so far (None: it is done).
    """

    generating = staticmethod(lambda tokens, limit: None)
    scoring = staticmethod(lambda name, seconds: None)
    stop_strings = None  # transformers' criterion for the stop strings of --generation_kwargs

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        strings = (self.args.generation_kwargs or {}).get("stop_strings")
        if strings and not self.args.use_vllm:
            self.stop_strings = StopStringCriteria(self.processing_class, strings)
            self.generation_config.stop_strings = None  # generate() would ask for a tokenizer, which TRL does not pass

    def policy(self):
        """The causal language model inside whatever wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def rehearsed(self, prompt, completion):
        """A pass of a rollout without data, of so many tokens, for utils/plan/rehearsal.py."""
        rows = self.args.per_device_train_batch_size
        prompts, answers = (torch.ones(rows, width, dtype=torch.int64) for width in (prompt, completion))
        given = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": answers, "completion_mask": answers}
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            given[name] = torch.zeros(rows, completion)
        for name in ("old_logps", "ref_logps", "advantages"):
            given[name] = torch.zeros(rows)
        return given | {"num_items_in_batch": torch.ones(())}

    def _generate_single_turn(self, *args, **kwargs):
        """TRL's, by the run's own sampling settings alone; a forward hook reports how far the rollout is."""
        sampled = [0]

        def count(model, inputs, outputs):
            sampled[0] += 1
            self.generating(sampled[0], self.max_completion_length)

        policy = self.policy()
        hook = policy.register_forward_hook(count)
        try:
            with own_settings_unused(policy):
                if self.stop_strings is None:
                    return super()._generate_single_turn(*args, **kwargs)
                with stopping_at(self.stop_strings, policy) as stops:
                    found = super()._generate_single_turn(*args, **kwargs)
            answers, *rest = found if isinstance(found, tuple) else (found,)  # GRPO's has log-probabilities, of vLLM
            # generate() pads behind a stop string, and TRL takes that padding for sampled tokens
            answers = [ids[:length] for ids, length in zip(answers, stops.lengths, strict=True)]
            return (answers, *rest) if rest else answers
        finally:
            hook.remove()
            self.generating(self.max_completion_length, self.max_completion_length)

    def _generate(self, prompts):
        """TRL's; an answer that a stop string ended does not count as cut."""
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

    def has_ended(self, ids):
        """True if an answer (its token ids) ended by itself: with an end token, or with a stop string."""
        if ids and ids[-1] in self.eos_token_ids:
            return True
        if self.stop_strings is None or not ids:
            return False
        return bool(self.stop_strings(torch.tensor([ids], device=self.accelerator.device), None))


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
        self.judged = [place for place, reward in enumerate(judges) if isinstance(reward, JudgeReward)]
        self.judge = judges[self.judged[0]].judge if self.judged else None
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
            disable_dropout(model)
        add_fused_lm_head(
            model,
            temperature=self.temperature,
            cast_lm_head_to_fp32=getattr(self.args, "cast_lm_head_to_fp32", False),
        )
        return share_out(self, model)

    def _get_train_sampler(self, dataset=None):
        return FromEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's (all processes' answers, functions), all nan for an answer without the judge's verdict.

        TRL leaves such a row out of the baseline and gives it the advantage 0. Raises RewardFailed where all functions
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

    def missing_eos(self, completion_ids, **kwargs):
        """A reward function of its own, so that the log shows it: missing_eos_penalty for each answer that was cut."""
        return [0.0 if self.has_ended(ids) else -self.args.missing_eos_penalty for ids in completion_ids]

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
        if self.judge and not self.judge.takes_part():
            for name in self.judge.judge.weights:  # a mean of no numbers
                for kind in ("mean", "std"):
                    self._metrics["eval"].pop(f"rewards/{name}/{kind}", None)
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


class Lengths(StoppingCriteria):
    """`criterion`, keeping in `lengths` the tokens (prompt excluded) at which it first ended each answer."""

    def __init__(self, criterion):
        self.criterion, self.lengths, self.sampled = criterion, None, 0

    def __call__(self, input_ids, scores, **kwargs):
        found = self.criterion(input_ids, scores, **kwargs)
        self.sampled += 1
        self.lengths = self.lengths or [None] * len(found)
        self.lengths = [
            self.sampled if length is None and stops else length
            for length, stops in zip(self.lengths, found.tolist(), strict=True)
        ]
        return found


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


def disable_dropout(model):
    """Sets every dropout to 0, also the rates that attention layers hand to a function, which TRL's helper leaves."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def own_settings_unused(model):
    """Hides the model's generation_config: generate() takes from it each setting that the run leaves unset."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def stopping_at(criterion, model):
    """Makes model.generate() stop at `criterion` as well; yields the Lengths of its answers."""
    generate, stops = model.generate, Lengths(criterion)
    model.generate = partial(generate, stopping_criteria=StoppingCriteriaList([stops]))
    try:
        yield stops
    finally:
        del model.generate
