"""Rules of operations: the factors of what is computed from parameters where it meets samples.

Legend: N samples, S measured, T positions (all dimensions between first and last), I in, O out,
D width, P elements that share their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.factors.affine import Scale, Shift
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.conv import ConvOuter
from adabatch.grad_sample.factors.outer import OneHotOuter, Outer
from adabatch.grad_sample.functional.expression import Leaf, Operation, ParameterExpression
from adabatch.grad_sample.functional.pull_back import EMBEDDING, EXPANSIONS, bound, shaped, sum_to
from adabatch.kernels import accumulation_dtype, sample_chunks


@dataclass(eq=False)
class Operand:
    """An argument that carries samples or is computed from parameters.

    Attributes:
        value: a tensor, or the expression.
        rows: those to be measured; None for all.
        own_rows: whether it has a row for each sample.
    """

    value: Tensor | ParameterExpression
    own_rows: bool
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def traced(self) -> bool:
        """Whether it is computed from parameters."""
        return isinstance(self.value, ParameterExpression)

    @property
    def tensor(self) -> Tensor:
        """The measured rows of what carries samples, else all."""
        assert isinstance(self.value, Tensor)
        value = self.value
        if self.rows is not None and self.own_rows:
            value = value.index_select(0, self.rows)
        return value if value.layout is torch.strided else value.to_dense()


@dataclass(eq=False)
class Call:
    """A call of an operation with one output.

    Attributes:
        name: of the function, without underscores.
        function: that gives the result as a new tensor.
        args, kwargs: with an Operand in place of every tensor and expression.
        grad: of the output, [S, ...], the measured rows.
        wide: the same in the type that sums are formed in.
        value: gives the value of an expression.
    """

    name: str
    function: Operation
    args: Args
    kwargs: Kwargs
    grad: Tensor
    wide: Tensor
    value: Callable[[ParameterExpression], Tensor]

    def bound(self, *names: str) -> dict[str, Leaf]:
        """The arguments by name; NoRule where there are others."""
        found = bound(self.args, self.kwargs, names)
        if found is None:
            raise NoRule
        return found

    def sums(self, operand: Operand, grad: Tensor) -> Dense:
        """The operand's gradients from those that are broadcast to the output's shape."""
        shape = operand.shape[1:] if operand.own_rows else operand.shape
        if operand.own_rows:
            need(len(operand.shape) == grad.dim())
        else:
            need(len(shape) < grad.dim() or shape[0] == 1)
            grad = grad.unsqueeze(1)
        found = sum_to(grad, shape)
        need(found.shape[1:] == shape)  # not rows of samples and positions in one dimension
        return Dense(found)


class NoRule(Exception):
    """The operation has to be run again."""


Parts = list[tuple[Operand, Factor]]
Rule = Callable[[Call], Parts]
RULES: dict[str, Rule] = {}
FLAT_RULES: set[str] = set()


def rule(*names: str, flat: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: the rule of the operations of these names; flat: it holds as well where samples
    and positions share the first dimension, as if they had one each."""
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        FLAT_RULES.update(names if flat else ())
        return function

    return register


def need(condition: object) -> None:
    """Raise NoRule unless the condition holds."""
    if not condition:
        raise NoRule


def _traced(*values: object) -> list[Operand]:
    return [each for each in values if isinstance(each, Operand) and each.traced]


def _samples(operand: object, dims: int | None = None) -> Tensor:
    """The measured rows of an argument that carries samples, and has that many dimensions."""
    if not (isinstance(operand, Operand) and operand.own_rows and not operand.traced):
        raise NoRule
    need(dims is None or len(operand.shape) == dims)
    return operand.tensor


# -- elementwise


@rule("add", "radd", "sub", "subtract", "rsub", flat=True)
def _sum(call: Call) -> Parts:
    """± b, summed over what the operand was broadcast to."""
    values = call.bound("input", "other", "alpha")
    alpha = values.get("alpha", 1)
    need(isinstance(alpha, (int, float)))
    signs = {"add": (1, alpha), "radd": (alpha, 1), "rsub": (-alpha, 1)}.get(call.name, (1, -alpha))
    parts: Parts = []
    for operand, sign in zip((values["input"], values["other"]), signs, strict=True):
        if _traced(operand):
            grad = call.wide if sign == 1 else sign * call.wide
            parts.append((operand, call.sums(operand, grad)))
    return parts


@rule("mul", "rmul", "multiply", flat=True)
def _product(call: Call) -> Parts:
    """b ∘ the other factor, summed over what the operand was broadcast to."""
    values = call.bound("input", "other")
    own, other = values["input"], values["other"]
    if not _traced(own):
        own, other = other, own
    return [(own, _sums_of_products(call, own, _samples(other)))]


@rule("div", "divide", "true_divide", "truediv", "rtruediv", "rdiv", flat=True)
def _quotient(call: Call) -> Parts:
    """b / y of x / y for x, −b x / y² for y, summed likewise."""
    values = call.bound("input", "other")
    above, below = values["input"], values["other"]
    if call.name.startswith("r"):
        above, below = below, above
    if _traced(above):
        return [(above, _sums_of_products(call, above, _samples(below).reciprocal()))]
    products = _sums_of_products(call, below, _samples(above))
    need(not below.own_rows)
    value = call.value(below.value).to(products.grad.dtype)
    return [(below, Dense(-products.grad / value.square()))]


def _sums_of_products(call: Call, operand: Operand, other: Tensor) -> Dense:
    """Σ b ∘ other over what the operand was broadcast to, some samples at a time."""
    grad, dtype = call.grad, accumulation_dtype(call.wide, other)
    need(other.dim() == grad.dim() and not (operand.own_rows and len(operand.shape) != grad.dim()))
    if not grad.numel():
        return call.sums(operand, (call.wide * other).expand(grad.shape))
    parts = [call.sums(operand, b.to(dtype) * a.to(dtype)).grad
             for b, a in sample_chunks(grad[:1].numel(), dtype, grad, other)]
    return Dense(parts[0] if len(parts) == 1 else torch.cat(parts))


ELEMENTWISE = (
    "where", "lerp", "pow", "rpow", "float_power", "maximum", "minimum", "fmax", "fmin",
    "addcmul", "addcdiv", "atan2", "arctan2", "hypot", "logaddexp", "xlogy")


@rule(*ELEMENTWISE, flat=True)
def _elementwise(call: Call) -> Parts:
    """By autograd, of the operation run again with the operand's own copy for each sample."""
    own = _traced(*call.args, *call.kwargs.values())
    copies: list[Tensor] = []

    def argument(value: object) -> object:
        if not isinstance(value, Operand):
            return value
        tensor = call.value(value.value) if value.traced else value.tensor  # type: ignore[arg-type]
        tensor = tensor.to(call.wide.dtype) if tensor.is_floating_point() else tensor
        if not value.traced:
            return tensor
        need(not value.own_rows and len(value.shape) <= call.grad.dim())
        need(len(value.shape) < call.grad.dim() or value.shape[0] == 1)
        ones = (1,) * (call.grad.dim() - len(value.shape))
        copy = tensor.detach().reshape(*ones, *value.shape)
        copies.append(copy.expand(len(call.grad), *copy.shape[1:]).requires_grad_())
        return copies[-1]

    args = [argument(each) for each in call.args]
    kwargs = {name: argument(each) for name, each in call.kwargs.items()}
    with torch.enable_grad():
        output = call.function(*args, **kwargs)
    need(output.shape == call.grad.shape and output.dtype == call.wide.dtype)
    grads = torch.autograd.grad(output, copies, call.wide)
    return [(each, Dense(grad.reshape(len(grad), *each.shape)))
            for each, grad in zip(own, grads, strict=True)]


@rule("masked_fill", flat=True)
def _masked(call: Call) -> Parts:
    """b where the mask says so for the value, and elsewhere for what is filled."""
    values = call.bound("input", "mask", "value")
    mask = values["mask"]
    need(isinstance(mask, Operand) and not mask.traced)
    without = {"input": mask.tensor, "value": ~mask.tensor}
    return [(values[name], call.sums(values[name], call.wide.masked_fill(hidden, 0)))
            for name, hidden in without.items() if _traced(values[name])]


@rule(*EXPANSIONS)
def _expanded(call: Call) -> Parts:
    """To the samples' shape."""
    own = call.args[0]
    need(_traced(own) and not own.own_rows)
    return [(own, call.sums(own, call.wide))]


@rule("with_item")
def _written(call: Call) -> Parts:
    """tensor[:, index] = value."""
    tensor, index, value = call.args
    entries = index if isinstance(index, tuple) else (index,)
    basic = all(each is None or each is Ellipsis or type(each) in (int, slice) for each in entries)
    need(basic and _traced(value) and not _traced(tensor))
    need(entries[0] is Ellipsis or entries[0] == slice(None))
    return [(value, call.sums(value, call.wide[index]))]


# -- joining


@rule("cat", "concat", "concatenate")
def _joined(call: Call) -> Parts:
    values = call.bound("tensors", "dim")
    tensors, dim = values["tensors"], values.get("dim", 0)
    need(isinstance(dim, int) and dim % call.grad.dim() and isinstance(tensors, (list, tuple)))
    dim %= call.grad.dim()
    parts: Parts = []
    start = 0
    for each in tensors:
        need(isinstance(each, Operand) and each.own_rows)
        length = each.shape[dim]
        if each.traced:
            parts.append((each, Dense(call.wide.narrow(dim, start, length))))
        start += length
    need(start == call.grad.shape[dim])
    return parts


@rule("stack")
def _stacked(call: Call) -> Parts:
    values = call.bound("tensors", "dim")
    tensors, dim = values["tensors"], values.get("dim", 0)
    need(isinstance(dim, int) and dim % call.grad.dim() and isinstance(tensors, (list, tuple)))
    need(all(isinstance(each, Operand) and each.own_rows for each in tensors))
    return [(each, Dense(call.wide.select(dim, place)))
            for place, each in enumerate(tensors) if each.traced]


# -- products of matrices


@rule("linear", flat=True)
def _linear(call: Call) -> Parts:
    """x Wᵀ + bias."""
    values = call.bound("input", "weight", "bias")
    weight, parts = values["weight"], _added(call, values.get("bias"), 1)
    if _traced(weight):
        parts.append((weight, _matrix(call, _samples(values["input"]), weight, True)))
    return _complete(parts, values)


@rule("addmm", "addmv", "baddbmm", flat=True)
def _added_product(call: Call) -> Parts:
    """beta · input + alpha · x W."""
    left, right = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"),
                   "baddbmm": ("batch1", "batch2")}[call.name]
    values = call.bound("input", left, right, "beta", "alpha")
    beta, alpha = values.get("beta", 1), values.get("alpha", 1)
    need(all(isinstance(each, (int, float)) for each in (beta, alpha)))
    parts = _added(call, values["input"], beta)
    for own, factor in _of_product(call, values[left], values[right]):
        parts.append((own, factor if alpha == 1 else _times(factor, alpha)))
    return _complete(parts, values)


@rule("matmul", "rmatmul", "mm", "bmm", flat=True)
def _matmul(call: Call) -> Parts:
    values = call.bound("input", "other")
    left, right = values["input"], values["other"]
    if call.name == "rmatmul":
        left, right = right, left
    return _complete(_of_product(call, left, right), values)


def _complete(parts: Parts, values: dict[str, Leaf]) -> Parts:
    need(len(parts) == len(_traced(*values.values())))
    return parts


def _added(call: Call, operand: object, factor: float) -> Parts:
    grad = call.wide if factor == 1 else factor * call.wide
    return [(each, call.sums(each, grad)) for each in _traced(operand)]


def _times(factor: Factor, number: float) -> Factor:
    if isinstance(factor, Outer):
        return Outer(factor.left * number, factor.right)
    return Dense(factor.dense() * number)


def _of_product(call: Call, left: Operand, right: Operand) -> Parts:
    """Of left @ right, one of which is computed from parameters, or none."""
    if not _traced(left, right):
        return []
    own, grad = (left, call.grad) if left.traced else (right, call.grad)
    other = _samples(right if left.traced else left)
    rank = len(own.shape)
    if own.own_rows:  # W_n, a matrix for each sample
        need(rank == 3 and other.dim() == 3 and grad.dim() == 3)
        pair = (grad.mT, other.mT) if left.traced else (other, grad)
        return [(own, Outer(*pair))]
    if right.traced and rank == 2:
        return [(own, _matrix(call, other, own, False))]
    if right.traced and rank == 1:  # x [S, ..., I] times a vector
        positions = grad.reshape(len(grad), -1, 1)
        wide = call.wide.dtype
        return [(own, Dense(torch.bmm(positions.mT.to(wide), _positions(other).to(wide))[:, 0]))]
    need(other.dim() >= 3)  # else its rows are summed over
    if rank == 1:  # a vector times x [S, ..., I, O]
        columns = other.mT.reshape(len(other), -1, other.shape[-2]).to(call.wide.dtype)
        row = call.wide.reshape(len(grad), 1, -1)
        return [(own, Dense(torch.bmm(row, columns)[:, 0]))]
    if rank == 2:  # W [O, I] times x [S, ..., I, T]
        return [(own, Outer(_positions(grad.mT), _positions(other.mT)))]
    dims = max(rank, other.dim())
    need(dims == grad.dim() and (other.dim() > rank or own.shape[0] == 1))
    wide = call.wide.dtype
    products = (torch.matmul(grad.to(wide), other.to(wide).mT) if left.traced
                else torch.matmul(other.to(wide).mT, grad.to(wide)))
    return [(own, call.sums(own, products))]


def _matrix(call: Call, inputs: Tensor, weight: Operand, output_first: bool) -> Factor:
    """Of a weight [O, I] or [I, O] that multiplies inputs [S, ..., I]."""
    need(len(weight.shape) == 2 and not weight.own_rows and inputs.dim() == call.grad.dim() >= 2)
    a_STI, b_STO = _positions(inputs), _positions(call.grad)
    return Outer(b_STO, a_STI) if output_first else Outer(a_STI, b_STO)


def _positions(tensor: Tensor) -> Tensor:
    """[S, ..., width] as [S, T, width]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


@rule("einsum")
def _einsum(call: Call) -> Parts:
    """Of two operands: the output's gradient times the other one, an outer product where they share
    no label with the parameter's."""
    need(call.args and isinstance(call.args[0], str) and not call.kwargs)
    operands = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
    text = call.args[0].replace(" ", "")
    need("->" in text and "." not in text and len(operands) == 2)
    inputs, result = text.split("->")
    labels = inputs.split(",")
    place = 0 if _traced(operands[0]) else 1
    own, theirs, mine = operands[place], labels[1 - place], labels[place]
    other = _samples(operands[1 - place])
    need(not own.own_rows and all(len(set(each)) == len(each) for each in (*labels, result)))
    sample = theirs[0]
    need(result[:1] == sample and sample not in mine)
    need(set(mine) <= set(theirs) | set(result))
    of_other = [each for each in mine if each not in result]
    of_grad = [each for each in mine if each not in theirs]
    positions = [each for each in theirs[1:] if each in result]
    outer = (len(positions) + len(of_other) + 1 == len(theirs)
             and len(positions) + len(of_grad) + 1 == len(result))
    if outer and of_other and of_grad:
        sides = [_arranged(other, theirs, [sample, *positions, *of_other], len(positions)),
                 _arranged(call.grad, result, [sample, *positions, *of_grad], len(positions))]
        if mine == "".join(of_grad + of_other):
            return [(own, shaped(Outer(*sides[::-1]), own.shape))]
        if mine == "".join(of_other + of_grad):
            return [(own, shaped(Outer(*sides), own.shape))]
    wide = call.wide.dtype
    grads = torch.einsum(f"{result},{theirs}->{sample}{mine}", call.wide, other.to(wide))
    return [(own, Dense(grads))]


def _arranged(tensor: Tensor, labels: str, order: Sequence[str], positions: int) -> Tensor:
    """The tensor with its dimensions in another order, as [S, T, width]."""
    permuted = tensor.permute([labels.index(each) for each in order])
    return permuted.flatten(1 + positions).reshape(
        len(tensor), math.prod(permuted.shape[1 : 1 + positions]), -1)


# -- look-ups


@rule("embedding", flat=True)
def _embedding(call: Call) -> Parts:
    values = call.bound(*EMBEDDING)
    need(values.get("max_norm") is None and not values.get("scale_grad_by_freq"))
    return [_looked_up(call, values["weight"], _samples(values["input"]),
                       values.get("padding_idx"))]


@rule("getitem", flat=True)
def _picked(call: Call) -> Parts:
    table, index = call.args
    return [_looked_up(call, table, _samples(index))]


@rule("index_select")
def _selected(call: Call) -> Parts:
    values = call.bound("input", "dim", "index")
    need(values["dim"] == 0)
    return [_looked_up(call, values["input"], _samples(values["index"]))]


def _looked_up(
    call: Call, table: Operand, ids: Tensor, padding: int | None = None
) -> tuple[Operand, Factor]:
    """Rows of a table [V, ...] picked by the samples' ids."""
    need(table.traced and not table.own_rows and len(table.shape) > 0)
    need(ids.dtype in (torch.int64, torch.int32))
    rows, width = table.shape[0], math.prod(table.shape[1:])
    ids_ST = ids.reshape(len(ids), -1) % rows
    b_STD = call.grad.reshape(*ids_ST.shape, width)
    if padding is not None:
        b_STD = b_STD.masked_fill((ids_ST == padding % rows).unsqueeze(2), 0)
    return table, shaped(OneHotOuter(ids_ST, b_STD, rows), table.shape)


# -- convolutions and normalizations


@rule("conv1d", "conv2d", "conv3d")
def _convolution(call: Call) -> Parts:
    values = call.bound("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    dims = call.grad.dim() - 2
    parts: Parts = [(each, Dense(call.wide.flatten(2).sum(2)))
                    for each in _traced(values.get("bias"))]
    weight = values["weight"]
    if _traced(weight):
        inputs = _samples(values["input"], dims + 2)
        stride, dilation, padding = (
            _ints(values.get(name, default), dims)
            for name, default in (("stride", 1), ("dilation", 1), ("padding", 0)))
        parts.append((weight, ConvOuter(inputs, call.grad, weight.shape, stride, padding, dilation,
                                        values.get("groups", 1))))
    return _complete(parts, values)


def _ints(value: object, dims: int) -> tuple[int, ...]:
    """One number a dimension."""
    if value == "valid":
        return (0,) * dims
    if isinstance(value, int):
        return (value,) * dims
    if not isinstance(value, (tuple, list)):
        raise NoRule
    return tuple(value) * dims if len(value) == 1 else tuple(value)


@rule("layer_norm", flat=True)
def _layer_norm(call: Call) -> Parts:
    values = call.bound("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    shape = list(values["normalized_shape"])
    inputs = _samples(values["input"]).to(call.wide.dtype)
    need(inputs.dim() > len(shape))
    normalized = F.layer_norm(inputs, shape, eps=values.get("eps", 1e-5))
    return _affine(call, values, normalized.flatten(-len(shape)), call.grad.flatten(-len(shape)))


@rule("rms_norm", flat=True)
def _rms_norm(call: Call) -> Parts:
    values = call.bound("input", "normalized_shape", "weight", "eps")
    shape, eps = list(values["normalized_shape"]), values.get("eps")
    inputs = _samples(values["input"])
    need(inputs.dim() > len(shape))
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    normalized = F.rms_norm(inputs.to(call.wide.dtype), shape, eps=eps)
    return _affine(call, values, normalized.flatten(-len(shape)), call.grad.flatten(-len(shape)))


@rule("group_norm")
def _group_norm(call: Call) -> Parts:
    values = call.bound("input", "num_groups", "weight", "bias", "eps")
    inputs = _samples(values["input"]).to(call.wide.dtype)
    normalized = F.group_norm(inputs, values["num_groups"], eps=values.get("eps", 1e-5))
    channels_last = [each.unsqueeze(1) if each.dim() == 2 else each.flatten(2).mT
                     for each in (normalized, call.grad)]
    return _affine(call, values, *channels_last)


def _affine(
    call: Call, values: dict[str, Leaf], normalized: Tensor, grad: Tensor
) -> Parts:
    """Scale and shift of what is normalized, [S, ..., P]."""
    weight: Leaf = values.get("weight")
    bias: Leaf = values.get("bias")
    sides = _positions(normalized), _positions(grad)
    parts: Parts = []
    if _traced(weight):
        scale = Scale(*sides, None, None, weight.shape)
        parts.append((weight, scale))
        if _traced(bias):
            parts.append((bias, Shift(scale)))
    elif _traced(bias):
        sums = sides[1].sum(1, dtype=call.wide.dtype)
        parts.append((bias, Dense(sums.view(len(sums), *bias.shape))))
    return _complete(parts, values)
