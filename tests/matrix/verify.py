"""Opens a result with the libraries alone, beside the process of its own in which a run does that by itself."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def verify(folder, task, start):
    """Raises AssertionError unless the folder holds a whole, trained model (or adapter) with its tokenizer."""
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    assert tensors and all(t.numel() and t.isfinite().all() for t in tensors.values()), "an empty tensor"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("What is the capital of France?")["input_ids"]])
    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    kwargs = {} if task == "CAUSAL_LM" else {"num_labels": 1}

    if (Path(folder) / "adapter_config.json").exists():
        matrices = [tensor for name, tensor in tensors.items() if "lora_B" in name]
        assert matrices and all(tensor.any() for tensor in matrices), "a lora_B is still zero"
        base = kind.from_pretrained(start, dtype=torch.float32, **kwargs).eval()
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = kind.from_pretrained(folder, dtype=torch.float32, **kwargs)
        begun = load_file(Path(start) / "model.safetensors")
        assert begun.keys() <= tensors.keys() | {"lm_head.weight"}, "a tensor is missing"
        moved = [name for name in begun.keys() & tensors.keys() if not tensors[name].float().equal(begun[name])]
        assert len(moved) > 0.9 * len(begun), f"only {len(moved)} of {len(begun)} tensors differ from the start"
        before = kind.from_pretrained(start, dtype=torch.float32, **kwargs).eval()(ids).logits
    model.eval()
    after = model(ids).logits
    assert after.isfinite().all() and not after.equal(before), "it answers as it did before"
    if task == "CAUSAL_LM":
        assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    else:
        assert after.shape == (1, 1)
