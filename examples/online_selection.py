"""Chooses the batch size online: the losses of one loaded batch, in parts of 256, 128 and 64, are
compared, and the best size takes its steps. Fixed batches for comparison.

    python examples/online_selection.py
    python examples/online_selection.py --network batchnorm
    python examples/online_selection.py --budget 20epochs --candidates 128 64 32

The form of a published experiment (AlexNet on CIFAR-10), on scikit-learn's digits with a small
network. The parts of any size make up the same batch, so that their losses differ only through what
is drawn for each part (dropout, as in AlexNet: chance decides) or depends on the whole part (batch
norm: the larger part nearly always has the smaller loss). Every run loads batches of the largest
candidate and sees as many samples; parts of n samples step with lr · n / largest. The curves are
means over repeats, each with different weights and order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import digits
import torch
from matplotlib.figure import Figure
from options import positive_int, shared_options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from training import EVALUATIONS, accuracy

from adabatch.schedules.online import online_step

COLOURS = {"smallest loss": "#c8442f", "largest loss": "#8a6fb0"}
FIXED_COLOURS = ("#4878b0", "#5aa469", "#b08a48", "#6b6b6b")


@dataclass
class Curve:
    """Samples seen, mean loss since the entry before, and held-out accuracy, at `EVALUATIONS`
    points; the chosen size of every loaded batch."""

    samples: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    steps: int = 0


def dropout() -> nn.Module:
    """Conv 3×3×16 and a hidden layer of 64 with dropout, for 8 × 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(16 * 4 * 4, 64), nn.ReLU(),
        nn.Dropout(0.25), nn.Linear(64, 10),
    )


def batchnorm() -> nn.Module:
    """The same, batch-normalised in place of dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )


NETWORKS = {"dropout": dropout, "batchnorm": batchnorm}


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, targets = batch
    return cross_entropy(model(inputs), targets)


def batches(data: TensorDataset, size: int, budget: int, seed: int) -> Iterator[list[Tensor]]:
    """Shuffled batches of this size, epoch after epoch, until the budget of samples is spent."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, size, shuffle=True, drop_last=True, generator=generator)
    left = budget // size
    while left > 0:
        for _, batch in zip(range(left), loader, strict=False):
            left -= 1
            yield batch


def train(
    make: Callable[[], nn.Module], candidates: list[int], largest: int, pick: str, data, *,
    lr: float, budget: int, seed: int,
) -> Curve:
    """A run; with one candidate that size is fixed."""
    torch.manual_seed(seed)
    model = make()
    # A single candidate is stepped with its share of the largest one's lr, too.
    optimizer = torch.optim.SGD(model.parameters(), lr=lr * max(candidates) / largest)
    curve, losses, mark = Curve(), [], 0
    for count, batch in enumerate(batches(data[0], largest, budget, seed), start=1):
        step = online_step(model, optimizer, loss_fn, batch, candidates=candidates, pick=pick)
        losses.append(step.loss)
        curve.sizes.append(step.batch_size)
        curve.steps += step.n_steps
        if count * EVALUATIONS // (budget // largest) > mark:
            mark = count * EVALUATIONS // (budget // largest)
            curve.samples.append(count * largest)
            curve.loss.append(sum(losses) / len(losses))
            curve.accuracy.append(accuracy(model, data[1]))
            losses = []
    return curve


def mean(curves: list[Curve], name: str) -> list[float]:
    columns = zip(*(getattr(curve, name) for curve in curves), strict=True)
    return [sum(values) / len(values) for values in columns]


def draw(runs: dict[str, list[Curve]], candidates: list[int]) -> Figure:
    """Loss, accuracy, and for the online runs how often each size was chosen."""
    online = [name for name in runs if name in COLOURS]
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    widths = [1.5, 1.5, *[1] * len(online)]
    loss, held_out, *chosen = figure.subplots(1, len(widths), width_ratios=widths)
    fixed = iter(FIXED_COLOURS * len(runs))
    for name, curves in runs.items():
        style = ({"color": COLOURS[name], "linewidth": 2.0, "zorder": 3} if name in COLOURS
                 else {"color": next(fixed), "linewidth": 1.3})
        percent = [100 * share for share in mean(curves, "accuracy")]
        loss.plot(curves[0].samples, mean(curves, "loss"), label=name, **style)
        held_out.plot(curves[0].samples, percent, label=name, **style)
    loss.set(yscale="log", ylabel="training loss", xlabel="samples seen")
    held_out.set(ylabel="held-out accuracy (%)", xlabel="samples seen", ylim=(80, 100))
    held_out.legend(frameon=False, fontsize=9, loc="lower right")
    for panel, name in zip(chosen, online, strict=True):
        sizes = [size for curve in runs[name] for size in curve.sizes]
        shares = [100 * sizes.count(size) / len(sizes) for size in candidates]
        bars = panel.bar([str(size) for size in candidates], shares, color=COLOURS[name], width=0.6)
        panel.bar_label(bars, fmt="%.0f %%", fontsize=9)
        panel.set(title=f"chosen: {name}", xlabel="batch size",
                  ylabel="share of loaded batches (%)", ylim=(0, 105))
    for panel in (loss, held_out, *chosen):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def table(runs: dict[str, list[Curve]]) -> str:
    """One line a run."""
    lines = [f"{'run':<16}{'loss':>10}{'accuracy':>10}{'steps':>9}"]
    for name, curves in runs.items():
        steps = sum(curve.steps for curve in curves) / len(curves)
        lines.append(f"{name:<16}{mean(curves, 'loss')[-1]:>10.4f}"
                     f"{mean(curves, 'accuracy')[-1]:>10.2%}{steps:>9,.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__, budget="20epochs", out="out/online_selection")
    parser.add_argument("--candidates", type=positive_int, nargs="+", default=[256, 128, 64],
                        metavar="N", help="batch sizes (default 256 128 64)")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="dropout",
                        help="what makes the candidates' losses differ (default dropout)")
    parser.add_argument("--repeats", type=positive_int, default=3,
                        help="runs of each kind, whose mean is drawn (default 3)")
    parser.set_defaults(lr=0.2)
    options = parser.parse_args(arguments)
    data, candidates = digits.load_data(), sorted(options.candidates, reverse=True)
    budget = options.budget.samples(len(data[0]))
    if budget < candidates[0] or len(data[0]) < candidates[0]:
        parser.error(f"the largest candidate ({candidates[0]}) must fit the budget "
                     f"({budget} samples) and the training set ({len(data[0])})")
    torch.set_num_threads(1)
    kinds = {f"{pick} loss": (candidates, pick) for pick in ("smallest", "largest")}
    kinds |= {f"fixed {size}": ([size], "smallest") for size in candidates}
    seeds, make = range(options.seed, options.seed + options.repeats), NETWORKS[options.network]
    runs = {
        name: [train(make, sizes, candidates[0], pick, data, lr=options.lr, budget=budget,
                     seed=seed) for seed in seeds]
        for name, (sizes, pick) in kinds.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    draw(runs, candidates).savefig(options.out / "online_selection.png", dpi=110)
    print(table(runs))
    print(f"The curves are in {options.out / 'online_selection.png'}")


if __name__ == "__main__":
    main()
