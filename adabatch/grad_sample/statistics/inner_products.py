"""Inner products ⟨g_i, g⟩ of per-sample gradients with the step's finished gradient, without keeping the per-sample gradients.

While a pass runs, g is not known: the factors of every use are kept until it is, then each is multiplied with its parameter's gradient. What is kept are the
measured rows of each layer's activations and output gradients, for all of a step's backward passes: measure a subset (samples=) where that is too much.

Legend: S samples measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from adabatch.grad_sample.backward.recorder import ParameterUse
from adabatch.grad_sample.compat import is_compiled

COMPILED = (
    "inner_products=True cannot measure a compiled model, whose graph ends before the mean gradient is known: leave inner_products=True away, or do not compile {what} "
    "(its parts without measured parameters may be compiled)"
)
OVERWRITTEN = (
    "a tensor that {name} was run with, or its gradient, was changed in place before the step's last backward pass: inner_products=True reads it once more when the "
    "mean gradient is known. Give every backward pass of a step tensors of its own (clone a buffer that is filled again), or leave inner_products=True away"
)


class DeferredInnerProducts:
    """The uses of one backward pass, held until the step's gradient is finished.

    Example:
        >>> import torch
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, 3.0])
        >>> held = DeferredInnerProducts([ParameterUse("weight", Dense(torch.tensor([[2.0, 4.0], [0.0, 2.0]])))])
        >>> held.inner_products({"weight": weight}, {"weight": 0}, lambda values: values)
        [tensor([14.,  6.])]
    """

    def __init__(self, uses: Iterable[ParameterUse]):
        self._uses: dict[str, list[tuple[ParameterUse, list[int]]]] = {}
        for use in uses:
            self._uses.setdefault(use.parameter, []).append((use, list(_versions(use))))

    def inner_products(self, parameters: Mapping[str, Tensor], row_of: Mapping[str, int], to_result_device: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """⟨contribution of sample i, gradient⟩ [S] for each probe row; None where no parameter of the row took part.

        Raises:
            RuntimeError: a tensor that was held has been overwritten.
        """
        rows: list[Tensor | None] = [None] * (1 + max(row_of.values()))
        for name, parameter in parameters.items():
            grad = _whole(parameter.grad)
            for use, versions in self._uses.get(name, ()):
                if versions != list(_versions(use)):
                    raise RuntimeError(OVERWRITTEN.format(name=name))
                if grad is None:
                    continue
                row, value = row_of[name], to_result_device(use.factor.dot(grad))
                rows[row] = value if rows[row] is None else rows[row] + value
        return rows


def check_not_compiled(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a model of which a part with measured parameters is compiled.

    Raises:
        ValueError: naming the parts.
    """
    measured = {id(parameter) for parameter in parameters.values()}
    parts = {name or "it": part for name, part in model.named_modules() if is_compiled(part)}
    compiled = [name for name, part in parts.items() if any(id(parameter) in measured for parameter in part.parameters())]
    if compiled:
        raise ValueError(COMPILED.format(what=", ".join(compiled)))


def _versions(use: ParameterUse) -> Iterator[int]:
    return (value._version for value in vars(use.factor).values() if isinstance(value, Tensor))


def _whole(grad: Tensor | None) -> Tensor | None:
    """A sharded gradient gathered, which all ranks do in the same order; a sparse one made dense."""
    if hasattr(grad, "full_tensor"):
        return grad.full_tensor()
    return grad.to_dense() if grad is not None and grad.is_sparse else grad
