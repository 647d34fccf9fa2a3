"""The teacher of a distillation: its lines in the plan, its loading, its answers."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from common_args import SharedArgs
from utils.cli.run import Run
from utils.models import load, sampling
from utils.models.folders import ModelFolder, same_path
from utils.models.sampling import describe_sampling
from utils.runtime.errors import Failed
from utils.runtime.output import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_args.gkd_config import GKDConfig


def describe_teacher(run: Run) -> list[str]:
    """The lines of a distillation in the plan."""
    common, config = run.common, run.config
    path = config.teacher_model_name_or_path
    held = "held in 4 bits (NF4)" if in_4bit(common, config) else f"held in {common.dtype}"
    if shares_base(common, config):
        held = "the student's base with its adapter off (no second copy)"
        held += ", in 4 bits as the student's" if common.train_mode == "qlora" else ""
    lines = [f"teacher   {path}, {held}", f"distils   {config.describe()}"]
    if config.lmbda:
        lines.append(describe_sampling(common, config))
    wanted = len(rows_to_answer(run))
    if wanted:
        lines.append(f"answers   {wanted} by the teacher, kept in {config.answers_dir}")
    pair = [ModelFolder.at(model) for model in (common.model_name_or_path, path)]
    sizes = [model.vocabulary_rows or 0 for model in pair]  # 0: the config does not say
    if min(sizes) and sizes[0] != sizes[1]:
        rows = f"the student has {sizes[0]} embedding rows and the teacher {sizes[1]}"
        lines.append(f"note      {rows}: compared on the {min(sizes)} tokens that both have")
    student, teacher = (model.numbers for model in pair)
    if student and teacher and teacher < student:
        parameters = f"{teacher / 1e6:.0f}M parameters, the student {student / 1e6:.0f}M"
        lines.append(f"warning   the teacher has {parameters}: is the teacher really better?")
    return lines


def shares_base(common: SharedArgs, config: GKDConfig) -> bool:
    """True if the teacher is the base of the student's adapter: it needs no second copy."""
    base = ModelFolder.at(common.model_name_or_path, common.model_revision).base
    same = same_path(base.path, config.teacher_model_name_or_path) and base.revision == config.teacher_model_revision
    return same and common.train_mode != "full"


def in_4bit(common: SharedArgs, config: GKDConfig) -> bool:
    return config.teacher_load_in_4bit or common.train_mode == "qlora" and shares_base(common, config)


def load_teacher(common: SharedArgs, config: GKDConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The frozen teacher. An adapter is merged into its base, unless the base is loaded in 4 bits."""
    four_bit = in_4bit(common, config)
    teacher = load.load_model(
        config.teacher_model_name_or_path,
        task="CAUSAL_LM",
        dtype=common.dtype,
        tokenizer=tokenizer,
        seed=config.seed,
        revision=config.teacher_model_revision,
        attn_implementation=common.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        four_bit=four_bit,
        adapter="keep" if four_bit else "merge",
        flag="--teacher_model_name_or_path",
    )
    return teacher.eval().requires_grad_(False)


def load_beside(run: Run) -> PreTrainedModel | None:
    """The teacher for the trainer; None if it is the student's own base."""
    return None if shares_base(run.common, run.config) else load_teacher(run.common, run.config, run.tokenizer)


def rows_to_answer(run: Run) -> list[dict]:
    """Rows that the teacher answers: held-out rows without an answer, and with --seq_kd all training rows."""
    return [
        *(run.train.rows if run.config.seq_kd else ()),
        *(row for row in run.held_out.rows if not row["completion_ids"]),
    ]


def write_answers(run: Run) -> None:
    """Add the teacher's answers to the rows that need one. Answers missing in --answers_dir are sampled first."""
    import torch
    from accelerate.utils import broadcast_object_list

    common, config, tokenizer, rows = run.common, run.config, run.tokenizer, rows_to_answer(run)
    if not rows:
        return
    drawn = sampling.Sampling(
        config.max_completion_length, config.temperature, config.top_p, config.top_k, config.seed
    )
    model = ModelFolder.at(config.teacher_model_name_or_path, config.teacher_model_revision)
    parts = [model, model.base] if model.adapter else [model]
    weights = [sampling.identify_weights(part.path, part.revision) for part in parts]
    held = "4bit" if in_4bit(common, config) else common.dtype
    folder = sampling.answers_folder(config.answers_dir, [*weights, held, tokenizer.eos_token_id], drawn)
    prompts = [row["prompt_ids"] for row in rows]
    # rank 0 decides for all: ranks may see different files while another run writes
    folder, missing = broadcast_object_list([folder, sampling.missing_prompts(folder, prompts)])
    say(f"answers   {len(missing)} to sample, {len({*map(tuple, prompts)}) - len(missing)} in {folder} already")
    if missing:
        with load.unsharded():
            teacher = load_teacher(common, config, tokenizer)
        teacher = teacher if in_4bit(common, config) else teacher.to(config.device)
        sampling.answer_prompts(teacher, tokenizer, missing, drawn, folder, config.answers_batch_size, what="teacher")
        del teacher
        gc.collect()
        torch.cuda.empty_cache()
    answers = sampling.read_answers(folder)
    lost = sum(sampling.prompt_key(ids) not in answers for ids in prompts)
    if lost:
        raise Failed(f"{folder}: {lost} answers are missing. --answers_dir must be on a disk that all nodes share")
    for row in rows:
        row["completion_ids"] = answers[sampling.prompt_key(row["prompt_ids"])]
    full = [row["completion_ids"] for row in rows if len(row["completion_ids"]) == config.max_completion_length]
    cut = sum(ids[-1] != tokenizer.eos_token_id for ids in full)
    if cut:
        say(f"note      {cut} of {len(rows)} answers of the teacher are truncated at --max_completion_length")
