"""The choice between digits and Fashion-MNIST, for the scripts that train on either."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import digits
import fashion_mnist
from networks import digits_network
from options import Budget, add_fashion_data
from torch import nn
from training import ImageSets


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data, and what chosen_data() reads besides."""
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits",
                        help="which data to train on (default digits)")
    add_fashion_data(parser)


def chosen_data(options: argparse.Namespace) -> tuple[ImageSets, Callable[[], nn.Module], int]:
    """((training set, held-out set), what makes a network, budget in samples)."""
    if options.data == "digits":
        data, network, default_budget = digits.load_data(), digits_network, digits.BUDGET
    else:
        data, network = (fashion_mnist.load_data(options.data_dir),
                         fashion_mnist.NETWORKS[options.network])
        default_budget = fashion_mnist.BUDGET
    return data, network, (options.budget or Budget.parse(default_budget)).samples(len(data[0]))
