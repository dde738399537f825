"""How fast the gradient-moment kernels are: against what a large copy and a large matrix product
reach on the same device in the same run, and alongside plain torch: the weight gradient alone, and
all per-sample gradients (bmm) reduced afterwards.

    python examples/benchmarks/kernels.py --device cuda         # minutes, mostly of compiling
    python examples/benchmarks/kernels.py --device cpu --quick  # tries the script

Between runs the cache is flushed, and the GPU kept busy while the next launch is prepared.
Memory-bound rows are a share of the copy's bytes/s, matrix rows of the product's FLOP/s, counting
what must be read, or multiplied, at least. `error` is the largest deviation from float64, relative
to the largest element. A case that fails is a row that says so. Writes kernels.json and kernels.md
into --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import _line
from torch import Tensor

from adabatch import kernels
from adabatch.kernels import OPERATIONS

HEADER = (
    "kernel", "case", "ms", "reached", "share of peak", "weight gradient alone, ms", "ratio",
    "bmm and reduce, ms", "error",
)


@dataclass
class Case:
    """One row: kernels.<kernel>(*inputs, **options) is timed, its definition on float64 inputs is
    the truth, `flops` or the inputs' bytes are its work."""

    kernel: str
    title: str
    inputs: tuple
    flops: float = 0.0
    weight_grad: Callable[[], Tensor] | None = None
    materialised: Callable[[], Tensor] | None = None
    options: dict = field(default_factory=dict)

    def run(self) -> Tensor | tuple:
        return getattr(kernels, self.kernel)(*self.inputs, **self.options)

    def definition(self, *inputs: object) -> Tensor | tuple:
        return OPERATIONS[self.kernel].definition(*inputs, **self.options)


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
    """More than any cache holds; setting it to zero takes longer than Python needs to launch what
    is timed."""
    return torch.empty(2**29, dtype=torch.uint8, device="cuda")


def peaks(device: str, small: bool) -> dict[str, float]:
    """Bytes/s of a large copy (read and written), FLOP/s of large products by type."""
    source = torch.empty(2**22 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) * 1e3}
    width = 256 if small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(2, width, width, device=device).to(dtype)
        spent = milliseconds(functools.partial(torch.matmul, left, right), device, 10)
        found[str(dtype)] = 2 * width**3 / spent * 1e3
    return found


def outer_cases(device: str, small: bool) -> list[Case]:
    """N, T, I, O of GPT-2 small's layers and wider ones, of float32, and of T = 1."""
    low, single = torch.bfloat16, torch.float32
    shapes = [
        (8, 2048, 4096, 4096, low), (8, 1024, 768, 3072, low), (8, 1024, 768, 768, low),
        (64, 197, 384, 1536, low), (8, 1024, 768, 768, single), (4096, 1, 4096, 4096, low),
    ]
    cases = []
    for samples, positions, width_in, width_out, dtype in (
        [(4, 8, 16, 16, low), (8, 1, 64, 32, low)] if small else shapes
    ):
        a = torch.randn(samples, positions, width_in, device=device).to(dtype)
        b = torch.randn(samples, positions, width_out, device=device).to(dtype)
        p = torch.rand(width_out, width_in, device=device)
        title = f"N={samples} T={positions} I={width_in} O={width_out} {str(dtype)[6:]}"
        flops = 2.0 * samples * positions * width_in * width_out
        gram = 1.0 * samples * positions * (positions + 1) * (width_in + width_out)

        def weight_grad(a: Tensor = a, b: Tensor = b) -> Tensor:
            return b.flatten(0, 1).T @ a.flatten(0, 1)

        def materialised(a: Tensor = a, b: Tensor = b) -> Tensor:
            return torch.bmm(b.mT, a).square().sum((1, 2))

        if positions == 1:
            cases.append(Case("outer_sq_norms", title, (a, b), 0.0, weight_grad))
            continue
        plain = (flops, weight_grad, materialised)
        cases.append(Case("weight_grad_moments", title, (a, b), *plain))
        cases.append(Case("preconditioned_trace", title, (a, b, p), *plain))
        if (width_in, width_out) in ((16, 16), (768, 768)):
            both = {"second_moment": True}
            cases.append(Case("weight_grad_moments", f"{title} second", (a, b), *plain, both))
        cases.append(Case("outer_sq_norms", title, (a, b), min(flops, gram), *plain[1:]))
    return cases


def other_cases(device: str, small: bool) -> list[Case]:
    """Normalization layers, embeddings and convolutions."""
    # 4 · 24 positions are more than the Gram form takes in float32: small cases run every kernel.
    samples, positions, width = (2, 24, 8) if small else (16, 1024, 768)
    x, b = torch.randn(2, samples, positions, width, device=device).bfloat16()
    mean = x.float().mean(2, keepdim=True)
    statistics = (mean, (x.float().var(2, keepdim=True) + 1e-5).rsqrt())
    title = f"LayerNorm N={samples} T={positions} D={width}"
    cases = [
        Case("affine_sq_norms", f"{title} bfloat16", (x, b, *statistics)),
        Case("affine_sq_norms", f"{title} float32", (x.float(), b.float(), *statistics)),
    ]
    images, backprops = torch.randn(2, samples, 64, positions, device=device).bfloat16().mT
    statistics = tuple(torch.rand(2, samples, 1, 64, device=device))
    name = f"GroupNorm N={samples} C=64 S={positions} bfloat16"
    cases.append(Case("affine_sq_norms", name, (images, backprops, *statistics)))
    for length in (positions, 4 * positions):
        ids = torch.randint(50_000, (samples, length), device=device)
        rows = torch.randn(samples, length, width, device=device).bfloat16()
        for values in (rows, rows.float()):
            name = f"N={samples} T={length} D={width} {str(values.dtype)[6:]}"
            cases.append(Case("embedding_sq_norms", name, (ids, values)))
    shapes = [(8, 6, 3)] if small else [(64, 56, 3), (256, 14, 3), (256, 56, 1)]
    for channels, size, kernel in shapes:
        batch = 2 if small else 64
        a, g = torch.randn(2, batch, channels, size, size, device=device).bfloat16().contiguous()
        for layout in (torch.contiguous_format, torch.channels_last):
            both = (each.contiguous(memory_format=layout) for each in (a, g))
            cases.append(conv_case(*both, kernel, str(layout)[6:]))
        cases.append(conv_case(a[:8].float(), g[:8].float(), kernel, "contiguous_format"))
    return cases


def conv_case(a: Tensor, b: Tensor, kernel: int, layout: str) -> Case:
    """A square convolution that keeps the size."""
    (samples, channels, height, width), pad = a.shape, kernel // 2
    geometry = ((channels, channels, kernel, kernel), (1, 1), (pad, pad), (1, 1), 1)

    def weight_grad() -> Tensor:
        return torch.nn.grad.conv2d_weight(a, geometry[0], b, padding=pad)

    flops = 2.0 * samples * height * width * math.prod(geometry[0])
    sizes = f"N={samples} C=O={channels} {height}x{width} kernel {kernel}"
    title = f"{sizes} {str(a.dtype)[6:]} {layout}"
    return Case("conv_weight_grad_moments", title, (a, b, *geometry), flops, weight_grad)


def error(case: Case) -> float:
    """Largest deviation of any result from float64, relative to that result's largest element;
    inputs are rounded before both."""
    doubles = [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in case.inputs
    ]
    found = case.run(), case.definition(*doubles)
    pairs = zip(*found, strict=True) if isinstance(found[1], tuple) else [found]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs if y is not None)


def measure(case: Case, device: str, peak: dict[str, float]) -> dict:
    """One row of the table."""
    own = milliseconds(case.run, device)
    tensors = [value for value in case.inputs if isinstance(value, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    work, limit = (case.flops, peak[str(tensors[1].dtype)]) if case.flops else (size, peak["copy"])
    row = {
        "kernel": case.kernel, "case": case.title, "ms": own, "reached": 1e3 * work / own,
        "unit": "FLOP/s" if case.flops else "B/s", "share": 1e3 * work / own / limit,
    }
    for name, function in (("weight_grad", case.weight_grad), ("materialised", case.materialised)):
        row[name] = None if function is None else milliseconds(function, device)
    row["error"] = error(case)
    return row


def tried(case: Case, device: str, peak: dict[str, float]) -> dict:
    """The row, or one that says why there is none."""
    try:
        return measure(case, device, peak)
    except Exception as problem:  # a new device, driver or compiler may raise anything
        failed = f"{type(problem).__name__}: {problem}"[:300]
        return {"kernel": case.kernel, "case": case.title, "failed": failed}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for row in rows:
        if "failed" in row:
            failed = f"failed: {row['failed']}".replace("\n", " ").replace("|", "/")
            cells = [row["kernel"], row["case"], failed, *[""] * (len(HEADER) - 3)]
        else:
            plain, materialised = (
                "" if row[name] is None else f"{row[name]:.3f}"
                for name in ("weight_grad", "materialised")
            )
            ratio = f"{row['ms'] / row['weight_grad']:.2f}" if plain else ""
            cells = [
                row["kernel"], row["case"], f"{row['ms']:.3f}",
                f"{row['reached'] / 1e12:.3g} T{row['unit']}", f"{row['share']:.0%}",
                plain, ratio, materialised, f"{row['error']:.1e}",
            ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def is_broken(device: str) -> bool:
    """Whether a kernel's fault has ended all work of this process on the GPU."""
    try:
        return device == "cuda" and torch.ones(1, device=device).item() != 1
    except RuntimeError:
        return True


def run(
    device: str, small: bool, out_of_time: Callable[[], bool] = lambda: False,
    save: Callable[[dict], None] = lambda result: None, first: int = 0,
) -> dict:
    """All rows from number `first` on that there is time for; `save` is called after each. "next"
    is the number to continue with where a fault ends it early."""
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
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cuda or cpu (default cuda where there is one)")
    add("--quick", "--small", dest="small", action="store_true", help="tiny cases of every kernel")
    add("--out", type=Path, default=Path("out/kernels"), help="results (default out/kernels)")
    add("--deterministic", action="store_true", help="first configurations, without tuning")
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
