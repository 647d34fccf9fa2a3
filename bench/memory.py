"""Measured peak memory compared with --plan, on random weights.

    python bench/memory.py [--methods DPO PPO] [--modes lora] [--launches zero3:2] [FLAGS OF THE TRAINING]
    python bench/memory.py --again bench/memory_h100.jsonl       # plan again what was measured earlier; no training

Each cell (method x train mode x launch) trains two steps with the real script in new processes, on rows of about equal
length. On a GPU the peak is torch.cuda.max_memory_allocated; on a CPU it is the largest total of torch's allocator in
its profiler. With several processes the largest peak counts. --jobs cells run at once; this changes no peak. Nothing
is downloaded. On a CPU compare in float32: in bfloat16 torch and bitsandbytes make copies that a GPU does not make.

Prints a line for each cell and, last, one JSON object.
"""

import ctypes
import json
import os
import random
import string
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness

PROMPT, SAMPLED = 100, 64  # tokens of a prompt and of a sampled answer
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
    parser = harness.make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["DPO", "KTO", "Reward", "CPO", "SFT", "RLOO", "PPO", "GKD"])
    parser.add_argument("--modes", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--launches", nargs="+", default=["single_gpu" if gpu else "cpu"], help="LAUNCH, or LAUNCH:2")
    parser.add_argument("--shape", default="qwen2-7b" if gpu else "small", help="a name, or a config's fields as JSON")
    parser.add_argument("--batch", type=int, default=2, help="rows per device and forward pass")
    parser.add_argument("--length", type=int, default=256, help=f"tokens of a row; its prompt has {PROMPT}")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--again", help="file of earlier JSON lines: plan its cells again, measure none")
    asked, flags = parser.parse_known_args()
    if asked.again:
        return plan_again(Path(asked.again).read_text().splitlines())
    device = "cuda" if gpu else "cpu"
    flags = ["--dtype", "bfloat16" if gpu else "float32", "--gradient_checkpointing", str(gpu), *flags]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        shape, found = make_model(folder, asked.shape), {}
        for method in asked.methods:
            write_rows(Path(folder, f"{method}.jsonl"), method, asked.length - PROMPT)
            for mode in asked.modes:
                for launch in asked.launches:
                    words = command_of(folder, method, mode, launch, asked.batch, asked.length, flags)
                    name = f"{method}-{mode}-{launch}"
                    found[name] = pool.submit(measure, words, name, f"{folder}/{name}", launch, device)
        cells = {name: cell.result() for name, cell in found.items()}
    sizes = {"batch": asked.batch, "length": asked.length}
    harness.finish("memory", device=device, shape=shape, flags=flags, **sizes, cells=cells)


def plan_again(lines):
    """Print each cell's phases, measured and planned now, and the errors of the peaks."""
    errors = {}
    for found in map(json.loads, lines):
        with TemporaryDirectory() as folder:
            make_model(folder, json.dumps(found["shape"]), weights=False)
            for name, cell in found["cells"].items():
                method, mode, launch = name.split("-")
                write_rows(Path(folder, f"{method}.jsonl"), method, found["length"] - PROMPT)
                flags = [*found["flags"], *cell.get("flags", ())]
                words = command_of(folder, method, mode, launch, found["batch"], found["length"], flags)
                phases = plan_cell(words, *split_launch(launch), found["device"])
                peak = max(phases[phase] for phase in cell["phases"])  # only measured phases
                size = f"{found['shape']['hidden_size']} x {found['shape']['num_hidden_layers']}"
                errors[f"{size} {name}"] = error = round(peak / cell["measured"] - 1, 4)
                print_cell(f"{size} {name}", cell, peak, phases, error)
    harness.finish("memory", errors=errors, largest=max(errors.values(), key=abs))


def print_cell(name, cell, peak, phases, error):
    for label, total, parts in (("measured", cell["measured"], cell["phases"]), ("planned", peak, phases)):
        each = ", ".join(f"{phase} {size / 1e6:.0f}" for phase, size in parts.items())
        print(f"{name}  {label} {total / 1e6:.1f} MB ({each})")
    print(f"{name}  error {error:+.1%}", flush=True)


def make_model(folder, shape, weights=True):
    """Writes folder/model with a byte-level tokenizer and random weights, and folder/teacher with links to its files.

    shape: as --shape. Without weights only the config is written, for a plan.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.conftest import make_tokenizer

    shape = dict(zip(FIELDS, SHAPES[shape], strict=True)) if shape in SHAPES else json.loads(shape)
    model, teacher, tokenizer = Path(folder, "model"), Path(folder, "teacher"), make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**shape, **ends, max_position_embeddings=4096, dtype="bfloat16")
    torch.manual_seed(0)
    if weights:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(model)
        torch.cuda.empty_cache()  # the cells need this memory
    for saved in (config, tokenizer):
        saved.save_pretrained(model)
    teacher.mkdir()
    for file in model.iterdir():
        (teacher / file.name).symlink_to(file)
    return shape


def write_rows(path, method, answer):
    """Rows for the method, of random letters (a letter is a token).

    answer: tokens of an answer, its end of turn included. Every other row is shorter, so there is padding.
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
        # one rollout per step: in the second, Adam's state is in memory
        words += ["--num_generations", "2", "--num_iterations", "1"]
    else:
        words += ["--max_length", str(length), "--train_sampling_strategy", "sequential"]
    if method == "GKD":
        words += ["--teacher_model_name_or_path", f"{folder}/teacher", "--answers_dir", f"{folder}/answers"]
        words += ["--max_completion_length", str(length - PROMPT)]  # the length in the data
    else:
        words += ["--rlhf_type", method]
    return [*words, *flags]


def measure(words, name, folder, launch, device):
    """Trains and plans a cell, prints and returns both."""
    engine, _, processes = launch.partition(":")
    Path(folder).mkdir()
    command = [sys.executable, "-m", "utils.launch", "bench/memory.py", *words]
    try:
        harness.run(command, LAUNCH=engine, NUM_PROCESSES=processes or "1", MEASURED=folder)
        phases = harness.call(plan_cell, words, *split_launch(launch), device, CUDA_VISIBLE_DEVICES="")
    except RuntimeError as failure:
        print(f"{name}  {failure}", flush=True)
        return {"failed": str(failure).splitlines()[-1]}
    peak = max(phases.values())
    found = [json.loads(file.read_text()) for file in Path(folder).glob("measured-*")]
    cell = max(found, key=lambda one: one["measured"])
    cell |= {"planned": peak, "error": round(peak / cell["measured"] - 1, 4)}
    print_cell(name, cell, peak, phases, cell["error"])
    return cell


def split_launch(launch):
    """(the engine's name in --plan, processes) of a cell's launch."""
    name, _, processes = launch.partition(":")
    return name.replace("cpu", "multi_gpu" if processes else "single_gpu"), int(processes or 1)


def plan_cell(words, engine, processes, device):
    """{phase: planned bytes} of the same command."""
    from utils.plan.planner import Planner

    name = "GKD" if "gkd" in words[0] else None
    asked = [*words[1:], "--plan", engine, "--num_processes", str(processes)]
    planner = Planner(asked, name, on_gpu=device == "cuda")
    estimate = planner.estimate(planner.case)
    return {phase: sum(estimate.phases[phase].values()) for phase in PHASES if phase in estimate.phases}


# ── one of a cell's processes ────────────────────────────────────────────────────────────────────────────────────────


def train(words):
    """Trains with the real script and writes the measured memory; the result is not saved or verified."""
    import torch

    import train_gkd
    import train_rlhf

    meter = GPUMeter() if torch.cuda.is_available() else CPUMeter()
    patch_run(meter)
    script = {"train_rlhf.py": train_rlhf, "train_gkd.py": train_gkd}[words[0]]
    with meter:
        status = script.main(words[1:])
    if not status:
        file = Path(os.environ["MEASURED"], f"measured-{os.environ.get('RANK', 0)}")
        file.write_text(json.dumps(meter.read()))
    return status


def patch_run(meter):
    """The only names of utils/training/run.py that this benchmark replaces."""
    from utils.training import chapters

    make_trainer = chapters.make_trainer
    chapters.make_trainer = lambda *args, **kwargs: mark_phases(make_trainer(*args, **kwargs), meter)
    chapters.save_and_verify = lambda *args, **kwargs: None


def mark_phases(trainer, meter):
    """Tell the meter when a phase begins. DeepSpeed's step runs inside accelerate's backward."""
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
    """Reads the allocator's running total from the profiler, which sees the blocks of the main thread."""

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
        seen = "FLAGS_caffe2_report_cpu_memory_usage"  # the totals include other threads
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
        phase, phases = "load", Counter()
        for event in sorted(flatten(tree), key=lambda event: event.start_time_ns):
            if event.name.startswith("phase "):
                phase = event.name[6:]
            elif event.name == "[memory]" and phase != "weights":  # copies of own_memory are not a peak
                phases[phase] = max(phases[phase], event.extra_fields.total_allocated)
        return {"measured": max(phases.values()), "phases": phases}


def flatten(events):
    for event in events:
        yield event
        yield from flatten(event.children)


def own_memory(model):
    """Copy the weights into memory of the allocator: the profiler sees neither mapped files nor other threads."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not hasattr(tensor, "ds_id"):  # ZeRO-3 has allocated its shard itself
            tensor.data = tensor.data.clone()
        state = getattr(tensor, "quant_state", None)
        for part in (state, state and state.state2) if state else ():
            part.absmax, part.code = part.absmax.clone(), part.code.clone()
    return model


if __name__ == "__main__":
    if "MEASURED" in os.environ:
        sys.exit(train(sys.argv[1:]))
    main()
