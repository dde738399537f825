"""Trains the CABS authors' MNIST network on data in MNIST's format at sizes that CABS chooses.

Three epochs take some minutes on a CPU; --network small takes less than half of that.

    # the data of Debian's package dataset-fashion-mnist:
    python examples/fashion_mnist.py
    python examples/fashion_mnist.py --data-dir ~/mnist --network small --budget 60000
    python examples/fashion_mnist.py --batch-size 64                  # fixed, to compare

The loop that uses adabatch is in training.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from idx_data import load_folder
from networks import mnist_network, small_network
from options import add_batch_size, add_fashion_data, shared_options
from torch.utils.data import TensorDataset
from training import image_sets, train

BUDGET = "3epochs"
NETWORKS = {"mnist": mnist_network, "small": small_network}


def load_data(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """60,000 images of 28 × 28 pixels to train on and 10,000 held out.

    Ends the script with advice where the files are missing or broken.
    """
    try:
        return image_sets(*load_folder(folder))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__, budget=BUDGET, out="out/fashion_mnist")
    add_batch_size(parser)
    add_fashion_data(parser)
    options = parser.parse_args(arguments)
    data = load_data(options.data_dir)
    budget = options.budget.samples(len(data[0]))
    sizes = {"batch_size": options.batch_size, "measure": options.measure or "all"}
    run = train(NETWORKS[options.network], data, lr=options.lr, budget=budget,
                seed=options.seed, out=options.out, **sizes)
    print(run.summary())
    print(f"History and plot are in {options.out / run.name}")


if __name__ == "__main__":
    main()
