"""Samples per second of AdaptiveDataLoader and torch's DataLoader, and the lag of a new batch size.

    python examples/benchmarks/loader.py --out out/loader
    python examples/benchmarks/loader.py --quick

Ratios are of passes over the same data, taken in turn with torch's DataLoader at the constant size:
above 1 is faster. Workers are started beforehand. Every batch is read once, as in training: what a
worker hands over in shared memory costs nothing until then, what is joined here is paid for at
once. With --seed-samples each sample's generators are seeded, which torch's DataLoader does not do
(6 to 20 microseconds): cheap samples show that most; of costly ones it is a few hundredths.
Takes about eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

import adabatch

ASKED = {"constant": 0.95, "changing": 0.9}
# Around the constant size, and no two neighbours equal; their mean is 1.
CHANGES = (0.5, 1.5, 0.75, 1.25, 0.9, 1.1)


class Cheap(Dataset):
    """A row of a tensor and its label, some microseconds a sample."""

    seconds = 6e-6

    def __init__(self, n: int):
        self.rows, self.labels = torch.randn(n, 64), torch.arange(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[index], self.labels[index]


class Drawn(Cheap):
    """A random crop of a picture, flipped at random and scaled: little but three random numbers."""

    seconds = 1.5e-5

    def __init__(self, n: int):
        self.rows = torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8)
        self.labels = torch.arange(n)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left, turned = torch.randint(0, 9, (3,)).tolist()
        picture = self.rows[index][:, top : top + 32, left : left + 32]
        picture = picture.flip(2) if turned < 4 else picture
        return picture.float().div_(255).sub_(0.5), self.labels[index]


class Costly(Cheap):
    """The usual augmentation: a crop of random place and size, resized, flipped, normalized.

    Decoding a photograph before would cost ten times as much.
    """

    seconds = 2e-4
    pictures = 256

    def __init__(self, n: int):
        self.rows = torch.randint(0, 256, (self.pictures, 3, 96, 96), dtype=torch.uint8)
        self.labels = torch.arange(n)
        self.mean = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)
        self.scale = torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = int(torch.randint(48, 97, ()))
        top, left = torch.randint(0, 97 - size, (2,)).tolist()
        part = self.rows[index % self.pictures][None, :, top : top + size, left : left + size]
        part = part.float().div_(255)
        picture = interpolate(part, (32, 32), mode="bilinear", antialias=True)[0]
        picture = picture.flip(2) if torch.rand(()) < 0.5 else picture
        return picture.sub_(self.mean).div_(self.scale), self.labels[index]


KINDS = {kind.__name__.lower(): kind for kind in (Cheap, Drawn, Costly)}


def pass_through(loader: Any, sizes: Iterable[int]) -> float:
    """Seconds for all batches of an epoch, requested in these sizes and read once."""
    sizes = iter(sizes)
    adaptive = isinstance(loader, adabatch.AdaptiveDataLoader)
    begin = time.perf_counter()
    if adaptive:
        loader.batch_size = next(sizes)
    for inputs, _ in loader:
        inputs.sum()
        if adaptive:
            loader.batch_size = next(sizes)
    return time.perf_counter() - begin


def enough(kind: type, batch_size: int, seconds: float, options: dict) -> int:
    """Samples that torch's DataLoader takes about `seconds` for, and four batches at least."""
    few = max(4 * batch_size, int(0.1 * seconds / kind.seconds))
    pilot = DataLoader(kind(few), batch_size, shuffle=True, **options)
    taken = min(pass_through(pilot, ()) for _ in range(3))  # the first starts the workers
    return max(4 * batch_size, int(few * seconds / taken))


def throughput(
    kind: type, workers: int, batch_size: int, seconds: float, repeats: int, seeded: bool = False
) -> dict:
    """Ratios of ours to torch's, at a constant size and at one that changes with every batch."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    samples = enough(kind, batch_size, seconds, options)
    data = kind(samples)
    loaders = {"torch": DataLoader(data, batch_size, shuffle=True, **options)}
    for name in ASKED:
        loaders[name] = adabatch.AdaptiveDataLoader(
            data, batch_size, True, seed_samples=seeded, **options
        )
    changing = [max(1, round(batch_size * change)) for change in CHANGES]
    sizes: dict[str, Callable[[], Iterable[int]]] = {
        name: lambda: cycle([batch_size]) for name in loaders
    } | {"changing": lambda: cycle(changing)}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    order = list(loaders)
    for repeat in range(-1, repeats):
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            taken = pass_through(loaders[name], sizes[name]())
            if repeat >= 0:
                times[name].append(taken)
    setting = {"samples": kind.__name__.lower(), "workers": workers, "batch_size": batch_size}
    speed = samples / sorted(times["torch"])[repeats // 2]
    ratios = {
        name: sorted(plain / own for own, plain in zip(times[name], times["torch"], strict=True))
        for name in ASKED
    }
    return {**setting, "seeded": seeded, "torch_samples_per_second": speed, **ratios}


class Chosen:
    """The usual batch sampler whose size is set from outside: workers draw ahead in the old one."""

    def __init__(self, n: int, batch_size: int):
        self.n, self.batch_size = n, batch_size

    def __iter__(self):
        at = 0
        while at < self.n:
            yield list(range(at, min(at + self.batch_size, self.n)))
            at += self.batch_size


def delay(workers: int, prefetch: int, adaptive: bool, pause: float = 0.005) -> dict:
    """Batches and seconds from requesting four times the size to getting it; steps take `pause`."""
    data = Drawn(20_000)
    options = {"num_workers": workers, "prefetch_factor": prefetch} if workers else {}
    sampler: Any = Chosen(len(data), 32)
    if adaptive:
        loader: Any = adabatch.AdaptiveDataLoader(data, 32, **options)
        sampler = loader
    else:
        loader = DataLoader(data, batch_sampler=sampler, **options)
    asked_at, asked_after = 0.0, 20
    for index, (inputs, _) in enumerate(loader):
        time.sleep(pause)
        if index == asked_after:
            asked_at = time.perf_counter()
            sampler.batch_size = 128
        elif index > asked_after and len(inputs) == 128:
            return {
                "loader": "ours" if adaptive else "batch_sampler", "workers": workers,
                "prefetch_factor": prefetch, "late_batches": index - asked_after - 1,
                "seconds": time.perf_counter() - pause - asked_at,
            }
    raise RuntimeError("the requested size never came")


def tables(rows: list[dict], delays: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| samples | workers | batch | torch, samples/s | ours, constant | ours, changing |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[name][len(row[name]) // 2]:.3f} ({row[name][0]:.2f} to {row[name][-1]:.2f})"
            for name in ASKED
        ]
        name = row["samples"] + (", seeded" if row["seeded"] else "")
        cells = [name, str(row["workers"]), str(row["batch_size"]),
                 f"{row['torch_samples_per_second']:,.0f}", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Median (least to most) of {len(rows[0]['constant'])} ratios to torch; aims "
        f"{ASKED['constant']} and {ASKED['changing']}.",
        "",
        "| loader | workers | prefetch_factor | batches of the old size | seconds until the new |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['loader']} | {row['workers']} | {row['prefetch_factor']} | {row['late_batches']} "
        f"| {row['seconds']:.3f} |"
        for row in delays
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/loader"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0,
                        help="that a pass of torch's takes, about (default 1)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--samples", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--seed-samples", action="store_true", help="seed each sample")
    parser.add_argument("--quick", action="store_true",
                        help="three short passes of few settings, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.seconds, options.batch_sizes = 3, 0.05, [16, 256]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        throughput(KINDS[name], workers, size, options.seconds, options.repeats,
                   options.seed_samples)
        for name in options.samples for workers in options.workers for size in options.batch_sizes
    ]
    shapes = [
        (workers, prefetch) for workers in options.workers
        for prefetch in ((2,) if options.quick or not workers else (2, 4))
    ]
    delays = [delay(*shape, adaptive) for shape in shapes for adaptive in (False, True)]
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"torch": torch.__version__, "repeats": options.repeats, "seconds": options.seconds,
               "seeded": options.seed_samples, "asked": ASKED}
    report = {"setting": setting, "throughput": rows, "delays": delays}
    (options.out / "loader.json").write_text(json.dumps(report, indent=1))
    (options.out / "loader.md").write_text(tables(rows, delays))
    print(tables(rows, delays))


if __name__ == "__main__":
    main()
