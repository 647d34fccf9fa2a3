"""The stages of a rejection sampling. Each adds the missing lines to the folder, and prints a summary."""

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy

from common_args import CommonArgs
from rlhf_args.methods import PROMPT
from rlhf_args.rejection_config import RejectionConfig
from utils.data import files
from utils.data.rows import Rows, check_dropped, count_reasons, make_rows
from utils.models import load, sampling
from utils.models.folders import ModelFolder
from utils.rejection import checks, engines, report, scoring, selection
from utils.rejection.folder import Lines, Prompts, Tokenizer, keep_settings, locked, read_settings, write_prompts
from utils.results import plots, saves
from utils.rewards import functions
from utils.runtime import environment, output
from utils.runtime.errors import Failed, Refused
from utils.runtime.paths import empty

# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def open_folder(folder: Path, common: CommonArgs) -> Iterator[None]:
    """Lock the output folder. A new folder is removed if the run is refused before it sampled anything."""
    fresh = common.overwrite_output_dir or not folder.is_dir() or not any(folder.iterdir())
    if environment.is_main():
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if environment.is_main() and common.overwrite_output_dir:
            empty(folder, keep=(".lock",))
        environment.wait_for_everyone()
        try:
            yield
        except Refused:
            if environment.is_main() and fresh and not any(folder.glob("completions.*")):
                empty(folder)
                if not folder.is_symlink():
                    folder.rmdir()
            raise


def load_answering_tokenizer(common: CommonArgs, config: RejectionConfig) -> Tokenizer:
    """The tokenizer of the answering model; None with a server, or if only select runs."""
    if not {"generate", "score"} & set(config.stages):
        return None
    kept = read_settings(config.output_dir or "").get("generate", {}) if "generate" not in config.stages else {}
    path = kept.get("model") or (common.model_name_or_path if config.engine != "openai" else None)
    if not path:
        return None
    return load.load_tokenizer(path, kept.get("model_revision", common.model_revision), config.trust_remote_code)


def longest_prompt(common: CommonArgs, config: RejectionConfig) -> int | None:
    """Maximum tokens of a prompt: the flag, or the model's context minus the answer. None: no limit known."""
    if config.engine == "openai":
        return config.max_prompt_length
    held = ModelFolder.at(common.model_name_or_path).positions
    if held and held <= config.max_new_tokens:
        raise Refused(
            [
                f"--max_new_tokens {config.max_new_tokens}: the model holds {held} tokens, prompt and answer. Type "
                f"--max_new_tokens {held // 2}"
            ]
        )
    room = [held - config.max_new_tokens] if held else []
    return min([*room, *([config.max_prompt_length] if config.max_prompt_length else [])], default=None)


def check_prompts(
    common: CommonArgs, config: RejectionConfig, file: Path | None = None, tokenizer: Tokenizer = None
) -> tuple[int, list[str]]:
    """Check every prompt, and write them to `file` if given. Returns their number and notes. Raises Refused."""
    if "generate" not in config.stages:
        return 0, []
    notes: list[str] = []
    rows = files.FileRows(common.train_data_path, "--train_data_path", common.max_samples)
    tokenizer = tokenizer or load_answering_tokenizer(common, config)
    longest = longest_prompt(common, config)
    asked = config.system_prompt, longest, config.reference_column
    count, found, twice = write_prompts(file, rows, notes, tokenizer, *asked)
    seen = Rows([], dropped=found.dropped, total=count + twice + len(found.dropped), notes=notes)
    check_dropped(seen, common.max_drop_fraction)
    if config.reference_column and config.reference_column not in found.names:
        known = ", ".join(name for name in found.names if name != "prompt") or "none beside the prompt"
        raise Refused([f"--reference_column {config.reference_column}: no such column. There are {known}"])
    if count < 2 and common.eval_fraction:
        raise Refused(
            [f"--eval_fraction {common.eval_fraction:g}: one prompt cannot be split. Type --eval_fraction 0"]
        )
    refused = ", ".join(f"{number} {reason}" for reason, number in count_reasons(found.dropped).items()) or "none"
    doubled = f"; {twice} repeated prompts left out" if twice else ""
    if file:
        saves.prepare_output_dir(file.parent, False, found.dropped)
    return count, [f"prompts   {count}; refused: {refused}{doubled}", *(f"note      {note}" for note in notes)]


def check_rejection(common: CommonArgs, config: RejectionConfig) -> int:
    """--check beyond the flags: every prompt, and the reward functions on a few of them."""
    tokenizer = load_answering_tokenizer(common, config)
    check_prompts(common, config, tokenizer=tokenizer)
    if "generate" in config.stages and "score" in config.stages:
        rows, _ = make_rows(list(files.FileRows(common.train_data_path, "--train_data_path", 4)), PROMPT, [])
        functions.load_functions(common.reward_funcs, rows, tokenizer or scoring.no_tokens, common.reward_timeout)
    output.say("checked   nothing stands in the way; no model was loaded, nothing was written")
    return 0


def prepare_folder(common: CommonArgs, config: RejectionConfig, folder: Path, tokenizer: Tokenizer) -> None:
    """Write prompts.jsonl and settings.json of a new folder; in an existing folder the settings of new stages."""
    if "generate" in config.stages and not (folder / "prompts.jsonl").exists():
        keep_settings(folder, "generate", checks.generation_settings(common, config))
        for line in check_prompts(common, config, folder / "prompts.jsonl", tokenizer)[1]:
            output.say(line)
    if "score" in config.stages:
        keep_settings(folder, "score", checks.score_settings(common, config))


# ── the stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


class RejectionRun:
    """A run in a folder: its prompts and lines, and the stages that add to them."""

    def __init__(self, common: CommonArgs, config: RejectionConfig, folder: Path, tokenizer: Tokenizer) -> None:
        self.common, self.config, self.folder, self.tokenizer = common, config, folder, tokenizer
        kept = read_settings(folder)["generate"]
        self.made_with = kept
        self.prompts = Prompts(folder / "prompts.jsonl", kept["eval_fraction"], kept["held_out_prompts"], kept["seed"])
        self.samples = kept["num_completions"]
        self.reference = kept["reference_column"]
        shape = len(self.prompts), self.samples + bool(self.reference)
        self.completions = Lines(folder, "completions", *shape)
        self.scores = Lines(folder, "scores", *shape)
        self.rank, self.world = int(os.environ.get("RANK", 0)), environment.world_size()
        self.first = [self.prompts[number] for number in self.prompts.numbers[:4]]
        self.failed_share = 0.0
        if tokenizer is not None:
            from utils.data import template

            template.fit_tokenizer(tokenizer, chat=isinstance(self.first[0]["prompt"], list))

    def generate(self) -> None:
        """Sample the missing answers, longest prompts first: out of memory then shows at once."""
        numbers = self.prompts.numbers
        order = numbers[numpy.argsort(-self.prompts.tokens[numbers], kind="stable")]
        done = self.completions.find()[1]
        flat = done[order, : self.samples].reshape(-1)
        missing = int((~flat).sum())
        output.say(f"generate  {missing} answers to sample, {len(flat) - missing} are there")
        if missing and "score" in self.config.stages:
            self.load_scorers()  # to try them before hours of sampling
            free_memory()
        if self.reference and environment.is_main():
            self.add_references(done)
        if missing:
            kind = engines.ENGINES[self.config.engine]
            self.sample_answers(order, flat, kind(self.common, self.config, self.tokenizer))
            free_memory()
        self.finish(self.completions)

    def sample_answers(self, order: numpy.ndarray, flat: numpy.ndarray, engine: engines.Engine) -> None:
        from tqdm import tqdm

        size = self.config.generate_batch_size or engine.batch
        starts = range(self.rank * size, len(flat), self.world * size)
        mine = sum(int((~flat[start : start + size]).sum()) for start in starts)
        with tqdm(total=mine, desc="generate", unit="answer", disable=not environment.is_main()) as bar:
            for start in starts:
                places: list[int] = (start + numpy.flatnonzero(~flat[start : start + size])).tolist()
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
        engine.say_failures()

    def add_references(self, done: numpy.ndarray) -> None:
        """Add the answers in the data as one more sample of each prompt."""
        lines = []
        for number in self.prompts.numbers[~done[self.prompts.numbers, self.samples]].tolist():
            row = self.prompts[number]
            answer = row["further"].get(self.reference)
            if answer:
                written = answer[-1]["content"] if isinstance(answer, list) else answer
                written = written.removeprefix(row["prompt"]) if isinstance(row["prompt"], str) else written
                line = {"completion": written.strip(), "tokens": None, "ended": True, "reference": True}
                lines.append({"prompt": number, "sample": self.samples, **line})
            if len(lines) == 1000:
                self.completions.append(lines)
                lines = []
        if lines:
            self.completions.append(lines)

    def load_scorers(self) -> scoring.Scorers:
        rows = scoring.as_rows(self.first)
        return scoring.Scorers(self.common, self.config, rows, self.tokenizer, environment.local_device())

    def score(self) -> None:
        """Score all answers to each prompt that lacks a score."""
        from tqdm import tqdm

        self.merge_lines(self.completions)  # of a generation that was interrupted
        answered, scored = self.completions.find()[1], self.scores.find()[1]
        missing = answered & ~scored
        total = int(missing.any(1).sum())
        output.say(f"score     {int(missing.sum())} answers to score, {int((answered & scored).sum())} are there")
        if total:
            scorers = self.load_scorers()
            with tqdm(total=total, desc="score", unit="prompt", disable=not environment.is_main()) as bar:
                scorers.show = bar.set_postfix_str
                for turn, chunk in enumerate(scoring.chunk_groups(self.completions.groups())):
                    wanted = [(number, group) for number, group in chunk if missing[number].any()]
                    if turn % self.world == self.rank and wanted:
                        prompts = [self.prompts[number] for number, _ in wanted]
                        groups = [[line for line in group if "failed" not in line] for _, group in wanted]
                        self.scores.append(scorers.score(prompts, groups))
                    bar.update(len(wanted))  # other processes work at the same pace
            if scorers.judge:
                scorers.judge.server.say_failures()
        self.finish(self.scores, answered)

    def merge_lines(self, lines: Lines) -> None:
        environment.wait_for_everyone()
        if environment.is_main():
            lines.merge()
        environment.wait_for_everyone()

    def finish(self, lines: Lines, wanted: numpy.ndarray | None = None) -> None:
        """Merge the lines of a stage, and count the failed lines."""
        self.merge_lines(lines)
        if wanted is None:
            wanted = numpy.zeros(lines.shape, dtype=bool)
            wanted[self.prompts.numbers, : self.samples] = True
        failed = int((wanted & ~lines.find()[1]).sum())
        self.failed_share = max(self.failed_share, failed / max(int(wanted.sum()), 1))
        if failed:
            reasons: dict[str, int] = {}
            for _, group in lines.groups():
                for line in group:
                    if "failed" in line:
                        reason = re.sub(r"[:(].*", "", line["failed"]).strip()
                        reasons[reason] = reasons.get(reason, 0) + 1
            said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            output.say(
                f"failed    {failed} of {int(wanted.sum())} in {lines.file}: {said}. The same command tries them again"
            )

    def select(self) -> None:
        """Write the training files and the report from all scored answers. It takes seconds and is always redone."""
        config, kept = self.config, read_settings(self.folder)
        tally = report.Pool(self.samples, self.made_with["seed"])
        origin = {name: self.made_with.get(name) for name in ("model", "api_model", "engine")}
        origin = {name: value for name, value in origin.items() if value is not None}
        drawn = {name: self.made_with[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")}
        names = list(dict.fromkeys(config.write))
        with selection.Files(self.folder, names, config.chunk_size) as out:
            for number, answers in selection.candidates(self.completions.groups(), self.scores.groups()):
                good, bad, why, gone = selection.choose_answers(answers, config)
                tally.add(answers, why, gone)
                row = self.prompts[number]
                for name in names:
                    for made, traces in selection.rows_of(name, row["prompt"], good, bad, config):
                        whence = {"source": row["where"], **origin, "sampling": drawn, "answer": traces}
                        out.add(name, made | {"provenance": whence})
        found = tally.report(out.counts) | {"select": config.select, "scored_by": kept.get("score")}
        report.write_report(self.folder, found)
        plots.draw_rewards(self.folder, found, tally.shown)
        report.say_report(found, config.keep_cut, output.say)
        for name in names:
            path = selection.path_of(self.folder, name, config.chunk_size)
            output.say(f"written   {path}: {out.counts[name]} rows")
            if out.counts[name] and self.made_with.get("model"):
                output.say(
                    f"train     RLHF_TYPE={name} MODEL={self.made_with['model']} TRAIN_DATA={path} bash rlhf_run.sh"
                )

    def end(self) -> int:
        """Exit status 0. Raises Failed in the main process if too many lines failed."""
        if environment.is_main() and self.failed_share > self.config.max_failed_fraction:
            raise Failed(
                f"{self.failed_share:.0%} failed, more than --max_failed_fraction {self.config.max_failed_fraction:g}"
            )
        return 0


def free_memory() -> None:
    """Free the memory of a deleted model."""
    gc.collect()
    if environment.has_gpu():
        import torch

        torch.cuda.empty_cache()
