"""What TRL's kernels allocate on a GPU, for a step on tensors without data (utils/plan/rehearsal.py).

On a CPU, torch's operations do in several copies what a Triton kernel does where the logits lie; a plan for a GPU
that counted them would be a third too high. Source: trl 1.16.0, kernels/ and trainer/utils.py.
"""

import contextlib
from unittest import mock

import torch


class FusedLogProbAndEntropy(torch.autograd.Function):
    """Allocates what kernels/logprob_entropy.py does: four numbers a row, and the logits' gradient."""

    @staticmethod
    def forward(ctx, logits, index, temperature, row_mask):
        outputs = [torch.empty(logits.shape[:-1], dtype=torch.float32) for _ in range(4)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, index, *outputs[2:])
        return tuple(outputs[:2])

    @staticmethod
    def backward(ctx, *gradients):
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def fused(logits, index, temperature=1.0, row_mask=None):
    return FusedLogProbAndEntropy.apply(logits, index, temperature, row_mask)


def is_fused(logits, index=None, row_mask=None):
    """Whether the fused kernel takes it: one index a row."""
    return index is None or index.shape == logits.shape[:-1]


def nothing(*args, **kwargs):
    """A kernel: what it writes is allocated already."""


def project(tile, hidden, weight, bias, start, end, dtype):
    """kernels/chunked_divergence.py, _project: float32 results of weights in their own dtype."""
    weight[start:end].to(dtype)


def add_product(total, left, right):
    """kernels/chunked_logprob.py, _addmm_fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)


@contextlib.contextmanager
def as_on_gpu():
    """Inside, TRL's losses allocate what they do on a GPU."""
    from trl.kernels import chunked_divergence, chunked_logprob
    from trl.trainer import distillation_trainer, utils

    from trainers import gkd_trainer

    divergence = {"_stats_tile": nothing, "_jsd_tile": nothing, "_backward_tile": nothing, "_project": project}
    entropy = {"_fused_logprob_entropy": fused, "_supports_trl_loss_kernel": is_fused}
    patches = [
        mock.patch.multiple(chunked_logprob, _forward_tile=nothing, _backward_tile=nothing, _addmm_fp32=add_product),
        mock.patch.multiple(chunked_divergence, **divergence, _addmm_fp32=add_product),
        mock.patch.object(gkd_trainer, "_project", project),
        mock.patch.object(distillation_trainer, "_use_triton", lambda device: True),
        mock.patch.multiple(utils, create=True, _use_triton=lambda device: True, is_triton_available=lambda: True),
        mock.patch.multiple(utils, create=True, **entropy),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
