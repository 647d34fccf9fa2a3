"""A reward for the tests of the online methods, and, asked for, answers that are the same however a run is spread.

--reward_funcs tests/matrix/answers.py:spread judges answers. With FIXED_ANSWERS in the environment the file also puts
a sampler in the place of the model's own that answers by the prompt alone: what differs then is the training.
"""

import os

import torch


def spread(completion_ids, **columns):
    """A number from 0 to 1 that hangs on every token, so that two answers rarely get the same."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def fixed_generate(self, input_ids, attention_mask, generation_config=None, **kwargs):
    """`generate` whose answers, of 3 to 7 tokens and an end, follow from a prompt and how often the batch had it."""
    eos, pad = generation_config.eos_token_id, generation_config.pad_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    seen, answers = {}, []
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        prompt = tuple(ids[mask.bool()].tolist())
        seen[prompt] = seen.get(prompt, 0) + 1
        drawn = torch.Generator().manual_seed(hash((prompt, seen[prompt])) % 2**31)
        length = int(torch.randint(3, 8, (1,), generator=drawn))
        answers.append([*torch.randint(4, 200, (length,), generator=drawn).tolist(), eos])
    width = max(map(len, answers))
    padded = [answer + [pad] * (width - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], 1)


if os.environ.get("FIXED_ANSWERS"):
    import transformers

    sampled = transformers.GenerationMixin.generate

    def generate(self, *args, generation_config=None, **kwargs):
        if generation_config is None:  # the sample answers of the report
            return sampled(self, *args, **kwargs)
        return fixed_generate(self, generation_config=generation_config, **kwargs)

    transformers.GenerationMixin.generate = generate
