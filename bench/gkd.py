"""Our distillation and TRL 1.16's GKDTrainer on the same models, rows, seed and batches.

    python bench/gkd.py [--parts on_policy seq_kd memory kinds]

Each measurement runs in a new process, in float32; both trainers are called from Python.

on_policy: lmbda 1, answers of exactly --new_tokens tokens, gradient checkpointing on (TRL's default): completions per
    second of whole steps (sampling, both forward passes, backward), and the largest difference of the gradients of
    both trainers on the same completions.
seq_kd: --seq_epochs epochs on the teacher's answers; TRL samples them again in each step. Seconds, sampling included.
memory: peak of one step above the memory before it; batch 4, length 512, vocabulary 151936, small hidden sizes.
kinds: gkd_run.sh as shipped, for each kind, --kind_steps steps of 4 rows from the same start: held-out numbers before
    and after, and seconds of the steps.

Needs the demo student and teacher: python -m utils.demo_model --student
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness
from bench.harness import MODEL as TEACHER, ROOT

STUDENT = "models/SmolLM2-106M-student"
SHARED = {
    "per_device_train_batch_size": 8,  # transformers' default
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "seed": 42,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": True,
    "lmbda": 1.0,
    "beta": 0.5,
    "temperature": 1.0,
    "disable_dropout": True,
}
KINDS = {
    "KD (lmbda 0)": {"LMBDA": "0"},
    "GKD (lmbda 0.5)": {"LMBDA": "0.5"},
    "on-policy (lmbda 1)": {"LMBDA": "1"},
    "SeqKD": {"SEQ_KD": "True"},
}


def main():
    parser = harness.make_parser(__doc__)
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of an on-policy answer")
    parser.add_argument("--seq_tokens", type=int, default=32, help="tokens of a SeqKD answer")
    parser.add_argument("--seq_epochs", type=int, default=3)
    parser.add_argument("--kind_steps", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["on_policy", "seq_kd", "memory", "kinds"])
    asked = parser.parse_args()
    result = {"student": STUDENT, "teacher": TEACHER, "new_tokens": asked.new_tokens}
    if "on_policy" in asked.parts:
        ours, trl = compare(measure_on_policy, asked.new_tokens)
        speed = round(ours["completions_per_second"] / trl["completions_per_second"], 2)
        apart = ours["gradients_apart"]
        result["on_policy"] = {"completions_per_second_ratio": speed, "gradients_apart": apart}
    if "seq_kd" in asked.parts:
        ours, trl = compare(measure_seq_kd, asked.seq_tokens, asked.seq_epochs)
        result["seq_kd"] = {"epochs": asked.seq_epochs, "speed_ratio": round(trl["seconds"] / ours["seconds"], 2)}
    if "memory" in asked.parts:
        ours, trl = compare(measure_memory)
        result["memory"] = {"peak_of_a_step_ratio": round(ours["step_bytes"] / trl["step_bytes"], 3)}
    if "kinds" in asked.parts:
        with TemporaryDirectory() as folder:
            found = {name: train_kind(Path(folder), flags, asked.kind_steps) for name, flags in KINDS.items()}
        print_kinds(found)
        result["kinds"] = {"steps": asked.kind_steps, **found}
    harness.finish("gkd", **result)


def compare(measure, *args):
    """Results of our trainer and of TRL's."""
    found = []
    for side in ("ours", "trl"):
        with TemporaryDirectory() as folder:
            found.append(harness.call(measure, side, folder, *args, **harness.CPU))
        print(measure.__name__, side, found[-1], flush=True)
    return found


def train_kind(folder, variables, steps):
    """Held-out numbers before and after gkd_run.sh, and the seconds of its steps."""
    out = folder / "-".join(variables.values())
    env = variables | {"MAX_STEPS": str(steps), "OUTPUT_DIR": str(out), "PYTHON": sys.executable}
    harness.run(["bash", "gkd_run.sh", "--answers_dir", folder / "answers", "--save_strategy", "no"], **env)
    card = json.loads((out / "run_card.json").read_text(encoding="utf-8"))
    print(variables, card["held_out"], flush=True)
    return {**card["held_out"], "train_seconds": card["throughput"]["train_seconds"]}


def print_kinds(kinds):
    """The table of docs/methods/gkd.md."""
    before = next(iter(kinds.values()))["before"]
    names = [name for name in before if name != "loss"]
    rows = [["before", *(f"{before[name]:.3f}" for name in names), ""]]
    for kind, found in kinds.items():
        rows.append([kind, *(f"{found['after'][name]:.3f}" for name in names), f"{found['train_seconds']:.0f}"])
    print(harness.table(["", *names, "seconds"], rows))


# ── the two trainers ─────────────────────────────────────────────────────────────────────────────────────────────────


def load(path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokenizer_of(path):
    from utils.data import template
    from utils.models.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    template.fit_tokenizer(tokenizer, chat=True)
    return tokenizer


def dialogues(count):
    lines = (ROOT / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [{"messages": json.loads(line)["messages"]} for line in lines]


def make_ours(student, teacher, tokenizer, rows, folder, tokens, **flags):
    """GKDTrainer of this project on chats, and the rows that it is given."""
    from rlhf_args.gkd_config import GKDConfig
    from trainers.gkd_trainer import GKDTrainer
    from utils.data import columns, prepare

    config = GKDConfig(output_dir=str(folder), max_completion_length=tokens, **{**SHARED, **flags})
    split = [("row", columns.split_answer(row)) for row in rows]
    prepared = prepare.prepare_rows(split, tokenizer, ("prompt", "completion"), 1024)
    dataset = prepare.as_dataset(prepared)
    trainer = GKDTrainer(student, config, teacher, processing_class=tokenizer, train_dataset=dataset)
    trainer.generation_config.min_new_tokens = tokens
    return trainer, prepared.rows


def make_trl(student, teacher, tokenizer, rows, folder, tokens, **flags):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(output_dir=str(folder), max_new_tokens=tokens, **{**SHARED, **flags})
    trainer = GKDTrainer(student, teacher, config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    trainer.generation_config.min_new_tokens = tokens
    return trainer


def make(side, *args, **flags):
    return make_ours(*args, **flags)[0] if side == "ours" else make_trl(*args, **flags)


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure_on_policy(side, folder, new_tokens):
    tokenizer, rows = tokenizer_of(TEACHER), dialogues(SHARED["per_device_train_batch_size"])
    trainer = make(side, load(STUDENT), load(TEACHER), tokenizer, rows, folder, new_tokens, num_train_epochs=1)
    seconds = harness.seconds_of(trainer.train)
    found = {"completions_per_second": round(len(rows) / seconds, 4), "step_seconds": round(seconds, 1)}
    return found | ({"gradients_apart": compare_gradients(folder)} if side == "ours" else {})


def compare_gradients(folder):
    """Largest difference of both trainers' gradients on the same completions / the largest gradient."""
    import torch

    tokenizer, rows = tokenizer_of(TEACHER), dialogues(4)
    teacher, gradients = load(TEACHER), {}
    ours, made = make_ours(load(STUDENT), teacher, tokenizer, rows, folder, 8)
    theirs = make_trl(load(STUDENT), teacher, tokenizer, rows, folder, 8)

    def padded(name, left, fill):
        width = max(len(row[name]) for row in made)
        spare = [[fill] * (width - len(row[name])) for row in made]
        pairs = zip(spare, [row[name] for row in made], strict=True)
        return torch.tensor([s + ids if left else ids + s for s, ids in pairs])

    prompts, answers = padded("prompt_ids", True, -1), padded("completion_ids", False, -1)
    both = torch.cat([prompts, answers], 1)
    labels = torch.cat([torch.full_like(prompts, -100), answers.masked_fill(answers < 0, -100)], 1)
    count = (answers >= 0).sum()
    filled = {name: ids.clamp(min=0) for name, ids in (("prompt_ids", prompts), ("completion_ids", answers))}
    masks = {"prompt_mask": (prompts >= 0).long(), "completion_mask": (answers >= 0).long()}
    batches = {
        ours: {**filled, **masks, "num_items_in_batch": count},
        theirs: {"input_ids": both.clamp(min=0), "attention_mask": (both >= 0).long(), "labels": labels},
    }
    for trainer, batch in batches.items():
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
        gradients[trainer] = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert gradients[ours].keys() == gradients[theirs].keys()
    largest = max(grad.abs().max() for grad in gradients[theirs].values())
    apart = max((gradients[ours][name] - grad).abs().max() for name, grad in gradients[theirs].items())
    return float(f"{apart / largest:.2g}")


def measure_seq_kd(side, folder, tokens, epochs):
    tokenizer, rows = tokenizer_of(TEACHER), dialogues(8)
    student, teacher = load(STUDENT), load(TEACHER)
    flags = {"lmbda": 0.0, "seq_kd": True, "num_train_epochs": epochs}
    if side == "trl":
        trainer = make_trl(student, teacher, tokenizer, rows, folder, tokens, **flags)
        return {"seconds": round(harness.seconds_of(trainer.train), 1)}
    from datasets import Dataset

    from utils.models import sampling

    _, made = make_ours(student, teacher, tokenizer, rows, folder, tokens, **flags)
    prompts, drawn = [row["prompt_ids"] for row in made], sampling.Sampling(tokens)
    teacher.generation_config.eos_token_id = -1  # answers of exactly `tokens` tokens
    kept = sampling.answers_folder(Path(folder, "answers"), "teacher", drawn)
    missing = sampling.missing_prompts(kept, prompts)
    sampled = harness.seconds_of(sampling.answer_prompts, teacher, tokenizer, missing, drawn, kept, 16)
    answers = sampling.read_answers(kept)
    for row, prompt in zip(made, prompts, strict=True):
        row["completion_ids"] = answers[sampling.prompt_key(prompt)]
    trainer, _ = make_ours(student, teacher, tokenizer, rows, folder, tokens, **flags)
    trainer.train_dataset = Dataset.from_list(made)
    return {"seconds": round(sampled + harness.seconds_of(trainer.train), 1)}


def measure_memory(side, folder):
    """Peak of one supervised step above the memory before it; 4 rows of 512 tokens, half of them the answer's."""
    import psutil
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer_of(TEACHER)
    shape = {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    student, teacher = (Qwen2ForCausalLM(Qwen2Config(**shape, **heads)) for _ in range(2))
    asks, says = "ask " * 180, "say " * 280
    rows = [{"messages": [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]}] * 4
    cut = {"max_length": 512, "lmbda": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    trainer = make(side, student, teacher, tokenizer, rows, folder, 8, **cut)
    before = psutil.Process().memory_info().rss
    trainer.train()
    return {"step_bytes": harness.peak_bytes() - before}


if __name__ == "__main__":
    main()
