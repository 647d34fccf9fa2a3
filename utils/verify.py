"""Check saved models: `python -m utils.verify FOLDER ...` opens each as a user would, in a fresh process.

First the files: no truncated or missing shards, no empty, NaN or infinite tensors, no pickled weights, a readable
config and tokenizer, an adapter's base. Then, if a run or merge wrote probe.json from the model in memory, the
reopened model must give the same log-probabilities for the same text (a reward model: scores).

Exit status: 0 sound, 1 not sound (one line: the difference), 2 not a model folder, or a model with custom code.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from utils.results.proof import OUT_OF_MEMORY, verify
from utils.runtime import environment
from utils.runtime.environment import is_out_of_memory
from utils.runtime.errors import Failed, Refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a result, a merged model, or a checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device of the reopened model")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    with contextlib.suppress(OSError):  # if memory runs out, the system kills this process, not a trainer
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    if asked.device == "cuda" and not environment.has_gpu():
        parser.error("--device cuda: no GPU is visible. Remove the flag")
    status = 0
    for folder in asked.folders:
        try:
            print(verify(folder, asked.device), flush=True)
        except Refused as refusal:
            refusal.say()
            status = 2
        except Failed as error:
            print(error, file=sys.stderr)
            status = max(status, 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{folder}: out of memory while it is reopened ({error})", file=sys.stderr)
            status = OUT_OF_MEMORY
    return status


if __name__ == "__main__":
    sys.exit(main())
