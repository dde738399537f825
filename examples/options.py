"""Command line options that the example scripts share."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(ep|epochs?)?")


@dataclass(frozen=True)
class Budget:
    """How many samples to train on: a number of them, or of passes over the training set.

    An adaptive batch size makes the number of steps unknown, so that a fair budget counts samples.
    """

    amount: float
    in_epochs: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "180000" (samples) or "3epochs" (also "3ep", "0.5 epochs").

        Raises:
            argparse.ArgumentTypeError: any other text, or nothing to train on.
        """
        match = _BUDGET.fullmatch(text.strip().replace("_", "").lower())
        if match is None or float(match[1]) == 0 or not (match[2] or match[1].isdecimal()):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a budget; give a number of samples, as 180000, or of epochs, as "
                "3epochs or 0.5ep."
            )
        return cls(float(match[1]), match[2] is not None)

    def samples(self, n_train: int) -> int:
        """The budget in samples for a training set of `n_train` samples, at least 1."""
        return max(1, round(self.amount * n_train if self.in_epochs else self.amount))


QUICK = Budget(1000, in_epochs=False)


def positive_int(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a batch size; give a positive integer.")
    return int(text)


def shared_options(
    description: str | None, budget: str | None, out: str
) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD (default 0.1)")
    about_budget = ("samples to train on, as 180000, or passes over the training set, as 3epochs "
                    f"(default {budget or 'the one of the data'})")
    parser.add_argument("--budget", type=Budget.parse, default=budget, help=about_budget)
    about_quick = (f"train on {QUICK.amount:,} samples only, to see that it runs: as --budget "
                   f"{QUICK.amount}")
    parser.add_argument("--quick", action="store_const", dest="budget", const=QUICK,
                        help=about_quick)
    parser.add_argument("--seed", type=int, default=0,
                        help="start weights and order of the samples (default 0)")
    parser.add_argument("--out", type=Path, default=Path(out),
                        help=f"folder for the results (default {out})")
    return parser


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds the choice between CABS and a fixed size, and what CABS may spend on measuring."""
    parser.add_argument("--batch-size", type=positive_int, metavar="N",
                        help="train at this fixed batch size; without it CABS chooses the size")
    about_measure = "share of the time to spend on measuring, as 0.05 (default: measure every step)"
    parser.add_argument("--measure", type=float, help=about_measure)


def add_fashion_data(parser: argparse.ArgumentParser) -> None:
    """Adds where the images come from and which network learns them."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data-dir", type=Path, default=folder, help="folder of IDX files in "
                        f"MNIST's format, gzipped or not (default {folder})")
    parser.add_argument("--network", choices=("mnist", "small"), default="mnist",
                        help="the CABS authors' MNIST network, or a smaller one (default mnist)")
