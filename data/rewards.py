"""Example reward functions, to use or to copy: --reward_funcs data/rewards.py:brevity

TRL calls a function with the prompts and completions of a batch (strings; for chats, lists of messages),
`completion_ids`, and every further column of the data by name. It returns a number for each completion.
"""


def brevity(completions, **columns):
    """1 for an answer of up to 5 words, falling linearly to 0 at 25 words. Teaches a talkative model to be brief."""
    return [min(1.0, max(0.0, (25 - length(completion)) / 20)) for completion in completions]


def length(completion):
    """Number of words; a Chinese character counts as half a word."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    return len(text.split()) + chinese / 2
