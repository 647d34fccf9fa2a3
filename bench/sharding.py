"""What each process holds of parameters and optimizer state under DDP, ZeRO-3 and FSDP2: python bench/sharding.py

Trains DPO with full weights for one step with two processes, through the real command, on a made-up model of 3M
parameters in float32, and adds up when training ends. The last line is JSON: kilobytes a process, and its share of
what DDP holds.
Not counted: DeepSpeed's float32 copy of its share, and its buffers (reduce_bucket_size, 5e8 elements as it comes).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAUNCHES = {"ddp": "cpu", "zero3": "zero3", "fsdp2": "fsdp2"}


def main():
    from tests.conftest import make_model

    line = {"bench": "sharding", "method": "DPO", "processes": 2, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", width=8192)
        for mode in ("full",):
            held = {name: measure(model, Path(folder), mode, launch) for name, launch in LAUNCHES.items()}
            line[mode] = {name: {"kilobytes": kilobytes} for name, kilobytes in held.items()}
            for name in ("zero3", "fsdp2"):
                line[mode][name]["share"] = {
                    what: [round(mine[what] / of[what], 3) for mine, of in zip(held[name], held["ddp"], strict=True)]
                    for what in held["ddp"][0]
                }
            print(mode, line[mode], flush=True)
    print(json.dumps(line))


def measure(model, folder, mode, launch):
    """[{"parameters": kilobytes, "optimizer_state": kilobytes}] of process 0 and of process 1."""
    flags = (
        f"--rlhf_type DPO --train_mode {mode} --model_name_or_path {model} --train_data_path data/preference.jsonl "
    )
    flags += f"--max_samples 8 --max_steps 1 --output_dir {folder / f'{mode}-{launch}'} --save_strategy no"
    env = {**os.environ, "LAUNCH": launch, "NUM_PROCESSES": "2", "HELD_FOLDER": str(folder)}
    command = [sys.executable, "-m", "utils.launch", "bench/sharding.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads((folder / f"held-{rank}").read_text()) for rank in (0, 1)]


def train(argv):
    """One of the processes: trains as train_rlhf.py does, and writes what it holds when training ends."""
    import train_rlhf
    from utils.results import report

    def weigh(self, *args, **kwargs):
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            optimizer = optimizer.optimizer
        parameters = [getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters()]
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        held = {"parameters": kilobytes(parameters), "optimizer_state": kilobytes(states)}
        (Path(os.environ["HELD_FOLDER"]) / f"held-{os.environ['RANK']}").write_text(json.dumps(held))

    report.Report.on_train_end = weigh
    return train_rlhf.main(argv)


def kilobytes(tensors):
    """Of the pieces that this process holds."""
    pieces = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if hasattr(tensor, "numel")]
    return round(sum(piece.numel() * piece.element_size() for piece in pieces) / 1e3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(train(sys.argv[1:]))
    main()
