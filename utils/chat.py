"""Chat with a result, adapter or model, in its own chat template: `python -m utils.chat FOLDER`.

An empty line or Ctrl-D ends the chat. `echo "Hello" | python -m utils.chat FOLDER` answers once.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from utils.models.folders import ModelFolder
from utils.models.load import load_model, load_tokenizer
from utils.runtime import environment
from utils.runtime.errors import Refused, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    max_new_tokens: int,
    streamer: "TextStreamer | None" = None,
) -> str:
    """The model's reply to `messages` (a list of {"role", "content"}), as text."""
    import torch

    text = messages[-1]["content"]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of a result, or Hub id")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum tokens of an answer")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    try:
        folder = ModelFolder.at(asked.model)
        refuse_if(folder.check_whole("model"))  # PEFT would load pickled weights
        if folder.is_reward_model:
            raise Refused(f"{asked.model}: a reward model, not a language model")
        tokenizer = load_tokenizer(asked.model)
        dtype = "bfloat16" if environment.has_bf16() else "float32"
        model = load_model(asked.model, "CAUSAL_LM", dtype, tokenizer=tokenizer, seed=0).eval()
    except Refused as refusal:
        refusal.say()
        return 2
    talk(model, tokenizer, asked.max_new_tokens)
    return 0


def talk(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int) -> None:
    from transformers import TextStreamer

    if environment.has_gpu():
        model.to("cuda")
    live = sys.stdin.isatty()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = []
    while line := (input("> ") if live else sys.stdin.readline()).strip():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, max_new_tokens, streamer)})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (EOFError, KeyboardInterrupt):
        print()
