"""Annealed: a decay of the step per sample, spent on growing the batch, then on lowering the lr."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

from adabatch import interfaces
from adabatch._checks import choice, positive, real
from adabatch.controllers.base import Controller, Input
from adabatch.controllers.combinators import Operand
from adabatch.controllers.seesaw import rule_of_optimizer
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import RunContext

SHAPES = ("linear", "power", "cosine")
EXPONENTS = {"linear": 1.0, "sqrt": 0.5}


def decay(progress: float, shape: str = "linear", power: float = 2.0) -> float:
    """f(p), p = samples seen / budget, cut to [0, 1]: 1 − p, (1 − p)^power or (1 + cos πp)/2."""
    left = 1.0 - min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    return left if shape == "linear" else left**power


class Annealed(Controller):
    """Decays the step per sample η over a budget of samples: holds the lr and grows the batch until
    it meets its cap, then lowers the lr.

        η(p) = η₀·f(p), p = samples seen / budget, η = α/m for SGD, α/√m for Adam and its family

    Growing: m = B₀/f for SGD, B₀/f² for Adam, at the optimizer's lr. At the cap, and for whatever
    size bounds and rounding leave, the lr is multiplied by f·B/B₀ or f·√(B/B₀), so that η is the
    decay's at every step. An lr schedule of the user's multiplies. It saves steps, not samples;
    measurements: adabatch/controllers/README.md.

    Args:
        budget: samples of the whole run; afterwards η stays at final·η₀.
        batch_size: B₀, for which the lr was chosen, in samples.
        shape: f: 'linear' for 1 − p, 'power' for (1 − p)^power, 'cosine' for (1 + cos πp)/2.
        cap: where the batch stops growing, not below B₀: a number of samples; a controller, such as
            NoiseScale(scale=c), at every measured step; None leaves it to the upper bound.
        final: f at the end, 0 <= final <= 1: f becomes final + (1 − final)·f.
        rule: 'linear' (SGD) or 'sqrt' (Adam); None lets bind() choose by the optimizer, with a
            ValueError for one that is not known.

    Example:
        >>> rule = Annealed(budget=1000, batch_size=16, cap=64, rule="linear")
        >>> for samples in (500, 400):
        ...     rule.on_step(samples=samples, epoch=0)
        ...     size = rule.propose(None, loss=1.0, lr=0.1)
        ...     print(size, round(rule.lr_factor()(size), 6))
        32.0 1.0
        64.0 0.4

    References: Smith, Kindermans, Ying, Le (2018), arXiv 1711.00489; for budgets Li, Yumer, Ramanan
    (2020), arXiv 1905.04753. The cap and the composition are ours.
    """

    init_args = ("budget", "batch_size", "shape", "power", "cap", "final", "rule")
    state_attrs = ("samples_seen",)

    def __init__(self, budget: int, batch_size: int = 16, shape: str = "linear", power: float = 2.0,
                 cap: Operand | None = None, final: float = 0.0, rule: str | None = None):
        self.budget = positive("budget", budget)
        self._first_batch_size = self.batch_size = positive("batch_size", batch_size)
        self.shape, self.power = choice("shape", shape, SHAPES), positive("power", power)
        self.rule = choice("rule", rule, (None, *EXPONENTS))
        self.final = real("final", final, at_least=0, at_most=1)
        self.cap = cap
        if isinstance(cap, interfaces.Controller):
            self.children = (cap,)
        elif cap is not None:
            positive("cap", cap)
        if budget < batch_size:
            raise ValueError(f"budget ({budget}) must not be below batch_size ({batch_size}): it "
                             "counts the samples of the whole run, epochs * len(dataset)")
        self.samples_seen, self._latest_cap = 0, math.inf
        self._warned = False

    @property
    def needs_moments(self) -> bool:
        return any(child.needs_moments for child in self.children)

    @property
    def step_per_sample(self) -> float:
        """η/η₀ of the next step."""
        progress = self.samples_seen / self.budget
        return self.final + (1 - self.final) * decay(progress, self.shape, self.power)

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        self.rule = rule_of_optimizer(context.optimizer) if self.rule is None else self.rule

    def on_step(self, *, samples: int, epoch: int) -> None:
        super().on_step(samples=samples, epoch=epoch)
        if self.samples_seen > 1.1 * self.budget and not self._warned:  # not for the last batch
            self._warned = True
            warnings.warn(
                f"Annealed: training continues after its budget of {self.budget} samples, at "
                f"final={self.final:g} times the first step. The budget counts samples of the "
                "whole run, not steps: pass epochs * len(dataset)", stacklevel=4)
        self.samples_seen += samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        if isinstance(self.cap, interfaces.Controller):
            self._latest_cap = float(self.cap.propose(moments, loss=loss, lr=lr))
        else:
            self._latest_cap = math.inf if self.cap is None else float(self.cap)
        return self._rule(self._latest_cap)

    def _inputs(self, level: float) -> list[Input]:
        return [(self._latest_cap, *child.interval(level)) for child in self.children]

    def _rule(self, *inputs: float) -> float:
        decayed = self.step_per_sample ** (1 / self._exponent)
        grown = self.batch_size / decayed if decayed > 0 else math.inf
        return min(grown, max(inputs[0], float(self.batch_size)))

    def lr_factor(self) -> Callable[[int], float]:
        return functools.partial(_factor, self.step_per_sample, self.batch_size, self._exponent)

    @property
    def _exponent(self) -> float:
        if self.rule is None:
            raise ValueError("Annealed does not know its rule yet: pass rule='linear' (SGD) or "
                             "'sqrt' (Adam), or let adabatch.wrap bind it")
        return EXPONENTS[self.rule]


def _factor(step_per_sample: float, base: float, exponent: float, batch_size: int) -> float:
    return step_per_sample * (batch_size / base) ** exponent
