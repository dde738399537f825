"""Trains with every controller, and at fixed batch sizes with constant and decaying rates.

    python examples/controllers.py
    python examples/controllers.py --lrs 0.03 0.1 0.3 1 --seeds 0 1 2
    python examples/controllers.py --data fashion --network small --only annealed "16 (1-p)^2"
    python examples/controllers.py --optimizer adam --lrs 0.001 --only CABS "16 constant"

All see the same number of samples. The lr of each row is the one of --lrs with the best last
accuracy on the first seed; the table gives mean and standard error over the seeds, the figure the
first one. The row "annealed" spends the decay of "16 (1-p)^2" on growing the batch: by theory and
simulation the same accuracy in fewer steps. No row that only picks the batch size is expected to
beat a well-shaped decay at equal samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from either_data import add_data, chosen_data
from matplotlib.figure import Figure
from options import shared_options
from torch.utils.data import DataLoader
from training import ImageSets, Run, train_loop

import adabatch
from adabatch import CABS, controllers

BASE, LARGEST = 16, 1024
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
DECAYS = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "(1-p)^2": lambda p: (1 - p) ** 2,
}


@dataclass(frozen=True)
class Method:
    """One row: a controller made for a budget, or a fixed size whose lr decays with the fraction of
    the budget seen."""

    controller: Callable[[int, int], Any] | None = None
    coupling: str | adabatch.Coupling = "none"
    size: int = BASE
    decay: Callable[[float], float] = DECAYS["constant"]


def methods() -> dict[str, Method]:
    """Every row of the table; a controller is made from (budget, samples of an epoch)."""
    lowered = adabatch.Coupling(on_limit="lower_lr")
    adaptive = {
        "annealed": Method(lambda budget, _: controllers.Annealed(budget, BASE, shape="power")),
        "annealed, noise cap": Method(lambda budget, _: controllers.Annealed(
            budget, BASE, shape="power", cap=controllers.NoiseScale(scale=2.0))),
        "CABS": Method(lambda budget, _: CABS()),
        "CABS, lower_lr": Method(lambda budget, _: CABS(), lowered),
        "CABS, f_star auto": Method(lambda budget, _: CABS(f_star="auto"), lowered),
        "NormTest": Method(lambda budget, _: controllers.NormTest(), lowered),
        "InnerProductTest": Method(lambda budget, _: controllers.InnerProductTest(), lowered),
        "augmented": Method(lambda budget, _: controllers.InnerProductTest.augmented(), lowered),
        "NoiseScale": Method(lambda budget, _: controllers.NoiseScale(), lowered),
        # With the published linear coupling the lr outgrows what the network can be trained at:
        # runs collapse, different ones with every seed.
        "GradientDiversity": Method(lambda budget, epoch: controllers.GradientDiversity(), "sqrt"),
        "AdaDamp": Method(lambda budget, _: controllers.AdaDamp(BASE), lowered),
        "PadaDamp": Method(
            lambda budget, epoch: controllers.PadaDamp(BASE, rate=BASE**2 / epoch), lowered),
        "GeoDamp": Method(lambda budget, _: controllers.GeoDamp(BASE), lowered),
        "AdaScale": Method(lambda budget, _: controllers.AdaScale(8 * BASE, BASE)),
        "Goodput": Method(lambda budget, _: controllers.Goodput(BASE, LARGEST), "adascale"),
    }
    fixed = {f"{size} {name}": Method(size=size, decay=decay)
             for size in (BASE, 8 * BASE) for name, decay in DECAYS.items()}
    return {**adaptive, **fixed}


def train(
    name: str, method: Method, make_network: Callable, data: ImageSets, *, lr: float, budget: int,
    seed: int, optimizer: str = "sgd",
) -> Run:
    """One run from fresh weights. The same seed gives the same run, except with Goodput, which
    depends on the clock."""
    torch.manual_seed(seed)
    network = make_network()
    optimizer = OPTIMIZERS[optimizer](network.parameters(), lr=lr)
    loader = DataLoader(
        data[0], batch_size=method.size, shuffle=True, drop_last=method.controller is None,
        generator=torch.Generator().manual_seed(seed))
    if method.controller is not None:
        controller = method.controller(budget, len(data[0]))
        # What is compared are the rules: all of them may measure every step.
        optimizer, loader, scheduler = adabatch.wrap(
            network, optimizer, loader, controller=controller, coupling=method.coupling,
            batch_sizes=(BASE, min(LARGEST, len(data[0]))),
            measure="all" if controller.needs_moments else "auto",
        )
        run = Run(name, scheduler.diagnostics)
        train_loop(network, optimizer, loader, scheduler, run, budget, data[1])
        scheduler.remove()
        return run
    run = Run(name, adabatch.Diagnostics())

    def decay(optimizer, args, kwargs):
        seen = run.history.latest.samples_seen if len(run.history) else 0
        optimizer.param_groups[0]["lr"] = lr * method.decay(min(1.0, seen / budget))

    optimizer.register_step_pre_hook(decay)
    train_loop(network, optimizer, loader, None, run, budget, data[1])
    return run


def row(
    train_one: Callable[..., Run], lrs: list[float], seeds: list[int]
) -> tuple[list[Run], float]:
    """The runs of all seeds at the lr that is best on the first seed, and that lr; a run is
    train_one(lr=, seed=)."""
    tried = {lr: train_one(lr=lr, seed=seeds[0]) for lr in lrs}
    best = max(lrs, key=lambda lr: tried[lr].accuracy[-1])
    return [tried[best], *(train_one(lr=best, seed=seed) for seed in seeds[1:])], best


def sizes(run: Run) -> str:
    """Smallest, median and largest batch size, fraction of steps at a bound, mean change a step."""
    chosen = run.history.column("next_batch_size")
    low, high = chosen.min(), chosen.max()
    if low == high:
        return f"{low}"
    at_bound = float(((chosen == BASE) | (chosen == high) & (high >= LARGEST)).mean())
    move = float(np.mean(np.abs(np.diff(np.log(chosen)))))
    return (f"{low} … {np.median(chosen):.0f} … {high}, {at_bound:.0%} at a bound, "
            f"moves {move:.1%} a step")


def table(rows: dict[str, tuple[list[Run], float]]) -> str:
    """One line a row: last accuracy (mean and standard error over the seeds), mean steps and
    seconds, sizes."""
    lines = [f"{'run':<22}{'lr':>8}{'accuracy':>18}{'steps':>9}{'seconds':>9}"
             "  batch size of the first seed"]
    for name, (runs, lr) in rows.items():
        shares = torch.tensor([run.accuracy[-1] for run in runs], dtype=torch.float64)
        error = f"± {float(shares.std()) / len(runs) ** 0.5:.2%}" if len(runs) > 1 else ""
        steps = sum(run.history.n_steps for run in runs) / len(runs)
        seconds = sum(run.seconds[-1] for run in runs) / len(runs)
        accuracy = f"{float(shares.mean()):.2%} {error}"
        lines.append(f"{name:<22}{lr:>8g}{accuracy:>18}{steps:>9,.0f}{seconds:>9.1f}"
                     f"  {sizes(runs[0])}")
    return "\n".join(lines)


def draw(rows: dict[str, tuple[list[Run], float]]) -> Figure:
    """Of the first seed, accuracy over samples, steps and seconds, and batch size over samples;
    fixed sizes are thin and grey."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for number, (name, (runs, _)) in enumerate(rows.items()):
        history, accuracy = runs[0].history, [100 * share for share in runs[0].accuracy]
        seen = history.column("samples_seen")
        steps = [int((seen <= samples).sum()) for samples in runs[0].samples]
        fixed = name[0].isdigit()
        style = {"color": f"C{number % 10}", "linewidth": 1.4,
                 "linestyle": "-" if number < 10 else "--"}
        if fixed:
            style = {"color": "0.6", "linewidth": 0.8,
                     "linestyle": ("-", "--", ":", "-.")[number % 4]}
        style |= {"color": "black", "linewidth": 2.4} if name == "annealed" else {}
        for panel, across in zip(panels, (runs[0].samples, steps, runs[0].seconds), strict=False):
            panel.plot(across, accuracy, label=name, **style)
        panels[3].step(seen, history.column("next_batch_size"), **style)
    settled = [100 * share for runs, _ in rows.values()
               for share in runs[0].accuracy[len(runs[0].accuracy) // 5 :]]
    labels = "samples seen", "steps", "seconds of training", "samples seen"
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.set_ylabel("held-out accuracy (%)")
        panel.set_ylim(max(0, min(settled) - 1), min(100, max(settled) + 1))
    panels[1].set_xscale("log")
    panels[3].set_ylabel("batch size (samples)")
    panels[3].set_ylim(BASE / 1.5, LARGEST * 1.5)
    panels[3].set_yscale("log", base=2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper",
                  frameon=False, fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__, budget=None, out="out/controllers")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd",
                        help="the optimizer (default sgd)")
    parser.add_argument("--lrs", type=float, nargs="+", default=None, metavar="LR",
                        help="rates from which each row takes its best (default --lr)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, metavar="N",
                        help="seeds; the lr is chosen on the first (default --seed)")
    parser.add_argument("--only", nargs="+", choices=list(methods()), metavar="ROW",
                        help=f"rows to run, of: {', '.join(methods())}".replace("%", "%%"))
    add_data(parser)
    options = parser.parse_args(arguments)
    data, network, budget = chosen_data(options)
    out: Path = options.out / options.data
    out.mkdir(parents=True, exist_ok=True)
    chosen = {name: method for name, method in methods().items()
              if options.only is None or name in options.only}
    rows = {}
    for name, method in chosen.items():
        train_one = functools.partial(
            train, name, method, network, data, budget=budget, optimizer=options.optimizer)
        rows[name] = row(train_one, options.lrs or [options.lr], options.seeds or [options.seed])
    draw(rows).savefig(out / "controllers.png", dpi=120)
    (out / "controllers.txt").write_text(table(rows) + "\n")
    print(table(rows))
    print(f"The curves are in {out / 'controllers.png'}")


if __name__ == "__main__":
    main()
