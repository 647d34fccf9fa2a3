"""Memory of parameters and optimizer state per process under DDP, ZeRO-3 and FSDP2.

    python bench/sharding.py

Trains DPO with full weights for one step on two processes with train_rlhf.py, on a model of 3M random parameters in
float32, and sums the tensors when training ends. The last line is JSON: kilobytes per process, and the share of DDP's.
Not counted: DeepSpeed's float32 copy of its share, and its buffers (reduce_bucket_size, 5e8 elements by default).
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import harness

LAUNCHES = {"ddp": "cpu", "zero3": "zero3", "fsdp2": "fsdp2"}


def main():
    harness.make_parser(__doc__).parse_args()
    from tests.conftest import make_model

    with TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", width=8192)
        held = {name: measure(model, Path(folder), launch) for name, launch in LAUNCHES.items()}
    full = {name: {"kilobytes": kilobytes} for name, kilobytes in held.items()}
    for name in ("zero3", "fsdp2"):
        full[name]["share"] = {
            kind: [round(ours[kind] / ddp[kind], 3) for ours, ddp in zip(held[name], held["ddp"], strict=True)]
            for kind in held["ddp"][0]
        }
    harness.finish("sharding", method="DPO", processes=2, dtype="float32", full=full)


def measure(model, folder, launch):
    """[{"parameters": kilobytes, "optimizer_state": kilobytes}] of both processes."""
    flags = f"--rlhf_type DPO --train_mode full --model_name_or_path {model} --train_data_path data/preference.jsonl "
    flags += f"--max_samples 8 --max_steps 1 --output_dir {folder / launch} --save_strategy no"
    command = [sys.executable, "-m", "utils.launch", "bench/sharding.py", *flags.split()]
    harness.run(command, LAUNCH=launch, NUM_PROCESSES="2", HELD_FOLDER=str(folder))
    held = [json.loads((folder / f"held-{rank}").read_text()) for rank in (0, 1)]
    print(launch, held, flush=True)
    return held


def train(argv):
    """One of the processes: trains, and writes its memory to a file when training ends."""
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
    """Size of the local shards."""
    shards = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if hasattr(tensor, "numel")]
    return round(sum(shard.numel() * shard.element_size() for shard in shards) / 1e3)


if __name__ == "__main__":
    if "HELD_FOLDER" in os.environ:
        sys.exit(train(sys.argv[1:]))
    main()
