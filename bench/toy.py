"""A task that a small policy learns within a minute: answer with the letter that the prompt asks for.

A policy of 0.3M parameters that was taught to say random letters, prompts "c17:", answers of up to 16 tokens; the
reward is the share of an answer's tokens that are the letter: 0.04 at the start, 1 at best.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LETTERS, TOKENS = "abcd", 16
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789:?"


def letter(prompt):
    return prompt[0]


def share(prompts, completions, completion_ids, **columns):
    """The reward of the first task: tokens that are the letter, of all that were sampled."""
    return [c.count(letter(p)) / len(ids) for p, c, ids in zip(prompts, completions, completion_ids, strict=True)]


def zigzag(completions, **columns):
    """The reward of the second task: 0.12 for each change between vowel and consonant; a longer answer has more."""
    return [0.12 * sum(vowel(a) != vowel(b) for a, b in zip(c, c[1:], strict=False)) for c in completions]


# An offset or a scale on every reward must change nothing.
def zigzag_plus_5(**columns):
    return [reward + 5 for reward in zigzag(**columns)]


def zigzag_minus_5(**columns):
    return [reward - 5 for reward in zigzag(**columns)]


def zigzag_times_10(**columns):
    return [10 * reward for reward in zigzag(**columns)]


def vowel(letter):
    return letter in "aeiou"


def make_prompts(numbers):
    """Every letter with every number; held-out prompts have numbers that training has not."""
    return [f"{letter}{number:02}:" for number in numbers for letter in LETTERS]


def make_toy(folder, seed=0, spread=0.02):
    """The policy with its tokenizer in folder/policy, folder/prompts.jsonl and folder/held_out.jsonl.

    spread: standard deviation of the initial weights. An adapter cannot change the embedding, which is the head too:
    with 0.02 its largest logits are near 3, so that an adapter can never be sure of a letter. Give 0.1 for adapters.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    names = ["<pad>", "<end>", "<bos>", *ALPHABET]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(names),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    folder = Path(folder)
    model = Qwen2ForCausalLM(config)
    teach_letters(model, tokenizer)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for name, numbers in (("prompts", range(96)), ("held_out", range(96, 100))):
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in make_prompts(numbers)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def teach_letters(model, tokenizer, steps=150):
    """Some seconds of supervised training on a prompt and 8 to 24 random letters: it never says <pad>, and it ends."""
    import torch

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        answers = ["".join(rng.choices(ALPHABET[:26], k=rng.randint(8, 24))) for _ in range(32)]
        prompts = make_prompts(rng.sample(range(100), 32 // len(LETTERS)))
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# The same budget for all: rollouts of 128 answers, 4 passes of 4 mini-batches over each, one process, one thread.
ROLLOUT, MICRO, PASSES, MINI_BATCHES, BETA, RATE = 128, 32, 4, 4, 0.003, 1e-3


def run_ours(method, toy, out, rollouts, seed, *flags, rate=RATE, reward="share", beta=BETA):
    """Trains through train_rlhf.py: {"rewards": one a rollout, "episodes_per_second", "reward_minus_kl"}."""
    answers = [] if method == "PPO" else ["--num_generations", "8"]
    words = ["--rlhf_type", method, "--train_mode", "full", "--model_name_or_path", toy / "policy"]
    words += ["--train_data_path", toy / "prompts.jsonl", "--reward_funcs", f"{ROOT}/bench/toy.py:{reward}"]
    words += ["--output_dir", out, "--overwrite_output_dir", "--logging_steps", 1, "--save_strategy", "no"]
    words += ["--max_completion_length", TOKENS, "--beta", beta, "--learning_rate", rate]
    words += ["--eval_data_path", toy / "held_out.jsonl", "--num_generations_eval", 8]
    words += ["--per_device_eval_batch_size", 128]
    words += ["--per_device_train_batch_size", MICRO, "--num_mini_batches", MINI_BATCHES, "--num_iterations", PASSES]
    words += ["--total_episodes", rollouts * ROLLOUT, "--seed", seed, "--dtype", "float32", *answers, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [PYTHON, "train_rlhf.py", *map(str, words)], cwd=ROOT, env=env, text=True, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    sampled = [line for line in lines if "reward" in line]
    card = json.loads((Path(out) / "run_card.json").read_text())
    last = sampled[-3:]
    held = card["held_out"]
    per_answer = [line["reward"] - beta * line["kl"] * line["completions/mean_length"] for line in last]
    explained = [line["explained_variance"] for line in sampled if "explained_variance" in line]
    return {
        "rewards": [line["reward"] for line in sampled],
        "explained_variance": explained or None,
        "reward": sum(line["reward"] for line in last) / len(last),
        "reward_minus_kl": sum(per_answer) / len(last),
        "held_out": [held["before"]["reward"], held["after"]["reward"]],
        "episodes_per_second": rollouts * ROLLOUT / card["throughput"]["train_seconds"],
    }


if __name__ == "__main__":  # python -m bench.toy PPO zigzag 0.05 32 0 [FLAGS]: one run, to try a setting
    method, task, beta, rollouts, seed, *flags = sys.argv[1:]
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        toy, out = make_toy(Path(folder) / "toy"), Path(folder) / "out"
        found = run_ours(method, toy, out, int(rollouts), int(seed), *flags, reward=task, beta=float(beta))
    print(" ".join(f"{reward:.2f}" for reward in found.pop("rewards")), found, f"{time.time() - begun:.0f} s")
