"""The teacher of a distillation: checked before it is loaded, asked for its answers once, held beside the student."""

import gc

from utils.models import folders, load, sampling
from utils.models.folders import count_numbers, vocabulary_rows
from utils.models.sampling import describe_sampling
from utils.runtime.errors import Failed
from utils.runtime.output import say

# ── what is said of it ───────────────────────────────────────────────────────────────────────────────────────────────


def describe(run):
    """The plan's lines of a distillation."""
    common, config = run.common, run.config
    path = config.teacher_model_name_or_path
    if shares_base(common, config):
        held = "the student's base with its adapter off (no second copy)"
        held += ", in 4 bits as the student's" if common.train_mode == "qlora" else ""
    else:
        held = "held in 4 bits (NF4)" if in_4bit(common, config) else f"held in {common.dtype}"
    lines = [f"teacher   {path}, {held}", f"distils   {config.describe()}"]
    if config.lmbda:
        lines.append(describe_sampling(common, config))
    wanted = len(rows_to_answer(run))
    if wanted:
        lines.append(f"answers   {wanted} by the teacher, kept in {config.answers_dir}")
    sizes = [vocabulary_rows(path) for path in (common.model_name_or_path, path)]
    if None not in sizes and sizes[0] != sizes[1]:
        lines.append(
            f"note      embeddings of {sizes[0]} (student) and {sizes[1]} (teacher) rows for one tokenizer: compared "
            f"over the {min(sizes)} that both have"
        )
    student, teacher = (count_numbers(path) for path in (common.model_name_or_path, path))
    if student and teacher and teacher < student:
        lines.append(
            f"warning   the teacher has {teacher / 1e6:.0f}M parameters, the student {student / 1e6:.0f}M: is it the "
            "better one?"
        )
    return lines


# ── loading, and its answers ─────────────────────────────────────────────────────────────────────────────────────────


def shares_base(common, config):
    """Whether the teacher is the very base that the student's adapter is trained on, and needs no copy of its own."""
    adapter = folders.read_adapter(common.model_name_or_path)
    base, revision = common.model_name_or_path, common.model_revision
    if adapter:
        base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    same = folders.same_path(base, config.teacher_model_name_or_path) and revision == config.teacher_model_revision
    return same and common.train_mode != "full"


def in_4bit(common, config):
    return config.teacher_load_in_4bit or common.train_mode == "qlora" and shares_base(common, config)


def load_teacher(common, config, tokenizer):
    """The frozen teacher; one that is an adapter is merged into its base, unless that is held in 4 bits."""
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


def load_beside(run):
    """The teacher that the trainer holds beside the student; None where it is the student's own base."""
    return None if shares_base(run.common, run.config) else load_teacher(run.common, run.config, run.tokenizer)


def rows_to_answer(run):
    """The rows that the teacher answers: held-out rows without an answer, and with SeqKD all training rows."""
    return [
        *(run.train.rows if run.config.seq_kd else ()),
        *(row for row in run.held_out.rows if not row["completion_ids"]),
    ]


def write_answers(run):
    """Puts the teacher's answers into the rows that want one, sampling those that are not in answers_dir yet."""
    import torch
    from accelerate.utils import broadcast_object_list

    common, config, tokenizer, rows = run.common, run.config, run.tokenizer, rows_to_answer(run)
    if not rows:
        return
    drawn = sampling.Sampling(
        config.max_completion_length, config.temperature, config.top_p, config.top_k, config.seed
    )
    path = config.teacher_model_name_or_path
    adapter = folders.read_adapter(path)
    weights = [sampling.describe_weights(path, config.teacher_model_revision)]
    if adapter:
        weights.append(sampling.describe_weights(adapter["base_model_name_or_path"], adapter.get("revision")))
    held = "4bit" if in_4bit(common, config) else common.dtype
    folder = sampling.answers_folder(config.answers_dir, [*weights, held, tokenizer.eos_token_id], drawn)
    prompts = [row["prompt_ids"] for row in rows]
    # the main process looks for all: what another run writes meanwhile, or another node's copy of the teacher, is else
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
        raise Failed(f"{folder}: {lost} answers are not here. --answers_dir is on a disk that all nodes see")
    for row in rows:
        row["completion_ids"] = answers[sampling.prompt_key(row["prompt_ids"])]
    full = [row["completion_ids"] for row in rows if len(row["completion_ids"]) == config.max_completion_length]
    cut = sum(ids[-1] != tokenizer.eos_token_id for ids in full)
    if cut:
        say(f"note      {cut} of {len(rows)} answers of the teacher are cut at --max_completion_length")
