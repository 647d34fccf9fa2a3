"""Rejection sampling against plain loops, and its memory: python bench/rejection.py

    speed     --prompts prompts of data/prompts.jsonl, --completions answers each, --new_tokens at most, float32, all
              cores, one model: completions a second of the engine "transformers" as the command uses it, against
              model.generate for one prompt at a time with num_return_sequences, and for one completion at a time
    scoring   a reward model (the demo model with a made-up head) on made-up answers of 5 to 60 words: answers a
              second in batches of 16, against one at a time
    memory    the peak of a whole run, all stages, with an engine and a reward that cost nothing, over 1,000 prompts,
              8 answers each, and over 100,000; what Python and its libraries take is in both

Prints a line a measurement and, last, one JSON object with the ratios. Needs python -m utils.demo_model.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = "models/SmolLM2-135M-Instruct"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--memory_prompts", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--parts", nargs="+", default=["speed", "scoring", "memory"])
    parser.add_argument("--part", help="(internal) one measurement")
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(globals()[f"measure_{asked.part}"](asked)))
        return
    result = {"bench": "rejection", "model": MODEL, "dtype": "float32", "prompts": asked.prompts}
    result |= {"completions": asked.completions, "new_tokens": asked.new_tokens}
    for part in asked.parts:
        if part == "memory":
            peaks = [run(f"memory_{size}") for size in ("few", "many")]
            few, many = (peak["megabytes"] for peak in peaks)
            result[part] = {"prompts": asked.memory_prompts, "megabytes": [few, many], "ratio": round(many / few, 3)}
        else:
            result[part] = run(part)
    print(json.dumps(result))


def run(part):
    command = [sys.executable, "bench/rejection.py", *sys.argv[1:], "--part", part]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{part}: status {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(part, found, flush=True)
    return found


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(asked):
    """What the command's flags would give."""
    from common_args import RewardArgs
    from rlhf_args.rejection_config import RejectionConfig

    common = RewardArgs(model_name_or_path=MODEL, dtype="float32")
    return common, RejectionConfig(num_completions=asked.completions, max_new_tokens=asked.new_tokens)


def load(common, config):
    from utils.data import template
    from utils.models.load import load_tokenizer
    from utils.rejection import engines

    tokenizer = load_tokenizer(MODEL)
    template.fit_tokenizer(tokenizer, chat=True)
    return engines.Transformers(common, config, tokenizer)


def prompts_of(count):
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


def measure_speed(asked):
    """Completions a second. The loops answer every fourth prompt of the engine's, as they take so long."""
    from utils.models import sampling

    engine = load(*settings(asked))
    prompts = prompts_of(asked.prompts)
    engine.complete([(prompts[0], 1)] * 2)
    order = sorted(prompts, key=lambda prompt: -len(engine.tokens(prompt)))
    requests = [(p, sampling.seed_of(0, p, sample)) for p in order for sample in range(asked.completions)]
    answers, begun = [], time.perf_counter()
    for start in range(0, len(requests), engine.batch):
        answers += engine.complete(requests[start : start + engine.batch])
    found = {"engine": len(answers) / (time.perf_counter() - begun)}
    for name, returned in (("prompt_at_a_time", asked.completions), ("completion_at_a_time", 1)):
        some = order[:: 4 if returned > 1 else 8]
        begun = time.perf_counter()
        for prompt in some:
            loop(engine, prompt, asked.new_tokens, returned)
        found[name] = len(some) * returned / (time.perf_counter() - begun)
    ratios = {f"to_{name}": round(found["engine"] / found[name], 2) for name in list(found)[1:]}
    lengths = {"mean_tokens": round(sum(answer["tokens"] for answer in answers) / len(answers), 1)}
    return {**{name: round(value, 3) for name, value in found.items()}, **ratios, **lengths}


def loop(engine, prompt, new_tokens, returned):
    """The plain way, with the settings of the engine: temperature 1, no top-p, no top-k."""
    import torch

    ids = torch.tensor([engine.tokens(prompt)])
    with torch.no_grad():
        return engine.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=new_tokens,
            num_return_sequences=returned,
        )


def measure_scoring(asked):
    """Answers a second of one reward model, whose head is random: what it says is not looked at."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from utils.rewards import models

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
        rows = [("", {"prompt": prompt, "further": {}}) for prompt in prompts_of(4)]
        reward = models.load_reward_model(folder, rows, "float32", "cpu", 16)
    words = "the answer to this is that one has to look at it with some care before anything is said".split()
    draw = random.Random(0)
    pairs = [
        (prompt, [{"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(5, 60)))}])
        for prompt in prompts_of(asked.prompts)
        for _ in range(asked.completions)
    ]
    tokens = [reward.tokens(*pair) for pair in pairs]
    found = {}
    for name, size in (("batched", 16), ("one_at_a_time", 1)):
        reward.batch_size = size
        begun = time.perf_counter()
        reward.score(tokens)
        found[name] = len(tokens) / (time.perf_counter() - begun)
    return {**{n: round(v, 2) for n, v in found.items()}, "ratio": round(found["batched"] / found["one_at_a_time"], 2)}


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stub:
    """An engine that costs nothing: answers of some sentences, of which no two are the same."""

    batch = 1024

    def __init__(self, common, config, tokenizer):
        pass

    def say_end(self):
        pass

    def complete(self, requests):
        return [{"completion": f"{seed} " + "word " * 60, "tokens": 60, "ended": True} for _, seed in requests]


def measure_memory_few(asked):
    return measure_memory(asked.memory_prompts[0])


def measure_memory_many(asked):
    return measure_memory(asked.memory_prompts[1])


def measure_memory(count):
    """The peak of the process over all stages through the real entry, and its seconds."""
    import rejection_sampling
    from utils.rejection import engines

    engines.ENGINES["transformers"] = Stub
    with tempfile.TemporaryDirectory() as folder:
        data, reward = Path(folder) / "prompts.jsonl", Path(folder) / "reward.py"
        with open(data, "w", encoding="utf-8") as handle:
            for number in range(count):
                content = f"Question {number}: " + "what is to be said of it? " * 4
                handle.write(json.dumps({"prompt": [{"role": "user", "content": content}]}) + "\n")
        reward.write_text(
            "def value(completions, **columns):\n"
            "    return [sum(answer[-1]['content'][:15].encode()) for answer in completions]\n"
        )
        flags = f"--model_name_or_path {MODEL} --train_data_path {data} --reward_funcs {reward}:value "
        flags += f"--num_completions 8 --output_dir {folder}/out --write SFT,DPO,KTO,Reward"
        begun = time.perf_counter()
        status = rejection_sampling.main(flags.split())
        rows = json.loads((Path(folder) / "out" / "report.json").read_text())["written"]
    assert status == 0 and rows["SFT"] == count, rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"prompts": count, "megabytes": round(peak), "seconds": round(time.perf_counter() - begun)}


if __name__ == "__main__":
    main()
