"""Keeps tokens and keys out of logs and run cards."""

import os
import re

HIDDEN = "<hidden>"
FLAG = re.compile(r"--?\w*(token|api_key|apikey|password|secret)$", re.IGNORECASE)
VARIABLE = re.compile(r"(TOKEN|API_KEY|APIKEY|PASSWORD|SECRET|ACCESS_KEY)(_ID)?$")
# The formats of Hugging Face, OpenAI and compatible servers, GitHub and AWS
SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b")


def hide(text: str) -> str:
    """The text without strings that look like keys and without the keys of the environment."""
    for name, value in os.environ.items():
        if VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def hide_words(words: list[str]) -> list[str]:
    """The command line without the values of flags that carry a key."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [HIDDEN if at and FLAG.search(words[at - 1]) else hide(word) for at, word in enumerate(words)]
