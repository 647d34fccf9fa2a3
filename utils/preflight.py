"""What can be known of a run before a model is loaded, beyond what is refused: its weights, lengths, rows, disk.

`findings` is what a run says at its start, what `--check` says, and what stands in run_card.json.
"""

import importlib.metadata
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from utils import checks
from utils.data import repeats
from utils.models.folders import (
    base_of,
    count_trained,
    describe_weights,
    gigabytes,
    is_safetensors,
    model_positions,
    read_adapter,
    read_header,
    read_tensors,
    vocabulary_rows,
)
from utils.runtime import environment
from utils.runtime.errors import Refused

EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
USUAL = "AdamW usually takes 1e-6 to 5e-5 for full weights and 1e-5 to 5e-4 for adapters"
HIGHEST = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}  # learning rates; above them AdamW hardly learns


@dataclass(frozen=True)
class Finding:
    """`kind`: "warning", or the head of a line that informs. `text` is one line; that of a warning ends in its fix."""

    kind: str
    text: str


def findings(common, config, method, rows, tokenizer, train, held_out):
    """The Findings of a run whose text is prepared. Raises Refused where it could not work."""
    check_vocabulary(common, tokenizer, max(train.highest, held_out.highest))
    warnings = [
        *check_versions(),
        *check_lengths(common, config, train, held_out),
        *check_tokens(train, held_out),
        *check_rows(rows),
        *check_balance(config, rows),
        *check_schedule(common, config, method, len(train.rows)),
    ]
    disk, further = check_disk(common, config, method, len(train.rows))
    told = [("weights", describe_weights(common.model_name_or_path)), ("lengths", describe_lengths(train)), disk]
    told = [Finding(kind, text) for kind, text in told if text]
    return told + [Finding("warning", text) for text in [*warnings, *further]]


# ── the installation ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_versions(file=Path(__file__).parent.parent / "requirements.txt"):
    """Warnings of packages that are not in the version that requirements.txt pins."""
    from packaging.version import Version

    for name, pinned in re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is not installed, pinned {pinned}. Type pip install -r {file.name}"
            continue
        if Version(installed).public != pinned:
            yield f"{name} {installed} is installed, pinned {pinned}. Type pip install -r {file.name}"


# ── the weights ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_folders(common, config):
    """Problems of the weights of every model that the run would load, as far as their headers tell."""
    named = [common.model_name_or_path, getattr(common, "reward_model_path", None)]
    named += [getattr(config, flag, None) for flag in ("teacher_model_name_or_path", "value_model_path")]
    folders = dict.fromkeys(folder for path in named if path for folder in (path, base_of(path)))
    return [problem for folder in folders if Path(folder).is_dir() for problem in check_weights(Path(folder))]


def check_weights(folder):
    """Problems of a folder's safetensors files: cut ones, and those that are missing of several."""
    again = "Download or copy it again"
    for file in sorted(folder.glob("*.safetensors")):
        if not is_safetensors(file):
            continue  # said by checks.check_folder
        try:
            whole = end_of(file)
        except (ValueError, TypeError, KeyError):
            yield f"{file}: its header cannot be read. {again}"
            continue
        size = file.stat().st_size
        if size != whole:
            yield f"{file}: has {size} bytes, and {whole} by its header. {again}"
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            yield f"{index}: cannot be read. {again}"
            continue
        yield from (
            f"{index}: names {shard}, which is not there. {again}" for shard in shards if not (folder / shard).exists()
        )


def end_of(file):
    """How many bytes a safetensors file has, by its header."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    return 8 + length + max((tensor["data_offsets"][1] for tensor in read_header(file).values()), default=0)


def check_vocabulary(common, tokenizer, highest):
    """Raises Refused where the model has no embedding for a token that the data use, of which `highest` is the last.

    A tokenizer may know further ones that text has no use for (Gemma's for images).
    """
    path, revision = common.model_name_or_path, common.model_revision
    tensors = read_tensors(base_of(path)) | read_tensors(path)
    said = vocabulary_rows(path, revision)
    rows = next((tensor["shape"][0] for name, tensor in tensors.items() if EMBEDDINGS.search(name)), said)
    if not rows:
        return
    if said and said != rows and not read_adapter(path):
        raise Refused(
            [
                f"{path}: vocab_size is {said} in its config.json, and its embeddings have {rows} rows. Copy both "
                "from the original model"
            ]
        )
    used = max(highest, tokenizer.pad_token_id, tokenizer.eos_token_id)
    if used >= rows:
        raise Refused(
            [
                f"{path}: the data need token {used} ({tokenizer.convert_ids_to_tokens(used)!r}), and its embeddings "
                f"have {rows} rows. Its tokenizer is another model's, or tokens were added to it alone: copy the "
                "tokenizer from the original model"
            ]
        )


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_lengths(train):
    """ "prompt 17, 40, 93; chosen ..., in tokens: median, 95 %, longest" of all rows read."""
    said = [f"{name} {', '.join(map(str, percentiles(lengths)))}" for name, lengths in train.lengths.items()]
    return f"{'; '.join(said)} tokens (median, 95 %, longest)" if said else ""


def percentiles(lengths):
    """(median, 95th percentile, longest): the smallest length that so many of the rows do not exceed."""
    ordered = sorted(lengths)
    return [ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 1)]


def check_lengths(common, config, train, held_out):
    """A warning where max_length cuts or drops rows, with the one that would not."""
    flag = "max_prompt_length" if hasattr(config, "max_prompt_length") else "max_length"
    dropped = sum("longer than" in reason for _, reason, _ in train.dropped + held_out.dropped)
    cut, longest = train.cut + held_out.cut, max(train.longest, held_out.longest)
    if not cut and not dropped:
        return
    total = sum(len(part.rows) + len(part.dropped) for part in (train, held_out))
    held = model_positions(common.model_name_or_path)
    room = held and held - (config.max_completion_length if flag == "max_prompt_length" else 0)
    way_out = f"--{flag} {longest} would take all rows whole"
    if room and room < longest:
        way_out = f"the longest has {longest} tokens, and the model holds {room}: --{flag} {room} would take the most"
    limit = checks.length_limit(config, common.model_name_or_path)
    yield f"--{flag} {limit} drops {dropped} and cuts {cut} of {total} rows; {way_out}"


def check_tokens(train, held_out):
    """Warnings of tokens between prompt and answer that a row has once and another time, or not once."""
    total = len(train.rows) + len(held_out.rows)
    spanned = train.spanned + held_out.spanned
    if spanned:
        yield (
            f"in {spanned} of {total} rows ({spanned / max(total, spanned):.0%}) a token spans prompt and answer, "
            "which is not so when the model answers by itself. End the prompts without a space, and begin the answers "
            "with it"
        )
    odd = train.odd + held_out.odd
    if odd:
        (where, what), *_ = odd
        yield (
            f"{len(odd)} rows have more or less than one BOS and one end of turn, as {where} ({what}). Take the "
            "template's own tokens out of the data: it writes them"
        )


def check_rows(rows):
    """Warnings of rows that stand twice, in both parts, or against each other."""
    mend, total = "python -m utils.doctor_data FILE --fix OUT.jsonl", len(dict(rows.train))
    again, against = repeats.find_again(rows.train), repeats.find_against(rows.train)
    if again:
        two = repeats.say_two(again)
        yield f"{len(again)} of {total} rows repeat another, as {two}. `{mend}` keeps the first of each"
    if against:
        two = repeats.say_two(against)
        yield f"{len(against)} of {total} rows contradict another, as {two}. Take out the wrong ones"
    known = {repeats.to_key(row): where for where, row in rows.train} if rows.held_out else {}
    held = {where: known[key] for where, row in rows.held_out if (key := repeats.to_key(row)) in known}
    if held:
        yield (
            f"{len(held)} of {len(dict(rows.held_out))} held-out rows are trained on too, as "
            f"{repeats.say_two(held)}: the result would look better than it is. Take them out of one of the two; "
            f"`{mend}` leaves each once in a file"
        )


def check_balance(config, rows):
    """A warning where KTO's weights x rows, good to bad, are not within 1:1 to 4:3. Source: doctor_data.weigh."""
    labels = [values["label"] for _, values in rows.train if "label" in values]
    true, false = labels.count(True), labels.count(False)
    if not true or not false or not hasattr(config, "desirable_weight"):
        return
    good, bad = true * config.desirable_weight, false * config.undesirable_weight
    if not bad <= good <= bad * 4 / 3 + 1e-9:
        way_out = repeats.weigh(true, false)
        way_out = way_out if way_out.startswith("type") else "leave both weights out"
        yield (
            f"{true} rows are labelled true and {false} false, which --desirable_weight {config.desirable_weight:g} "
            f"and --undesirable_weight {config.undesirable_weight:g} make {good:g} to {bad:g}; KTO wants 1:1 to 4:3: "
            f"{way_out}"
        )


# ── the training ─────────────────────────────────────────────────────────────────────────────────────────────────────


def count_steps(config, method, rows):
    """Optimizer steps of the run; None where the rows do not tell (sampled answers, packing)."""
    if config.max_steps > 0:
        return config.max_steps
    if method.sample_reward or getattr(config, "packing", False):
        return None
    passes = rows / count_batch(config)
    passes = math.floor(passes) if config.dataloader_drop_last else math.ceil(passes)
    return math.ceil(math.ceil(passes / max(config.gradient_accumulation_steps, 1)) * config.num_train_epochs)


def count_batch(config):
    """Rows that all processes take at once; 1 of a batch of 0, which is refused elsewhere."""
    return max(config.per_device_train_batch_size, 1) * environment.processes_asked()


def check_schedule(common, config, method, rows):
    """Warnings of a learning rate, warm-up or batch that hardly trains. Raises Refused where nothing would."""
    steps, a_pass = count_steps(config, method, rows), count_batch(config)
    a_step = a_pass * config.gradient_accumulation_steps
    if config.dataloader_drop_last and rows < a_pass and not method.sample_reward:
        raise Refused(
            [
                f"--dataloader_drop_last: {rows} rows do not fill one batch of {a_pass}, and would all be dropped. "
                "Leave it out, or type --per_device_train_batch_size smaller"
            ]
        )
    highest = HIGHEST[common.train_mode]
    if "adam" in str(getattr(config.optim, "value", config.optim)) and config.learning_rate > highest:
        yield f"--learning_rate {config.learning_rate:g} is above {highest:g}. {USUAL}"
    warm_up = config.get_warmup_steps(steps) if steps else 0
    if steps and warm_up >= steps:
        yield (
            f"--warmup_steps {config.warmup_steps:g}: all {steps} steps would warm up, and the learning rate never be "
            f"reached. Type --warmup_steps {steps // 10}"
        )
    if not method.sample_reward and not getattr(config, "packing", False) and a_step > rows:
        yield (
            f"a step takes {a_step} rows and there are {rows}: each pass over the data is one step. Type "
            "--gradient_accumulation_steps or --per_device_train_batch_size smaller"
        )


def check_disk(common, config, method, rows):
    """(("disk", what the run will take), warnings). Raises Refused where not even one checkpoint fits."""
    trained = count_trained(common)
    if not trained:
        return ("disk", ""), []
    small = sum(file.stat().st_size for file in Path(common.model_name_or_path).glob("*.json"))
    # as models.load_policy holds them; DeepSpeed saves those of --dtype and its own float32 copy
    sharded = environment.engine().startswith("zero") and common.train_mode == "full"
    weights = trained * (2 if sharded and common.dtype != "float32" else 4) + small
    optim = str(getattr(config.optim, "value", config.optim))
    moments = 8 if "adamw" in optim and "8bit" not in optim else 0
    state = 0 if config.save_only_model else trained * (moments + 4 * sharded)
    one, kept = weights + state, count_checkpoints(config, method, rows)
    needed = one * kept + weights
    above = next(
        parent
        for parent in (Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents)
        if parent.exists()
    )
    free = shutil.disk_usage(above).free
    text = (
        f"{kept} checkpoint{'s' * (kept != 1)} of {gigabytes(one)} ({trained / 1e6:.1f}M trained numbers) and "
        f"{gigabytes(weights)} at the end, about; {gigabytes(free)} free"
    )
    fewer = (
        "Free some, name another --output_dir, or type --save_total_limit 1, --save_only_model or --save_strategy no"
    )
    if (one if kept else weights) > free:
        raise Refused([f"--output_dir {config.output_dir}: has no room for one checkpoint: {text}. {fewer}"])
    return ("disk", text), [f"the disk would run full: {text}. {fewer}"] if needed > free else []


def count_checkpoints(config, method, rows):
    """The most checkpoints that are on the disk at once; a new one is written before the oldest is deleted."""
    strategy, steps = config.save_strategy.value, count_steps(config, method, rows)
    if strategy == "no":
        return 0
    limit = config.save_total_limit + 1 if config.save_total_limit else math.inf
    if strategy == "steps" and steps:
        every = config.save_steps if config.save_steps >= 1 else max(1, math.ceil(steps * config.save_steps))
        return min(limit, math.ceil(steps / every))
    return min(limit, math.ceil(config.num_train_epochs)) if strategy == "epoch" else min(limit, 1)
