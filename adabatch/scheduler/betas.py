"""Adam's betas, rescaled so that its averages span the same number of samples at any batch size.

Legend: r the size of a batch over the base batch size, R the sum of r over the steps so far, s an
optimizer's own count of steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from adabatch.interfaces import ParamGroup, State
from adabatch.scheduler.during_step import HeldWeakly, undo_after_error

Betas = tuple[float, ...]
Count = Tensor | float


class BetaRescaler:
    """Raises each beta to the power r while optimizer.step() runs: β' = β^r, so that n samples
    decay the averages by β^(n / base batch size).

    The optimizer's bias correction, 1 − β'^s, would take all steps so far for steps of r: right
    after the batch grew tenfold at s = 200 and β = 0.999 it would divide by 0.86 what sums to 0.18.
    So the optimizer's step count is replaced during the step as well, by R/r: then β'^(R/r) = β^R.
    Steps taken before count r = 1 each; for a parameter that missed some steps the mean r of all
    steps is used. For RAdam and NAdam, which use the count in other ways too, R/r is approximate.

    Args:
        optimizer: has `betas` in its param groups.
        exponent: r of the batch being stepped; a bound method is held weakly.

    Attributes:
        steps: optimizer steps seen; exponents: the sum of their r.

    Raises:
        ValueError: no param group has betas.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.Adam([weight], betas=(0.9, 0.99))
        >>> rescaler = BetaRescaler(optimizer, lambda: 2.0)
        >>> handle = optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: print(
        ...     [round(beta, 4) for beta in optimizer.param_groups[0]["betas"]]))
        >>> optimizer.step()
        [0.81, 0.9801]
        >>> optimizer.param_groups[0]["betas"], rescaler.exponents
        ((0.9, 0.99), 2.0)
    """

    def __init__(self, optimizer: Optimizer, exponent: Callable[[], float]):
        if not any("betas" in group for group in optimizer.param_groups):
            raise ValueError("scale_betas=True needs an optimizer with betas, such as "
                             f"torch.optim.AdamW; {type(optimizer).__name__} has none")
        self._exponent = HeldWeakly(exponent)
        self.steps, self.exponents, self._applied, self._stepping = 0, 0.0, 1.0, False
        self._betas: list[tuple[ParamGroup, Betas, Betas]] = []
        self._counts: list[tuple[State, Count, Count]] = []
        self._handles = [optimizer.register_step_pre_hook(self._before),
                         optimizer.register_step_post_hook(self._after),
                         optimizer.register_state_dict_post_hook(self._without_scaling)]
        self._end = undo_after_error(optimizer, self.restore)

    def restore(self) -> None:
        """Undo what a step that raised left behind; betas set since then are kept."""
        for group, betas, scaled in self._betas:
            if group["betas"] is scaled:
                group["betas"] = betas
        for state, count, replaced in self._counts:
            _set_count(state, _own_count(state, count, replaced))
        self._betas, self._counts = [], []

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self.restore()
        self._end()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> State:
        """The counts, as plain numbers."""
        return {"steps": self.steps, "exponents": self.exponents}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict()."""
        self.steps, self.exponents = state["steps"], state["exponents"]

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        self.restore()
        self._applied, self._stepping = self._exponent(1.0), True
        if self._applied == 1.0 and self.exponents == self.steps:
            return
        for group in optimizer.param_groups:
            if "betas" in group:
                betas = group["betas"]
                scaled = tuple(beta**self._applied for beta in betas)
                self._betas.append((group, betas, scaled))  # before it is written
                group["betas"] = scaled
                for parameter in group["params"]:
                    self._replace_count(optimizer.state.get(parameter, {}))

    def _without_scaling(self, optimizer: Optimizer, saved: State) -> None:
        """A state_dict() within a step, as of a signal's handler, has the optimizer's own values.
        """
        for group, betas, scaled in self._betas:
            for own, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                if own is group and packed["betas"] is scaled:
                    packed["betas"] = betas
        counts = {id(state): _own_count(state, *counts) for state, *counts in self._counts}
        for index, state in saved["state"].items():
            if id(state) in counts:
                saved["state"][index] = {**state, "step": counts[id(state)]}

    def _replace_count(self, state: State) -> None:
        if "step" not in state:
            return
        count, mean = state["step"], self.exponents / self.steps if self.steps else 1.0
        if isinstance(count, Tensor):
            count = count.clone()
            past = (count - self.steps).clamp(min=0) + count.clamp(max=self.steps) * mean
        else:
            past = max(count - self.steps, 0) + min(count, self.steps) * mean
        self._counts.append((state, count, past / self._applied))
        _set_count(state, past / self._applied)

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        self.restore()
        # torch runs the hooks around each step() of a class: twice where a subclass calls super().
        self.steps += self._stepping
        self.exponents += self._applied * self._stepping
        self._stepping = False


def _own_count(state: State, count: Count, replaced: Count) -> Count:
    """The optimizer's count, with what the step added: 1, or 0 for a parameter that it skipped."""
    added = state["step"] - replaced
    if isinstance(count, Tensor):
        return count + added.round()
    return count + round(float(added))


def _set_count(state: State, count: Count) -> None:
    if isinstance(count, Tensor):
        state["step"].copy_(count)
    else:
        state["step"] = count
