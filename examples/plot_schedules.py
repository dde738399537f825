"""Draws every schedule of adabatch.schedules over its steps: the batch size, and the lr that falls
linearly with the samples seen.

    python examples/plot_schedules.py
    python examples/plot_schedules.py --steps 100 --out schedules.png

No data are loaded: the schedules run over VirtualBatchSize, which only remembers a size. Where
batches are large, the budget of samples is spent in fewer steps, so the lr falls faster there.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adabatch import schedules as s

START, LIMIT = 64, 512
SIZE_COLOUR, LR_COLOUR = "#c8442f", "#4878b0"


def place(batch_size: int = START, limit: int = LIMIT) -> dict:
    """Where the schedules of one panel keep their size, and its bounds."""
    manager = s.VirtualBatchSize(batch_size)
    return {"dataloader": None, "batch_size_manager": manager, "max_batch_size": limit}


def chained(at: dict) -> s.BSScheduler:
    return s.ChainedBSScheduler(
        [s.ConstantBS(factor=3.0, milestone=20, **at), s.ExponentialBS(gamma=1.02, **at)])


def sequential(at: dict) -> s.BSScheduler:
    members = [s.ConstantBS(factor=3.0, milestone=15, **at), s.ExponentialBS(gamma=1.04, **at),
               s.StepBS(step_size=10, gamma=0.5, **at)]
    return s.SequentialBS(members, milestones=[20, 40])


BATCH_SIZES: dict[str, Callable[[dict], s.BSScheduler]] = {
    "LambdaBS: 1 + t/10": lambda at: s.LambdaBS(bs_lambda=lambda t: 1 + t / 10, **at),
    "MultiplicativeBS: 1.05, from t = 20 on 1": lambda at: s.MultiplicativeBS(
        bs_lambda=lambda t: 1.05 if 0 < t < 20 else 1.0, **at),
    "StepBS: × 2 every 20": lambda at: s.StepBS(step_size=20, **at),
    "MultiStepBS: × 2 at 10, 40": lambda at: s.MultiStepBS(milestones=[10, 40], **at),
    "ConstantBS: × 4 until 20": lambda at: s.ConstantBS(factor=4.0, milestone=20, **at),
    "LinearBS: 6 to 1 in 40": lambda at: s.LinearBS(start_factor=6.0, milestone=40, **at),
    "ExponentialBS: 1.03": lambda at: s.ExponentialBS(gamma=1.03, **at),
    "PolynomialBS: 30, power 3": lambda at: s.PolynomialBS(
        total_iters=30, power=3.0, **at | place(8)),
    "CosineAnnealingBS: 20": lambda at: s.CosineAnnealingBS(total_iters=20, **at),
    "…WithWarmRestarts: 8, × 2": lambda at: s.CosineAnnealingBSWithWarmRestarts(
        t_0=8, factor=2, **at),
    "CyclicBS: triangular2, 10 + 10": lambda at: s.CyclicBS(
        step_size_down=10, mode="triangular2", **at | place(256)),
    "OneCycleBS: 60": lambda at: s.OneCycleBS(
        total_steps=60, min_batch_size=16, **at | place(128)),
    "IncreaseBSOnPlateau: patience 5": lambda at: s.IncreaseBSOnPlateau(
        patience=5, threshold=0.03, **at),
    "SequentialBS": sequential,
    "ChainedBSScheduler": chained,
    'RampBS: "0:64 1K:128 3K:256 7K:512"': lambda at: s.RampBS(
        ramp="0:64 1K:128 3K:256 7K:512", **at),
    "RampBS: increments of 64 over 10K": lambda at: s.RampBS(
        ramp=s.increment_ramp(64, 64, 10_000, 512), **at),
    "RampBS: doubling at 1K, 4K": lambda at: s.RampBS(
        ramp=s.doubling_ramp(64, [1_000, 4_000]), **at),
}


def sizes_of(build: Callable[[dict], s.BSScheduler], steps: int) -> list[int]:
    """The batch sizes of the first steps; the metric, a loss, falls like exp(-t/10) towards 0.5."""
    schedule, sizes = build(place()), []
    for step in range(steps):
        sizes.append(schedule.batch_size)
        schedule.step(metrics=0.5 + 2.0 ** (-step / 7), samples=schedule.batch_size)
    return sizes


def lrs_of(
    scheduler: s.LinearLR | s.SampleClock, sizes: list[int], by_samples: bool = True
) -> list[float]:
    """The lrs at those batch sizes."""
    lrs = []
    for size in sizes:
        lrs.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step(*([size] if by_samples else []))
    return lrs


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def warm_cosine(budget: int, unit: int = 64) -> s.SampleClock:
    """A warm-up over a tenth of the budget and a cosine over the rest, counted in samples."""
    steps, warm, inner = budget // unit, budget // unit // 10, optimizer()
    lr = torch.optim.lr_scheduler
    parts = [lr.LinearLR(inner, 0.05, total_iters=warm), lr.CosineAnnealingLR(inner, steps - warm)]
    return s.SampleClock(lr.SequentialLR(inner, parts, [warm]), samples_per_step=unit)


def draw_sizes(panel: Axes, title: str, sizes: list[int]) -> None:
    """Batch size on the left, lr on the right."""
    panel.step(range(len(sizes)), sizes, where="post", color=SIZE_COLOUR, linewidth=1.8)
    panel.set_title(title, fontsize=9)
    panel.set_ylim(0, 1.08 * max(sizes))
    right = panel.twinx()
    lrs = lrs_of(s.LinearLR(optimizer(), budget_samples=sum(sizes)), sizes)
    right.step(range(len(sizes)), lrs, where="post", color=LR_COLOUR, linewidth=1.0)
    right.set_ylim(0, 1.08)
    right.tick_params(labelsize=7, colors=LR_COLOUR)
    panel.tick_params(labelsize=7)
    panel.tick_params(axis="y", colors=SIZE_COLOUR)


def draw_lrs(panel: Axes, title: str, curves: dict[str, list[float]]) -> None:
    """Several lrs over the same steps."""
    for (label, lrs), style in zip(curves.items(), ("-", "--"), strict=False):
        panel.step(range(len(lrs)), lrs, where="post", color=LR_COLOUR, linestyle=style,
                   linewidth=1.4, label=label)
    panel.set_title(title, fontsize=9)
    panel.set_ylim(0, 1.08)
    panel.tick_params(labelsize=7)
    panel.legend(frameon=False, fontsize=7)


def draw(steps: int) -> Figure:
    """All panels."""
    figure = Figure(figsize=(15, 14), layout="constrained")
    panels = figure.subplots(5, 4).flat
    for panel, (title, build) in zip(panels, BATCH_SIZES.items(), strict=False):
        draw_sizes(panel, title, sizes_of(build, steps))
    constant, growing = [START] * steps, sizes_of(BATCH_SIZES["StepBS: × 2 every 20"], steps)
    by_steps = lrs_of(s.LinearLR(optimizer(), T=steps), growing, by_samples=False)
    by_samples = lrs_of(s.LinearLR(optimizer(), budget_samples=sum(growing)), growing)
    both = {"by steps": by_steps, "by samples": by_samples}
    draw_lrs(panels[18], "LinearLR under that StepBS", both)
    clocks = {name: lrs_of(warm_cosine(sum(sizes)), sizes)
              for name, sizes in (("batch 64", constant), ("StepBS × 2 every 20", growing))}
    draw_lrs(panels[19], "SampleClock: warm-up and cosine", clocks)
    figure.supxlabel("step", fontsize=10)
    title = "batch size (red, left) and lr of LinearLR over the samples drawn (blue, right)"
    figure.suptitle(title, fontsize=12)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60,
                        help="steps of each schedule, 20 or more (default 60)")
    parser.add_argument("--quick", action="store_const", dest="steps", const=20,
                        help="20 steps, to see that it runs: as --steps 20")
    parser.add_argument("--out", type=Path, default=Path("out/schedules.png"),
                        help="picture to write (default out/schedules.png)")
    options = parser.parse_args(arguments)
    # torch's SequentialLR steps its parts with an argument that torch itself warns about.
    warnings.filterwarnings("ignore", message="The epoch parameter in")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.steps).savefig(options.out, dpi=90)
    print(f"Drawn to {options.out}")


if __name__ == "__main__":
    main()
