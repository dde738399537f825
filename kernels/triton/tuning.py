"""How the Triton kernels choose among their configurations, precisions, and splits over samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config
from triton.runtime.errors import OutOfResources

Result = TypeVar("Result")

# A multiplication and an addition may be fused to one rounding; stated, since Triton's default is
# about to change.
OPTIONS = {"enable_fp_fusion": True}
# Kernels are compiled or interpreted for good when their module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_fastest: dict[tuple[object, ...], Config] = {}


def config(warps: int, stages: int | None = None, **blocks: int) -> Config:
    """Block sizes, e.g. T=32 for BLOCK_T, warps and pipeline stages."""
    sizes = {f"BLOCK_{name}": size for name, size in blocks.items()}
    return Config(sizes, num_warps=warps, **({} if stages is None else {"num_stages": stages}))


def launch(
    key: tuple[object, ...], configs: Sequence[Config], run: Callable[[Config], Result],
    deterministic: bool | None = None,
) -> Result:
    """run(config) with the fastest configuration for this key, timed once per process; the first
    that fits if deterministic.

    Sums depend in their last bits on the configuration, and timings on the day: a deterministic
    call does not measure. Neither does a call inside the capture of a CUDA graph, where timing is
    impossible. The interpreter takes the last configuration, by convention the smallest.

    Args:
        configs: best guess first, smallest last.
        run: launches the kernel; may be called several times.
        deterministic: choose by order; None follows torch.use_deterministic_algorithms.

    Raises:
        OutOfResources: the device has too little shared memory for every configuration.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if INTERPRETED:
        return run(configs[-1])
    if key in _fastest and not deterministic:
        return run(_fastest[key])
    if deterministic or len(configs) == 1 or torch.cuda.is_current_stream_capturing():
        return _first_that_fits(configs, run)
    times = [_time(each, run) for each in configs]
    fastest = min(range(len(times)), key=times.__getitem__)
    if times[fastest] == math.inf:
        return run(configs[-1])  # raises what is short
    _fastest[key] = configs[fastest]
    return run(_fastest[key])


def _first_that_fits(configs: Sequence[Config], run: Callable[[Config], Result]) -> Result:
    for each in configs[:-1]:
        try:
            return run(each)
        except OutOfResources:
            continue
    return run(configs[-1])


def _time(config: Config, run: Callable[[Config], object]) -> float:
    """Milliseconds; infinite where the device lacks memory for it."""
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return math.inf


def by_precision(
    dtype: tl.dtype, rounding: str, low: list[Config], tf32: list[Config], ieee: list[Config]
) -> list[Config]:
    """The list for a type that products are formed in, and a rounding of float32."""
    return low if dtype != tl.float32 else ieee if rounding == "ieee" else tf32


def bucket(size: int) -> int:
    """The next power of two: batch sizes change often, and are not tuned for one by one."""
    return triton.next_power_of_2(size) if size > 0 else 0


def supports(*args: object) -> bool:
    """Whether the kernels take these types: float64 is left to the definition."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return all(each.dtype in types for each in args if isinstance(each, Tensor))


def compute_type(*tensors: Tensor) -> tl.dtype:
    """The type that products are formed in: the inputs' if they agree, else float32."""
    low_precision = {torch.float16: tl.float16}
    if not INTERPRETED:  # its product reads the bits of bfloat16 as integers
        low_precision[torch.bfloat16] = tl.bfloat16
    dtypes = {tensor.dtype for tensor in tensors}
    return low_precision.get(dtypes.pop(), tl.float32) if len(dtypes) == 1 else tl.float32


def precision(dtype: tl.dtype) -> str:
    """How float32 products are rounded: 'tf32' only if torch.backends.cuda.matmul requests it."""
    if dtype != tl.float32:
        return "tf32"  # not read for 16-bit inputs, but in the compiled kernel's key: a constant
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; two for the interpreter, so that it walks splits."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def major(device: torch.device) -> int:
    """Major compute capability of an NVIDIA device, 9 for Hopper; 0 of any other."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if nvidia else 0


def split_samples(n_samples: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(samples per program, number of splits), so that tiles × splits fill the device about twice:
    each further split costs a partial result of the weight's size."""
    splits = max(1, min(n_samples, 2 * processors(device) // max(1, tiles)))
    per_split = max(1, triton.cdiv(n_samples, splits))
    return per_split, triton.cdiv(n_samples, per_split)


def split_positions(
    positions: int, programs: int, shortest: int, device: torch.device
) -> tuple[int, int]:
    """(positions per split, number of splits), so that programs × splits fill the device about four
    times, with `shortest` positions in a split or more."""
    wanted = triton.cdiv(4 * processors(device), max(1, programs))
    per_split = triton.cdiv(positions, max(1, min(wanted, positions // shortest)))
    return per_split, max(1, triton.cdiv(positions, max(1, per_split)))
