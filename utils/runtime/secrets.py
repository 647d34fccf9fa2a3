"""Tokens and keys never reach a log or a run card."""

import os
import re

HIDDEN = "<hidden>"
FLAG = re.compile(r"--?\w*(token|api_key|apikey|password|secret)$", re.IGNORECASE)
VARIABLE = re.compile(r"(TOKEN|API_KEY|APIKEY|PASSWORD|SECRET|ACCESS_KEY)(_ID)?$")
# As the services write them: Hugging Face, OpenAI and its kin, GitHub, Weights & Biases, AWS
SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b")


def hide(text):
    """A text without what looks like a key, and without the values of the environment's keys."""
    for name, value in os.environ.items():
        if VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def hide_words(words):
    """A command line whose flags keep their names alone where they carry a key."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [HIDDEN if at and FLAG.search(words[at - 1]) else hide(word) for at, word in enumerate(words)]
