"""Configs of well-known models, for plans without their files: --plan --model_name_or_path qwen2-7b

Source: config.json of Qwen2.5-0.5B, 1.5B, 3B, 7B, 14B, 32B, Llama-3.1-8B, 70B and Llama-2-7B as released.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# name -> (model type, vocabulary, hidden size, MLP, layers, heads, key and value heads, tied embeddings)
SHAPES = {
    "0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "3b": ("qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    "qwen2-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "llama-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, False),
    "llama-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "14b": ("qwen2", 152064, 5120, 13824, 48, 40, 8, False),
    "32b": ("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "70b": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
}


def find_shape(name: str | Path) -> "PretrainedConfig | None":
    """The config of a named shape, in any letter case; None for another name, or a folder of that name."""
    sizes = SHAPES.get(str(name).lower())
    if sizes is None or Path(name).exists():
        return None
    from transformers import CONFIG_MAPPING

    kind, vocabulary, hidden, mlp, layers, heads, key_value_heads, tied = sizes
    return CONFIG_MAPPING[kind](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer with one word, to make texts with any number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
