"""Where a schedule reads and writes the batch size: a loader's batch sampler, a data set, or nothing but a number."""

from torch.utils.data import BatchSampler, DataLoader, Dataset

from adabatch._checks import integer
from adabatch.data.sampler import ResizableBatchSampler


class BatchSizeManager:
    """Reads and writes one batch size. Subclass it, with both methods, for a batch size kept somewhere else."""

    def get_current_batch_size(self) -> int:
        """The batch size in use, in samples."""
        raise NotImplementedError

    def set_batch_size(self, new_bs: int) -> None:
        """Make ``new_bs`` (samples) the batch size in use."""
        raise NotImplementedError


class DefaultBatchSizeManager(BatchSizeManager):
    """The batch size of a plain torch ``DataLoader``: that of its batch sampler. A change holds from the next batch drawn.

    torch's own BatchSampler with drop_last=True reads its size once an epoch, so it is replaced, in the loader and over the same sampler, by a
    :class:`~adabatch.data.sampler.ResizableBatchSampler`. A batch sampler of another class is kept, and its ``batch_size`` attribute is set.
    Batches that workers have been asked for already (``prefetch_factor * num_workers``) keep their size. That sampler keeps one position: ``len(loader)``
    within an epoch counts the batches to come, and of two iterators over the loader only the newer may be drawn from.

    Args:
        dataloader: a loader that has a batch sampler.

    Raises:
        TypeError: ``dataloader`` is no ``DataLoader``.
        ValueError: it has no batch sampler (it was built with batch_size=None).
        AttributeError: its batch sampler has no ``batch_size``.

    Example:
        >>> manager = DefaultBatchSizeManager(DataLoader(range(10), batch_size=4, drop_last=True))
        >>> sizes = []
        >>> for batch in manager.dataloader:
        ...     sizes.append(len(batch))
        ...     manager.set_batch_size(2)
        >>> sizes
        [4, 2, 2, 2]
    """

    def __init__(self, dataloader: DataLoader):
        if not isinstance(dataloader, DataLoader):
            raise TypeError(f"dataloader must be a torch.utils.data.DataLoader, got {type(dataloader).__name__}.")
        sampler = dataloader.batch_sampler
        if sampler is None:
            raise ValueError("dataloader has no batch sampler (batch_size=None), so its data set makes the batches. Use CustomBatchSizeManager(dataset).")
        if type(sampler) is BatchSampler:
            sampler = ResizableBatchSampler(None, sampler.batch_size, sampler=sampler.sampler, drop_last=sampler.drop_last)
            # DataLoader.__setattr__ refuses this attribute once the loader is built, for fear of a size that no longer matches; ours always does.
            object.__setattr__(dataloader, "batch_sampler", sampler)
            # Persistent workers keep an iterator over the old batch sampler from epoch to epoch.
            dataloader._iterator = None
        if not hasattr(sampler, "batch_size"):
            raise AttributeError(f"The batch sampler ({type(sampler).__name__}) has no batch_size to set. Give it that attribute, or pass batch_size_manager=.")
        self.dataloader = dataloader

    def get_current_batch_size(self) -> int:
        """The batch sampler's batch size, in samples."""
        return self.dataloader.batch_sampler.batch_size

    def set_batch_size(self, new_bs: int) -> None:
        """Set the batch sampler's batch size (samples); it holds from the next batch drawn."""
        self.dataloader.batch_sampler.batch_size = new_bs


class CustomBatchSizeManager(BatchSizeManager):
    """The batch size of a data set that makes its own batches (the loader has batch_size=None).

    Args:
        dataset: a data set with the methods ``get_batch_size() -> int`` and ``change_batch_size(int)``.

    Raises:
        TypeError: ``dataset`` is no ``torch.utils.data.Dataset``.
        KeyError: it lacks one of the two methods.

    Example:
        >>> class Blocks(Dataset):
        ...     size = 8
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
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset must be a torch.utils.data.Dataset, got {type(dataset).__name__}.")
        missing = [name for name in ("change_batch_size", "get_batch_size") if not hasattr(dataset, name)]
        if missing:
            raise KeyError(f"Without a batch sampler the data set ({type(dataset).__name__}) must size the batches: add {' and '.join(missing)} to it.")
        self.dataset = dataset

    def get_current_batch_size(self) -> int:
        """What the data set's ``get_batch_size()`` says, in samples."""
        return self.dataset.get_batch_size()

    def set_batch_size(self, new_bs: int) -> None:
        """Call the data set's ``change_batch_size(new_bs)``."""
        self.dataset.change_batch_size(new_bs)


class VirtualBatchSize(BatchSizeManager):
    """A batch size that is only remembered: a schedule over it proposes sizes and changes no loader.

    With it a schedule serves as a controller, a plan to print, or a plot: ``StepBS(None, 30, batch_size_manager=VirtualBatchSize(64))``.

    Args:
        batch_size: the size to start from, in samples.

    Raises:
        TypeError: ``batch_size`` is no integer.
        ValueError: it is below 1.

    Example:
        >>> held = VirtualBatchSize(64)
        >>> held.set_batch_size(128)
        >>> held.get_current_batch_size()
        128
    """

    def __init__(self, batch_size: int):
        self._batch_size = integer("batch_size", batch_size, at_least=1)

    def get_current_batch_size(self) -> int:
        """The size last set, in samples."""
        return self._batch_size

    def set_batch_size(self, new_bs: int) -> None:
        """Remember ``new_bs``."""
        self._batch_size = new_bs


class _SettableBatchSize(BatchSizeManager):
    """The ``batch_size`` property of a loader or sampler of ours, which may be assigned at any time."""

    def __init__(self, owner: object):
        self.owner = owner

    def get_current_batch_size(self) -> int:
        return self.owner.batch_size

    def set_batch_size(self, new_bs: int) -> None:
        self.owner.batch_size = new_bs


def has_settable_batch_size(loader: object) -> bool:
    """Whether the class of ``loader`` has a ``batch_size`` property with a setter, as AdaptiveDataLoader and ResizableBatchSampler have.

    Example:
        >>> has_settable_batch_size(DataLoader(range(4)))
        False
    """
    return getattr(getattr(type(loader), "batch_size", None), "fset", None) is not None


def manager_for(loader: object) -> BatchSizeManager:
    """The batch-size manager that fits a loader.

    Raises:
        TypeError: ``loader`` is no torch ``DataLoader`` and has no ``batch_size`` that may be set.
        KeyError: the data set must make the batches and lacks the methods for it.

    Example:
        >>> type(manager_for(DataLoader(range(4), batch_size=2))).__name__
        'DefaultBatchSizeManager'
    """
    if has_settable_batch_size(loader):
        return _SettableBatchSize(loader)
    if isinstance(loader, DataLoader) and loader.batch_sampler is None:
        return CustomBatchSizeManager(loader.dataset)
    return DefaultBatchSizeManager(loader)
