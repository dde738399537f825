"""OnlineSelection: of a few candidate sizes, the one whose split of a batch has the smallest (or largest) loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adabatch._checks import check_controller
from adabatch.estimators.moments import GradientMoments
from adabatch.schedules.arguments import choice, function, integers
from adabatch.schedules.online import CANDIDATES, select_batch_size


class OnlineSelection:
    """Wishes one of a few sizes, chosen anew after as many samples as the largest has: two 128s or four 64s for one 256.

    The proposal has no interval: which loss is smallest is mostly chance where the splits differ by dropout (see `adabatch.schedules.online`).

    With BatchSizeScheduler(..., coupling="linear", base_batch_size=<largest>) a batch steps with lr · size/largest, as published. No moments are needed.

    As published one batch is loaded, split and stepped: that is `adabatch.schedules.online.online_step`, a function. Here the loader's batches have the chosen size, so
    the losses are of a batch that `losses_by_size` chooses: a fresh one, or the last one.

    Args:
        losses_by_size: called without arguments for {size: mean loss}, usually of `adabatch.schedules.online.split_losses`.
        candidates: sizes in samples.
        pick: 'smallest' or 'largest'.

    Raises:
        TypeError: losses_by_size is not callable, or candidates no list or tuple of integers.
        ValueError: a candidate below 1, or another pick.

    Example:
        >>> controller = OnlineSelection(lambda: {256: 0.7, 128: 0.6, 64: 0.8})
        >>> controller.advance(samples=256, epoch=0)
        >>> controller.propose(None, loss=0.7, lr=0.1)
        128.0

    References:
        The experiment is reported with AlexNet on CIFAR-10; see `adabatch.schedules.online` for when the losses differ at all.
    """

    needs_moments = False
    version = 1

    def __init__(self, losses_by_size: Callable[[], Mapping[int, float]], candidates: Sequence[int] = CANDIDATES, pick: str = "smallest"):
        self.losses_by_size = function("losses_by_size", losses_by_size)
        self.candidates = integers("candidates", candidates, at_least=1)
        self.pick = choice("pick", pick, ("smallest", "largest"))
        self._chosen, self._samples = max(self.candidates), 0

    @property
    def first_batch_size(self) -> int:
        """The largest candidate."""
        return max(self.candidates)

    def advance(self, *, samples: int, epoch: int) -> None:
        """Called by the scheduler at every step, before propose, with the samples of the step."""
        self._samples += samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The size chosen, in samples; the last one where all losses are NaN.

        Raises:
            ValueError: losses_by_size gave no loss for some candidate.
        """
        if self._samples >= max(self.candidates):
            self._samples = 0
            losses = self.losses_by_size()
            missing = [size for size in self.candidates if size not in losses]
            if missing:
                raise ValueError(f"losses_by_size() must give a loss for each of {self.candidates}, got none for {missing}")
            numbers = {size: losses[size] for size in self.candidates if losses[size] == losses[size]}
            self._chosen = select_batch_size(numbers, self.pick) if numbers else self._chosen
        return float(self._chosen)

    def state_dict(self) -> dict[str, Any]:
        """The size chosen and the samples since, as plain numbers."""
        return {"version": self.version, "controller": type(self).__name__, "chosen": self._chosen, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version, or the state of another controller.
        """
        check_controller(state, self.version, type(self).__name__)
        self._chosen, self._samples = state["chosen"], state["samples"]

    def __repr__(self) -> str:
        return f"OnlineSelection(candidates={self.candidates}, pick={self.pick!r})"
