"""The stages of a rejection sampling: each does what is missing in the folder, and says what came of it."""

import contextlib
import gc
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy

from rlhf_args.methods import METHODS, PROMPT, REJECTION, find_method
from utils import (
    best_of_n,
    checks,
    data,
    engines,
    environment,
    files,
    judge,
    models,
    pool,
    rewards,
    sampling,
    scoring,
    selection,
    summary,
)

STAGES = ("generate", "score", "select")
TRAINING = ("train_mode", "use_dora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def needs_model(config):
    """Whether the model's folder is read: to sample from it, or to train it."""
    return "generate" in config.stages and config.engine != "openai" or bool(config.then)


def check_flags(common, config, words):
    """Problems of the flags of rejection sampling, all of them."""
    problems = [*check_generation(common, config)] if "generate" in config.stages else []
    problems += check_scorers(common, config) if "score" in config.stages else []
    problems += check_selection(config)
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        problems.append(f"--stages {','.join(config.stages)}: takes {', '.join(STAGES)}, some or all")
    if not 0 <= config.max_failed_fraction <= 1:
        problems.append(f"--max_failed_fraction {config.max_failed_fraction:g}: a share from 0 to 1")
    if "generate" in config.stages:
        problems += check_data(common, config)
    if environment.engine():
        problems.append(f"LAUNCH={environment.engine()}: each process samples with a whole model. Type LAUNCH=auto")
    if config.then:
        problems += check_then(config)
    else:
        given = [name for name in TRAINING if f"--{name}" in words]
        problems += [f"--{name}: nothing is trained without --then. Leave it out" for name in given]
        if config.rounds != 1:
            problems.append(f"--rounds {config.rounds}: a round ends with a training. Add --then DPO (or another)")
    return problems


def check_data(common, config):
    if not common.train_data_path and not needs_model(config):
        yield f"--train_data_path: missing. Type --train_data_path {REJECTION.sample_data} to try"
    for flag, paths in (("--train_data_path", common.train_data_path), ("--eval_data_path", common.eval_data_path)):
        try:
            files.find_files(paths or (), flag)
        except checks.Refused as refusal:
            yield from refusal.problems
    if common.eval_data_path and not config.then:
        yield "--eval_data_path: measures what --then trains. Leave it out, or add --then"


def check_generation(common, config):
    if config.num_completions < 1:
        yield f"--num_completions {config.num_completions}: 1 or more"
    if config.max_new_tokens < 1:
        yield f"--max_new_tokens {config.max_new_tokens}: 1 or more"
    if not config.temperature >= 0:
        yield f"--temperature {config.temperature:g}: 0 (the likeliest token) or more"
    elif config.temperature == 0 and config.num_completions > 1:
        yield (
            f"--temperature 0 with --num_completions {config.num_completions}: the same answer so many times. Type "
            "--temperature 1, or --num_completions 1"
        )
    if not 0 < config.top_p <= 1:
        yield f"--top_p {config.top_p:g}: above 0, up to 1"
    if config.top_k < 0:
        yield f"--top_k {config.top_k}: 0 (all tokens) or more"
    if config.generate_batch_size is not None and config.generate_batch_size < 1:
        yield f"--generate_batch_size {config.generate_batch_size}: 1 or more"
    if config.engine == "openai":
        if not config.api_base_url:
            yield "--engine openai: no server. Type --api_base_url http://localhost:8000/v1"
        if not config.api_model:
            yield "--engine openai: which of the server's models? Type --api_model NAME"
        if config.top_k:
            yield "--top_k with --engine openai: its API has no such field. Leave it out; --top_p it has"
        yield from check_server(config, config.api_key_variable)
    else:
        for name in ("api_base_url", "api_model"):
            if getattr(config, name) and not (name == "api_base_url" and config.judge_model):
                yield f"--{name}: is for --engine openai, and this is {config.engine}. Add --engine openai"
    if config.engine == "vllm":
        yield from (problem.replace("--use_vllm", "--engine vllm") for problem in checks.check_vllm())
        if environment.processes_asked() > 1:
            yield "--engine vllm with several processes: one engine is one process here. Type NUM_PROCESSES=1"
        path = common.model_name_or_path
        if path and models.read_adapter(path):
            yield f"--engine vllm: {path} is an adapter. Type python -m utils.merge_lora {path} MERGED, and give that"
        if config.then and common.train_mode != "full":
            yield f"--engine vllm with --then and --train_mode {common.train_mode}: it takes no adapter. Type full"


def check_server(config, variable):
    if not os.environ.get(variable):
        yield f"{variable} is not set: the server's key. Type export {variable}=...; a local server takes any word"
    if config.api_concurrency < 1:
        yield f"--api_concurrency {config.api_concurrency}: 1 or more"
    if not config.api_timeout > 0:
        yield f"--api_timeout {config.api_timeout:g}: seconds, above 0"
    if config.api_retries < 0:
        yield f"--api_retries {config.api_retries}: 0 or more"


def check_scorers(common, config):
    names = scoring.name_scorers(common, config)
    if not names:
        yield (
            f"no scorer: what is a good answer? Type --reward_funcs {REJECTION.sample_reward} to try, "
            "--reward_model_path FOLDER or --judge_model NAME"
        )
    elif common.reward_funcs or common.reward_model_path:
        yield from checks.check_rewards(common, "Rejection sampling", REJECTION)
    if config.judge_model and config.judge_model in names[:-1]:
        yield f"two rewards are called {config.judge_model}. Rename one"
    if config.reward_weights and len(config.reward_weights) != len(names):
        yield f"--reward_weights: {len(config.reward_weights)} of them for {len(names)} rewards. Give each its weight"
    if not all(abs(weight) < float("inf") for weight in config.reward_weights or ()):
        yield f"--reward_weights {' '.join(map(str, config.reward_weights))}: finite numbers"
    if config.score_batch_size < 1:
        yield f"--score_batch_size {config.score_batch_size}: 1 or more"
    if not config.judge_model:
        for name in ("judge_template", "judge_base_url"):
            if getattr(config, name):
                yield f"--{name}: without --judge_model there is no judge. Type --judge_model NAME"
        return
    if not (config.judge_base_url or config.api_base_url):
        yield "--judge_model: no server. Type --judge_base_url http://localhost:8000/v1"
    yield from check_server(config, config.judge_key_variable or config.api_key_variable)
    yield from judge.check_template(config.judge_template or judge.TEMPLATES[config.judge_mode], config.judge_mode)
    if len(config.judge_scale) != 2 or not config.judge_scale[0] < config.judge_scale[1]:
        yield f"--judge_scale {' '.join(map(str, config.judge_scale))}: the least number and the highest, like 1 10"
    candidates = config.num_completions + bool(config.reference_column)
    if config.judge_mode == "pick" and not 2 <= candidates <= len(judge.LABELS):
        yield f"--judge_mode pick: picks of 2 to {len(judge.LABELS)} answers, and there are {candidates}"


def check_selection(config):
    for name in config.write:
        if name not in selection.FILES:
            yield f"--write {name}: takes {', '.join(selection.FILES)}"
    if (config.select == "threshold") != (config.threshold is not None):
        yield "--select threshold and --threshold NUMBER belong together: give both, or neither"
    if config.select_k < 1:
        yield f"--select_k {config.select_k}: 1 or more"
    if not config.min_margin >= 0:
        yield f"--min_margin {config.min_margin:g}: 0 or more"
    if config.chunk_size is not None and config.chunk_size < 1:
        yield f"--chunk_size {config.chunk_size}: 1 or more rows a file"


def check_then(config):
    name = find_method(config.then)
    able = [method for method in METHODS if selection.file_for(method)]
    if name not in able:
        why = "it samples for itself, with --rlhf_type" if name else "no such method"
        yield f"--then {config.then}: {why}. It takes {', '.join(able)}"
    if config.rounds < 1:
        yield f"--rounds {config.rounds}: 1 or more"
    if config.rounds > 1 and config.engine == "openai":
        yield "--rounds with --engine openai: the server's model would be the same in each. Type --rounds 1"
    if name == "Reward" and config.rounds > 1:
        yield "--then Reward with --rounds: a reward model cannot answer in the next round. Type --rounds 1"
    if set(config.stages) != set(STAGES):
        yield f"--then with --stages {','.join(config.stages)}: it needs all of them. Leave --stages out"


def check_output_dir(common, config):
    if not config.output_dir:
        return ["--output_dir: missing. A folder for the answers, scores and files"]
    folder = Path(config.output_dir)
    if folder.is_file():
        return [f"--output_dir {folder}: a file of that name is there. Name a folder"]
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        return [f"--output_dir {folder}: nothing can be written in {above}. Name another folder"]
    ours = any((folder / trace).exists() for trace in ("settings.json", "prompts.jsonl.part", ".lock", "rounds.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        return [f"--output_dir {folder}: holds files that no rejection sampling made. Name another folder"]
    if config.then or common.overwrite_output_dir:
        return []  # of a round's folder its own run looks
    if "generate" not in config.stages and not (folder / "completions.jsonl").exists():
        return [f"--output_dir {folder}: no completions in it. Add generate to --stages"]
    if config.stages == ["select"] and not (folder / "scores.jsonl").exists():
        return [f"--output_dir {folder}: no scores in it. Add score to --stages"]
    return [*compare(common, config, folder)]


# ── what a folder was made with ──────────────────────────────────────────────────────────────────────────────────────


def compare(common, config, folder):
    """Problems of going on in a folder that was made with other settings."""
    anew = "Name another --output_dir, or add --overwrite_output_dir to start afresh"
    if "generate" in config.stages and (folder / "prompts.jsonl").exists():
        yield from pool.compare_settings(folder, "generate", generation_settings(common, config), anew)
    if "score" in config.stages and any(folder.glob("scores.*")):
        anew = f"Name another --output_dir, or rm -r {folder}/scores.* to score the same answers anew"
        yield from pool.compare_settings(folder, "score", score_settings(common, config), anew)


def generation_settings(common, config):
    """All that an answer depends on."""
    model = {"model": common.model_name_or_path, "model_revision": common.model_revision, "dtype": common.dtype}
    model |= {"weights": hash_short(str(weights_of(common.model_name_or_path, common.model_revision)))}
    server = {"api_base_url": config.api_base_url, "api_model": config.api_model}
    names = (
        "engine", "num_completions", "temperature", "top_p", "top_k", "max_new_tokens", "max_prompt_length",
        "system_prompt", "reference_column", "seed", "held_out_prompts",
    )  # fmt: skip
    found = files.find_files(common.train_data_path, "--train_data_path")
    return {
        **{name: getattr(config, name) for name in names},
        **(server if config.engine == "openai" else model),
        "data": {file: hash_file(file) for file in found},
        "max_samples": common.max_samples,
        "eval_fraction": common.eval_fraction,
    }


def weights_of(path, revision):
    adapter = models.read_adapter(path)
    base = [adapter["base_model_name_or_path"], adapter.get("revision")] if adapter else None
    return [sampling.describe_weights(path, revision), base and sampling.describe_weights(*base)]


def score_settings(common, config):
    functions = {spec: hash_file(spec.rpartition(":")[0]) for spec in common.reward_funcs or ()}
    found = {"reward_funcs": functions, "reward_weights": config.reward_weights}
    if common.reward_model_path:
        weights = hash_short(str(weights_of(common.reward_model_path, None)))
        found |= {"reward_model_path": common.reward_model_path, "reward_model_weights": weights}
    if config.judge_model:
        template = config.judge_template or judge.TEMPLATES[config.judge_mode]
        found |= {"judge_model": config.judge_model, "judge_mode": config.judge_mode}
        found |= {"judge_template": hash_file(template), "judge_scale": config.judge_scale}
    return found


def hash_file(path):
    if not Path(path).expanduser().is_file():
        return None  # a Hub id
    with open(Path(path).expanduser(), "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


def hash_short(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def opened(folder, common):
    """The output folder, for this run alone; of a run that is refused before it sampled anything nothing stays."""
    if environment.is_main():
        if common.overwrite_output_dir and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    environment.wait_for_everyone()
    with pool.locked(folder):
        try:
            yield
        except checks.Refused:
            if environment.is_main() and not any(folder.glob("completions.*")):
                shutil.rmtree(folder)
            raise


def load_tokenizer(common, config):
    """The tokenizer of the model that answers; None where a server does, or the model is not asked for again."""
    kept = pool.read_settings(config.output_dir or "").get("generate", {}) if "generate" not in config.stages else {}
    path = kept.get("model") or (common.model_name_or_path if config.engine != "openai" else None)
    if not path:
        return None
    return models.load_tokenizer(path, kept.get("model_revision", common.model_revision), config.trust_remote_code)


def longest_prompt(common, config):
    """Tokens that a prompt may have beside an answer, as far as the model says."""
    if config.engine == "openai":
        return config.max_prompt_length
    held = checks.model_positions(common.model_name_or_path)
    if held and held <= config.max_new_tokens:
        raise checks.Refused(
            [
                f"--max_new_tokens {config.max_new_tokens}: the model holds {held} tokens, prompt and answer. Type "
                f"--max_new_tokens {held // 2}"
            ]
        )
    room = [held - config.max_new_tokens] if held else []
    return min([*room, *([config.max_prompt_length] if config.max_prompt_length else [])], default=None)


def check_prompts(common, config, file=None, tokenizer=None):
    """Looks at every prompt, writes them to `file` if it is given: (how many, notes). Raises Refused."""
    if "generate" not in config.stages:
        return 0, []
    rows, notes = files.FileRows(common.train_data_path, "--train_data_path", common.max_samples), []
    tokenizer = tokenizer or load_tokenizer(common, config)
    longest = longest_prompt(common, config)
    count, found, twice = pool.write_prompts(file, rows, notes, tokenizer, config.system_prompt, longest)
    seen = data.Rows([], dropped=found.dropped, total=count + twice + len(found.dropped), notes=notes)
    data.check_dropped(seen, common.max_drop_fraction)
    if config.reference_column and config.reference_column not in found.names:
        known = ", ".join(name for name in found.names if name != "prompt") or "none beside the prompt"
        raise checks.Refused([f"--reference_column {config.reference_column}: no such column. There are {known}"])
    if count < 2 and common.eval_fraction:
        raise checks.Refused([f"--eval_fraction {common.eval_fraction:g}: of one prompt nothing can be held out"])
    refused = ", ".join(f"{number} {reason}" for reason, number in data.count_reasons(found.dropped).items()) or "none"
    doubled = f"; {twice} repeated ones left out" if twice else ""
    return count, [f"prompts   {count}; refused: {refused}{doubled}", *(f"note      {note}" for note in notes)]


def check(common, config):
    """What --check looks at beyond the flags: every prompt, and the reward functions on a few of them."""
    tokenizer = load_tokenizer(common, config)
    check_prompts(common, config, tokenizer=tokenizer)
    if "generate" in config.stages and "score" in config.stages:
        rows, _ = data.make_rows(list(files.FileRows(common.train_data_path, "--train_data_path", 4)), PROMPT, [])
        rewards.load_functions(common.reward_funcs, rows, tokenizer or scoring.no_tokens)
    summary.say("checked   nothing stands in the way; no model was loaded, nothing was written")
    return 0


def prepare(common, config, folder, tokenizer):
    """prompts.jsonl and settings.json of a new folder; of one that is there, the settings of the stages to come."""
    if "generate" in config.stages and not (folder / "prompts.jsonl").exists():
        pool.keep_settings(folder, "generate", generation_settings(common, config))
        for line in check_prompts(common, config, folder / "prompts.jsonl", tokenizer)[1]:
            summary.say(line)
    if "score" in config.stages:
        pool.keep_settings(folder, "score", score_settings(common, config))


# ── the stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Work:
    """One run over a folder: its lines so far, and the stages that add to them."""

    def __init__(self, common, config, folder, tokenizer):
        self.common, self.config, self.folder, self.tokenizer = common, config, folder, tokenizer
        kept = pool.read_settings(folder)["generate"]
        self.made_with = kept
        self.prompts = pool.Prompts(
            folder / "prompts.jsonl", kept["eval_fraction"], kept["held_out_prompts"], kept["seed"]
        )
        self.samples = kept["num_completions"]
        self.reference = kept["reference_column"]
        shape = len(self.prompts), self.samples + bool(self.reference)
        self.completions = pool.Lines(folder, "completions", *shape)
        self.scores = pool.Lines(folder, "scores", *shape)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = [self.prompts[number] for number in self.prompts.numbers[:4]]
        self.failed_share = 0.0
        if tokenizer is not None:
            from utils import text

            text.fit_tokenizer(tokenizer, chat=isinstance(self.first[0]["prompt"], list))

    def generate(self):
        """Answers what is not answered, the longest prompts first: what does not fit fails at once."""
        numbers = self.prompts.numbers
        order = numbers[numpy.argsort(-self.prompts.tokens[numbers], kind="stable")]
        done = self.completions.find()[1]
        flat = done[order, : self.samples].reshape(-1)
        missing = int((~flat).sum())
        summary.say(f"generate  {missing} answers to sample, {len(flat) - missing} are there")
        if missing and "score" in self.config.stages:
            self.load_scorers()  # and tries them, before hours are spent on answers that they could not judge
            free_memory()
        if self.reference and environment.is_main():
            self.add_references(done)
        if missing:
            kind = engines.ENGINES[self.config.engine]
            self.sample(order, flat, kind(self.common, self.config, self.tokenizer))
            free_memory()
        self.finish(self.completions)

    def sample(self, order, flat, engine):
        from tqdm import tqdm

        size = self.config.generate_batch_size or engine.batch
        starts = range(self.rank * size, len(flat), self.world * size)
        mine = sum(int((~flat[start : start + size]).sum()) for start in starts)
        bar = tqdm(total=mine, desc="generate", unit="answer", disable=not environment.is_main())
        for start in starts:
            places = (start + numpy.flatnonzero(~flat[start : start + size])).tolist()
            if not places:
                continue
            keys = [(int(order[place // self.samples]), place % self.samples) for place in places]
            asked = [(self.prompts[number]["prompt"], sample) for number, sample in keys]
            requests = [(prompt, sampling.seed_of(self.config.seed, prompt, sample)) for prompt, sample in asked]
            answers = engine.complete(requests)
            self.completions.append(
                [{"prompt": n, "sample": s, **answer} for (n, s), answer in zip(keys, answers, strict=True)]
            )
            bar.update(len(places))
        bar.close()

    def add_references(self, done):
        """The answers in the data, as one more sample of each prompt that has one."""
        for number in self.prompts.numbers.tolist():
            answer = self.prompts[number]["further"].get(self.reference)
            if not done[number, self.samples] and answer:
                written = answer if isinstance(answer, str) else answer[-1]["content"]
                line = {"completion": written.strip(), "tokens": None, "ended": True, "reference": True}
                self.completions.append([{"prompt": number, "sample": self.samples, **line}])

    def load_scorers(self):
        rows = scoring.as_rows(self.first)
        return scoring.Scorers(self.common, self.config, rows, self.tokenizer, environment.local_device())

    def score(self):
        """Scores every prompt whose answers are not all scored."""
        from tqdm import tqdm

        answered, scored = self.completions.find()[1], self.scores.find()[1]
        missing = answered & ~scored
        total = int(missing.any(1).sum())
        summary.say(f"score     {int(missing.sum())} answers to score, {int((answered & scored).sum())} are there")
        if total:
            scorers = self.load_scorers()
            bar = tqdm(total=total, desc="score", unit="prompt", disable=not environment.is_main())
            for turn, chunk in enumerate(scoring.chunk_groups(self.completions.groups())):
                wanted = [(number, group) for number, group in chunk if missing[number].any()]
                bar.update(len(wanted))
                if turn % self.world == self.rank and wanted:
                    prompts = [self.prompts[number] for number, _ in wanted]
                    groups = [[line for line in group if "failed" not in line] for _, group in wanted]
                    self.scores.append(scorers.score(prompts, groups))
            bar.close()
        self.finish(self.scores, answered)

    def finish(self, lines, wanted=None):
        """Brings a stage's lines in order, and counts what failed."""
        environment.wait_for_everyone()
        if environment.is_main():
            lines.merge()
        environment.wait_for_everyone()
        if wanted is None:
            wanted = numpy.zeros(lines.shape, dtype=bool)
            wanted[self.prompts.numbers, : self.samples] = True
        failed = int((wanted & ~lines.find()[1]).sum())
        self.failed_share = max(self.failed_share, failed / max(int(wanted.sum()), 1))
        if failed:
            reasons = {}
            for _, group in lines.groups():
                for line in group:
                    if "failed" in line:
                        reason = re.sub(r"[:(].*", "", line["failed"]).strip()
                        reasons[reason] = reasons.get(reason, 0) + 1
            said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            summary.say(
                f"failed    {failed} of {int(wanted.sum())} in {lines.file}: {said}. The same command tries them again"
            )

    def select(self):
        """Writes the files and the report from all that is scored; done anew each time, it takes seconds."""
        config, kept = self.config, pool.read_settings(self.folder)
        tally = best_of_n.Pool(self.samples, self.made_with["seed"])
        origin = {name: self.made_with.get(name) for name in ("model", "api_model", "api_base_url", "engine")}
        origin = {name: value for name, value in origin.items() if value is not None}
        drawn = {name: self.made_with[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")}
        names = list(dict.fromkeys(config.write))
        with selection.Files(self.folder, names, config.chunk_size) as out:
            for number, answers in selection.candidates(self.completions.groups(), self.scores.groups()):
                good, bad, why, gone = selection.choose(answers, config)
                tally.add(answers, why, gone)
                row = self.prompts[number]
                for name in names:
                    for made, traces in selection.rows_of(name, row["prompt"], good, bad, config):
                        whence = {"source": row["where"], **origin, "sampling": drawn, "answer": traces}
                        out.add(name, made | {"provenance": whence})
        found = tally.report(out.counts) | {"select": config.select, "scored_by": kept.get("score")}
        best_of_n.write_report(self.folder, found)
        best_of_n.draw(self.folder, found, tally.shown)
        best_of_n.say_report(found, summary.say)
        for name in names:
            path = selection.path_of(self.folder, name, config.chunk_size)
            summary.say(f"written   {path}: {out.counts[name]} rows")
            if out.counts[name]:
                summary.say(
                    f"train     RLHF_TYPE={name} MODEL={self.made_with.get('model') or 'MODEL'} TRAIN_DATA={path} "
                    "bash rlhf_run.sh"
                )

    def end(self):
        """The exit status."""
        if self.failed_share <= self.config.max_failed_fraction:
            return 0
        if environment.is_main():
            raise checks.Failed(
                f"{self.failed_share:.0%} failed, more than --max_failed_fraction {self.config.max_failed_fraction:g}"
            )
        return 1


def free_memory():
    """Gives back what a model held that nobody has any more."""
    gc.collect()
    if environment.has_gpu():
        import torch

        torch.cuda.empty_cache()
