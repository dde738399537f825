"""Layouts: which rows of a layer's activations and output gradients belong to which sample, and where the number of samples can be read.

Legend: N samples, T positions.

The three samples a, b, c with the two positions 0 and 1, row by row:

    batch_first       [N, T, ...]   [[a0, a1], [b0, b1], [c0, c1]]
    batch_second      [T, N, ...]   [[a0, b0, c0], [a1, b1, c1]]       nn.MultiheadAttention and nn.LSTM unless batch_first=True
    flat_batch_major  [N·T, ...]    [a0, a1, b0, b1, c0, c1]           x.flatten(0, 1) of [N, T, ...]; windows of an image
    flat_time_major   [T·N, ...]    [a0, b0, c0, a1, b1, c1]           x.flatten(0, 1) of [T, N, ...]
    shared            [1, T, ...]   computed once and broadcast to all samples: a position embedding looked up without a batch dimension; also [T, ...]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

__all__ = ["BatchSizeSource", "Layout"]


class Layout(str, Enum):
    """The order of the samples in a layer's tensors; see the module's table. A layout is made from its name: Layout("batch_second").

    Example:
        >>> import torch
        >>> rows = torch.tensor([10, 20, 30, 11, 21, 31])  # positions 0, then positions 1, of three samples
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

    @property
    def needs_batch_size(self) -> bool:
        """Whether N cannot be read from the tensor itself."""
        return not self.stores_batch_size

    def size(self, tensor: Tensor) -> int:
        """N, of a tensor whose layout tells it."""
        return tensor.shape[1 if self is Layout.BATCH_SECOND else 0]

    def split(self, tensor: Tensor, n_samples: int) -> Tensor:
        """The tensor with its samples along dimension 0; a view, which torch.compile can trace.

        Args:
            tensor: a layer's input, output or output gradient.
            n_samples: N.

        Returns:
            batch_first: [N, ...] as it is; batch_second and the flat ones: [N, T, ...]; shared: [N, ...], the same memory N times, with a leading
            dimension of 1 (where there are more) taken as the batch's place and kept out.

        Raises:
            ValueError: the tensor's shape does not hold N samples in this layout.

        Example:
            >>> import torch
            >>> Layout.BATCH_SECOND.split(torch.zeros(7, 3, 4), 3).shape
            torch.Size([3, 7, 4])
            >>> Layout.FLAT_BATCH_MAJOR.split(torch.zeros(21, 4), 3).shape
            torch.Size([3, 7, 4])
            >>> Layout.SHARED.split(torch.zeros(1, 7, 4), 3).shape, Layout.SHARED.split(torch.zeros(7, 4), 3).shape
            (torch.Size([3, 7, 4]), torch.Size([3, 7, 4]))
        """
        if self is Layout.SHARED:
            single = tensor if tensor.dim() > 1 and tensor.shape[0] == 1 else tensor.unsqueeze(0)
            return single.expand(n_samples, *single.shape[1:])
        if self is Layout.BATCH_SECOND:
            if tensor.dim() < 2 or tensor.shape[1] != n_samples:
                raise ValueError(self._misfit(tensor, n_samples, f"[T, {n_samples}, ...]"))
            return tensor.transpose(0, 1)
        if self is Layout.BATCH_FIRST:
            if tensor.dim() < 1 or tensor.shape[0] != n_samples:
                raise ValueError(self._misfit(tensor, n_samples, f"[{n_samples}, ...]"))
            return tensor
        if tensor.dim() < 1 or n_samples < 1 or tensor.shape[0] % n_samples:
            raise ValueError(self._misfit(tensor, n_samples, f"[a multiple of {n_samples}, ...]"))
        if self is Layout.FLAT_BATCH_MAJOR:
            return tensor.unflatten(0, (n_samples, tensor.shape[0] // n_samples))
        return tensor.unflatten(0, (tensor.shape[0] // n_samples, n_samples)).transpose(0, 1)

    def single(self, sample: Tensor) -> Tensor:
        """One sample's row of split() as the layer would see it in a batch of one.

        Example:
            >>> import torch
            >>> Layout.BATCH_SECOND.single(torch.zeros(7, 4)).shape, Layout.FLAT_TIME_MAJOR.single(torch.zeros(7, 4)).shape
            (torch.Size([7, 1, 4]), torch.Size([7, 4]))
        """
        if self in (Layout.FLAT_BATCH_MAJOR, Layout.FLAT_TIME_MAJOR):
            return sample
        return sample.unsqueeze(1 if self is Layout.BATCH_SECOND else 0)

    def _misfit(self, tensor: Tensor, n_samples: int, wanted: str) -> str:
        return (
            f"a tensor of shape {list(tensor.shape)} does not hold {n_samples} samples in the layout {self.value!r}, which is {wanted}. "
            "Settle the layouts with adabatch.check(model, batch, loss_fn)."
        )


@dataclass(frozen=True)
class BatchSizeSource:
    """Where N is read from the model's own inputs, before any layer has run: one dimension of one tensor among the arguments of model.forward.

    Args:
        position: the argument's place among the positional ones, or None if it is given by keyword only.
        name: the argument's name, or None if it has none.
        path: keys and indices that lead from the argument to the tensor; empty when the argument is the tensor.
        dim: the tensor's dimension that counts the samples.

    Example:
        >>> import torch
        >>> source = BatchSizeSource(position=0, name="inputs", path=("ids",), dim=1)
        >>> source.read(({"ids": torch.zeros(7, 3)},), {}), source.read((), {"inputs": {"ids": torch.zeros(7, 5)}})
        (3, 5)
        >>> print(source)
        inputs['ids'].shape[1]
    """

    position: int | None
    name: str | None
    path: tuple[int | str, ...]
    dim: int

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> int:
        """N, from the arguments of a call of the model.

        Raises:
            ValueError: the call has no such argument, or the argument no such tensor or dimension.
        """
        if self.position is not None and self.position < len(args):
            value = args[self.position]
        elif self.name is not None and self.name in kwargs:
            value = kwargs[self.name]
        else:
            raise ValueError(self._missing(f"the call has {len(args)} positional arguments and the keywords {sorted(kwargs)}"))
        for key in self.path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(self._missing(f"{key!r} leads nowhere in a {type(value).__name__}")) from None
        if not isinstance(value, Tensor) or value.dim() <= self.dim:
            raise ValueError(self._missing(f"found {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}"))
        return value.shape[self.dim]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which BatchSizeSource(**values) is made again."""
        return {"position": self.position, "name": self.name, "path": tuple(self.path), "dim": self.dim}

    def __str__(self) -> str:
        argument = self.name if self.name is not None else f"args[{self.position}]"
        return f"{argument}{''.join(f'[{key!r}]' for key in self.path)}.shape[{self.dim}]"

    def _missing(self, found: str) -> str:
        return f"the number of samples cannot be read from the model's inputs as {self}: {found}. Call the model as adabatch.check saw it, or check it again."
