"""Checks that the taps see the whole gradient: contributions add up to it, and the loss reaches the
parameters through taps only.

Legend: N samples, G_i the contribution of sample i.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from adabatch.estimators.gradients import running_backward
from adabatch.grad_sample.factors.base import Factor

DIFFERS = (
    "the samples' contributions do not add up to the gradient of these parameters: {listed}. "
    "Possible causes: a layer without a rule mixes samples or changes its buffers while it runs, a "
    "use that the hooks do not see, a term of the loss that does not pass through the samples. "
    "adabatch.check(model, batch, loss_fn) finds it. Give the layer a rule with "
    "register_grad_sampler, take the term out of the loss, or pass ignore=[...]"
)
Node: TypeAlias = torch.autograd.graph.Node
COMPILED = "CompiledFunctionBackward"  # one node that holds layers and taps alike
# Rounding in units of the eps of the coarsest type that took part: of the contributions, whose
# errors are independent, and of the gradient as a whole.
OF_SAMPLES, OF_GRADIENT = 4.0, 2.0
# Below this float32's eps is not trusted, as functions may be badly conditioned; on accelerators
# products of float32 may be rounded to 10 bits.
LEAST_EPS = {"cpu": 2.5e-5}
LEAST_EPS_ELSEWHERE = 2.0**-10
# Rounding of a coarse type (bfloat16) may hide in one pass, of few samples above all, what a layer
# mixes; hardly in that many passes.
COARSE_EPS, COARSE_PASSES = 2.0**-8, 16
CHUNK_BYTES = 1 << 24


@dataclass
class _Sums:
    """Of one parameter, over its uses: Σ_i G_i, Σ_i ‖G_i‖², the coarsest eps, and whether .grad was
    empty."""

    total: Tensor
    squares: Tensor
    eps: float
    fresh: bool


class GradientSumCheck:
    """Compares Σ_i G_i with p.grad for each parameter p, in passes that measure all samples.

    Rounding errors of the N contributions are independent: their sum grows as √Σ‖G_i‖², and so does
    what is allowed, ‖Σ_i G_i − p.grad‖ <= eps·(4·√Σ‖G_i‖² + 2·‖p.grad‖). Sums are in float64.

    Only layers without a rule, traced operations and parameters with several uses are observed:
    rules are tested. Gradients that were not empty before the pass, that hooks may change, or that
    processes share, are left out.

    Attributes:
        task: the backward pass observed last; -1 for none.

    Example:
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> check = GradientSumCheck({"weight": weight})
        >>> factor = Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> check.observe({"weight": "weight"}, {"weight": factor}, torch.float32)
        >>> weight.grad = torch.tensor([4.0, 6.0])
        >>> check.verify()
        True
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self._passes = 0
        self._forget(-1)

    def _forget(self, task: int) -> None:
        self.task = task
        self._sums: dict[str, _Sums] = {}

    def observe(
        self, names: Mapping[str, str], factors: Mapping[str, Factor], *dtypes: torch.dtype
    ) -> None:
        """A use, while the gradient is not complete.

        Args:
            names: {own name: name in the model}.
            dtypes: that the layer computed in, as autocast may have chosen them.
        """
        if self.task != running_backward():
            self._forget(running_backward())
        for own, factor in factors.items():
            name, parameter = names[own], self._parameters[names[own]]
            total, squares = _total(factor), factor.sq_norms().double().sum()
            eps = max(torch.finfo(dtype).eps for dtype in (parameter.dtype, *dtypes)
                      if dtype.is_floating_point)
            sums = self._sums.get(name)
            if sums is None:
                self._sums[name] = _Sums(total, squares, eps, _is_empty(parameter.grad))
            else:
                sums.total, sums.squares = sums.total + total, sums.squares + squares
                sums.eps = max(sums.eps, eps)

    def verify(self) -> bool:
        """When that backward pass has ended: whether enough was compared, one pass or 16 in which a
        coarse type took part; a RuntimeError lists the parameters whose contributions do not add
        up."""
        sums = self._sums
        self._forget(-1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False
        sums = {name: each for name, each in sums.items()
                if each.fresh and not _is_changed_by_others(self._parameters[name])}
        scales = {name: math.sqrt(float(each.squares)) for name, each in sums.items()}
        largest = max(scales.values(), default=0.0)
        wrong = []
        for name, each in sums.items():
            parameter, grad = self._parameters[name], torch.zeros_like(each.total)
            if parameter.grad is not None:
                grad = parameter.grad.to_dense().double().reshape(grad.shape)
            # What is zero but for rounding, as a key's bias in attention, is compared with the
            # other parameters.
            rounding = OF_SAMPLES * (scales[name] + 0.1 * largest)
            rounding += OF_GRADIENT * float(grad.norm())
            allowed = _trusted(each.eps, parameter) * rounding
            if float((each.total - grad).norm()) > allowed:  # not where a value is not finite
                wrong.append(name)
        if wrong:
            raise RuntimeError(DIFFERS.format(listed=", ".join(wrong)))
        self._passes += bool(sums)
        coarse = any(each.eps >= COARSE_EPS for each in sums.values())
        return self._passes >= (COARSE_PASSES if coarse else 1)


def _trusted(eps: float, like: Tensor) -> float:
    if eps <= torch.finfo(torch.float64).eps:
        return 1e-8
    return max(eps, LEAST_EPS.get(like.device.type, LEAST_EPS_ELSEWHERE))


def _total(factor: Factor) -> Tensor:
    """Σ_n G_n, in float64, some samples at a time."""
    size = max(1, CHUNK_BYTES // max(1, 4 * math.prod(factor.shape)))
    total: Tensor | float = 0.0
    for rows in torch.arange(factor.n_samples).split(size):
        total = total + factor.select(rows).dense().double().sum(0)
    if isinstance(total, Tensor):
        return total
    return torch.zeros(factor.shape, dtype=torch.float64)


def _is_empty(grad: Tensor | None) -> bool:
    return grad is None or (not grad.is_sparse and not bool(torch.count_nonzero(grad)))


def _is_changed_by_others(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)


def unseen_uses(
    loss: Tensor, parameters: Mapping[str, Tensor], leaves: Iterable[Tensor] = ()
) -> list[str]:
    """Names of the parameters that the loss reaches without passing a tap: a tied weight applied in
    the loss function, an L2 penalty inside the loss. The norms would lack them.

    Walks the graph from the loss down to the taps, also after backward. Uses below a tap are found
    while the model runs, not here.

    Args:
        loss: the scalar that was differentiated.
        leaves: what taps report to. A tap is recognised by its edge to one of them, not by its
            name, which is that of an in-place operation where a layer's output is a view.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> unseen_uses(weight.square().sum(), {"weight": weight})
        ['weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    reports = {id(leaf) for leaf in leaves}
    found: set[str] = set()
    seen: set[Node] = set()
    stack: list[Node | None] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        below = [function for function, _ in node.next_functions]
        compiled = node.name().split("::")[-1] == COMPILED
        if compiled or any(_reaches(each, reports) for each in below):
            continue
        name = names.get(_variable_id(node))
        if name is not None:
            found.add(name)
        stack.extend(below)
    return [name for name in parameters if name in found]


def _variable_id(node: Node) -> int:
    return id(getattr(node, "variable", None))


def _reaches(function: Node | None, leaves: Collection[int]) -> bool:
    """Whether an edge leads to one of the leaves, at once or through the selection of a line."""
    if function is None:
        return False
    nodes = (function, *(below for below, _ in function.next_functions))
    return any(node is not None and _variable_id(node) in leaves for node in nodes)


def check_uses_seen(
    loss: Tensor, parameters: Mapping[str, Tensor], leaves: Iterable[Tensor] = ()
) -> None:
    """Raise a RuntimeError listing the parameters that the loss reaches without passing a tap."""
    unseen = unseen_uses(loss, parameters, leaves)
    if unseen:
        raise RuntimeError(
            "the loss uses these parameters outside the model's layers, where no tap sees them: "
            f"{', '.join(unseen)}. For a tied weight: apply it inside the model's forward. For a "
            "penalty on the weights: use the optimizer's weight_decay, or add its gradient after "
            "backward()"
        )
