"""Reward functions to try and to copy: --reward_funcs data/rewards.py:brevity

TRL calls one with the prompts and completions of a batch (strings, or lists of messages where the data are chats),
`completion_ids`, and every further column of the data by its name. It returns a number for each completion.
"""


def brevity(completions, **columns):
    """1 for an answer of up to 5 words, falling to 0 at 25. Models are tuned to talk; this one learns to be brief."""
    return [min(1.0, max(0.0, (25 - length(completion)) / 20)) for completion in completions]


def length(completion):
    """Words, and a Chinese character as half of one."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    return len(text.split()) + chinese / 2
