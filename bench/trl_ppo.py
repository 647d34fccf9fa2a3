"""One run of TRL 1.12's PPOTrainer on the toy; bench/ppo.py starts it with TRL 1.12 first on PYTHONPATH.

    python bench/trl_ppo.py TOY OUT ROLLOUTS SEED REWARD BETA

Prints one JSON line. REWARD is a function of bench/toy.py, wrapped as the reward model that TRL 1.12 needs. Policy and
critic are two whole models; the critic starts from the policy.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after TRL 1.12

import torch
import trl
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench import harness, toy as tasks
from bench.toy import MINI_BATCHES, PASSES, RATE, ROLLOUT, TOKENS

PROMPT = len("c17:")


class Rule(nn.Module):
    """A reward function of bench/toy.py as a reward model of TRL 1.12: its head is the identity."""

    base_model_prefix = "trunk"

    def __init__(self, tokenizer, reward):
        super().__init__()
        self.tokenizer, self.reward = tokenizer, reward
        self.trunk, self.score = self.read, nn.Identity()

    def read(self, input_ids, attention_mask, **kwargs):
        """The reward as the "hidden state" of every token, (B, T, 1). An answer ends before its first pad."""
        rows = [row[row != self.tokenizer.pad_token_id] for row in input_ids]
        prompts = [self.tokenizer.decode(row[:PROMPT]) for row in rows]
        answers = [self.tokenizer.decode(row[PROMPT:], skip_special_tokens=True) for row in rows]
        rewards = self.reward(prompts=prompts, completions=answers, completion_ids=[row[PROMPT:] for row in rows])
        states = torch.tensor(rewards, device=input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[states])


def main(toy, out, rollouts, seed, reward, beta):
    assert trl.__version__.startswith("1.12."), trl.__version__
    path, rollouts = Path(toy) / "policy", int(rollouts)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in open(Path(toy) / "prompts.jsonl")]
    rows = Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts])
    load = {"dtype": torch.float32}
    torch.manual_seed(int(seed))
    value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **load)
    value.config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        output_dir=out,
        per_device_train_batch_size=ROLLOUT,  # its mini-batches are taken out of this
        gradient_accumulation_steps=1,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=PASSES,
        local_rollout_forward_batch_size=ROLLOUT,
        total_episodes=rollouts * ROLLOUT,
        response_length=TOKENS,
        stop_token="eos",
        temperature=1.0,
        kl_coef=float(beta),
        learning_rate=RATE,
        lr_scheduler_type="linear",
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=int(seed),
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(path, **load),
        ref_model=AutoModelForCausalLM.from_pretrained(path, **load),
        reward_model=Rule(tokenizer, getattr(tasks, reward)),
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    seconds = harness.seconds_of(trainer.train)
    lines = [line for line in trainer.state.log_history if "objective/scores" in line]
    last = lines[-3:]
    found = {
        "rewards": [line["objective/scores"] for line in lines],
        "reward": sum(line["objective/scores"] for line in last) / len(last),
        "reward_minus_kl": sum(line["objective/rlhf_reward"] for line in last) / len(last),
        "episodes_per_second": rollouts * ROLLOUT / seconds,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
