"""How the Triton kernels choose among their written-down configurations, precision, and splits over samples.

Importing this module imports Triton; adabatch.kernels does so only when a kernel is first needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

__all__ = [
    "INTERPRETED",
    "OPTIONS",
    "bucket",
    "compute_type",
    "follows_determinism",
    "launch",
    "major",
    "precision",
    "processors",
    "split_samples",
    "supports",
]

Result = TypeVar("Result")

# A multiplication and an addition may be fused to one rounding; stated, since Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}
# Kernels are compiled or interpreted for good when their module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_fastest: dict[tuple, triton.Config] = {}


def launch(key: tuple, configs: Sequence[triton.Config], run: Callable[[triton.Config], Result], deterministic: bool) -> Result:
    """run(config) with the fastest configuration for this key, timed once per process; the first that fits if deterministic.

    Sums depend in their last bits on the configuration, and timings on the day: so a deterministic call does not measure. Neither does a call inside
    the capture of a CUDA graph, where timing is impossible. The interpreter takes the last configuration, by convention the smallest.

    Args:
        key: the operation, bucketed sizes, types and device.
        configs: best guess first, smallest last.
        run: launches the kernel and returns its results; may be called several times.
        deterministic: choose by order.

    Raises:
        OutOfResources: the device has too little shared memory for every configuration.
    """
    if INTERPRETED:
        return run(configs[-1])
    if key in _fastest and not deterministic:
        return run(_fastest[key])
    if deterministic or len(configs) == 1 or torch.cuda.is_current_stream_capturing():
        return _first_that_fits(configs, run)
    timed = {index: milliseconds for index, config in enumerate(configs) if (milliseconds := _time(config, run)) is not None}
    if not timed:
        return run(configs[-1])  # raises what is short
    _fastest[key] = configs[min(timed, key=timed.__getitem__)]
    return run(_fastest[key])


def _first_that_fits(configs: Sequence[triton.Config], run: Callable[[triton.Config], Result]) -> Result:
    for config in configs[:-1]:
        try:
            return run(config)
        except OutOfResources:
            continue
    return run(configs[-1])


def _time(config: triton.Config, run: Callable[[triton.Config], Any]) -> float | None:
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return None


def bucket(size: int) -> int:
    """The next power of two: batch sizes change all the time, and must not be tuned for one by one."""
    return triton.next_power_of_2(size) if size > 0 else 0


def follows_determinism(deterministic: bool | None) -> bool:
    """The caller's choice, or torch's own switch."""
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these types: float64 is left to the definition."""
    return all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors)


def compute_type(*tensors: Tensor) -> tl.dtype:
    """The type that products are formed in: the inputs' own if they agree, else float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    # The interpreter's product reads the bits of bfloat16 as integers; float32 holds the same numbers.
    low_precision = {torch.float16: tl.float16} if INTERPRETED else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return low_precision.get(dtypes.pop(), tl.float32) if len(dtypes) == 1 else tl.float32


def precision(dtype: tl.dtype) -> str:
    """How float32 products are rounded: 'tf32' only where torch.backends.cuda.matmul asks for it, else 'ieee'."""
    if dtype != tl.float32:
        return "tf32"  # not read for 16-bit inputs, but part of the compiled kernel's key: keep it constant
    matmul = torch.backends.cuda.matmul
    asked = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if asked else "ieee"


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; the interpreter pretends to have two, so that splits are walked through."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def major(device: torch.device) -> int:
    """Major compute capability of an NVIDIA device, 9 for Hopper; 0 of any other."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.version.hip is None else 0


def split_samples(n_samples: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(samples per program, number of splits), so that tiles × splits fill the device about twice.

    One split where the tiles alone do: each further one costs a partial result of the weight's size.
    """
    splits = max(1, min(n_samples, 2 * processors(device) // max(1, tiles)))
    per_split = max(1, triton.cdiv(n_samples, splits))
    return per_split, triton.cdiv(n_samples, per_split)
