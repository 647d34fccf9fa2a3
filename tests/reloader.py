"""A process that has trained nothing: reads {"folder", "task", ...} a line and answers what the result says."""

import json
import sys

from utils.models.load import load_model, load_tokenizer
from utils.runtime.environment import calm_libraries

calm_libraries()


def reload(folder, task, four_bit, texts, max_new_tokens):
    import torch

    tokenizer = load_tokenizer(folder)
    model = load_model(folder, task, "float32", tokenizer=tokenizer, seed=1234, four_bit=four_bit).eval()
    if four_bit:  # TRL trains over 4 bits in bfloat16
        for name, parameter in model.named_parameters():
            if ("lora_" in name or "score" in name) and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            if task == "SEQ_CLS":
                answers.append(model(input_ids=ids).logits.item())
            else:
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
                )
                answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print("ANSWER" + json.dumps(reload(**json.loads(line))), flush=True)
