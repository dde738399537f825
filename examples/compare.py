"""Trains with CABS and at fixed batch sizes for the same number of samples.

Draws held-out accuracy over samples and over seconds.

    python examples/compare.py
    python examples/compare.py --sizes 16 32 64 128 --seed 1
    python examples/compare.py --data fashion --network small --budget 60000

All runs start from the same weights and share one learning rate. The seconds of CABS include
measuring every sample of every step. One seed shows the shapes of the curves; to say which is
better, tune the learning rate of each run and repeat with several seeds.
"""

from __future__ import annotations

from either_data import add_data, chosen_data
from matplotlib.figure import Figure
from options import positive_int, shared_options
from training import Run, train

COLOURS = ("#4878b0", "#5aa469", "#8a6fb0", "#b08a48", "#6b6b6b", "#48a8b0")


def draw(runs: list[Run]) -> Figure:
    """Accuracy over samples and over seconds, one line a run, CABS the bold one."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    fixed_colours = iter(COLOURS * len(runs))
    for run in runs:
        style = {"color": "#c8442f", "linewidth": 2.2, "zorder": 3}
        if run.name != "cabs":
            style = {"color": next(fixed_colours), "linewidth": 1.3}
        for panel, across in zip(panels, (run.samples, run.seconds), strict=True):
            panel.plot(across, [100 * share for share in run.accuracy], label=run.name, **style)
    # The first evaluations are far below the rest and would flatten it.
    settled = [100 * share for run in runs for share in run.accuracy[len(run.accuracy) // 5 :]]
    panels[0].set_ylim(min(settled) - 1, min(100, max(settled) + 1))
    panels[0].set_ylabel("held-out accuracy (%)")
    for panel, label in zip(panels, ("samples seen", "seconds of training"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def table(runs: list[Run]) -> str:
    """One line a run."""
    lines = [f"{'run':<12}{'accuracy':>10}{'best':>10}{'steps':>9}{'seconds':>10}  batch size"]
    for run in runs:
        lines.append(f"{run.name:<12}{run.accuracy[-1]:>10.2%}{max(run.accuracy):>10.2%}"
                     f"{run.history.n_steps:>9,}{run.seconds[-1]:>10.1f}  {run.batch_sizes()}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__, budget=None, out="out/compare")
    parser.add_argument("--sizes", type=positive_int, nargs="+", default=[16, 64, 256],
                        metavar="N", help="fixed batch sizes (default 16 64 256)")
    add_data(parser)
    options = parser.parse_args(arguments)
    data, network, budget = chosen_data(options)
    out = options.out / options.data
    runs = [train(network, data, lr=options.lr, budget=budget, seed=options.seed, out=out,
                  batch_size=size) for size in (None, *options.sizes)]
    draw(runs).savefig(out / "compare.png", dpi=120)
    print(table(runs))
    print(f"The curves are in {out / 'compare.png'}")


if __name__ == "__main__":
    main()
