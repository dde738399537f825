"""Which operations keep samples apart: a sample's rows of their results depend on its own only.

A layer whose operations all do is measured in them. What is not listed here may mix samples, or
lead to a branch that the whole batch takes: the layer is then run again for single samples, which
shows it.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.functional.flow import (
    FLAT, PRODUCTS, REDUCTIONS, RESHAPES, UNKNOWN, dim_after, einsum_dim,
)

ELEMENTWISE = frozenset({
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "truediv",
    "floordiv", "floor_divide", "remainder", "fmod", "mod", "pow", "float_power", "neg",
    "negative", "abs", "absolute", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt",
    "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh",
    "cosh", "tanh", "sigmoid", "logit", "erf", "erfc", "relu", "relu6", "gelu", "silu",
    "mish", "elu", "selu", "celu", "leaky_relu", "rrelu", "softplus", "softsign", "hardtanh",
    "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold",
    "clamp", "clip", "clamp_min", "clamp_max", "where", "lerp", "maximum", "minimum", "fmax",
    "fmin", "addcmul", "addcdiv", "sign", "sgn", "round", "floor", "ceil", "trunc", "frac", "hypot",
    "logaddexp", "xlogy", "to", "float", "double", "half", "bfloat16", "long", "int", "bool",
    "type", "type_as", "clone", "contiguous", "detach", "requires_grad", "eq", "ne", "lt", "le",
    "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "and", "or", "xor",
    "invert", "isnan", "isfinite", "isinf", "nan_to_num", "masked_fill", "dropout", "copy", "fill",
    "zero", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "polar", "complex"})
VIEWS = RESHAPES | {
    "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "t", "permute", "movedim",
    "moveaxis", "expand", "expand_as", "broadcast_to", "narrow", "select", "chunk", "split",
    "unbind", "get"}
# The place of their argument `dim`, and its default.
ALONG: dict[str, tuple[int, int | None]] = {
    "softmax": (1, None), "log_softmax": (1, None), "softmin": (1, None), "cumsum": (1, None),
    "cumprod": (1, None), "logcumsumexp": (1, None), "sort": (1, -1), "argsort": (1, -1),
    "topk": (2, -1), "flip": (1, None), "roll": (2, None), "normalize": (2, 1), "glu": (1, -1),
    "cat": (1, 0), "concat": (1, 0), "norm": (2, None), "vector_norm": (2, None),
    **dict.fromkeys(REDUCTIONS - {"norm", "vector_norm", "cosine_similarity"}, (1, None))}
CHANNELS = {  # of a rank, samples first
    "conv1d": 3, "conv2d": 4, "conv3d": 5, "conv_transpose1d": 3, "conv_transpose2d": 4,
    "conv_transpose3d": 5, "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "max_pool1d": 3,
    "max_pool2d": 4, "max_pool3d": 5, "adaptive_avg_pool1d": 3, "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5, "scaled_dot_product_attention": 4}
NORMS = frozenset({"layer_norm", "rms_norm"})
# They give no tensor, and nothing that depends on the samples' values.
SHAPES_ONLY = frozenset({
    "size", "get", "dim", "ndimension", "numel", "nelement", "len", "stride", "is_contiguous",
    "is_floating_point", "is_complex", "element_size", "get_device", "type"})
KNOWN = (ELEMENTWISE | VIEWS | ALONG.keys() | CHANNELS.keys() | NORMS | SHAPES_ONLY | PRODUCTS
         | {"linear", "embedding", "group_norm", "einsum", "stack", "getitem"})


def keeps_apart(
    function_name: str, name: str, args: Args, kwargs: Kwargs,
    inputs: Sequence[tuple[Tensor, int]], outputs: Sequence[tuple[Tensor, int]],
) -> bool:
    """Whether the operation is known to keep samples apart.

    Args:
        function_name, name: of the operation, and without what marks variants of it.
        inputs, outputs: its tensors that carry samples, and all results, with their dimensions.
    """
    if not outputs:
        return name in SHAPES_ONLY
    in_place = function_name.endswith("_") and not function_name.startswith("_")
    if (in_place or function_name.startswith("__i")) and name not in ELEMENTWISE:
        return False
    if name == "setitem":
        return False
    return all(dim != UNKNOWN and dim == _dim_after(name, tensor, before, args, kwargs, output)
               for tensor, before in inputs for output, dim in outputs)


def _dim_after(
    name: str, tensor: Tensor, dim: int, args: Args, kwargs: Kwargs, output: Tensor
) -> int:
    """The dimension of the samples in the result; UNKNOWN where the operation may mix them."""
    rank, after = tensor.dim(), output.dim()
    if dim == FLAT:
        return _after_flat(name, tensor, args, kwargs, output)
    if name in ELEMENTWISE:
        return dim + after - rank
    if name in NORMS:
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return dim if dim < rank - len(shape) else UNKNOWN
    if name == "linear":
        return dim if dim < rank - 1 and tensor is args[0] else UNKNOWN
    if name == "embedding":
        return dim if tensor is args[0] else UNKNOWN
    if name in CHANNELS:
        return 0 if dim == 0 and rank == CHANNELS[name] == after else UNKNOWN
    if name == "group_norm":
        return 0 if dim == 0 else UNKNOWN
    if name == "einsum":
        return einsum_dim(tensor, dim, args)
    if name in PRODUCTS and dim >= rank - 2 and sum(each is tensor for each in args) > 1:
        return UNKNOWN  # both sides of the product
    if name in VIEWS or name in PRODUCTS or name == "stack":
        return dim_after(name, tensor, dim, args, kwargs, output)
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        basic = all(each is None or each is Ellipsis or type(each) in (int, slice)
                    for each in index)
        return dim_after(name, tensor, dim, args, kwargs, output) if basic else UNKNOWN
    dims = _dims(name, rank, args, kwargs)
    if dims is None or dim in dims:
        return UNKNOWN
    return dim if after == rank else dim - sum(each < dim for each in dims)


def _after_flat(
    name: str, tensor: Tensor, args: Args, kwargs: Kwargs, output: Tensor
) -> int:
    """Of samples and positions in one first dimension."""
    if name in RESHAPES:  # back to a dimension for the samples, or of the others
        return FLAT if output.shape[0] == tensor.shape[0] else 0
    rows = name in ("linear", "addmm", "mm", "matmul", "embedding") or name in NORMS
    if rows:
        left = args[1] if name == "addmm" else args[0]
        return FLAT if tensor is left and (tensor.dim() > 1 or name == "embedding") else UNKNOWN
    if name in ELEMENTWISE:
        return FLAT if output.dim() == tensor.dim() else UNKNOWN
    dims = _dims(name, tensor.dim(), args, kwargs)
    return UNKNOWN if dims is None or 0 in dims else FLAT


def _dims(name: str, rank: int, args: Args, kwargs: Kwargs) -> list[int] | None:
    """The dimensions along which an operation works; None where they are not known."""
    if name not in ALONG:
        return None
    place, default = ALONG[name]
    given = kwargs.get("dim", args[place] if len(args) > place else default)
    if name == "flip" and len(args) > 2:
        given = args[1:]
    places = [given] if type(given) is int else given
    if not isinstance(places, (tuple, list)) or not places:
        return None
    return [each % rank for each in places] if all(type(each) is int for each in places) else None
