"""Where a schedule reads and writes the batch size: a loader, a data set, or only a number."""

from __future__ import annotations

from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from torch.utils.data import BatchSampler, DataLoader, Dataset

from adabatch._checks import integer
from adabatch.data.sampler import ResizableBatchSampler


@runtime_checkable
class HasBatchSize(Protocol):
    """A loader or sampler whose ``batch_size`` can be assigned."""

    batch_size: int


@runtime_checkable
class _SizesItsBatches(Protocol):
    def get_batch_size(self) -> int: ...
    def change_batch_size(self, size: int, /) -> object: ...


Loader: TypeAlias = DataLoader | HasBatchSize


class BatchSizeManager:
    """Reads and writes one batch size. Subclass it, with both methods, for one kept elsewhere."""

    _base: int | None = None

    @property
    def base_batch_size(self) -> int:
        """The size in use before the first schedule over this manager changed it, in samples."""
        if self._base is None:
            self._base = self.get_current_batch_size()
        return self._base

    @base_batch_size.setter
    def base_batch_size(self, size: int) -> None:
        self._base = size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_current_batch_size()})"

    def get_current_batch_size(self) -> int:
        """The batch size in use, in samples."""
        raise NotImplementedError

    def set_batch_size(self, new_bs: int) -> None:
        """Make ``new_bs`` (samples) the batch size in use."""
        raise NotImplementedError


class _Attribute(BatchSizeManager):
    """The ``batch_size`` attribute of a loader or sampler."""

    def __init__(self, owner: HasBatchSize):
        self.owner = owner

    def get_current_batch_size(self) -> int:
        return self.owner.batch_size

    def set_batch_size(self, new_bs: int) -> None:
        self.owner.batch_size = new_bs


class DefaultBatchSizeManager(_Attribute):
    """The batch size of a torch ``DataLoader``'s batch sampler; a change holds from the next batch
    drawn.

    torch's BatchSampler, which with drop_last=True reads its size once an epoch, is replaced, over
    the same sampler, by a :class:`~adabatch.data.sampler.ResizableBatchSampler`. A batch sampler of
    another class is kept, and its ``batch_size`` attribute is set. Batches that workers have
    already been given (``prefetch_factor * num_workers``) keep their size. The new sampler has one
    position: ``len(loader)`` within an epoch changes with the batch size, and of two iterators over
    the loader only the newer may be drawn from.

    Raises:
        TypeError: ``dataloader`` is not a ``DataLoader``.
        ValueError: it has no batch sampler (it was built with batch_size=None).
        AttributeError: its batch sampler has no ``batch_size``.

    Example:
        >>> manager = DefaultBatchSizeManager(DataLoader(range(10), batch_size=4, drop_last=True))
        >>> [manager.set_batch_size(2) or len(batch) for batch in manager.dataloader]
        [4, 2, 2, 2]
    """

    def __init__(self, dataloader: DataLoader):
        if not isinstance(dataloader, DataLoader):
            raise TypeError("dataloader must be a torch.utils.data.DataLoader, "
                            f"got {type(dataloader).__name__}")
        sampler = dataloader.batch_sampler
        if sampler is None:
            raise ValueError("dataloader has no batch sampler (batch_size=None), so its data set "
                             "makes the batches: use CustomBatchSizeManager(dataset)")
        if type(sampler) is BatchSampler:
            size, indices, drop_last = sampler.batch_size, sampler.sampler, sampler.drop_last
            sampler = ResizableBatchSampler(None, size, sampler=indices, drop_last=drop_last)
            # DataLoader.__setattr__ refuses to replace it, for fear of a size that does not match.
            object.__setattr__(dataloader, "batch_sampler", sampler)
            # Persistent workers keep an iterator over the old batch sampler between epochs.
            dataloader._iterator = None
        if not isinstance(sampler, HasBatchSize):
            raise AttributeError(f"the batch sampler ({type(sampler).__name__}) has no batch_size "
                                 "to set: give it that attribute, or pass batch_size_manager=")
        super().__init__(sampler)
        self.dataloader, self.sampler = dataloader, sampler


class CustomBatchSizeManager(BatchSizeManager):
    """The batch size of a data set that makes its own batches (the loader has batch_size=None).

    Raises:
        TypeError: ``dataset`` is not a ``torch.utils.data.Dataset``.
        KeyError: it lacks ``get_batch_size() -> int`` or ``change_batch_size(int)``.

    Example:
        >>> class Blocks(Dataset):
        ...     def get_batch_size(self):
        ...         return self.size
        ...     def change_batch_size(self, size):
        ...         self.size = size
        >>> manager = CustomBatchSizeManager(Blocks())
        >>> manager.set_batch_size(16)
        >>> manager.get_current_batch_size()
        16
    """

    def __init__(self, dataset: Dataset):
        kind = type(dataset).__name__
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset must be a torch.utils.data.Dataset, got {kind}")
        if not isinstance(dataset, _SizesItsBatches):
            raise KeyError(f"without a batch sampler the data set ({kind}) must size the batches: "
                           "give it get_batch_size() and change_batch_size(size)")
        self.dataset = dataset

    def get_current_batch_size(self) -> int:
        return self.dataset.get_batch_size()

    def set_batch_size(self, new_bs: int) -> None:
        self.dataset.change_batch_size(new_bs)


class VirtualBatchSize(BatchSizeManager):
    """A number (at least 1) that stands for a batch size: a schedule over it proposes sizes and
    changes no loader: StepBS(None, 30, batch_size_manager=VirtualBatchSize(64))."""

    def __init__(self, batch_size: int):
        self._batch_size = integer("batch_size", batch_size, at_least=1)

    def get_current_batch_size(self) -> int:
        return self._batch_size

    def set_batch_size(self, new_bs: int) -> None:
        self._batch_size = new_bs


def has_settable_batch_size(loader: object) -> TypeGuard[HasBatchSize]:
    """Whether its class has a ``batch_size`` property with a setter, as AdaptiveDataLoader's."""
    attribute = getattr(type(loader), "batch_size", None)
    return isinstance(attribute, property) and attribute.fset is not None


def manager_for(loader: Loader) -> BatchSizeManager:
    """The batch-size manager that fits a loader; errors as in the managers' constructors."""
    if has_settable_batch_size(loader) or not isinstance(loader, DataLoader):
        return _Attribute(loader)
    if loader.batch_sampler is None:
        return CustomBatchSizeManager(loader.dataset)
    return DefaultBatchSizeManager(loader)
