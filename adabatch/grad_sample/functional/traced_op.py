"""Operations in which what is computed from parameters alone meets samples: their per-sample
gradients, by the rule of the operation, or by running it again for each sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.merge import merge_factors
from adabatch.grad_sample.functional.expression import (
    Leaves, Operation, ParameterExpression, function_name, run_leaves,
)
from adabatch.grad_sample.functional.pull_back import bound, of_rows, pull_back, value_of
from adabatch.grad_sample.functional.rules import RULES, Call, NoRule, Operand
from adabatch.grad_sample.layers.generic import per_sample_grads
from adabatch.kernels import accumulation_dtype

FLATTENED = (
    "{name} meets samples and positions in one dimension, in a form that has no rule: give it "
    "inputs with a dimension for the samples, give the module a rule with register_grad_sampler, "
    "or pass ignore=[...]")


PRODUCTS = {"linear": ("input", "weight", "bias"), "addmm": ("bias", "input", "weight"),
            "matmul": ("input", "weight"), "mm": ("input", "weight")}


@dataclass(frozen=True)
class Product:
    """Samples times a weight that is a parameter itself, [O, I] (output_first) or [I, O], plus a
    bias that is one or "": the parameters' names."""

    weight: str
    bias: str
    output_first: bool


@dataclass(eq=False)
class TracedOp:
    """An operation in which traced parameters meet samples.

    What is computed from parameters alone may have a row for every sample (an expanded class token)
    or be the same for all (a weight). `aligned` are the places of those with a row each;
    `may_align` of those whose shape allows it, tried if the operation fails without. `flat`:
    samples and positions share the first dimension. What is not `active` is not measured here.
    `source` is its only tensor, with its gradient, while its tap is placed.
    """

    name: str
    function: Operation
    leaves: Leaves
    tree: TreeSpec
    tensors: list[Tensor]
    batched: list[bool]
    positions: list[int]
    parameters: dict[str, Tensor]
    aligned: frozenset[int]
    may_align: frozenset[int]
    n_samples: int
    flat: bool = False
    active: bool = True
    source: Tensor | None = None

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        """Per-sample gradients of the traced parameters through this operation, by name."""
        found = self._by_rule(tensors, backprops, rows)
        if found is not None:
            return found
        grads = self._grads_run_again(tensors, backprops, rows)
        return {name: Dense(grad) for name, grad in grads.items()}

    @cached_property
    def product(self) -> Product | None:
        """What it multiplies, if it is such a product of a single tensor."""
        names = PRODUCTS.get(function_name(self.function).strip("_"))
        if names is None or self.batched != [True] or self.aligned:
            return None
        places: Leaves = list(range(len(self.leaves)))
        args, kwargs = tree_unflatten(places, self.tree)
        values = bound(args, kwargs, names)
        if values is None or values["input"] != self.positions[0]:
            return None
        weight, bias = (None if place is None else self.leaves[place] for place in (
            values["weight"], values.get("bias")))
        used = [each for each in (weight, bias) if each is not None]
        if not all(isinstance(each, ParameterExpression) and each.name for each in used):
            return None
        if weight is None or len(weight.shape) != 2:
            return None
        output_first = names == PRODUCTS["linear"]
        if bias is not None and bias.shape != (weight.shape[0 if output_first else 1],):
            return None
        return Product(weight.name, "" if bias is None else bias.name, output_first)

    def _by_rule(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor] | None:
        """By the rule of the operation; None where it has none, or none for these arguments."""
        name = function_name(self.function).strip("_")
        if name not in RULES or len(backprops) != 1:
            return None
        if any(tensor.is_complex() for tensor in (*backprops, *tensors)):
            return None
        leaves: Leaves = [
            Operand(leaf, place in self.aligned or (leaf.expanded and place in self.may_align))
            if isinstance(leaf, ParameterExpression) else leaf
            for place, leaf in enumerate(self.leaves)]
        for position, tensor, each in zip(self.positions, tensors, self.batched, strict=True):
            leaves[position] = Operand(self.split(tensor) if each else tensor, each, rows)
        args, kwargs = tree_unflatten(leaves, self.tree)
        grad = self.split(backprops[0])
        grad = grad if rows is None else grad.index_select(0, rows)
        wide = grad.to(accumulation_dtype(grad, *self.parameters.values()))
        own = {each: value.detach() for each, value in self.parameters.items()}
        call = Call(name, self.function, args, kwargs, grad, wide,
                    lambda leaf: value_of(leaf, own, self.name))
        found: dict[str, Factor] = {}
        try:
            for operand, factor in RULES[name](call):
                for own_name, pulled in self._pulled(operand, factor).items():
                    before = [found[own_name]] if own_name in found else []
                    found[own_name] = merge_factors([*before, pulled])
        except NoRule:
            return None
        return found if found.keys() == self.parameters.keys() else None

    def _pulled(self, operand: Operand, factor: Factor) -> dict[str, Factor]:
        expression = operand.value
        assert isinstance(expression, ParameterExpression)
        if operand.own_rows:
            of_one = of_rows(expression, factor)
            if of_one is None:
                raise NoRule
            expression, factor = of_one
        found = pull_back(expression, factor, self.parameters, self.name)
        if found is None:
            raise NoRule
        return found

    def cost_of(self, output: Tensor) -> tuple[tuple[int, ...], int, bool]:
        """Output shape [N, ...], elements of the weight of a product, and whether it has no rule,
        as operation_cost takes them."""
        shape = tuple(output.shape)
        if self.flat:
            shape = (self.n_samples, shape[0] // max(1, self.n_samples), *shape[1:])
        product = self.product
        weight = self.parameters[product.weight].numel() if product else 0
        return shape, weight, function_name(self.function).strip("_") not in RULES

    def split(self, tensor: Tensor) -> Tensor:
        """[N, T, ...] of samples and positions in one dimension."""
        return tensor.unflatten(0, (self.n_samples, -1)) if self.flat else tensor

    def _grads_run_again(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Tensor]:
        if self.flat:
            raise RuntimeError(FLATTENED.format(name=self.name))
        if rows is None:
            rows = torch.arange(backprops[0].shape[0], device=backprops[0].device)
        picked = [tensor.index_select(0, rows) if each else tensor
                  for tensor, each in zip(tensors, self.batched, strict=True)]
        outer = [grad.index_select(0, rows) for grad in backprops]
        arguments = ([rows, *picked], [True, *self.batched], outer, self.name)
        try:
            return per_sample_grads(self._run, self.parameters, *arguments)
        except RuntimeError:
            if self.aligned >= self.may_align:
                raise
            self.aligned = self.may_align
            return per_sample_grads(self._run, self.parameters, *arguments)

    def _run(self, parameters: dict[str, Tensor], row: Tensor, *inputs: Tensor) -> list[Tensor]:
        leaves = run_leaves(self.leaves, parameters, {})
        for position in self.aligned:
            leaves[position] = leaves[position].index_select(0, row)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value
        args, kwargs = tree_unflatten(leaves, self.tree)
        return tree_flatten(self.function(*args, **kwargs))[0]


def identity(tensor: Tensor) -> Tensor:
    """The operation of `ParameterTracer.tap_rows`."""
    return tensor
