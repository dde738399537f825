"""Inputs of every operation, and its results in float64 from per-sample gradients, written out one
by one or made by autograd: for the definitions, the CPU's forms, the operators and Triton alike.

`SHAPES[operation]` names an operation's shapes, those for a CPU's forms "cpu-…", which would take
long under Triton's interpreter; `make(operation, shape, dtype)` gives a Case.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@dataclass
class Case:
    args: tuple
    expected: tuple
    kwargs: dict = field(default_factory=dict)


# N, T, I, O
OUTER = {
    "one-position": (5, 1, 7, 3),
    "gram": (5, 2, 40, 37),
    "gram-several-blocks": (2, 18, 40, 36),
    "gradients": (5, 13, 3, 2),
    "several-tiles": (3, 33, 40, 35),
    "round": (4, 8, 16, 16),
    "odd": (3, 5, 7, 9),
    "cpu-one-product-a-sample": (3, 9, 400, 400),
    "one-wide": (3, 4, 1, 1),
    "one-sample": (1, 3, 4, 5),
    "all-ones": (1, 1, 1, 1),
    "no-samples": (0, 3, 4, 5),
    "no-samples-one-position": (0, 1, 4, 5),
    "no-positions": (2, 0, 3, 4),
}
# N, T, D, V; the interpreter sorts samples of more than 8 positions, in blocks of 16
EMBEDDING = {
    "gram": (5, 7, 5, 4),
    "runs": (2, 40, 5, 6),
    "runs-longer-than-a-block": (2, 70, 3, 2),
    "one-run": (2, 60, 17, 1),
    "mostly-different": (2, 33, 3, 500),
    "one-wide": (2, 20, 1, 3),
    "one-sample": (1, 50, 3, 9),
    "one-position": (3, 1, 4, 5),
    "no-samples": (0, 20, 3, 4),
    "no-positions": (2, 0, 3, 4),
}
DENSE = {"2d": (5, 3), "1d": (5,), "3d": (1, 2, 3), "one-wide": (4, 1), "no-samples": (0, 3)}
# activations, O, kernel, stride, padding, dilation, groups
CONV = {
    "1d": ((5, 3, 11), 4, (4,), (2,), (1,), (2,), 1),
    "cpu-1d-gram": ((4, 50, 9), 60, (4,), (3,), (1,), (2,), 1),
    "2d": ((5, 4, 7, 6), 6, (3, 2), (1, 2), (1, 0), (1, 1), 2),
    "cpu-2d-windows": ((5, 3, 9, 8), 4, (3, 2), (2, 3), (2, 1), (2, 1), 1),
    "cpu-2d-gram": ((5, 60, 4, 5), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "cpu-2d-strided-gram": ((3, 70, 5, 4), 80, (3, 2), (2, 1), (2, 1), (1, 2), 1),
    "several-tiles": ((2, 6, 5, 5), 18, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "depthwise": ((5, 3, 6, 6), 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise-large": ((3, 3, 9, 8), 3, (5, 4), (1, 1), (2, 1), (1, 1), 3),
    "depthwise-large-strided": ((3, 2, 13, 16), 2, (4, 5), (2, 3), (1, 3), (2, 1), 2),
    "left-over": ((3, 2, 9, 8), 3, (3, 3), (2, 3), (0, 1), (1, 2), 1),
    "cpu-many-samples": ((18, 6, 10, 11), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "1x1": ((3, 5, 4, 3), 7, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "cpu-1x1-gram": ((3, 90, 2, 3), 100, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1-strided": ((3, 6, 7, 7), 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3d": ((2, 2, 4, 3, 5), 3, (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1), 1),
    "cpu-3d-gram": ((2, 40, 2, 3, 2), 60, (2, 2, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1),
    "one-wide": ((4, 1, 1), 1, (1,), (1,), (0,), (1,), 1),
    "one-sample": ((1, 2, 4, 4), 3, (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "no-samples": ((0, 2, 5, 5), 3, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
# N, T, P, statistics, whether channels are first; 130 positions are split over programs
AFFINE = {
    "layer-norm": (3, 5, 7, "layer", False),
    "rms-norm": (3, 5, 7, "rms", False),
    "group-norm": (3, 5, 7, "group", True),
    "batch-norm": (3, 5, 7, "batch", True),
    "mixed": (2, 9, 20, "mixed", False),
    "normalized": (5, 4, 7, "none", False),
    "normalized-channels-first": (5, 4, 7, "none", True),
    "cpu-normalized-chunks": (40, 300, 64, "none", False),
    "one-position": (3, 1, 40, "layer", False),
    "one-position-normalized": (3, 1, 6, "none", False),
    "one-wide": (2, 6, 1, "none", False),
    "one-sample": (1, 3, 18, "layer", False),
    "split": (1, 130, 3, "layer", False),
    "no-samples": (0, 3, 4, "none", False),
    "no-positions": (2, 0, 3, "none", False),
}
OUTER_NAMES = (
    "outer_sq_norms", "outer_second_moment", "outer_dot", "weight_grad_moments",
    "preconditioned_trace",
)
CONV_NAMES = (
    "conv_sq_norms", "conv_second_moment", "conv_dot", "conv_grad_sample",
    "conv_weight_grad_moments",
)
SHAPES = {
    **dict.fromkeys(OUTER_NAMES, OUTER),
    **dict.fromkeys(("embedding_sq_norms", "embedding_second_moment", "embedding_dot"), EMBEDDING),
    **dict.fromkeys(("dense_sq_norms", "dense_second_moment", "dense_dot"), DENSE),
    **dict.fromkeys(CONV_NAMES, CONV),
    **dict.fromkeys(("affine_sq_norms", "affine_grad_sample"), AFFINE),
}
ALL = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def outer(shape, dtype, device="cpu"):
    """a, a view as of a transposed layer; b, every second element of a row; G [N, O, I]."""
    samples, positions, width_in, width_out = shape
    a = torch.randn(samples, width_in, positions).to(dtype).to(device).mT
    b = torch.randn(samples, positions, 2 * width_out).to(dtype).to(device)[:, :, ::2]
    grads = torch.zeros(samples, width_out, width_in, dtype=torch.float64)
    for n in range(samples):
        for t in range(positions):
            grads[n] += torch.outer(b[n, t].double().cpu(), a[n, t].double().cpu())
    return a, b, grads


def embedding(shape, dtype, device="cpu"):
    samples, positions, width, rows = shape
    ids = torch.randint(rows, (positions, samples)).to(device).T
    b = torch.randn(samples, width, positions).to(dtype).to(device).mT
    grads = torch.zeros(samples, rows, width, dtype=torch.float64)
    for n in range(samples):
        for t in range(positions):
            grads[n, ids[n, t]] += b[n, t].double().cpu()
    return ids, b, grads


def conv(shape, dtype, device="cpu", memory_format=torch.contiguous_format):
    """Gradients by autograd, a sample at a time."""
    inputs_shape, width_out, kernel, *geometry = shape
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    weight_shape = (width_out, inputs_shape[1] // geometry[-1], *kernel)
    weight = torch.zeros(weight_shape, dtype=torch.float64, requires_grad=True)
    a = torch.randn(inputs_shape).to(dtype)
    one = torch.zeros(1, *inputs_shape[1:], dtype=torch.float64)
    b = torch.randn(inputs_shape[0], *convolution(one, weight, None, *geometry).shape[1:]).to(dtype)
    grads = torch.zeros(inputs_shape[0], *weight_shape, dtype=torch.float64)
    for n in range(inputs_shape[0]):
        outputs = convolution(a[n : n + 1].double(), weight, None, *geometry)
        (grads[n],) = torch.autograd.grad(outputs, weight, b[n : n + 1].double())
    a, b = (each.to(device).contiguous(memory_format=memory_format) for each in (a, b))
    return a, b, weight_shape, geometry, grads


def affine(shape, dtype, device="cpu"):
    """a, b, mean, rstd, and the gradients of scale and shift."""
    n, t, p, kind, channels_first = shape
    a, b = torch.randn(2, n, *((p, t) if channels_first else (t, p))).to(dtype)
    if channels_first:
        a, b = a.mT, b.mT
    sizes = {
        "layer": ((n, t, 1), (n, t, 1)), "rms": (None, (n, t, 1)), "none": (None, None),
        "group": ((n, 1, p), (n, 1, p)), "batch": ((1, 1, p), (1, 1, p)),
        "mixed": ((1, t, 1), (n, 1, p)),
    }[kind]
    mean, rstd = (None if size is None else torch.rand(size) for size in sizes)
    normalized = a.double()
    if mean is not None:
        normalized = normalized - mean.double()
    if rstd is not None:
        normalized = normalized * rstd.double()
    grads = (normalized * b.double()).sum(1), b.double().sum(1)
    inputs = (None if each is None else each.to(device) for each in (a, b, mean, rstd))
    return *inputs, grads


def make(name, shape, dtype, device="cpu", **options):
    torch.manual_seed(0)
    family = name.split("_")[0]
    if name in OUTER_NAMES:
        *inputs, grads = outer(shape, dtype, device)
    elif family == "embedding":
        *inputs, grads = embedding(shape, dtype, device)
    elif family == "dense":
        inputs = [torch.randn(shape).to(dtype).to(device)]
        grads = inputs[0].double().cpu()
    elif family == "conv":
        a, b, weight_shape, geometry, grads = conv(shape, dtype, device, **options)
        inputs = [a, b, weight_shape, *geometry]
    else:
        *inputs, grads = affine(shape, dtype, device)
        results = {
            "affine_sq_norms": tuple(each.square().sum(1) for each in grads),
            "affine_grad_sample": grads,
        }
        return Case(tuple(inputs), results[name])
    flat = grads.reshape(len(grads), grads.shape[1:].numel())
    sq_norms, second = flat.square().sum(1), grads.square().sum(0)
    if name.endswith("weight_grad_moments"):
        return Case(tuple(inputs), (grads.sum(0), sq_norms, second), {"second_moment": True})
    if name.endswith("sq_norms"):
        return Case(tuple(inputs), (sq_norms,))
    if name.endswith("grad_sample"):
        return Case(tuple(inputs), (grads,))
    if name.endswith("second_moment"):
        extra = [shape[3]] if family == "embedding" else []
        return Case((*inputs, *extra), (second,))
    other = torch.rand(grads.shape[1:]).to(dtype)
    moved = other.to(device)
    if name == "preconditioned_trace":
        return Case((*inputs, moved), ((other.double() * second).sum(),))
    args = (*inputs[:2], moved, *inputs[3:]) if family == "conv" else (*inputs, moved)
    return Case(args, (flat @ other.double().flatten(),))


def close(actual, expected, rtol):
    """Relative to the largest element, as cancelled sums keep the error of what was cancelled."""
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    actual, expected = actual.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * largest)


def check(form, case, dtype, rtol=None):
    """A form's results: types, and values against the case's."""
    results = form(*case.args, **case.kwargs)
    results = results if isinstance(results, tuple) else (results,)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for actual, expected in zip(results, case.expected, strict=True):
        assert actual.dtype == wanted
        close(actual, expected, rtol or RTOL[dtype])
    return results
