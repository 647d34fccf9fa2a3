"""Tensors with shapes and without data, and a ledger of what each allocates and who owns it."""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# autograd's own sums, which it makes in place for real tensors but not for fake ones
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_put.default: aten.index_put_.default,
}
PACKED = {"quant_state", "compress_statistics", "bnb_quantized", "quant_type", "quant_storage"}  # of a 4-bit weight


class Fake(FakeTensorMode):
    """The mode of all fake tensors. PEFT copies a head, whose tensors point to the mode: copying the mode's weak
    references to storages would free the storages twice and break the heap (torch 2.13, StorageWeakRef)."""

    def __deepcopy__(self, memo: dict) -> "Fake":
        return self


class Ledger(TorchDispatchMode):
    """Adds up the live storages by owner. `peaks`: {(phase, moment): {owner: bytes}} when the moment holds most.

    `owner`: the owner of the storages allocated from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = Fake(allow_non_fake_inputs=True)
        self.owner, self.phase, self.moment = "weights", "load", ""
        self.alive: dict[int, list] = {}  # {storage: [bytes, owner, weak reference]}
        self.held: Counter[str] = Counter()
        self.peaks: dict[tuple[str, str], dict[str, float]] = {}
        self.total, self.highest = 0, 0.0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default:  # no data: every number that a trainer asks for is 1
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor:  # a mask takes all: the longest rows have no padding
            args = args[0], [index for given in args[1] for index in as_indices(given)]
        if func in IN_PLACE and is_called_by_autograd():
            func = IN_PLACE[func]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = [size, self.owner, weakref.ref(storage, lambda _: self.release(key))]
            self.held[self.owner] += size
            self.total += size
            self.note_peak()

    def release(self, key: int) -> None:
        size, owner, _ = self.alive.pop(key)
        self.held[owner] -= size
        self.total -= size

    def give(self, tensor: torch.Tensor, owner: str) -> None:
        """Moves the tensor's storage to another owner."""
        entry = self.alive.get(tensor.untyped_storage()._cdata)
        if entry:
            self.held[entry[1]] -= entry[0]
            self.held[owner] += entry[0]
            entry[1] = owner

    def note_peak(self) -> None:
        if self.total > self.highest:
            self.highest = self.total
            self.peaks[self.phase, self.moment] = {owner: size for owner, size in self.held.items() if size}

    def enter(self, phase: str, owner: str, moment: str = "") -> None:
        """Begins a phase."""
        self.phase = phase
        self.reach(moment, owner)

    def reach(self, moment: str, owner: str = "activations") -> None:
        """Begins a moment of the phase; new storages belong to `owner`."""
        self.moment, self.owner = moment, owner
        self.highest = sum(self.peaks.get((self.phase, moment), {}).values(), start=0.0)
        self.note_peak()


def is_called_by_autograd() -> bool:
    """True if autograd itself runs the operation, not a function written in Python."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("_fn", "inner"):  # torch's wrappers of __torch_dispatch__
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_name == "_engine_run_backward"


def as_indices(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the indices of all that it could take; an index as it is."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64)] * index.dim()


def apply_by_replacing(module: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """torch.nn.Module._apply for fake tensors: it replaces parameters, which torch would change in place."""
    for child in module.children():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            moved = None if parameter is None else fn(parameter)
            if moved is not parameter:
                new = module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
                vars(new).update({key: value for key, value in vars(parameter).items() if key in PACKED})
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextlib.contextmanager
def without_data(ledger: Ledger) -> Iterator[None]:
    """Inside, new tensors have no data, and the ledger counts them."""
    forget_4bit_code()
    try:
        with mock.patch.object(torch.nn.Module, "_apply", apply_by_replacing), ledger.fake, ledger:
            yield
    finally:
        forget_4bit_code()


def forget_4bit_code() -> None:
    """Empties bitsandbytes' caches of its code tables, so that real models get no table without data."""
    caches = {"bitsandbytes.backends.utils": "_code_4bit_cache", "bitsandbytes.functional": "name2qmap"}
    for module, cache in caches.items():
        if module in sys.modules:
            getattr(sys.modules[module], cache).clear()
