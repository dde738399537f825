"""What a loader tells of its sampler: sizes, and how far the epoch has come."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adabatch.data.sampler import ResizableBatchSampler


class SamplerView:
    """Sizes and positions of `batch_sampler`, in samples of all processes together, but for `share`."""

    batch_sampler: ResizableBatchSampler

    @property
    def batch_size(self) -> int:
        """Size of the batches asked for from now on."""
        return self.batch_sampler.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.batch_sampler.batch_size = size

    @property
    def drop_last(self) -> bool:
        """Whether a last batch shorter than asked for is left out."""
        return self.batch_sampler.drop_last

    @drop_last.setter
    def drop_last(self, drop: bool) -> None:
        self.batch_sampler.drop_last = drop

    @property
    def recent(self) -> deque[tuple[int, int]]:
        """(size asked for, size delivered) of the last batches delivered, newest last."""
        return self.batch_sampler.recent

    @property
    def last_size(self) -> int:
        """Samples of the last batch delivered, of all processes together; 0 before the first."""
        return self.batch_sampler.last_size

    @property
    def share(self) -> int:
        """Samples of it that this process got. Its mean loss counts world_size · share / last_size for the mean over processes to be that over the batch."""
        return self.batch_sampler.share

    @property
    def n_batches(self) -> int:
        """Batches delivered so far, over all epochs."""
        return self.batch_sampler.n_batches

    @property
    def position(self) -> int:
        """Samples of the present epoch delivered so far; those that workers fetched ahead do not count."""
        return self.batch_sampler.position

    @property
    def num_samples(self) -> int:
        """Samples of a whole epoch.

        Raises:
            TypeError: an iterable data set, or a sampler of the caller's own, without a length.
        """
        return self.batch_sampler.num_samples

    @property
    def samples_left(self) -> int:
        """Samples of the present epoch still to be delivered; TypeError where the length is not known."""
        return max(0, self.num_samples - self.batch_sampler.position)
