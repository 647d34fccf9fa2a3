"""Order the rows of an epoch so that the rows of each batch have similar lengths."""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import Sampler


def deal(
    order: Sequence[int], lengths: Sequence[int], batch: int, passes: int, processes: int = 1, drop_last: bool = False
) -> list[int]:
    """`order` with the rows of each step sorted, longest first: each pass, over all processes, has similar rows.

    An incomplete last pass keeps its rows, because its rows have a higher weight. With several processes it is filled
    with the first rows of the epoch, as accelerate does.
    Source: accelerate 1.15.0, data_loader.py, BatchSamplerShard.
    """
    whole = batch * processes
    if processes > 1 and not drop_last:
        order = [*islice(cycle(order), -(-len(order) // whole) * whole)]
    order, dealt = list(order), []
    end = len(order) // whole * whole
    for start in range(0, end, whole * passes):
        dealt += sorted(order[start : min(start + whole * passes, end)], key=lambda row: -lengths[row])
    return dealt + order[end:]


class Dealt:
    """A sampler that applies `deal` to each epoch."""

    def __init__(
        self,
        sampler: "Sampler[int]",
        lengths: Sequence[int],
        batch: int,
        passes: int,
        processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.sampler, self.lengths, self.shape = sampler, lengths, (batch, passes, processes, drop_last)
        self.count = len(deal(range(len(sampler)), lengths, *self.shape))

    def __iter__(self) -> Iterator[int]:
        return iter(deal(list(self.sampler), self.lengths, *self.shape))

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
