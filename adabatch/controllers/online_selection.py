"""OnlineSelection: of a few sizes, the one whose split of a batch has the smallest loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adabatch._checks import choice, function, integers
from adabatch.controllers.base import Controller
from adabatch.estimators.moments import GradientMoments
from adabatch.schedules.online import CANDIDATES, select_batch_size


class OnlineSelection(Controller):
    """Proposes one of a few sizes, chosen again after as many samples as the largest has: two 128s
    or four 64s for one 256. The last one stays where all losses are NaN.

    With coupling="linear" and base_batch_size=<largest>, a batch steps with lr · size/largest, as
    published. There one batch is loaded, split and stepped: `schedules.online.online_step`. Here
    the loader's batches have the chosen size, so the losses are of a batch that `losses_by_size`
    picks: a new one, or the last one.

    Args:
        losses_by_size: called without arguments for {size: mean loss} of all candidates, usually of
            `schedules.online.split_losses`.
        pick: 'smallest' or 'largest'.

    Example:
        >>> controller = OnlineSelection(lambda: {256: 0.7, 128: 0.6, 64: 0.8})
        >>> controller.on_step(samples=256, epoch=0)
        >>> controller.propose(None, loss=0.7, lr=0.1)
        128.0

    Reported with AlexNet on CIFAR-10; `adabatch.schedules.online` says when losses differ.
    """

    needs_moments = False
    init_args = ("candidates", "pick")
    state_attrs = ("chosen", "samples")

    def __init__(self, losses_by_size: Callable[[], Mapping[int, float]],
                 candidates: Sequence[int] = CANDIDATES, pick: str = "smallest"):
        self.losses_by_size = function("losses_by_size", losses_by_size)
        self.candidates = integers("candidates", candidates, at_least=1)
        self.pick = choice("pick", pick, ("smallest", "largest"))
        self._first_batch_size = self.chosen = max(self.candidates)
        self.samples = 0

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.samples += samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        if self.samples >= max(self.candidates):
            self.samples = 0
            losses = self.losses_by_size()
            missing = [size for size in self.candidates if size not in losses]
            if missing:
                raise ValueError(f"losses_by_size() must give a loss for each of "
                                 f"{self.candidates}, got none for {missing}")
            found = {size: losses[size] for size in self.candidates if losses[size] == losses[size]}
            self.chosen = select_batch_size(found, self.pick) if found else self.chosen
        return float(self.chosen)
