"""What each process holds once it trains, under DDP, ZeRO-3 and FSDP2: python bench/sharding.py

Trains DPO for one step in each mode with two processes, through the real command, on SmolLM2-135M in float32. When
training ends, every process adds up the tensors that live in it: parameters, optimizer state, the reference;
activations are gone by then. The last line is JSON: megabytes a process, and the share of what DDP holds.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAUNCHES = {"ddp": "cpu", "zero3": "zero3", "fsdp2": "fsdp2"}
MODES = ("full", "lora", "qlora")


def main():
    from utils.demo_model import make_demo_model

    found = {}
    model = make_demo_model(ROOT / "models" / "SmolLM2-135M-Instruct")
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            for name, launch in LAUNCHES.items():
                found[mode, name] = measure(model, Path(folder), mode, launch)
                print(f"{mode:6} {name:6} {found[mode, name]} MB a process", flush=True)
    line = {"bench": "sharding", "method": "DPO", "model": model.name, "processes": 2, "dtype": "float32"}
    for mode in MODES:
        whole = found[mode, "ddp"]
        line[mode] = {"ddp_megabytes": whole}
        for name in ("zero3", "fsdp2"):
            shares = [round(mine / of, 3) for mine, of in zip(found[mode, name], whole, strict=True)]
            line[mode] |= {f"{name}_megabytes": found[mode, name], f"{name}_share": shares}
    print(json.dumps(line))


def measure(model, folder, mode, launch):
    """[megabytes that process 0 holds, that process 1 holds]."""
    out = folder / f"{mode}-{launch}"
    flags = (
        f"--rlhf_type DPO --train_mode {mode} --model_name_or_path {model} --train_data_path data/preference.jsonl "
    )
    flags += f"--max_samples 8 --max_steps 1 --max_length 256 --output_dir {out} --save_strategy no"
    env = {**os.environ, "LAUNCH": launch, "NUM_PROCESSES": "2", "HELD_FOLDER": str(folder)}
    command = [sys.executable, "-m", "utils.launch", "bench/sharding.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads((folder / f"held-{rank}").read_text()) for rank in (0, 1)]


def train(argv):
    """One of the processes: trains as train_rlhf.py does, and writes what it holds when training ends."""
    import train_rlhf
    from utils import report

    def weigh(self, *args, **kwargs):
        rank = os.environ["RANK"]
        (Path(os.environ["HELD_FOLDER"]) / f"held-{rank}").write_text(json.dumps(held_megabytes()))

    report.Report.on_train_end = weigh
    return train_rlhf.main(argv)


def held_megabytes():
    """The storages of all live tensors, each counted once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            thing = getattr(thing, "_local_tensor", thing)  # an FSDP2 parameter's own piece
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return round(sum(storages.values()) / 1e6)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(train(sys.argv[1:]))
    main()
