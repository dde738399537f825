"""How fast the gradient-moment kernels are: against what a large copy and a large matrix product reach on the same device in the same run, and
beside plain torch: the weight gradient alone, and all per-sample gradients (bmm) reduced afterwards.

    python examples/benchmarks/kernels.py --device cuda            # some minutes, most of them compiling what is tuned over; no GPU has timed it yet
    python examples/benchmarks/kernels.py --device cpu --quick     # tries the script on the definitions

Between runs the cache is flushed, and the GPU kept busy while the next launch is made ready. Memory-bound rows are a share of the copy's bytes/s, matrix rows
of the product's FLOP/s, counting what must be read, or multiplied, at least. `error` is the largest deviation from float64, relative to the largest element. A
case that fails is a row that says so. Writes kernels.json and kernels.md into --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report import _line
from torch import Tensor

from adabatch import kernels
from adabatch.kernels import reference

HEADER = ("kernel", "case", "ms", "reached", "share of peak", "weight gradient alone, ms", "ratio", "bmm and reduce, ms", "error")


@dataclass
class Case:
    """One row: `operation(*inputs)` is timed, `definition(*doubles)` is its truth, `flops` or the inputs' bytes are its work."""

    kernel: str
    title: str
    operation: Callable[..., Tensor | tuple]
    definition: Callable[..., Tensor | tuple]
    inputs: tuple
    flops: float = 0.0
    weight_grad: Callable[[], Tensor] | None = None
    materialised: Callable[[], Tensor] | None = None


def milliseconds(function: Callable[[], object], device: str, repeats: int = 30) -> float:
    """Median of single runs, after three to compile and tune."""
    times = []
    for repeat in range(repeats + 3):
        if device == "cuda":
            _flush().zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            function()
            elapsed = 1e3 * (time.perf_counter() - start)
        if repeat >= 3:
            times.append(elapsed)
    return sorted(times)[len(times) // 2]


@functools.cache
def _flush() -> Tensor:
    """More than any cache holds; setting it to zero takes longer than Python needs to launch what is timed."""
    return torch.empty(2**29, dtype=torch.uint8, device="cuda")


def peaks(device: str, small: bool) -> dict[str, float]:
    """Bytes/s of a large copy (read and written), FLOP/s of large products by type."""
    source = torch.empty(2**22 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) * 1e3}
    width = 256 if small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(2, width, width, device=device).to(dtype)
        found[str(dtype)] = 2 * width**3 / milliseconds(lambda left=left, right=right: left @ right, device, 10) * 1e3
    return found


def outer_cases(device: str, small: bool) -> list[Case]:
    """N, T, I, O of the issue's row, of GPT-2 small's layers, of float32, and of T = 1."""
    cases = []
    for samples, positions, width_in, width_out, dtype in (
        [(4, 8, 16, 16, torch.bfloat16), (8, 1, 64, 32, torch.bfloat16)]
        if small
        else [
            (8, 2048, 4096, 4096, torch.bfloat16),
            (8, 1024, 768, 3072, torch.bfloat16),
            (8, 1024, 768, 768, torch.bfloat16),
            (64, 197, 384, 1536, torch.bfloat16),
            (8, 1024, 768, 768, torch.float32),
            (4096, 1, 4096, 4096, torch.bfloat16),
        ]
    ):
        a = torch.randn(samples, positions, width_in, device=device).to(dtype)
        b = torch.randn(samples, positions, width_out, device=device).to(dtype)
        title = f"N={samples} T={positions} I={width_in} O={width_out} {str(dtype)[6:]}"
        flops = 2.0 * samples * positions * width_in * width_out
        plain = dict(weight_grad=lambda a=a, b=b: b.flatten(0, 1).T @ a.flatten(0, 1))  # noqa: C408
        if positions > 1:
            plain["materialised"] = lambda a=a, b=b: torch.bmm(b.mT, a).square().sum((1, 2))
            cases.append(Case("weight_grad_moments", title, kernels.weight_grad_moments, reference.weight_grad_moments, (a, b), flops, **plain))
            p = torch.rand(width_out, width_in, device=device)
            cases.append(Case("preconditioned_trace", title, kernels.preconditioned_trace, reference.preconditioned_trace, (a, b, p), flops, **plain))
        gram = samples * positions * (positions + 1) * (width_in + width_out)
        if (width_in, width_out) in ((16, 16), (768, 768)):
            both = {"operation": functools.partial(kernels.weight_grad_moments, second_moment=True), "flops": flops, **plain}
            definition = functools.partial(reference.weight_grad_moments, second_moment=True)
            cases.append(Case("weight_grad_moments", f"{title} second moment", definition=definition, inputs=(a, b), **both))
        cheapest = 0.0 if positions == 1 else min(flops, gram)
        cases.append(Case("outer_sq_norms", title, kernels.outer_sq_norms, reference.outer_sq_norms, (a, b), cheapest, **plain))
    return cases


def other_cases(device: str, small: bool) -> list[Case]:
    """Normalization layers, embeddings and convolutions."""
    # 4 · 24 positions are more than the Gram form takes in float32: the small cases run every kernel.
    samples, positions, width = (2, 24, 8) if small else (16, 1024, 768)
    x, b = torch.randn(2, samples, positions, width, device=device).bfloat16()
    mean, rstd = x.float().mean(2, keepdim=True), (x.float().var(2, keepdim=True) + 1e-5).rsqrt()
    title = f"N={samples} T={positions} D={width} bfloat16"
    cases = [Case("affine_sq_norms", f"LayerNorm {title}", kernels.affine_sq_norms, reference.affine_sq_norms, (x, b, mean, rstd))]
    wide = (x.float(), b.float(), mean, rstd)
    cases.append(Case("affine_sq_norms", f"LayerNorm {title.replace('bfloat16', 'float32')}", kernels.affine_sq_norms, reference.affine_sq_norms, wide))
    images, backprops = torch.randn(2, samples, 64, positions, device=device).bfloat16().mT
    statistics = torch.rand(2, samples, 1, 64, device=device)
    name = f"GroupNorm N={samples} C=64 S={positions} bfloat16"
    cases.append(Case("affine_sq_norms", name, kernels.affine_sq_norms, reference.affine_sq_norms, (images, backprops, *statistics)))
    for length in (positions, 4 * positions):
        ids = torch.randint(50_000, (samples, length), device=device)
        rows = torch.randn(samples, length, width, device=device).bfloat16()
        for values in (rows, rows.float()):
            name = f"N={samples} T={length} D={width} {str(values.dtype)[6:]}"
            cases.append(Case("embedding_sq_norms", name, kernels.embedding_sq_norms, reference.embedding_sq_norms, (ids, values)))
    for channels, size, kernel in [(8, 6, 3)] if small else [(64, 56, 3), (256, 14, 3), (256, 56, 1)]:
        a, g = torch.randn(2, 2 if small else 64, channels, size, size, device=device).bfloat16().contiguous()
        for layout in (torch.contiguous_format, torch.channels_last):
            cases.append(conv_case(a.contiguous(memory_format=layout), g.contiguous(memory_format=layout), kernel, str(layout)[6:]))
        cases.append(conv_case(a[:8].float(), g[:8].float(), kernel, "contiguous_format"))
    return cases


def conv_case(a: Tensor, b: Tensor, kernel: int, layout: str) -> Case:
    """A square convolution that keeps the size."""
    channels = a.shape[1]
    geometry = ((channels, channels, kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)

    def weight_grad() -> Tensor:
        return torch.nn.grad.conv2d_weight(a, geometry[0], b, padding=kernel // 2)

    flops = 2.0 * b.shape[0] * b.shape[2] * b.shape[3] * math.prod(geometry[0])
    title = f"N={a.shape[0]} C=O={channels} {a.shape[2]}x{a.shape[3]} kernel {kernel} {str(a.dtype)[6:]} {layout}"
    definition = reference.conv_weight_grad_moments
    return Case("conv_weight_grad_moments", title, kernels.conv_weight_grad_moments, definition, (a, b, *geometry), flops, weight_grad)


def error(case: Case) -> float:
    """Largest deviation of any result from float64, relative to that result's largest element; inputs are rounded before both."""
    doubles = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in case.inputs]
    actual, expected = case.operation(*case.inputs), case.definition(*doubles)
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs if other is not None)


def measure(case: Case, device: str, peak: dict[str, float]) -> dict:
    """One row of the table."""
    own = milliseconds(lambda: case.operation(*case.inputs), device)
    tensors = [value for value in case.inputs if isinstance(value, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    reached, limit = (case.flops, peak[str(tensors[1].dtype)]) if case.flops else (size, peak["copy"])
    row = {"kernel": case.kernel, "case": case.title, "ms": own, "reached": 1e3 * reached / own, "unit": "FLOP/s" if case.flops else "B/s"}
    row["share"] = row["reached"] / limit
    for name in ("weight_grad", "materialised"):
        function = getattr(case, name)
        row[name] = None if function is None else milliseconds(function, device)
    row["error"] = error(case)
    return row


def tried(case: Case, device: str, peak: dict[str, float]) -> dict:
    """The row, or one that tells why there is none."""
    try:
        return measure(case, device, peak)
    except Exception as problem:  # whatever a new device, driver or compiler comes up with
        return {"kernel": case.kernel, "case": case.title, "failed": f"{type(problem).__name__}: {problem}"[:300]}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for row in rows:
        if "failed" in row:
            lines.append(_line([row["kernel"], row["case"], f"failed: {row['failed']}".replace("\n", " ").replace("|", "/"), *[""] * (len(HEADER) - 3)]))
            continue
        reached = f"{row['reached'] / 1e12:.3g} T{row['unit']}"
        plain, materialised = ("" if row[name] is None else f"{row[name]:.3f}" for name in ("weight_grad", "materialised"))
        ratio = "" if row["weight_grad"] is None else f"{row['ms'] / row['weight_grad']:.2f}"
        lines.append(_line([row["kernel"], row["case"], f"{row['ms']:.3f}", reached, f"{row['share']:.0%}", plain, ratio, materialised, f"{row['error']:.1e}"]))
    return "\n".join(lines) + "\n"


def is_broken(device: str) -> bool:
    """Whether a kernel's fault has ended all work of this process on the GPU."""
    try:
        return device == "cuda" and torch.ones(1, device=device).item() != 1
    except RuntimeError:
        return True


def run(device: str, small: bool, out_of_time: Callable[[], bool] = lambda: False, save: Callable[[dict], None] = lambda result: None, first: int = 0) -> dict:
    """All rows from number `first` on that there is time for; `save` is told after each. "next" is the number to go on with where a fault ends it early."""
    torch.manual_seed(0)
    cases = [*outer_cases(device, small), *other_cases(device, small)]
    result: dict = {"peaks": peaks(device, small), "rows": [], "left_out": [], "next": first}
    save(result)
    for case in cases[first:]:
        if out_of_time():
            result["left_out"].append(f"{case.kernel}, {case.title}")
            continue
        result["rows"].append(tried(case, device, result["peaks"]))
        result["next"] += 1
        save(result)
        print(table(result["rows"][-1:]).splitlines()[-1], flush=True)
        if "failed" in result["rows"][-1] and is_broken(device):
            return result
    result["next"] = None
    save(result)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default cuda where there is one)")
    parser.add_argument("--quick", "--small", dest="small", action="store_true", help="tiny cases of every kernel, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/kernels"), help="folder for the results (default out/kernels)")
    parser.add_argument("--deterministic", action="store_true", help="each kernel's first configuration, without tuning")
    options = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    result = run(options.device, options.small)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps(result, indent=1))
    (options.out / "kernels.md").write_text(table(result["rows"]))
    if any("failed" in row for row in result["rows"]):
        sys.exit("some rows failed")


if __name__ == "__main__":
    main()
