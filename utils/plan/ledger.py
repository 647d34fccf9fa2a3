"""Tensors with shapes and without data, and a ledger of what each allocates and who owns it."""

import contextlib
import sys
import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# what autograd itself does in place, but not with tensors that have no data
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_put.default: aten.index_put_.default,
}
PACKED = {"quant_state", "compress_statistics", "bnb_quantized", "quant_type", "quant_storage"}  # of a 4-bit weight


class Fake(FakeTensorMode):
    """That of all tensors that have no data. PEFT copies a head whose tensors point to it: the copy of what holds weak
    references to storages would free them once more, and break the heap (torch 2.13, StorageWeakRef)."""

    def __deepcopy__(self, memo):
        return self


class Ledger(TorchDispatchMode):
    """Adds up the storages that are alive, by owner; `peaks`: {(phase, moment): {owner: bytes}}, each at its fullest.

    `owner` is whose the next ones are.
    """

    def __init__(self):
        super().__init__()
        self.fake = Fake(allow_non_fake_inputs=True)
        self.owner, self.phase = "weights", "load"
        self.alive, self.held, self.total, self.peaks = {}, Counter(), 0, {}
        self.moment, self.highest = "", 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:  # no data: every number that a trainer asks for is 1
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor:  # a mask takes all: the longest rows have no padding
            args = args[0], [index for given in args[1] for index in as_indices(given)]
        if func in IN_PLACE and is_asked_by_autograd():
            func = IN_PLACE[func]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, entry = storage._cdata, [storage.nbytes(), self.owner]
        if key in self.alive:
            return
        entry.append(weakref.ref(storage, lambda _: self.release(key)))
        self.alive[key] = entry
        self.held[entry[1]] += entry[0]
        self.total += entry[0]
        self.look()

    def release(self, key):
        size, owner, _ = self.alive.pop(key)
        self.held[owner] -= size
        self.total -= size

    def give(self, tensor, owner):
        """Books what a tensor lies in under another owner."""
        entry = self.alive.get(tensor.untyped_storage()._cdata)
        if entry:
            self.held[entry[1]] -= entry[0]
            self.held[owner] += entry[0]
            entry[1] = owner

    def look(self):
        if self.total > self.highest:
            self.highest = self.total
            self.peaks[self.phase, self.moment] = {owner: size for owner, size in self.held.items() if size}

    def enter(self, phase, owner, moment=""):
        self.phase = phase
        self.reach(moment, owner)

    def reach(self, moment, owner="activations"):
        """From here on, peaks are those of this moment of the phase, and what is new is this owner's."""
        self.moment, self.owner = moment, owner
        self.highest = sum(self.peaks.get((self.phase, moment), {}).values())
        self.look()


def is_asked_by_autograd():
    """Whether the operation under way is one of autograd's own, and no function's written in Python."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("_fn", "inner"):  # what torch wraps __torch_dispatch__ in
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def as_indices(index):
    """A mask as the indices of all it could take; an index as it is."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64)] * index.dim()


def apply_by_replacing(module, fn, recurse=True):
    """torch.nn.Module._apply for tensors without data, whose parameters it would swap in place and cannot."""
    for child in module.children():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            moved = None if parameter is None else fn(parameter)
            if moved is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
                of_packed = {key: value for key, value in vars(parameter).items() if key in PACKED}
                vars(module._parameters[name]).update(of_packed)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextlib.contextmanager
def without_data(ledger):
    """Inside, new tensors have no data, and the ledger sees them come and go."""
    kept = torch.nn.Module._apply
    torch.nn.Module._apply = apply_by_replacing
    forget_4bit_code()
    try:
        with ledger.fake, ledger:
            yield
    finally:
        torch.nn.Module._apply = kept
        forget_4bit_code()


def forget_4bit_code():
    """Empties bitsandbytes' caches of its tables, which would keep tensors without data for later real models."""
    caches = {"bitsandbytes.backends.utils": "_code_4bit_cache", "bitsandbytes.functional": "name2qmap"}
    for module, cache in caches.items():
        if module in sys.modules:
            getattr(sys.modules[module], cache).clear()
