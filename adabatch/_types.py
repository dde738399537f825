"""Types that several folders share, most of them for values whose type is the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# What a data set gives, what collate_fn makes of it, and loss_fn takes: anything.
Sample: TypeAlias = Any
Batch: TypeAlias = Any
# A data set, sampler or iterator, of which a few methods are looked for.
Source: TypeAlias = Any
CollateFn: TypeAlias = Callable[[list[Sample]], Batch]
LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]
# What a user's state_dict() returns.
SavedState: TypeAlias = Any
# Arguments passed on to a function that checks them.
Argument: TypeAlias = Any
Kwargs: TypeAlias = dict[str, Any]
Args: TypeAlias = tuple[Any, ...]
Inputs: TypeAlias = tuple[Args, Kwargs]
# Where a tensor is in nested containers: the keys, indices and names that lead to it.
Path: TypeAlias = tuple[Any, ...]
# A group; a mesh, all of whose processes are meant; ranks in the default group; None for all.
Processes: TypeAlias = "ProcessGroup | DeviceMesh | list[int] | None"


@runtime_checkable
class Part(Protocol):
    """Anything that can be saved."""

    def state_dict(self) -> SavedState: ...
    def load_state_dict(self, state_dict: SavedState, /) -> object: ...
