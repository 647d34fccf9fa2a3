"""Proof of what was saved: `python -m utils.verify FOLDER ...` opens each as any user would, in a fresh process.

First the files: whole, nothing empty, NaN or infinite, nothing that an index names missing, no pickled weights, config
and tokenizer readable, an adapter's base there. Then, where a run or a merge left probe.json while the model was still
in memory, the reopened one must answer the same text with the same log-probabilities (a reward model: scores).

Exit status: 0 sound, 1 not sound (one line, what differs), 2 no model folder, or one that only its own code can open.
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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where it is reopened")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    with contextlib.suppress(OSError):  # where memory runs out the system ends this process, not a trainer beside it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    if asked.device == "cuda" and not environment.has_gpu():
        parser.error("--device cuda: no GPU is visible. Leave it out")
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
