"""Answers of a model to many prompts: in batches sorted by length, kept on disk, never sampled twice.

A folder holds the answers of one model under one setting, as lines {"prompt": key, "ids": [token, ...]}. Each process
of each run appends whole batches to a file of its own: a kill loses one batch and repeats none, and two runs at once
do not meet.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from utils import environment


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def answers_folder(above, model, sampling):
    """The folder of one model's answers under one setting; `model` says all that tells it from others."""
    described = json.dumps({"model": model, "sampling": asdict(sampling)}, sort_keys=True, indent=2, default=str)
    folder = Path(above) / hashlib.sha256(described.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if environment.is_main() and not (folder / "made_with.json").exists():
        (folder / "made_with.json").write_text(described + "\n", encoding="utf-8")
    return folder


def describe_weights(path, revision=None):
    """What tells the weights in a folder from others: each file's size and time; of a Hub id, its revision."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return [path, revision]
    return [str(Path(path).resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def prompt_key(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:32]


def read_answers(folder):
    """{key: token ids} of all that is in a folder. A last line that a kill cut short is not there."""
    found = {}
    for file in sorted(Path(folder).glob("answers-*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
            answer = json.loads(line)
            found[answer["prompt"]] = answer["ids"]
    return found


def missing_prompts(folder, prompts):
    """The prompts that have no answer yet, once each, the longest first: what does not fit fails at once."""
    known = read_answers(folder)
    wanted = {prompt_key(ids): ids for ids in prompts}
    return sorted((ids for key, ids in wanted.items() if key not in known), key=lambda ids: (-len(ids), ids))


def answer_prompts(model, tokenizer, prompts, sampling, folder, batch_size, what="answering"):
    """Samples answers to `prompts`, the lists of token ids that missing_prompts gave; each process its share."""
    from accelerate import PartialState
    from tqdm import tqdm

    state = PartialState()
    mine = prompts[state.process_index :: state.num_processes]
    file = Path(folder) / f"answers-{state.process_index}-{os.getpid()}-{time.time_ns()}.jsonl"
    bar = tqdm(total=len(mine), desc=what, unit="prompt", disable=not environment.is_main())
    with open(file, "a", encoding="utf-8") as handle:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            answers = sample(model, tokenizer, batch, sampling)
            lines = [{"prompt": prompt_key(ids), "ids": answer} for ids, answer in zip(batch, answers, strict=True)]
            handle.write("".join(json.dumps(line) + "\n" for line in lines))
            handle.flush()
            os.fsync(handle.fileno())
            bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()


def sample(model, tokenizer, prompts, sampling, seeds=None):
    """One answer to each of a few prompts, as lists of token ids; an answer ends with its end of turn, or is cut.

    `seeds`: a number a prompt; unset, one that its tokens give. The draws hang on it alone: in whatever batch and
    process an answer is sampled it is the same, up to the rounding of its logits.
    """
    import torch
    from transformers import GenerationConfig

    seeds = seeds or [seed_of(sampling.seed, ids) for ids in prompts]
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = model.generation_config.eos_token_id
    config = model.generation_config = GenerationConfig(  # what is not said here is not taken from the model either
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the last processor has chosen
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        use_cache=True,
        suppress_tokens=nameless_tokens(model, tokenizer) or None,
    )
    choice = choose_seeded(sampling, seeds, width, device) if sampling.temperature > 0 else []
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=choice)
    ends = {ends} if isinstance(ends, int) else set(ends)
    return [cut_at_end(row, ends) for row in out[:, width:].tolist()]


def seed_of(*what):
    """60 bits that name `what`."""
    return int(hashlib.sha256(json.dumps(what).encode()).hexdigest()[:15], 16)


def choose_seeded(sampling, seeds, width, device):
    """The logits processors that warp as transformers does, then draw each row's token by its own random numbers.

    One uniform number a token, and the token at which the cumulated probabilities pass it.
    """
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    numbers = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.stack([torch.rand(sampling.max_new_tokens, generator=g, dtype=torch.float64) for g in numbers])
    drawn = drawn.to(device)  # (B, max_new_tokens)

    def draw(ids, scores):
        cumulated = scores.double().softmax(-1).cumsum(-1)  # (B, vocabulary)
        drawn_at = drawn[:, ids.shape[1] - width, None] * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, drawn_at, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([*warpers, draw])


def nameless_tokens(model, tokenizer, shared=None):
    """Ids behind the tokenizer's last, rows that pad an embedding, or behind those that two models share."""
    rows, named = model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    return list(range(min(named, shared or rows), rows))


def cut_at_end(ids, ends):
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)
