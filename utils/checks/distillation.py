"""Checks of a distillation: its flags, the teacher, and the vocabulary that teacher and student share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from common_args import SharedArgs
from rlhf_args.methods import DISTILLATION
from utils.checks import flags
from utils.cli.run import Run
from utils.data.rows import Rows
from utils.models import folders, load
from utils.models.folders import ModelFolder
from utils.models.teacher import shares_base
from utils.runtime import environment
from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from rlhf_args.gkd_config import GKDConfig


def check_distillation(common: SharedArgs, config: GKDConfig, rows: Rows) -> Iterator[str]:
    """Problems of the flags of distillation, of the teacher's folder, and of rows without an answer."""
    if config.seq_kd and config.lmbda == 1:
        yield "--seq_kd True with --lmbda 1: no step uses the teacher's answers. Type --lmbda 0, or remove --seq_kd"
    if config.teacher_model_init_kwargs:
        yield "--teacher_model_init_kwargs: not used here. Type --dtype or --teacher_load_in_4bit instead"
    if config.lmbda == 0:
        for flag in sorted(common.typed & {"min_p", "repetition_penalty", "generation_kwargs"}):
            yield f"--{flag}: only used to sample the student's answers, and --lmbda 0 samples none. Remove it"
    if config.learns_from_data():
        lacking = [where for where, values in rows.train if "completion" not in values]
        if lacking:
            yield (
                f"{lacking[0]}: no answer, as in {len(lacking)} of {len(rows.train)} rows; --lmbda {config.lmbda:g} "
                "needs them. Type --seq_kd True for the teacher's answers, or --lmbda 1 for the student's own"
            )
    yield from check_teacher(common, config)
    yield from flags.check_sampling(common, config)


def check_teacher(common: SharedArgs, config: GKDConfig) -> Iterator[str]:
    path = config.teacher_model_name_or_path
    flag = f"--teacher_model_name_or_path {path}"
    if not path:
        yield "--teacher_model_name_or_path: missing. Type a model folder or Hub id with the student's tokenizer"
        return
    teacher = ModelFolder.at(path, config.teacher_model_revision)
    yield from teacher.check("--teacher_model_name_or_path")
    if teacher.described is None:
        return
    if teacher.is_reward_model:
        yield f"{flag}: a reward model. The teacher must be a language model"
    if teacher.adapter is not None:
        problems = [*teacher.check_adapter("GKD", DISTILLATION["GKD"])]
        yield from problems
        if problems:
            return  # the checks below read its base
        if environment.engine() == "zero3" and not config.teacher_load_in_4bit:
            yield (
                f"{flag}: an adapter, which cannot be merged into a base that zero3 shards. Type python -m "
                f"utils.merge_lora {path} MERGED and --teacher_model_name_or_path MERGED, or LAUNCH=zero2"
            )
    if folders.same_path(common.model_name_or_path, path) and common.model_revision == config.teacher_model_revision:
        yield f"{flag}: is the student itself. To distil a base into its adapter, type --model_name_or_path ADAPTER"
    if teacher.described.get("quantization_config"):
        yield f"{flag}: already quantised. Use the original; --teacher_load_in_4bit loads it in 4 bits"
    if config.teacher_load_in_4bit and common.train_mode == "lora" and shares_base(common, config):
        yield (
            "--teacher_load_in_4bit: the teacher is the student's base, loaded once and not in 4 bits by lora. "
            "Remove it, or type --train_mode qlora"
        )
    different = folders.first_difference(ModelFolder.at(common.model_name_or_path).vocabulary, teacher.vocabulary)
    if different:
        yield different_tokenizers(flag, different)

    student, taught = ModelFolder.at(common.model_name_or_path).vocabulary_rows, teacher.vocabulary_rows
    if environment.engine() == "zero3" and student and taught and student > taught:
        yield (
            f"{flag}: has {taught} embedding rows and the student {student}: zero3 cannot cut the student's to the "
            "shared rows. Type LAUNCH=fsdp2 or LAUNCH=zero2"
        )


def different_tokenizers(flag: str, different: str) -> str:
    return f"{flag}: its tokenizer is not the student's: {different}. Use a teacher of the student's family"


def check_teacher_tokens(run: Run) -> None:
    """Raises Refused if the teacher cannot read the tokens of the rows. Loads its tokenizer, also from the Hub."""
    config, tokenizer = run.config, run.tokenizer
    path = config.teacher_model_name_or_path
    flag = f"--teacher_model_name_or_path {path}"
    if not path or ModelFolder.at(path).check(flag):  # refused by check_teacher
        return
    theirs = load.load_tokenizer(path, config.teacher_model_revision, config.trust_remote_code, "the teacher's")
    different = folders.first_difference(tokenizer.get_vocab(), theirs.get_vocab())
    if different:
        raise Refused(different_tokenizers(flag, different))
    highest = max(max(row["prompt_ids"] + row["completion_ids"]) for row in run.train.rows + run.held_out.rows)
    if highest >= (ModelFolder.at(path).vocabulary_rows or math.inf):
        token = tokenizer.convert_ids_to_tokens(highest)
        raise Refused(f"{flag}: has no token {highest} ({token!r}), which the student's template or data use")


def prompt_room(run: Run) -> Callable[[dict], float]:
    """A function of a row's values: the highest number of prompt tokens that leaves room for a sampled answer."""
    config = run.config
    paths = run.common.model_name_or_path, config.teacher_model_name_or_path
    held = [ModelFolder.at(path).positions for path in paths if path]
    room = min((positions - config.max_completion_length for positions in held if positions), default=math.inf)
    sampled = config.lmbda > 0 or config.seq_kd
    return lambda values: room if sampled or "completion" not in values else math.inf
