"""One global order for many processes: each takes its stripe of every batch, and all have equally many batches.

Legend: W processes, this one of rank r; p a position in the order of the epoch, m the size of a global batch. The batch at p covers p … p + m − 1, and this
process gets those q of them with q mod W = r. Which positions those are does not depend on the sizes to come, so that workers may fetch them ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from adabatch.data.arguments import checked_int


@dataclass(frozen=True)
class Processes:
    """This process among those that share an order.

    Args:
        rank: of this process, 0 … world_size − 1.
        world_size: number of processes.

    Raises:
        TypeError, ValueError: no integers, or out of range.

    Example:
        >>> [Processes(rank, 3).share(10, 8) for rank in range(3)]
        [2, 3, 3]
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        checked_int("world_size", self.world_size, 1)
        checked_int("rank", self.rank, 0, self.world_size - 1)

    def share(self, position: int, size: int) -> int:
        """Samples of this process in the batch of `size` at `position`: within one of those of any other."""
        return size if self.world_size == 1 else self._before(position + size) - self._before(position)

    def _before(self, position: int) -> int:
        return (position - self.rank + self.world_size - 1) // self.world_size

    def first(self, position: int) -> int:
        """The first position of this process from `position` on."""
        return position + (self.rank - position) % self.world_size

    def size_at(self, size: int, left: int, drop_last: bool) -> int:
        """Samples of the next batch, of all processes together, where `size` is asked for and `left` are left; 0 at the end.

        What would be left after it but for too few processes is taken now, or W are left, whichever keeps the batch at W or more.

        Example:
            >>> [Processes(0, 4).size_at(8, left, False) for left in (20, 8, 10, 3)]
            [8, 8, 6, 3]
            >>> Processes(0, 4).size_at(5, 7, False), Processes(0, 4).size_at(5, 7, True), Processes(0, 4).size_at(5, 4, True)
            (7, 5, 0)
        """
        if drop_last:
            return size if left >= size else 0
        rest = left - size
        if rest <= 0:
            return left
        if rest >= self.world_size:
            return size
        fewer = left - self.world_size
        return fewer if fewer >= self.world_size else left

    def sizes_to_come(self, size: int, left: int, drop_last: bool) -> tuple[int, list[int]]:
        """(number of whole batches, sizes of the others) that `left` samples give at this size.

        Example:
            >>> Processes(0, 4).sizes_to_come(8, 26, False)
            (2, [6, 4])
        """
        whole, rest = divmod(left, size)
        if drop_last or not rest:
            return whole, []
        if rest >= self.world_size or not whole:
            return whole, [rest]
        last = self.size_at(size, size + rest, False)
        return whole - 1, [last, size + rest - last] if last < size else [last]

    def positions(self, start: int, stop: int) -> range:
        """The positions of this process from `start` to before `stop`.

       Only a run saved by fewer processes can have fewer samples left than there are processes. Those whose share is none are then given one of the others'
        samples, so that all take part in the step; it counts nowhere.
        """
        if 0 < stop - start < self.world_size and not self.share(start, stop - start):
            position = start + self.rank % (stop - start)
            return range(position, position + 1)
        return range(self.first(start), stop, self.world_size)

    def of_order(self, order: Iterator[Any], start: int, stop: int | None) -> Iterator[Any]:
        """This process's part of an order that is only known by going through it, which begins at `start`; `stop` None where its end is not known."""
        if self.world_size == 1:
            return order
        positions = range(self.first(start), start) if stop is None else self.positions(start, stop)
        return islice(order, positions.start - start, None, self.world_size)

    def check_epoch(self, num_samples: int) -> None:
        """Refuse an epoch in which some process would have no sample.

        Raises:
            ValueError: fewer samples than processes.
        """
        if self.world_size > 1 and num_samples < self.world_size:
            raise ValueError(f"an epoch of {num_samples} samples gives not every one of {self.world_size} processes a sample: use fewer processes or more data")

    def check_size(self, batch_size: int) -> int:
        """`batch_size` as an int, if each process gets a sample of it.

        Raises:
            TypeError, ValueError: no integer, or out of range.
        """
        size = checked_int("batch_size", batch_size, 1)
        if size < self.world_size:
            raise ValueError(
                f"batch_size is that of the global batch, and each of the {self.world_size} processes needs a sample of it: it must be an integer >= "
                f"{self.world_size}, got {batch_size!r}."
            )
        return size
