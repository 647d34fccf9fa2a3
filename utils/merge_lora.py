"""Merge an adapter into its base and check the result: `python -m utils.merge_lora ADAPTER OUTPUT`.

The merge is computed in float32, on the base from disk (never its 4-bit form), and saved in the base's dtype.
Rounding to bfloat16 loses updates below half its precision (peft#2321), so the merged model is reopened and compared
with base + adapter. If too little of the adapter's effect is left, float32 is saved instead, with a note. Finally a
fresh process compares again (utils/verify.py).
"""

import argparse
import sys
from pathlib import Path

from utils.models.folders import ModelFolder
from utils.models.load import load_tokenizer
from utils.results import proof
from utils.runtime import environment
from utils.runtime.errors import Failed, Refused, refuse_if
from utils.runtime.output import first_line
from utils.runtime.paths import check_writable, empty

ENOUGH = 0.9  # share of the adapter's effect on the outputs that a merge must keep


def merge(adapter: str | Path, output: str | Path, dtype: str = "auto") -> tuple[str, float, list[str]]:
    """Write the merged model. Returns (saved dtype, share of the adapter's effect that the merge keeps, notes)."""
    folder = ModelFolder.at(adapter)
    described = folder.adapter
    if described is None:
        raise Refused(f"{adapter}: not an adapter: no adapter_config.json")
    refuse_if(check_writable(Path(output), flag=""))
    if Path(output).exists() and any(Path(output).iterdir()):
        raise Refused(f"{output}: already exists. Name another folder")
    refuse_if(folder.check_whole("adapter"))  # PEFT would load pickled weights

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = described["task_type"] == "SEQ_CLS"
    kind, extra = (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})
    tokenizer = load_tokenizer(adapter)
    task, ids = described["task_type"], tokenizer(proof.TEXT)["input_ids"]

    base = described["base_model_name_or_path"]
    safely = {"use_safetensors": True, "trust_remote_code": False}
    try:
        base = kind.from_pretrained(base, revision=described.get("revision"), dtype="auto", **safely, **extra)
    except (OSError, ValueError) as error:
        raise Refused(f"{adapter}: its base model {base} cannot be loaded ({first_line(error)})") from None
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    own_dtype, base = base.dtype, base.float()
    model = PeftModel.from_pretrained(base, adapter).eval()
    trained = proof.compute_outputs(model, ids, task)
    with model.disable_adapter():
        untrained = proof.compute_outputs(model, ids, task)
    effect = float((trained - untrained).abs().mean())
    if not effect:
        raise Refused(f"{adapter}: does not change the outputs of its base. Nothing to merge")
    merged = model.merge_and_unload(safe_merge=True)

    notes: list[str] = []
    wanted = own_dtype if dtype == "auto" else getattr(torch, dtype)
    for target in (wanted, torch.float32):
        if Path(output).exists():
            empty(output)
        merged.config.dtype = target
        once: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        state = {name: once.setdefault(t.data_ptr(), t.to(target)) for name, t in merged.state_dict().items()}
        merged.save_pretrained(output, state_dict=state)
        tokenizer.save_pretrained(output)
        del once, state
        found = proof.compute_outputs(kind.from_pretrained(output, dtype=torch.float32, **safely).eval(), ids, task)
        kept = 1 - float((found - trained).abs().mean()) / effect
        name = str(target).removeprefix("torch.")
        if kept >= ENOUGH or dtype != "auto" or target == torch.float32:
            break
        notes.append(f"in {name} the merge keeps {max(kept, 0):.0%} of the adapter's effect")
    proof.write_probe(output, trained, tokenizer, task=task, dtype="float32", exact_to=name, same=name == "float32")
    return name, kept, notes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: the base's")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    try:
        dtype, kept, notes = merge(asked.adapter, asked.output, asked.dtype)
    except Refused as refusal:
        refusal.say()
        return 2
    for note in notes:
        print(f"note      {note}: saved in float32 instead")
    if kept < ENOUGH:
        effect = f"keeps only {max(kept, 0):.0%} of the adapter's effect"
        print(f"{asked.output}: {effect}. Type --dtype float32", file=sys.stderr)
        return 1
    print(f"merged    {asked.output}, {dtype}: reopened, and keeps {kept:.1%} of the adapter's effect")
    try:
        print(proof.verify_in_fresh_process(asked.output))
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    print(f"chat      python -m utils.chat {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
