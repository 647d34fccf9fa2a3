"""Rejection sampling compared with plain loops, and its memory.

    python bench/rejection.py [--parts speed scoring memory]

speed: completions per second of the command's engine "transformers" on --prompts prompts of data/prompts.jsonl with
    --completions answers each, in float32; compared with model.generate for one prompt at a time with
    num_return_sequences, and for one completion at a time.
scoring: answers per second of a reward model (SmolLM2 with a random head) in batches of 16 and one at a time, on
    random answers of 5 to 60 words.
memory: peak of a whole run with all stages and 8 answers per prompt, for both numbers of --memory_prompts, with a stub
    engine and a stub reward; Python and its libraries are included.

Needs the demo model: python -m utils.demo_model
"""

import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness
from bench.harness import MODEL, ROOT


def main():
    parser = harness.make_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=4, help="answers per prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--memory_prompts", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--parts", nargs="+", default=["speed", "scoring", "memory"])
    asked = parser.parse_args()
    result = {"model": MODEL, "dtype": "float32"}
    result |= {name: getattr(asked, name) for name in ("prompts", "completions", "new_tokens")}
    if "speed" in asked.parts:
        result["speed"] = measure("speed", measure_speed, asked.prompts, asked.completions, asked.new_tokens)
    if "scoring" in asked.parts:
        result["scoring"] = measure("scoring", measure_scoring, asked.prompts, asked.completions)
    if "memory" in asked.parts:
        few, many = (measure("memory", measure_memory, count)["megabytes"] for count in asked.memory_prompts)
        ratio = round(many / few, 3)
        result["memory"] = {"prompts": asked.memory_prompts, "megabytes": [few, many], "ratio": ratio}
    harness.finish("rejection", **result)


def measure(part, function, *args):
    found = harness.call(function, *args, CUDA_VISIBLE_DEVICES="")
    print(part, found, flush=True)
    return found


def read_prompts(count):
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


def load_engine(completions, new_tokens):
    """The command's engine, with the flags' defaults."""
    from common_args import RewardArgs
    from rlhf_args.rejection_config import RejectionConfig
    from utils.data import template
    from utils.models.load import load_tokenizer
    from utils.rejection import engines

    tokenizer = load_tokenizer(MODEL)
    template.fit_tokenizer(tokenizer, chat=True)
    common = RewardArgs(model_name_or_path=MODEL, dtype="float32")
    config = RejectionConfig(num_completions=completions, max_new_tokens=new_tokens)
    return engines.Transformers(common, config, tokenizer)


def measure_speed(count, completions, new_tokens):
    """Completions per second. The loops are slow: they answer every fourth and every eighth prompt."""
    from utils.models import sampling

    engine, prompts = load_engine(completions, new_tokens), read_prompts(count)
    engine.complete([(prompts[0], 1)] * 2)
    order = sorted(prompts, key=lambda prompt: -len(engine.tokens(prompt)))
    requests = [(p, sampling.seed_of(0, p, sample)) for p in order for sample in range(completions)]
    answers, begun = [], time.perf_counter()
    for start in range(0, len(requests), engine.batch):
        answers += engine.complete(requests[start : start + engine.batch])
    found = {"engine": len(answers) / (time.perf_counter() - begun)}
    for name, returned, step in (("prompt_at_a_time", completions, 4), ("completion_at_a_time", 1, 8)):
        some, begun = order[::step], time.perf_counter()
        for prompt in some:
            generate(engine, prompt, new_tokens, returned)
        found[name] = len(some) * returned / (time.perf_counter() - begun)
    ratios = {f"to_{name}": round(found["engine"] / found[name], 2) for name in list(found)[1:]}
    mean = sum(answer["tokens"] for answer in answers) / len(answers)
    return {name: round(value, 3) for name, value in found.items()} | ratios | {"mean_tokens": round(mean, 1)}


def generate(engine, prompt, new_tokens, returned):
    """model.generate with the engine's settings: temperature 1, no top-p, no top-k."""
    import torch

    ids = torch.tensor([engine.tokens(prompt)])
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": new_tokens}
    with torch.no_grad():
        engine.model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=returned, **settings)


def measure_scoring(count, completions):
    """Answers per second of a reward model with a random head; its scores are not used."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from utils.rewards import models

    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
        rows = [("", {"prompt": prompt, "further": {}}) for prompt in read_prompts(4)]
        reward = models.load_reward_model(folder, rows, "float32", "cpu", 16)
    words = "the answer to this is that one has to look at it with some care before anything is said".split()
    draw = random.Random(0)
    pairs = [
        (prompt, [{"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(5, 60)))}])
        for prompt in read_prompts(count)
        for _ in range(completions)
    ]
    tokens, found = [reward.tokens(*pair) for pair in pairs], {}
    for name, size in (("batched", 16), ("one_at_a_time", 1)):
        reward.batch_size = size
        found[name] = round(len(tokens) / harness.seconds_of(reward.score, tokens), 2)
    return found | {"ratio": round(found["batched"] / found["one_at_a_time"], 2)}


class StubEngine:
    """An engine without a model: each answer is different."""

    batch = 1024

    def __init__(self, common, config, tokenizer):
        pass

    def say_end(self):
        pass

    def complete(self, requests):
        return [{"completion": f"{seed} " + "word " * 60, "tokens": 60, "ended": True} for _, seed in requests]


def measure_memory(count):
    """Peak memory and seconds of rejection_sampling.py over `count` prompts."""
    import rejection_sampling
    from utils.rejection import engines

    engines.ENGINES["transformers"] = StubEngine
    with TemporaryDirectory() as folder:
        data, reward = Path(folder) / "prompts.jsonl", Path(folder) / "reward.py"
        with open(data, "w", encoding="utf-8") as handle:
            for number in range(count):
                content = f"Question {number}: " + "what is to be said of it? " * 4
                handle.write(json.dumps({"prompt": [{"role": "user", "content": content}]}) + "\n")
        reward.write_text(
            "def value(completions, **columns):\n"
            "    return [sum(answer[-1]['content'][:15].encode()) for answer in completions]\n"
        )
        flags = {"model_name_or_path": MODEL, "train_data_path": data, "reward_funcs": f"{reward}:value"}
        flags |= {"num_completions": 8, "output_dir": f"{folder}/out", "write": "SFT,DPO,KTO,Reward"}
        seconds = harness.seconds_of(rejection_sampling.main, harness.as_flags(flags))
        written = json.loads((Path(folder) / "out" / "report.json").read_text())["written"]
    if written["SFT"] != count:
        raise RuntimeError(f"{written['SFT']} SFT rows of {count} prompts")
    return {"prompts": count, "megabytes": round(harness.peak_bytes() / 2**20), "seconds": round(seconds)}


if __name__ == "__main__":
    main()
