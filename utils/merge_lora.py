"""Merge an adapter into its base and prove it: `python -m utils.merge_lora ADAPTER OUTPUT`.

The base is read in its own dtype (bfloat16 as a rule), never in 4 bits, also for an adapter trained with qlora.
Before "done" is said, the merged model is reopened from disk and answers as base + adapter do.
"""

import argparse
import sys
from pathlib import Path

from utils import environment
from utils.checks import Refused
from utils.models import fit_config, load_tokenizer, read_adapter

PROBE = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2. 今天天气很好。 def f(x): return x"
TOLERANCE = 0.02  # share of the logits' spread; bfloat16 keeps 8 bits, and a merge rounds every weight once more


def merge(adapter, output, dtype="auto"):
    """Writes the merged model. Returns the largest difference of outputs, as a share of their spread."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    described = read_adapter(adapter)
    if described is None:
        raise Refused([f"{adapter}: no adapter_config.json in it, so not an adapter"])
    if Path(output).exists() and any(Path(output).iterdir()):
        raise Refused([f"{output}: is there already. Name another folder"])
    scores = described["task_type"] == "SEQ_CLS"
    kind, extra = (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})
    tokenizer = load_tokenizer(adapter)
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]])
    base = kind.from_pretrained(described["base_model_name_or_path"], dtype=dtype, use_safetensors=True, **extra)
    fit_config(base, tokenizer)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits.float()
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(output)
        tokenizer.save_pretrained(output)
        found = kind.from_pretrained(output, dtype=dtype).eval()(input_ids=ids).logits.float()
    spread = expected.std() if expected.numel() > 1 else expected.abs().clamp(min=1)
    return float((found - expected).abs().mean() / spread)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="auto", help="auto (the base's own), bfloat16 or float32")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    try:
        difference = merge(asked.adapter, asked.output, asked.dtype)
    except Refused as refusal:
        print("\n".join(f"refused: {problem}" for problem in refusal.problems), file=sys.stderr)
        return 2
    if difference > TOLERANCE:
        print(
            f"{asked.output}: answers differ from base + adapter by {difference:.2%}: do not use it", file=sys.stderr
        )
        return 1
    print(f"merged into {asked.output}; its outputs differ from base + adapter by {difference:.3%} of their spread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
