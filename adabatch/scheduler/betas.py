"""Adam's betas, rescaled so that its averages reach equally far back in samples, whatever the batch size.

Legend: r the size of a batch over the base batch size, R the sum of r over the steps so far, s an optimizer's own count of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from adabatch._checks import check_version
from adabatch.scheduler.step_factor import held_weakly


class BetaRescaler:
    """Raises each beta to the power r while optimizer.step() runs: β' = β^r, so that n samples decay the averages by β^(n / base batch size).

    The bias correction of the optimizer, 1 − β'^s, would take all steps so far for steps of r: right after the batch grew tenfold at s = 200 and β = 0.999 it
    would divide by 0.86 what sums to 0.18. So the optimizer's step count, too, is replaced for the length of the step, by R/r: then β'^(R/r) = β^R. The steps
    an optimizer had taken before count r = 1 each; for a parameter that was left out of some steps the mean r of all steps stands in.

    Args:
        optimizer: has `betas` in its param groups. RAdam and NAdam read the step count in other ways too, for which R/r is an approximation.
        exponent: r of the batch being stepped; a bound method is held weakly, as in `StepFactor`.

    Attributes:
        steps: optimizer steps seen; exponents: the sum of their r.

    Raises:
        ValueError: no param group has betas.

    Example:
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99))
        >>> horizon = BetaRescaler(optimizer, lambda: 2.0)
        >>> handle = optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: print([round(b, 4) for b in optimizer.param_groups[0]["betas"]]))
        >>> optimizer.step()
        [0.81, 0.9801]
        >>> optimizer.param_groups[0]["betas"], horizon.exponents
        ((0.9, 0.99), 2.0)
    """

    def __init__(self, optimizer: Optimizer, exponent: Callable[[], float]):
        if not any("betas" in group for group in optimizer.param_groups):
            raise ValueError(f"scale_betas=True needs an optimizer with betas, as torch.optim.AdamW; {type(optimizer).__name__} has none: leave it False")
        self._exponent = held_weakly(exponent)
        self.steps, self.exponents, self._applied, self._stepping = 0, 0.0, 1.0, False
        self._betas: list[tuple[dict[str, Any], Any]] = []
        self._counts: list[tuple[dict[str, Any], Any, Any]] = []
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def restore(self) -> None:
        """Undo what a step that raised left behind; betas that were set since then stay as they are."""
        for group, betas, scaled in self._betas:
            if group["betas"] is scaled:
                group["betas"] = betas
        for state, count, replaced in self._counts:
            # What was added by the step is kept: 1, or 0 for a parameter that was left out.
            _set_count(state, count + round(float(state["step"] - replaced)) if not _is_tensor(count) else count + (state["step"] - replaced).round())
        self._betas, self._counts = [], []

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, float]:
        """The counts, as plain numbers."""
        return {"version": 1, "steps": self.steps, "exponents": self.exponents}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "BetaRescaler")
        self.steps, self.exponents = state["steps"], state["exponents"]

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.restore()
        exponent = self._exponent()
        self._applied, self._stepping = 1.0 if exponent is None else exponent(), True
        for group in optimizer.param_groups:
            if "betas" not in group or (self._applied == 1.0 and self.exponents == self.steps):
                continue
            betas = group["betas"]
            group["betas"] = tuple(beta**self._applied for beta in betas)
            self._betas.append((group, betas, group["betas"]))
            for parameter in group["params"]:
                self._replace_count(optimizer.state.get(parameter, {}))

    def _replace_count(self, state: dict[str, Any]) -> None:
        if "step" not in state:
            return
        count = state["step"].clone() if _is_tensor(state["step"]) else state["step"]
        mean = self.exponents / self.steps if self.steps else 1.0
        if _is_tensor(count):
            past = (count - self.steps).clamp(min=0) + count.clamp(max=self.steps) * mean
        else:
            past = max(count - self.steps, 0) + min(count, self.steps) * mean
        _set_count(state, past / self._applied)
        self._counts.append((state, count, past / self._applied))

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.restore()
        # torch runs the hooks around each step() of a class: twice where a subclass calls super().step().
        self.steps += self._stepping
        self.exponents += self._applied * self._stepping
        self._stepping = False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _set_count(state: dict[str, Any], count: Any) -> None:
    if _is_tensor(count):
        state["step"].copy_(count)
    else:
        state["step"] = count
