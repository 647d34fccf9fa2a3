"""The teacher, the student and the vocabulary they must share."""

import math

from rlhf_args.methods import DISTILLATION
from utils.checks import flags
from utils.models import folders, load
from utils.models.folders import ModelFolder
from utils.models.teacher import shares_base
from utils.runtime import environment
from utils.runtime.errors import Refused


def check_distillation(common, config, rows):
    """Problems of the distillation's own flags, of the teacher's folder, and of rows that lack an answer."""
    if config.seq_kd and config.lmbda == 1:
        yield (
            "--seq_kd True with --lmbda 1: every step would be on the student's own answers, and none on the "
            "teacher's. Type --lmbda 0 for SeqKD, or leave --seq_kd out"
        )
    if config.teacher_model_init_kwargs:
        yield "--teacher_model_init_kwargs: not used here. --dtype and --teacher_load_in_4bit say how it is held"
    yield from flags.check_sampling(common, config)
    if config.lmbda == 0:
        for flag in sorted(common.typed & {"min_p", "repetition_penalty", "generation_kwargs"}):
            yield f"--{flag}: of the student's own answers, and --lmbda 0 learns from none. Leave it out"
    if config.learns_from_data():
        lacking = [where for where, values in rows.train if "completion" not in values]
        if lacking:
            yield (
                f"{lacking[0]}: no answer, and so {len(lacking)} of {len(rows.train)} rows; --lmbda {config.lmbda:g} "
                "learns from the answers in the data. Type --seq_kd True for the teacher's, or --lmbda 1 for the "
                "student's own"
            )
    yield from check_teacher(common, config)


def check_teacher(common, config):
    path = config.teacher_model_name_or_path
    flag = f"--teacher_model_name_or_path {path}"
    if not path:
        yield "--teacher_model_name_or_path: missing. A model folder or Hub id with the student's tokenizer"
        return
    teacher = ModelFolder.at(path, config.teacher_model_revision)
    yield from teacher.check("--teacher_model_name_or_path")
    if teacher.described is None:
        return
    if teacher.is_reward_model:
        yield f"{flag}: a trained reward model, which scores and cannot answer. A teacher is a language model"
    if teacher.adapter is not None:
        problems = [*teacher.check_adapter("GKD", DISTILLATION["GKD"])]
        yield from problems
        if problems:
            return  # what follows looks into its base
        if environment.engine() == "zero3" and not config.teacher_load_in_4bit:
            yield (
                f"{flag}: an adapter, and zero3 holds its base in pieces, into which it cannot be merged. Type python "
                f"-m utils.merge_lora {path} MERGED, and give that; or LAUNCH=zero2"
            )
    if folders.same_path(common.model_name_or_path, path) and common.model_revision == config.teacher_model_revision:
        yield (
            f"{flag}: the model that the student starts from, of which there is nothing to learn. A base teaches an "
            "adapter that has moved away from it: give that as --model_name_or_path"
        )
    if teacher.described.get("quantization_config"):
        yield f"{flag}: quantised already. Take the original; --teacher_load_in_4bit holds it in 4 bits"
    if config.teacher_load_in_4bit and common.train_mode == "lora" and shares_base(common, config):
        yield (
            "--teacher_load_in_4bit: the teacher is the student's own base, which lora holds once and whole. Leave it "
            "out, or type --train_mode qlora"
        )
    different = folders.first_difference(ModelFolder.at(common.model_name_or_path).vocabulary, teacher.vocabulary)
    if different:
        yield different_tokenizers(flag, different)

    student, teacher = (ModelFolder.at(one).vocabulary_rows for one in (common.model_name_or_path, path))
    if environment.engine() == "zero3" and student and teacher and student > teacher:
        yield (
            f"{flag}: has embeddings of {teacher} rows, fewer than the student's {student}, and zero3 holds those in "
            "pieces, which cannot be cut to the shared ones. Type LAUNCH=fsdp2 or LAUNCH=zero2"
        )


def different_tokenizers(flag, different):
    return (
        f"{flag}: its tokenizer is not the student's: {different}. Distillation compares the two token by token: take "
        "a teacher of the student's family"
    )


def check_tokens(run):
    """Raises Refused where the teacher cannot read the rows; its tokenizer, of a Hub id, is known only now."""
    config, tokenizer = run.config, run.tokenizer
    path = config.teacher_model_name_or_path
    flag = f"--teacher_model_name_or_path {path}"
    if not path:
        return
    theirs = load.load_tokenizer(path, config.teacher_model_revision, config.trust_remote_code, "the teacher's")
    different = folders.first_difference(tokenizer.get_vocab(), theirs.get_vocab())
    if different:
        raise Refused([different_tokenizers(flag, different)])
    highest = max(max(row["prompt_ids"] + row["completion_ids"]) for row in run.train.rows + run.held_out.rows)
    if highest >= (ModelFolder.at(path).vocabulary_rows or math.inf):
        token = tokenizer.convert_ids_to_tokens(highest)
        raise Refused([f"{flag}: has no token {highest} ({token!r}), which the student's template or data use"])


def prompt_room(run):
    """A function of a row's values: the most tokens that its prompt may have, so that a sampled answer fits."""
    config = run.config
    paths = run.common.model_name_or_path, config.teacher_model_name_or_path
    held = [ModelFolder.at(path).positions for path in paths if path]
    room = min((positions - config.max_completion_length for positions in held if positions), default=math.inf)
    sampled = config.lmbda > 0 or config.seq_kd
    return lambda values: room if sampled or "completion" not in values else math.inf
