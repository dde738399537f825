"""Layouts: which rows of a layer's tensors belong to which sample, and where N can be read.

Legend: N samples, T positions. The samples a, b, c with positions 0 and 1, row by row:

    batch_first       [N, T, ...]  [[a0, a1], [b0, b1], [c0, c1]]
    batch_second      [T, N, ...]  [[a0, b0, c0], [a1, b1, c1]]   nn.LSTM, nn.MultiheadAttention
    flat_batch_major  [N·T, ...]   [a0, a1, b0, b1, c0, c1]       x.flatten(0, 1) of [N, T, ...]
    flat_time_major   [T·N, ...]   [a0, b0, c0, a1, b1, c1]       x.flatten(0, 1) of [T, N, ...]
    shared            [1, T, ...]  computed once and broadcast to all samples: a position table
                                   looked up without a batch dimension; also [T, ...]
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from adabatch._types import Args, Kwargs


class Layout(str, Enum):
    """The order of the samples in a layer's tensors, see the module's table.

    Example:
        >>> import torch
        >>> rows = torch.tensor([10, 20, 30, 11, 21, 31])  # position 0, then 1, of three samples
        >>> Layout("flat_time_major").split(rows, 3)
        tensor([[10, 11],
                [20, 21],
                [30, 31]])
    """

    BATCH_FIRST = "batch_first"
    BATCH_SECOND = "batch_second"
    FLAT_BATCH_MAJOR = "flat_batch_major"
    FLAT_TIME_MAJOR = "flat_time_major"
    SHARED = "shared"

    def __str__(self) -> str:
        return self.value

    @property
    def stores_batch_size(self) -> bool:
        """Whether N can be read from the tensor itself; else a BatchSizeSource is needed."""
        return self in (Layout.BATCH_FIRST, Layout.BATCH_SECOND)

    def size(self, tensor: Tensor) -> int:
        """N of a tensor whose layout stores it."""
        return tensor.shape[1 if self is Layout.BATCH_SECOND else 0]

    def split(self, tensor: Tensor, n_samples: int) -> Tensor:  # type: ignore[override]
        """A view with the samples along dimension 0, which torch.compile can trace: [N, ...] of
        batch_first, [N, T, ...] of batch_second and the flat ones. Of shared, [N, ...] is the same
        memory N times; its leading dimension of 1 (of two or more) is the batch's place.

        Raises:
            ValueError: the tensor's shape does not hold N samples in this layout.

        Example:
            >>> import torch
            >>> Layout.BATCH_SECOND.split(torch.zeros(7, 3, 4), 3).shape
            torch.Size([3, 7, 4])
            >>> Layout.SHARED.split(torch.zeros(7, 4), 3).shape
            torch.Size([3, 7, 4])
        """
        if self is Layout.SHARED:
            has_place = tensor.dim() > 1 and tensor.shape[0] == 1
            single = tensor if has_place else tensor.unsqueeze(0)
            return single.expand(n_samples, *single.shape[1:])
        if self.stores_batch_size:
            dim = 1 if self is Layout.BATCH_SECOND else 0
            if tensor.dim() <= dim or tensor.shape[dim] != n_samples:
                raise self._misfit(tensor, n_samples, f"[{'T, ' * dim}{n_samples}, ...]")
            return tensor.transpose(0, dim)
        if tensor.dim() < 1 or n_samples < 1 or tensor.shape[0] % n_samples:
            raise self._misfit(tensor, n_samples, f"[a multiple of {n_samples}, ...]")
        positions = tensor.shape[0] // n_samples
        if self is Layout.FLAT_BATCH_MAJOR:
            return tensor.unflatten(0, (n_samples, positions))
        return tensor.unflatten(0, (positions, n_samples)).transpose(0, 1)

    def single(self, sample: Tensor) -> Tensor:
        """One sample's row of split() as the layer would see it in a batch of one."""
        if self in (Layout.FLAT_BATCH_MAJOR, Layout.FLAT_TIME_MAJOR):
            return sample
        return sample.unsqueeze(1 if self is Layout.BATCH_SECOND else 0)

    def _misfit(self, tensor: Tensor, n_samples: int, expected: str) -> ValueError:
        return ValueError(
            f"a tensor of shape {list(tensor.shape)} does not hold {n_samples} samples in the "
            f"layout {self.value!r}, which is {expected}. Settle the layouts with "
            "adabatch.check(model, batch, loss_fn).")


@dataclass(frozen=True)
class BatchSizeSource:
    """Where N is read from the arguments of model.forward, before any layer has run.

    Args:
        position: the argument's place among the positional ones; None if given by keyword only.
        name: the argument's name; None if it has none.
        path: keys and indices from the argument to the tensor; empty where it is the tensor.
        dim: the tensor's dimension that counts the samples.

    Example:
        >>> import torch
        >>> source = BatchSizeSource(position=0, name="inputs", path=("ids",), dim=1)
        >>> source.read(({"ids": torch.zeros(7, 3)},), {})
        3
        >>> print(source)
        inputs['ids'].shape[1]
    """

    position: int | None
    name: str | None
    path: tuple[int | str, ...]
    dim: int

    def read(self, args: Args, kwargs: Kwargs) -> int:
        """N, from the arguments of a call of the model; a ValueError where it is not there."""
        return self.tensor(args, kwargs).shape[self.dim]

    def tensor(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The tensor from which N is read."""
        if self.position is not None and self.position < len(args):
            value = args[self.position]
        elif self.name is not None and self.name in kwargs:
            value = kwargs[self.name]
        else:
            raise self._missing(f"the call has {len(args)} positional arguments and the keywords "
                                f"{sorted(kwargs)}")
        for key in self.path:
            try:
                fields = dataclasses.is_dataclass(value)
                value = getattr(value, str(key)) if fields else value[key]
            except (KeyError, IndexError, TypeError, AttributeError):
                raise self._missing(f"a {type(value).__name__} has no item {key!r}") from None
        if not isinstance(value, Tensor) or value.dim() <= self.dim:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise self._missing(f"found {found}")
        return value

    def to_dict(self) -> Kwargs:
        """The arguments of an equal BatchSizeSource."""
        return asdict(self)

    def __str__(self) -> str:
        argument = self.name if self.name is not None else f"args[{self.position}]"
        return f"{argument}{''.join(f'[{key!r}]' for key in self.path)}.shape[{self.dim}]"

    def _missing(self, found: str) -> ValueError:
        return ValueError(
            f"the number of samples cannot be read from the model's inputs as {self}: {found}. "
            "Call the model as adabatch.check saw it, or check it again.")


class KnownLayouts(Protocol):
    """What is known of a model's layers before they are called: `adabatch.check` finds it."""

    batch_size_source: BatchSizeSource | None
    roles: dict[tuple[str, int], bool]  # of inputs whose samples the data flow does not show

    @property
    def layouts(self) -> dict[str, Layout]:
        """{layer's name: its layout}."""
