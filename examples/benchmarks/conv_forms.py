"""Times of a convolution's weight gradient and of the forms in which ‖G_n‖² is found, on a grid of
shapes: the table from which `conv_form` and the cost model choose on a CPU.

    python examples/benchmarks/conv_forms.py --write    # replaces kernels/conv_timings.py
    python examples/benchmarks/conv_forms.py --quick    # prints a coarse grid

One thread, whose processor time counts, so that other processes disturb little. Takes a few
minutes.

Legend: N samples, C channels in, O channels out, K elements of the kernel, P positions out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from adabatch.kernels import cpu_conv, operators

CHANNELS, WIDTHS = (3, 8, 32, 128), (16, 64, 256)  # C and O
KERNELS, POSITIONS = (1, 9, 49), (16, 64, 256, 1024)  # K and P
PAIRS_POSITIONS = (4, 16, 64, 256)  # P of Gram matrices
ALONE = ((3, 32, 49, 1024), (3, 64, 49, 1024), (3, 16, 9, 256), (8, 32, 49, 256),
         (32, 32, 9, 256), (64, 64, 9, 64))  # shapes of a call a sample
SAMPLES = ((4e6, 64), (1e8, 16), (math.inf, 4))  # N by a sample's multiply-adds
CACHE_BYTES = 2**24
FORMS = ("weight gradient", "windows", "groups")
TARGET = Path(cpu_conv.__file__).with_name("conv_timings.py")


def microseconds(run: Callable[[], object], limit: float) -> float:
    """The least processor time of three calls or more, within `limit` seconds, each with caches
    that hold something else, as in a training step."""
    run()
    best, begin, calls = math.inf, time.thread_time(), 0
    other = torch.zeros(CACHE_BYTES // 4)
    while calls < 3 or time.thread_time() - begin < limit:
        other += 1
        start = time.thread_time()
        run()
        best, calls = min(best, time.thread_time() - start), calls + 1
    return 1e6 * best


def inputs(channels: int, width: int, kernel: int, positions: int) -> tuple:
    """Arguments of kernels.conv_weight_grad_moments, of square images that keep their size."""
    side, length = math.isqrt(positions), math.isqrt(kernel)
    size = channels * width * kernel * positions
    samples = next(samples for most, samples in SAMPLES if size <= most)
    a = torch.randn(samples, channels, side, side)
    b = torch.randn(samples, width, side, side)
    return a, b, (width, channels, length, length), (1, 1), (length // 2,) * 2, (1, 1), 1


def times(shape: tuple[int, int, int, int], limit: float) -> dict[str, float]:
    """Microseconds per sample of the weight gradient and of each form that also gives it."""
    given = inputs(*shape)
    moments = operators.OPERATIONS["conv_weight_grad_moments"].forms["cpu"]
    found = {"weight gradient": microseconds(lambda: cpu_conv.weight_grad(*given[:-1]), limit)}
    for form in ("windows", "groups"):
        with operators.forced_form(form):
            found[form] = microseconds(lambda: moments(*given), limit)
    return {form: value / len(given[0]) for form, value in found.items()}


def grid(limit: float, coarse: bool) -> dict[str, list]:
    """{form: nested lists [C][O][K][P]} of microseconds per sample."""
    axes = [axis[:: len(axis) - 1] if coarse else axis
            for axis in (CHANNELS, WIDTHS, KERNELS, POSITIONS)]
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for shape in sorted(itertools.product(*axes), key=math.prod):
        found[shape] = times(shape, limit)  # type: ignore[arg-type]
        print(shape, *(f"{found[shape][form]:.1f}" for form in FORMS), flush=True)

    def nested(form: str, *before: int) -> list:
        axis = axes[len(before)]
        return [float(f"{found[(*before, each)][form]:.3g}") if len(before) == 3
                else nested(form, *before, each) for each in axis]

    return {form: nested(form) for form in FORMS}


def gram_rates(limit: float) -> list[float]:
    """Microseconds of a multiply-add of Gram matrices, of one element added to their table, and of
    a sample besides, by least squares of relative errors."""
    rows, targets = [], []
    for width, kernel, positions in itertools.product((16, 64, 256), (9, 49), PAIRS_POSITIONS):
        given = inputs(width, width, kernel, positions)
        products, pairs = cpu_conv.gram_counts(*(each.shape[1:] for each in given[:2]),
                                               given[2], given[4])
        spent = microseconds(lambda given=given: cpu_conv.gram_sq_norms(
            given[0], given[1], given[2][2:], *given[3:6]), limit) / len(given[0])
        rows.append([products / spent, pairs / spent, 1 / spent])
        targets.append([1.0])
        print("gram", (width, kernel, positions), f"{spent:.1f}", flush=True)
    left, right = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets).double()
    found = torch.linalg.lstsq(left, right).solution.flatten().clamp(min=1e-7)
    return found.tolist()


def call_rates(limit: float) -> list[float]:
    """Microseconds of a call for one sample alone beyond its part of a call for all, and of an
    element of its result, by least squares."""
    rows, targets = [], []
    for shape in ALONE:
        given = inputs(*shape)
        samples = len(given[0])
        own = [*zip(given[0].split(1), given[1].split(1), strict=True)]
        whole = microseconds(lambda given=given: cpu_conv.weight_grad(*given[:-1]), limit)
        alone = microseconds(lambda given=given, own=own: [
            cpu_conv.weight_grad(*pair, *given[2:-1]) for pair in own], limit)
        rows.append([1.0, float(math.prod(given[2]))])
        targets.append([(alone - whole) / samples])
        print("calls", shape, f"{targets[-1][0]:.1f}", flush=True)
    left, right = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets).double()
    return torch.linalg.lstsq(left, right).solution.flatten().clamp(min=1e-7).tolist()


def product_rate(limit: float) -> float:
    """Multiply-adds per microsecond of a large matrix product."""
    a, b, out = torch.randn(768, 768), torch.randn(768, 768), torch.empty(768, 768)
    return 768**3 / microseconds(lambda: torch.mm(a, b, out=out), limit)


def source(table: dict[str, list], gram: list[float], call: list[float], rate: float) -> str:
    """The module kernels/conv_timings.py."""
    lines = [
        '"""Times of a convolution\'s forms on a CPU, for conv_form: written by',
        "",
        "    python examples/benchmarks/conv_forms.py --write",
        "",
        "Microseconds of one core per sample, float32, [C][O][K][P] of the axes below.",
        '"""',
        "",
        "AXES = (",
        *(f"    {axis},  # {name}" for axis, name in zip(
            (CHANNELS, WIDTHS, KERNELS, POSITIONS), "COKP", strict=True)),
        ")",
        "# Multiply-adds per microsecond of a large matrix product.",
        f"PRODUCTS = {rate:.0f}",
        "# Microseconds of a multiply-add of Gram matrices, of an element added to their table,",
        "# and of a sample besides.",
        f"GRAM, ADDED, CALLS = {', '.join(f'{each:.3g}' for each in gram)}",
        "# Microseconds of a call for one sample alone beyond its part of a call for all, and of",
        "# an element of its result.",
        f"CALL, RETURNED = {', '.join(f'{each:.3g}' for each in call)}",
    ]
    for form in FORMS:
        lines.append(f"{form.replace(' ', '_').upper()} = (")
        for by_width in table[form]:
            lines.append("    (")
            for by_kernel in by_width:
                rows = [f"({', '.join(f'{value:g}' for value in row)})" for row in by_kernel]
                lines += [f"        ({', '.join(rows[:2])},", f"         {', '.join(rows[2:])}),"]
            lines.append("    ),")
        lines.append(")")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each figure (default 0.2)")
    parser.add_argument("--write", action="store_true", help=f"replace {TARGET.name}")
    parser.add_argument("--quick", action="store_true", help="the corners of the grid only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seconds = 0.0 if options.quick else options.seconds
    if options.quick and options.write:
        parser.error("--write needs the whole grid: leave --quick out")
    table = grid(seconds, options.quick)
    text = source(table, gram_rates(seconds), call_rates(seconds), product_rate(seconds))
    if options.write:
        TARGET.write_text(text)
        print(f"wrote {TARGET}")
    else:
        print(text)


if __name__ == "__main__":
    main()
