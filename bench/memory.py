"""Peak memory measured beside planned, of random weights: python bench/memory.py [--methods DPO PPO] [--modes lora]

Each cell (method x train mode x launch) trains for two steps through the real command, in processes of its own, on
rows of almost one length; further flags go to that command. On a GPU the peak is torch.cuda.max_memory_allocated; on a
CPU it is the running total of torch's allocator as its profiler records it. Of several processes the largest counts.
Planned is what --plan says of the same command. Prints a line a cell and, last, one JSON object. Nothing is
downloaded: the model's shape is --shape, a name below or the fields of a config as JSON. Cells run --jobs at once,
which changes no peak. On a CPU in bfloat16 torch and bitsandbytes copy weights as no GPU does: compare in float32.

    python bench/memory.py --again bench/memory_h100.jsonl

measures nothing: it plans anew what was measured elsewhere, from the JSON that was printed there.
"""

import argparse
import ctypes
import json
import os
import random
import string
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)  # before the imports that change it
sys.path.insert(0, str(ROOT))
PROMPT, SAMPLED = 100, 64  # tokens of a prompt, and of an answer that the policy gives itself
PHASES = ("load", "rollout", "forward", "backward", "update")
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SHAPES = {
    "small": (512, 8, 8, 2, 1408, 32000, False),  # 53M parameters
    "qwen2-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2-7b": (3584, 28, 28, 4, 18944, 152064, False),
}


def main():
    from utils.runtime.environment import has_gpu

    gpu = has_gpu()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", default=["DPO", "KTO", "Reward", "CPO", "SFT", "RLOO", "PPO", "GKD"])
    parser.add_argument("--modes", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--launches", nargs="+", default=["single_gpu" if gpu else "cpu"], help="LAUNCH, or LAUNCH:2")
    parser.add_argument("--shape", default="qwen2-7b" if gpu else "small", help="a name, or a config's fields as JSON")
    parser.add_argument("--batch", type=int, default=2, help="rows a device and pass")
    parser.add_argument("--length", type=int, default=256, help=f"tokens of a row, {PROMPT} of them its prompt's")
    parser.add_argument("--top", type=int, default=0, help="on a CPU: the largest that lie there at the peak, so many")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--again", help="a file of what was printed earlier: plan those cells, measure none")
    asked, flags = parser.parse_known_args()
    if asked.again:
        return plan_again(Path(asked.again).read_text().splitlines())
    shape, device = read_shape(asked.shape), "cuda" if gpu else "cpu"
    flags = ["--dtype", "bfloat16" if gpu else "float32", "--gradient_checkpointing", str(gpu), *flags]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        make_weights(folder, make_folder(folder, shape))
        found = {}
        for method in asked.methods:
            write_rows(Path(folder, f"{method}.jsonl"), method, asked.length - PROMPT)
            for mode in asked.modes:
                for launch in asked.launches:
                    words = command_of(folder, method, mode, launch, asked.batch, asked.length, flags)
                    cell = method, mode, launch
                    own = f"{folder}/{'-'.join(cell)}"
                    found["-".join(cell)] = pool.submit(measure, words, *cell, own, asked.top, device)
        cells = {name: cell.result() for name, cell in found.items()}
    line = {"bench": "memory", "device": device, "shape": shape, "flags": flags}
    print(json.dumps(line | {"batch": asked.batch, "length": asked.length, "cells": cells}))


def plan_again(lines):
    """Prints each cell's phases as measured and as planned now, and one JSON object of the errors of the peaks."""
    errors = {}
    for found in map(json.loads, lines):
        with TemporaryDirectory() as folder:
            make_folder(folder, found["shape"])
            for name, cell in found["cells"].items():
                method, mode, launch = name.split("-")
                write_rows(Path(folder, f"{method}.jsonl"), method, found["length"] - PROMPT)
                flags = [*found["flags"], *cell.get("flags", ())]
                words = command_of(folder, method, mode, launch, found["batch"], found["length"], flags)
                phases = plan_cell(words, *split_launch(launch), found["device"])
                peak = max(phases[phase] for phase in cell["phases"])  # of those that were measured
                size = f"{found['shape']['hidden_size']} x {found['shape']['num_hidden_layers']}"
                errors[f"{size} {name}"] = error = round(peak / cell["measured"] - 1, 4)
                print(f"{size} {name}  measured {say(cell['measured'], cell['phases'])}")
                print(f"    planned {say(peak, phases)}: {error:+.1%}", flush=True)
    print(json.dumps({"bench": "memory", "errors": errors, "largest": max(errors.values(), key=abs)}))


def read_shape(given):
    return dict(zip(FIELDS, SHAPES[given], strict=True)) if given in SHAPES else json.loads(given)


def make_folder(folder, shape):
    """The folders of model and teacher, another model of the same weights: a config and a byte-level tokenizer, whose
    vocabulary is smaller than the model's. Returns the config."""
    from transformers import Qwen2Config

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**shape, **ends, max_position_embeddings=4096, dtype="bfloat16")
    for saved in (config, tokenizer):
        saved.save_pretrained(Path(folder, "model"))
    link_files(folder)
    return config


def link_files(folder):
    Path(folder, "teacher").mkdir(exist_ok=True)
    for file in Path(folder, "model").iterdir():
        if not (there := Path(folder, "teacher", file.name)).exists():
            there.symlink_to(file)


def make_weights(folder, config):
    """Random ones."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(Path(folder, "model"))
    torch.cuda.empty_cache()  # for the cells
    link_files(folder)


def write_rows(path, method, answer):
    """What the method trains on, in answers of so many tokens, the end of turn counted: a letter is a token.

    Every other row is some tokens shorter, so that there is padding and a mask.
    """
    from rlhf_args.methods import ANSWERED, DIALOGUE, EVERY

    single = EVERY[method].columns in (DIALOGUE, ANSWERED)
    sizes = {"prompt": PROMPT} | dict.fromkeys(("completion",) if single else ("chosen", "rejected"), answer - 1)
    letters = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(16):
            less = 4 * (number % 2)
            row = {name: "".join(letters.choices(string.ascii_lowercase, k=k - less)) for name, k in sizes.items()}
            file.write(json.dumps(row) + "\n")


def command_of(folder, method, mode, launch, batch, length, flags):
    """[script, flags ...] of a cell."""
    from rlhf_args.methods import EVERY

    words = [f"train_{EVERY[method].entry}.py", "--model_name_or_path", f"{folder}/model", "--train_mode", mode]
    words += ["--train_data_path", f"{folder}/{method}.jsonl", "--per_device_train_batch_size", str(batch)]
    words += ["--output_dir", f"{folder}/{method}-{mode}-{launch}/run", "--max_steps", "2", "--save_strategy", "no"]
    if EVERY[method].sample_reward:
        words += ["--reward_funcs", EVERY[method].sample_reward, "--max_completion_length", str(SAMPLED)]
        # a rollout a step: the second has Adam's state beside it
        words += ["--num_generations", "2", "--num_iterations", "1"]
    else:
        words += ["--max_length", str(length), "--train_sampling_strategy", "sequential"]
    if method == "GKD":
        words += ["--teacher_model_name_or_path", f"{folder}/teacher", "--answers_dir", f"{folder}/answers"]
        words += ["--max_completion_length", str(length - PROMPT)]  # as long as the data's
    else:
        words += ["--rlhf_type", method]
    return [*words, *flags]


def measure(words, method, mode, launch, folder, top, device):
    """What a cell took, said on a line."""
    name, _, processes = launch.partition(":")
    Path(folder).mkdir()
    command = [sys.executable, "-m", "utils.launch", "bench/memory.py", *words]
    env = {"LAUNCH": name, "NUM_PROCESSES": processes or "1", "MEASURED": folder, "TOP": str(top)}
    planning = {"PLANNED": launch, "DEVICE": device, "CUDA_VISIBLE_DEVICES": ""}
    planning = start([sys.executable, "bench/memory.py", *words], **planning)
    measuring = start(command, **env)
    _, errors = measuring.communicate()
    planned, trouble = planning.communicate()
    for process, what in (measuring, errors), (planning, trouble):
        if process.returncode:
            print(f"{method} {mode} {launch}  exit status {process.returncode}\n{what[-1500:]}", flush=True)
            return {"failed": what.strip().splitlines()[-1:]}
    phases = json.loads(planned.splitlines()[-1])
    peak = max(phases.values())
    found = [json.loads(file.read_text()) for file in Path(folder).glob("measured-*")]
    cell = max(found, key=lambda one: one["measured"])
    cell |= {"planned": peak, "error": round(peak / cell["measured"] - 1, 4)}
    print(f"{method} {mode} {launch}  measured {say(cell['measured'], cell['phases'])}")
    print(f"    planned {say(peak, phases)}: {cell['error']:+.1%}", flush=True)
    for size, count, where in cell.get("largest", ()):
        print(f"    {size / 1e6:9.1f} MB  {count:4} x  {where}")
    return cell


def start(command, **env):
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | env, text=True, stdout=-1, stderr=-1)


def say(peak, phases):
    return f"{peak / 1e6:.1f} MB ({', '.join(f'{phase} {size / 1e6:.0f}' for phase, size in phases.items())})"


def split_launch(launch):
    """(the engine that --plan knows, processes) of a cell's launch."""
    name, _, processes = launch.partition(":")
    return name.replace("cpu", "multi_gpu" if processes else "single_gpu"), int(processes or 1)


def plan_cell(words, engine, processes, device):
    """{phase: bytes} that --plan says of the same command."""
    from utils.plan.planner import Planner

    name = "GKD" if "gkd" in words[0] else None
    asked = [*words[1:], "--plan", engine, "--num_processes", str(processes)]
    planner = Planner(asked, name, on_gpu=device == "cuda")
    estimate = planner.estimate(planner.case)
    return {phase: sum(estimate.phases[phase].values()) for phase in PHASES if phase in estimate.phases}


# ── one of a cell's processes ────────────────────────────────────────────────────────────────────────────────────────


def train(words):
    """Trains as the command does, marks the phases, and writes what it took; nothing is saved or reopened."""
    import torch

    import train_gkd
    import train_rlhf
    from utils.training import chapters

    meter = GPUMeter() if torch.cuda.is_available() else CPUMeter()
    make_trainer = chapters.make_trainer

    def make_marked(*args, **kwargs):
        return mark_phases(make_trainer(*args, **kwargs), meter)

    chapters.make_trainer, chapters.save_and_verify = make_marked, lambda *args, **kwargs: None
    script = {"train_rlhf.py": train_rlhf, "train_gkd.py": train_gkd}[words[0]]
    with meter:
        status = script.main(words[1:])
    if not status:
        file = Path(os.environ["MEASURED"], f"measured-{os.environ.get('RANK', 0)}")
        file.write_text(json.dumps(meter.read()))
    return status


def mark_phases(trainer, meter):
    """Tells the meter which phase begins. DeepSpeed's step is part of what accelerate calls backward."""
    from accelerate.optimizer import AcceleratedOptimizer

    def marked(function, before, after=None):
        def call(*args, **kwargs):
            meter.enter(before)
            out = function(*args, **kwargs)
            if after:
                meter.enter(after)
            return out

        return call

    trainer._prepare_inputs = marked(
        trainer._prepare_inputs, "rollout" if hasattr(trainer, "generating") else "forward"
    )
    trainer.compute_loss = marked(trainer.compute_loss, "forward")
    trainer.accelerator.backward = marked(trainer.accelerator.backward, "backward", "update")
    AcceleratedOptimizer.step = marked(AcceleratedOptimizer.step, "update")
    if trainer.is_deepspeed_enabled:
        from deepspeed import DeepSpeedEngine

        DeepSpeedEngine.step = marked(DeepSpeedEngine.step, "update")
    return trainer


class GPUMeter:
    def __enter__(self):
        self.phase, self.phases = "load", Counter()

    def __exit__(self, *_):
        self.enter("weights")

    def enter(self, phase):
        import torch

        self.phases[self.phase] = max(self.phases[self.phase], torch.cuda.max_memory_allocated())
        self.reserved = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def read(self):
        return {"measured": max(self.phases.values()), "phases": self.phases, "reserved": self.reserved}


class CPUMeter:
    """The allocator tells the profiler of each block of the main thread that comes or goes, and the total."""

    def __enter__(self):
        import torch
        from transformers import PreTrainedModel

        load = PreTrainedModel.from_pretrained.__func__

        def load_into_memory(cls, *args, **kwargs):
            model = load(cls, *args, **kwargs)
            self.enter("weights")
            own_memory(model)
            self.enter("load")
            return model

        PreTrainedModel.from_pretrained = classmethod(load_into_memory)
        seen = "FLAGS_caffe2_report_cpu_memory_usage"  # what other threads take and give back is in its totals too
        ctypes.c_bool.in_dll(ctypes.CDLL(Path(torch.__file__).parent / "lib/libc10.so"), seen).value = True
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()

    def __exit__(self, *error):
        self.profiler.__exit__(*error)

    def enter(self, phase):
        import torch

        with torch.profiler.record_function(f"phase {phase}"):
            pass

    def read(self):
        tree = self.profiler.profiler.kineto_results.experimental_event_tree()
        events = sorted(flatten(tree), key=lambda found: found[0].start_time_ns)  # of "weights" none is the peak
        phase, phases, blocks = "load", Counter(), []
        for event, operation in events:
            if event.name.startswith("phase "):
                phase = event.name[6:]
            elif event.name == "[memory]":
                block = event.extra_fields
                total = 0 if phase == "weights" else block.total_allocated
                phases[phase] = max(phases[phase], total)
                blocks.append((total, block.ptr, block.alloc_size, f"{phase}, {operation}"))
        peak = max(range(len(blocks)), key=lambda place: blocks[place][0])
        phases.pop("weights", None)
        return {"measured": blocks[peak][0], "phases": phases, "largest": largest(blocks[: peak + 1])}


def flatten(events, operation=""):
    """(event, the outermost operation that it is part of)."""
    for event in events:
        yield event, operation
        yield from flatten(event.children, operation or event.name)


def largest(blocks):
    """[(bytes, how many blocks, where they came from)] of those alive after these events, the --top largest."""
    alive, sums = {}, Counter()
    for _, pointer, size, where in blocks:
        if size > 0:
            alive[pointer] = size, where
        else:
            alive.pop(pointer, None)
    counts = Counter(where for _, where in alive.values())
    for size, where in alive.values():
        sums[where] += size
    return [(size, counts[where], where) for where, size in sums.most_common(int(os.environ["TOP"]))]


def own_memory(model):
    """The model with all of it in the allocator's memory: what loading maps from the file, or fills in threads of its
    own, the profiler does not see."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not hasattr(tensor, "ds_id"):  # ZeRO-3 has allocated its share itself
            tensor.data = tensor.data.clone()
        state = getattr(tensor, "quant_state", None)
        for part in (state, state and state.state2) if state else ():
            part.absmax, part.code = part.absmax.clone(), part.code.clone()
    return model


if __name__ == "__main__":
    if "PLANNED" in os.environ:
        print(json.dumps(plan_cell(sys.argv[1:], *split_launch(os.environ["PLANNED"]), os.environ["DEVICE"])))
    elif "MEASURED" in os.environ:
        sys.exit(train(sys.argv[1:]))
    else:
        main()
