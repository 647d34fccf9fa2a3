"""Writes ppo_reference.json beside it: what TRL 1.12.0's code, the last with a PPO of its own, makes of a few numbers.

    python -m pip install --no-deps --target DIR trl==1.12.0
    python tests/trainers/ppo_reference.py DIR

TRL 1.12 has this arithmetic in the middle of train(). Here those very lines are cut out of its file and run; nothing
of it is written anew. Every answer fills all its places: an answer that ends early has its score one place behind the
end in TRL 1.12, and on its last token here (trainers/ppo_trainer.py, token_rewards).
"""

import datetime
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

ANSWERS, TOKENS = 3, 6
SETTINGS = {
    "kl_coef": 0.05, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "whiten_rewards": False, "cliprange": 0.2,
    "cliprange_value": 0.2, "vf_coef": 0.1,
}  # fmt: skip
CASES = {
    "plain": {},
    "whiten_rewards": {"whiten_rewards": True},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.5},
    "gamma_and_lam": {"gamma": 0.9, "lam": 0.7, "cliprange": 0.1, "cliprange_value": 0.1, "vf_coef": 0.5},
}


def main(folder):
    sys.path.insert(0, folder)  # before the TRL of the project
    import trl

    if trl.__version__ != "1.12.0" or Path(folder).resolve() not in Path(trl.__file__).resolve().parents:
        raise SystemExit(f"{folder}: no TRL 1.12.0 there. {__doc__.splitlines()[2].strip()} puts it there")
    from trl.experimental.ppo import ppo_trainer

    train = inspect.getsource(ppo_trainer.PPOTrainer.train)
    rollout = cut(train, "# 4. compute rewards", "empty_cache()")
    losses = cut(train, "vpred = torch.masked_fill(vpred", "accelerator.backward(loss)")
    clipped = cut(train, "pg_clipfrac = masked_mean(", "prob_dist = ")
    cases = []
    for seed, (name, changes) in enumerate(CASES.items()):
        settings, inputs = SETTINGS | changes, make_inputs(seed)
        outputs = run(ppo_trainer, [rollout, losses + clipped], settings, inputs)
        cases.append({"name": name, "settings": settings, "inputs": inputs, "outputs": outputs})
    page = {"trl": trl.__version__, "torch": torch.__version__, "date": str(datetime.date.today()), "cases": cases}
    rows_on_a_line = re.sub(
        r"\[\s+([^\[\]]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", json.dumps(page, indent=1)
    )
    Path(__file__).with_suffix(".json").write_text(rows_on_a_line + "\n", encoding="utf-8")


def cut(source, first, end):
    """The lines from the one with `first` to the one before that with `end`, as code of its own."""
    lines = source.splitlines()
    start = next(n for n, line in enumerate(lines) if first in line)
    stop = next(n for n, line in enumerate(lines) if n > start and end in line)
    return textwrap.dedent("\n".join(lines[start:stop]) + "\n")


def make_inputs(seed):
    """Drawn with `seed`, of three digits behind the point: easy to read, and the file has them whole."""
    generator = torch.Generator().manual_seed(seed)

    def normal(spread, *shape):
        return spread * torch.randn(*shape, generator=generator)

    logps = -normal(1.5, ANSWERS, TOKENS).abs()
    values = normal(0.5, ANSWERS, TOKENS)
    inputs = {
        "scores": normal(1.0, ANSWERS),
        "logps": logps,  # of the policy that sampled, as are the values
        "ref_logps": logps + normal(0.5, ANSWERS, TOKENS),
        "values": values,
        "new_logps": logps + normal(0.25, ANSWERS, TOKENS),  # of the policy in training, as are the new values
        "new_values": values + normal(0.25, ANSWERS, TOKENS),
    }
    return {name: rounded(tensor, 3) for name, tensor in inputs.items()}


def run(ppo_trainer, segments, settings, inputs):
    """TRL's lines on `inputs` in float32, under the names that they use; all answers are one micro-batch."""
    given = {name: torch.tensor(numbers) for name, numbers in inputs.items()}
    lengths = torch.full((ANSWERS,), TOKENS - 1)  # places of the last tokens
    nothing = torch.zeros(ANSWERS, TOKENS, dtype=torch.bool)
    names = vars(ppo_trainer) | {
        "args": SimpleNamespace(**settings),
        "responses": torch.zeros(ANSWERS, TOKENS, dtype=torch.long),  # only their shape is read
        "sequence_lengths": lengths,
        "sequence_lengths_p1": lengths + 1,
        "padding_mask": nothing,
        "padding_mask_p1": nothing,
        "scores": given["scores"],
        "logprobs": given["logps"],
        "ref_logprobs": given["ref_logps"],
        "values": given["values"],
    }
    rollout, losses = segments
    exec(rollout, names)
    new_logps, new_values = given["new_logps"].requires_grad_(), given["new_values"].requires_grad_()
    names |= {
        "micro_batch_inds": torch.arange(ANSWERS),
        "mb_advantage": names["advantages"],
        "mb_logprobs": names["logprobs"],
        "mb_return": names["returns"],
        "mb_values": names["values"],
        "new_logprobs": new_logps,
        "vpred": new_values,
    }
    exec(losses, names)
    names["loss"].backward()
    outputs = {
        "kl": names["kl"],
        "rewards": names["rewards"],
        "advantages": names["advantages"],
        "returns": names["returns"],
        "policy_loss": names["pg_loss"],
        "value_loss": names["vf_loss"],
        "loss": names["loss"],
        "policy_clipped": names["pg_clipfrac"],
        "value_clipped": names["vf_clipfrac"],
        "new_logps_grad": new_logps.grad,
        "new_values_grad": new_values.grad,
    }
    return {name: rounded(tensor.detach(), 8) for name, tensor in outputs.items()}


def rounded(tensor, digits):
    return tensor.double().round(decimals=digits).tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
