"""The examples' training loop, with CABS or at a fixed batch size, and its record of accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import adabatch

FIRST_BATCH_SIZE = 16
EVALUATIONS = 25

ImageSets = tuple[TensorDataset, TensorDataset]


@dataclass
class Run:
    """A training run: its history, and held-out accuracy over samples and seconds of training.

    The seconds do not include evaluation.
    """

    name: str
    history: adabatch.Diagnostics
    samples: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def batch_sizes(self) -> str:
        """Smallest, largest and last batch size requested."""
        sizes = self.history.column("next_batch_size")
        low, high = sizes.min(), sizes.max()
        return f"{low}" if low == high else f"{low} to {high}, last {sizes[-1]}"

    def summary(self) -> str:
        """One line on how it went."""
        return (
            f"{self.name}: {self.accuracy[-1]:.2%} held-out accuracy after "
            f"{self.samples[-1]:,} samples, {self.history.n_steps:,} steps, "
            f"{self.seconds[-1]:.1f} s; batch size {self.batch_sizes()}"
        )


def train(
    make_network: Callable[[], nn.Module],
    data: ImageSets,
    *,
    lr: float,
    budget: int,
    seed: int,
    out: Path,
    batch_size: int | None = None,
    measure: float | str = "all",
) -> Run:
    """Trains a fresh network for `budget` samples, with CABS or at `batch_size`.

    A run at a fixed size is plain torch: nothing is measured, so that its seconds are what training
    costs without adabatch. Writes history.jsonl, step by step, and history.png to `out` / name of
    the run. The same seed gives the same run.
    """
    train_set, test_set = data
    torch.manual_seed(seed)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    # A few samples left over at the end of an epoch would take a step at full lr and undo progress.
    # CABS's run scales the lr of that step; a fixed run drops them, so that the two differ in batch
    # size alone.
    drop_last = batch_size is not None and batch_size < len(train_set)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, batch_size=batch_size or FIRST_BATCH_SIZE, shuffle=True,
                        drop_last=drop_last, generator=generator)
    if batch_size is None:
        # Runs this short have few steps to learn the variance from: every one of them is measured.
        options = {"controller": adabatch.CABS(), "batch_sizes": (16, 2048), "measure": measure}
        optimizer, loader, scheduler = adabatch.wrap(network, optimizer, loader, **options)
        run = Run("cabs", scheduler.diagnostics)
    else:
        scheduler, run = None, Run(f"fixed-{batch_size}", adabatch.Diagnostics())
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    run.history.to_jsonl(folder / "history.jsonl")
    train_loop(network, optimizer, loader, scheduler, run, budget, test_set)
    run.history.close()
    run.history.plot(folder / "history.png")
    return run


def train_loop(
    network, optimizer, loader, scheduler, run: Run, budget: int, test_set: TensorDataset
) -> None:
    """Steps until `budget` samples are seen; evaluates `EVALUATIONS` times on the way.

    A short run evaluates less often, scoring at most ten held-out samples for each one trained on,
    but always at its end. With scheduler None the batch size is fixed.
    """
    start, evaluating, mark = time.perf_counter(), 0.0, 0
    evaluations = max(1, min(EVALUATIONS, 10 * budget // len(test_set)))
    with tqdm(total=budget, unit=" samples", desc=run.name, disable=None) as bar:
        for inputs, targets in chain.from_iterable(repeat(loader)):
            optimizer.zero_grad()
            loss = cross_entropy(network(inputs), targets)
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step(loss)
            else:
                record_plain_step(run.history, optimizer, len(targets), loss)

            latest = run.history.latest
            if latest.samples_seen * evaluations // budget > mark:
                mark = latest.samples_seen * evaluations // budget
                stopped = time.perf_counter()
                run.samples.append(latest.samples_seen)
                run.seconds.append(stopped - start - evaluating)
                run.accuracy.append(accuracy(network, test_set))
                evaluating += time.perf_counter() - stopped
            held_out = f"{run.accuracy[-1]:.1%}" if run.accuracy else "-"
            bar.set_postfix(loss=f"{latest.loss_ema:.3f}", batch=latest.batch_size,
                            lr=f"{latest.lr:g}", accuracy=held_out, refresh=False)
            bar.update(latest.batch_size)
            if latest.samples_seen >= budget:
                break


def record_plain_step(
    history: adabatch.Diagnostics, optimizer: torch.optim.Optimizer, batch_size: int, loss: Tensor
) -> None:
    """Adds a step of training without adabatch to a history: both kinds of run leave it."""
    step, seen = (history.latest.step + 1, history.latest.samples_seen) if len(history) else (0, 0)
    lr = optimizer.param_groups[0]["lr"]
    history.append(step=step, samples_seen=seen + batch_size, batch_size=batch_size,
                   next_batch_size=batch_size, lr=lr, loss=loss.item())


@torch.no_grad()
def accuracy(network: nn.Module, data: TensorDataset) -> float:
    """Share of the samples whose largest score is the right class."""
    network.eval()
    batches = zip(*(tensor.split(1000) for tensor in data.tensors), strict=True)
    correct = sum(
        int((network(inputs).argmax(dim=1) == targets).sum()) for inputs, targets in batches
    )
    network.train()
    return correct / len(data)


def image_sets(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> ImageSets:
    """Data sets of images [N, 1, height, width], float32, standardised by the training pixels."""
    mean, std = train_images.float().mean(), train_images.float().std()
    pairs = ((train_images, train_labels), (test_images, test_labels))
    train_set, test_set = (
        TensorDataset(((images.float() - mean) / std).unsqueeze(1), labels.long())
        for images, labels in pairs
    )
    return train_set, test_set
