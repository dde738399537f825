"""Trains a small network on scikit-learn's digits at batch sizes that CABS chooses, in seconds.

    python examples/digits.py
    python examples/digits.py --batch-size 64           # fixed, to compare
    python examples/digits.py --budget 10epochs --lr 0.2
    python examples/digits.py --picture out/batch_size.png   # batch size and noise scale

The loop that uses adabatch is in training.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from networks import digits_network
from options import add_batch_size, shared_options
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset
from training import Run, image_sets, train

BUDGET = "20epochs"


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1347 images of 8 × 8 pixels to train on and 450 held out; one split for every seed."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    chosen, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    return image_sets(images[chosen], labels[chosen], images[held_out], labels[held_out])


def draw(run: Run) -> Figure:
    """Batch size and smoothed noise scale over the samples seen."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    sizes = figure.subplots()
    noise = sizes.twinx()
    seen = run.history.column("samples_seen")
    sizes.step(seen, run.history.column("next_batch_size"), where="post", color="#1f5a99")
    noise.semilogy(seen, run.history.column("noise_scale_ema"), color="#a8741a", linewidth=1)
    sizes.set_xlabel("samples seen")
    sizes.set_ylabel("batch size", color="#1f5a99")
    noise.set_ylabel("noise scale", color="#a8741a")
    sizes.set_ylim(bottom=0)
    sizes.set_xlim(0, seen[-1])
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__, budget=BUDGET, out="out/digits")
    add_batch_size(parser)
    parser.add_argument("--picture", type=Path,
                        help="also draw batch size and noise scale to this file")
    options = parser.parse_args(arguments)
    data = load_data()
    budget = options.budget.samples(len(data[0]))
    sizes = {"batch_size": options.batch_size, "measure": options.measure or "all"}
    run = train(digits_network, data, lr=options.lr, budget=budget,
                seed=options.seed, out=options.out, **sizes)
    print(run.summary())
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(run).savefig(options.picture, dpi=110)
    print(f"History and plot are in {options.out / run.name}")


if __name__ == "__main__":
    # On images this small, handing work between threads costs more than it saves.
    torch.set_num_threads(1)
    main()
