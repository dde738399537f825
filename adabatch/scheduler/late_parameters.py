"""Parameters that came too late to be measured: unfrozen, or added to the optimizer, after the hooks were attached."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

SHAPES_SHOWN = 3


class UntrackedParameters:
    """Warns once about parameters that are stepped but not measured, because they were frozen or not in the optimizer when measuring began.

    What is frozen later is no such case: taps stay where they are, and measure again what is unfrozen again.

    Args:
        optimizer: its parameters are looked at.
        measured: what the hooks measure; empty where that is not known, and nothing is looked for.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.bias.requires_grad_(False) is layer.bias
        True
        >>> late = UntrackedParameters(torch.optim.SGD(layer.parameters(), lr=0.1), [layer.weight])
        >>> late.found()
        []
        >>> layer.bias.requires_grad_(True) is late.found()[0]
        True
    """

    def __init__(self, optimizer: Optimizer, measured: Iterable[Tensor]):
        known = {id(parameter) for parameter in measured}
        self._optimizer, self._looks = optimizer, bool(known)
        # Trainable but not measured from the start: left out on purpose, with ignore= or as parameters of another module.
        self._known = known | {id(parameter) for parameter in self._stepped()}

    def found(self) -> list[Tensor]:
        """The parameters that came too late."""
        return [parameter for parameter in self._stepped() if id(parameter) not in self._known] if self._looks else []

    def warn(self, stacklevel: int) -> None:
        """Warn of those found, the first time there are any.

        Args:
            stacklevel: as in warnings.warn, counted from the caller of this method.
        """
        late = self.found()
        if not late:
            return
        self._looks = False
        shapes = ", ".join(str(list(parameter.shape)) for parameter in late[:SHAPES_SHOWN]) + (", …" if len(late) > SHAPES_SHOWN else "")
        warnings.warn(
            f"{len(late)} parameters (of shapes {shapes}) are trained but not measured: they were unfrozen, or added to the optimizer, after adabatch was "
            "attached, so that variance and gradient norm are those of the others alone. Attach while all that will be trained requires grad and is in the "
            "optimizer, and freeze afterwards; or call scheduler.remove() and adabatch.wrap again",
            stacklevel=stacklevel + 1,
        )

    def _stepped(self) -> Iterable[Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"] if parameter.requires_grad)
