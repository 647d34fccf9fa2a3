"""Toy tasks that a small policy learns within a minute, for example to answer with the letter in the prompt.

    python bench/toy.py PPO zigzag 0.05 32 0 [FLAGS]      # method, reward, beta, rollouts, seed: one run

A policy of 0.3M parameters, trained to say random letters; prompts "c17:", answers of up to 16 tokens. The reward
`share` is the share of an answer's tokens that are the prompt's letter: 0.04 at the start, 1 at best.
"""

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness
from bench.harness import ROOT

ONE_THREAD = harness.CPU | {"OMP_NUM_THREADS": "1"}
LETTERS, TOKENS = "abcd", 16
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789:?"


def letter(prompt):
    return prompt[0]


def share(prompts, completions, completion_ids, **columns):
    """Tokens that are the prompt's letter / sampled tokens."""
    return [c.count(letter(p)) / len(ids) for p, c, ids in zip(prompts, completions, completion_ids, strict=True)]


def zigzag(completions, **columns):
    """0.12 for each change between vowel and consonant, so a longer answer can get more."""
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
    """Every letter with every number. Held-out prompts have other numbers than the training prompts."""
    return [f"{letter}{number:02}:" for number in numbers for letter in LETTERS]


def make_toy(folder, seed=0, spread=0.02):
    """Writes folder/policy (with its tokenizer), folder/prompts.jsonl and folder/held_out.jsonl.

    spread: standard deviation of the initial weights. An adapter cannot change the embedding, which is also the head:
    with 0.02 the largest logits are near 3, so an adapter can never be sure of a letter. Use 0.1 for adapters.
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
    """Short supervised training on 8 to 24 random letters per prompt: no answer has <pad>, and answers end."""
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


# The same budget for every method: rollouts of 128 answers, 4 passes of 4 mini-batches, one process, one thread.
ROLLOUT, MICRO, PASSES, MINI_BATCHES, BETA, RATE = 128, 32, 4, 4, 0.003, 1e-3


def run_ours(method, toy, out, rollouts, seed, *flags, rate=RATE, reward="share", beta=BETA):
    """Numbers of one training with train_rlhf.py. "rewards": one per rollout; "reward": mean of the last three."""
    words = {"rlhf_type": method, "train_mode": "full", "model_name_or_path": toy / "policy", "dtype": "float32"}
    words |= {"train_data_path": toy / "prompts.jsonl", "reward_funcs": f"{ROOT}/bench/toy.py:{reward}"}
    words |= {"eval_data_path": toy / "held_out.jsonl", "num_generations_eval": 8, "per_device_eval_batch_size": 128}
    words |= {"max_completion_length": TOKENS, "beta": beta, "learning_rate": rate, "seed": seed, "output_dir": out}
    words |= {"per_device_train_batch_size": MICRO, "num_mini_batches": MINI_BATCHES, "num_iterations": PASSES}
    words |= {"total_episodes": rollouts * ROLLOUT, "logging_steps": 1, "save_strategy": "no"}
    words |= {} if method == "PPO" else {"num_generations": 8}
    command = [sys.executable, "train_rlhf.py", "--overwrite_output_dir", *harness.as_flags(words), *flags]
    harness.run(command, **ONE_THREAD)
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    sampled = [line for line in lines if "reward" in line]
    card = json.loads((Path(out) / "run_card.json").read_text())
    last, held = sampled[-3:], card["held_out"]
    per_answer = [line["reward"] - beta * line["kl"] * line["completions/mean_length"] for line in last]
    return {
        "rewards": [line["reward"] for line in sampled],
        "explained_variance": [line["explained_variance"] for line in sampled if "explained_variance" in line],
        "reward": sum(line["reward"] for line in last) / len(last),
        "reward_minus_kl": sum(per_answer) / len(last),
        "held_out": [held["before"]["reward"], held["after"]["reward"]],
        "episodes_per_second": rollouts * ROLLOUT / card["throughput"]["train_seconds"],
    }


def main(method, task, beta, rollouts, seed, *flags):
    with TemporaryDirectory() as folder:
        toy, out = make_toy(Path(folder) / "toy"), Path(folder) / "out"
        found = run_ours(method, toy, out, int(rollouts), int(seed), *flags, reward=task, beta=float(beta))
    print(" ".join(f"{reward:.2f}" for reward in found["rewards"]))
    harness.finish("toy", method=method, task=task, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
