"""What TRL's kernels allocate on a GPU, for a step on tensors without data (utils/plan/rehearsal.py).

On a CPU, torch's operations make several copies where a Triton kernel works in place; counting them would make a
plan for a GPU a third too high. Source: trl 1.16.0, kernels/ and trainer/utils.py.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


class FusedLogProbAndEntropy(torch.autograd.Function):
    """Allocates as kernels/logprob_entropy.py does: four numbers a row, and the logits' gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, index: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        outputs = [torch.empty(logits.shape[:-1], dtype=torch.float32) for _ in range(4)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, index, *outputs[2:])
        return tuple(outputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def fused(logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, row_mask: Any = None) -> Any:
    return FusedLogProbAndEntropy.apply(logits, index, temperature, row_mask)


def is_fused(logits: torch.Tensor, index: torch.Tensor | None = None, row_mask: Any = None) -> bool:
    """True if the fused kernel takes the call: one index a row."""
    return index is None or index.shape == logits.shape[:-1]


def write_only(*args: Any, **kwargs: Any) -> None:
    """A kernel that writes into tensors allocated before."""


def project(tile: Any, hidden: Any, weight: torch.Tensor, bias: Any, start: int, end: int, dtype: torch.dtype) -> None:
    """kernels/chunked_divergence.py, _project: float32 results from weights in their own dtype."""
    weight[start:end].to(dtype)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """kernels/chunked_logprob.py, _addmm_fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, TRL's losses allocate as on a GPU."""
    from trl.kernels import chunked_divergence, chunked_logprob
    from trl.trainer import distillation_trainer, utils

    from trainers import gkd_trainer

    written: dict[str, Any] = dict.fromkeys(("_stats_tile", "_jsd_tile", "_backward_tile"), write_only)
    tiles: dict[str, Any] = dict.fromkeys(("_forward_tile", "_backward_tile"), write_only)
    losses: dict[str, Any] = {"_fused_logprob_entropy": fused, "_supports_trl_loss_kernel": is_fused}
    losses |= {"_use_triton": lambda device: True, "is_triton_available": lambda: True}
    with contextlib.ExitStack() as stack:
        for module, names in (
            (chunked_logprob, tiles | {"_addmm_fp32": add_product}),
            (chunked_divergence, written | {"_addmm_fp32": add_product, "_project": project}),
            (gkd_trainer, {"_project": project}),
            (distillation_trainer, {"_use_triton": losses["_use_triton"]}),
        ):
            stack.enter_context(mock.patch.multiple(module, **names))
        stack.enter_context(mock.patch.multiple(utils, create=True, **losses))
        yield
