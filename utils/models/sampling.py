"""Answers of a model to many prompts: sampled in batches sorted by length, once, and stored on disk.

A folder holds the answers of one model with one Sampling, as lines {"prompt": key, "ids": [token, ...]}. Each process
of each run appends whole batches to its own file: a kill loses at most one batch, and concurrent runs do not conflict.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.models.folders import ModelFolder
from utils.runtime import environment
from utils.runtime.errors import guess_name

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from common_args import CommonArgs

# Sampling flags of a trainer: flag -> its neutral value.
SETTINGS = {"temperature": None, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
# Keys of --generation_kwargs that have a flag, which the rest of the run reads.
FLAGS = dict.fromkeys(SETTINGS) | {"max_new_tokens": "max_completion_length", "max_length": "max_completion_length"}
FLAGS |= {"cache_implementation": None}
# Keys that a rollout (one sampled answer to each prompt, as token ids) excludes.
OTHERWISE = (
    "do_sample", "num_beams", "num_return_sequences", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "eos_token_id", "penalty_alpha", "dola_layers", "num_beam_groups", "constraints", "force_words_ids",
)  # fmt: skip
# Entries of generation_config.json that are not sampling settings, or are kept: end, pad and begin tokens.
NO_SETTINGS = ("do_sample", "use_cache", "max_length", "max_new_tokens", "transformers_version", "pad_token_id",
               "bos_token_id", "eos_token_id")  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; temperature 0: greedy decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def check_settings(config: "TrainingArguments") -> Iterator[str]:
    """Problems of the flags for sampling from the trained model."""
    given = config.generation_kwargs or {}
    if not isinstance(given, dict):
        yield f'--generation_kwargs {given}: not a JSON object. Type it as \'{{"stop_strings": ["###"]}}\''
        return
    if given and not config.use_vllm:  # vLLM's SamplingParams refuses unknown keys
        problems = [*check_generation_kwargs(given)]
        yield from problems or try_generation_kwargs(given)


def check_generation_kwargs(given: dict) -> Iterator[str]:
    from transformers import GenerationConfig

    known = [key for key in vars(GenerationConfig()) if not key.startswith("_") and key not in (*FLAGS, *OTHERWISE)]
    for key in given:
        if key in FLAGS:
            yield f"--generation_kwargs: {key} has its own flag. Type --{FLAGS[key] or key} {given[key]}"
        elif key in OTHERWISE:
            yield f"--generation_kwargs: {key} does not apply to rollouts (one sampled answer per prompt). Remove it"
        elif key not in known:
            guess = guess_name(key, [*known, *FLAGS]) or ". GenerationConfig of transformers lists them"
            yield f"--generation_kwargs: no setting {key}{guess}"
    strings = given.get("stop_strings", "-")
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, list) or not strings or not all(isinstance(one, str) and one for one in strings):
        yield f"--generation_kwargs: stop_strings {json.dumps(given['stop_strings'])}: a list of strings, none empty"


def try_generation_kwargs(given: dict) -> Iterator[str]:
    """The problem of values that generate() refuses, found with a model of hidden size 2."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=2**18, n_positions=512, n_embd=2, n_layer=1, n_head=1))
        settings = given | {"do_sample": True, "max_new_tokens": 2, "stop_strings": None, "pad_token_id": 0}
        try:
            model.generate(torch.ones(2, 2, dtype=torch.int64), **settings)
        except Exception as error:
            why = " ".join(str(error).split())
            yield f"--generation_kwargs {json.dumps(given)}: generate() does not take it ({why})"


def describe_settings(config: "TrainingArguments", own: dict) -> str:
    """The policy's sampling settings, in one line. own: its generation_config.json."""
    used = {name: getattr(config, name) for name in SETTINGS if getattr(config, name) != SETTINGS[name]}
    used |= config.generation_kwargs or {}
    unused = {
        key: value
        for key, value in own.items()
        if not key.startswith(("_", "output_")) and key not in NO_SETTINGS and value not in (None, used.get(key))
    }
    return show_settings(used) + (f"; not by the model's own {show_settings(unused)}" if unused else "")


def show_settings(settings: dict) -> str:
    shown = {key: f"{v:g}" if type(v) is float else json.dumps(v, ensure_ascii=False) for key, v in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def answers_folder(above: str | Path, model: object, sampling: Sampling) -> Path:
    """The folder for the answers of one model with one Sampling. model: identifies it, as JSON."""
    described = json.dumps({"model": model, "sampling": asdict(sampling)}, sort_keys=True, indent=2, default=str)
    folder = Path(above) / hashlib.sha256(described.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if environment.is_main() and not (folder / "made_with.json").exists():
        (folder / "made_with.json").write_text(described + "\n", encoding="utf-8")
    return folder


def identify_weights(path: str, revision: str | None = None) -> list:
    """Identifies weights: the size and time of each file; for a Hub id, the revision."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return [path, revision]
    return [str(Path(path).resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def prompt_key(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:32]


def read_answers(folder: str | Path) -> dict[str, list[int]]:
    """{key: token ids} of all answers in a folder, without a last line that a kill truncated."""
    found = {}
    for file in sorted(Path(folder).glob("answers-*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
            answer = json.loads(line)
            found[answer["prompt"]] = answer["ids"]
    return found


def missing_prompts(folder: str | Path, prompts: list[list[int]]) -> list[list[int]]:
    """Distinct prompts without an answer, longest first, so that memory runs out at the start or never."""
    known = read_answers(folder)
    wanted = {prompt_key(ids): ids for ids in prompts}
    return sorted((ids for key, ids in wanted.items() if key not in known), key=lambda ids: (-len(ids), ids))


def answer_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    sampling: Sampling,
    folder: str | Path,
    batch_size: int,
    what: str = "answering",
) -> None:
    """Sample answers to `prompts` (from missing_prompts); each process takes its share."""
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


def sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int] | None = None,
) -> list[list[int]]:
    """One answer to each prompt, as token ids; an answer ends with its end of turn, or is truncated.

    seeds: one per prompt (None: derived from its tokens). The random numbers depend on it alone, so an answer is the
    same in any batch and process, up to rounding of the logits.
    """
    import torch
    from transformers import GenerationConfig

    seeds = seeds or [seed_of(sampling.seed, ids) for ids in prompts]
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = model.generation_config.eos_token_id
    config = model.generation_config = GenerationConfig(  # the model's own settings are not used
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the last processor chooses
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


def seed_of(*what: object) -> int:
    """A seed of 60 bits, derived from `what`."""
    return int(hashlib.sha256(json.dumps(what).encode()).hexdigest()[:15], 16)


def choose_seeded(sampling: Sampling, seeds: list[int], width: int, device: "torch.device") -> "LogitsProcessorList":
    """Logits processors: transformers' warpers, then a draw of each row's token with the row's own random numbers.

    A token is drawn with one uniform number: the first token whose cumulative probability exceeds it.
    """
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    numbers = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.stack([torch.rand(sampling.max_new_tokens, generator=g, dtype=torch.float64) for g in numbers])
    drawn = drawn.to(device)  # (B, max_new_tokens)

    def draw(ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        cumulated = scores.double().softmax(-1).cumsum(-1)  # (B, vocabulary)
        drawn_at = drawn[:, ids.shape[1] - width, None] * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, drawn_at, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([*warpers, draw])


def nameless_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", shared: int | None = None
) -> list[int]:
    """Token ids without a token: embedding rows added as padding, or beyond the vocabulary both models share."""
    rows, named = model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    return list(range(min(named, shared or rows), rows))


def cut_at_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def describe_sampling(common: "CommonArgs", config: "TrainingArguments") -> str:
    own = ModelFolder.at(common.model_name_or_path, common.model_revision).generation_config
    return f"sampling  {describe_settings(config, own)}"
