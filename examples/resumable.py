"""A training run that may be killed at any moment.

Started again with the same arguments, it ends with the same weights, bit for bit.

    python examples/resumable.py --out out/resumable
    python examples/resumable.py --out out/resumable --workers 2 --every 10

Every few steps a checkpoint is written alongside the last one and replaces it in one move, so that
there is always a whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import adabatch


class NoisyPoints(Dataset):
    """Two classes of random points, shifted at random whenever they are read, repeatably."""

    def __init__(self, n: int):
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(n, 8, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int):
        return index, self.points[index] + 0.1 * torch.randn(8), self.labels[index]


def save(state: dict, path: Path) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/resumable"),
                        help="folder of the checkpoint to resume from (default out/resumable)")
    parser.add_argument("--samples", type=int, default=1000, help="in an epoch (default 1000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the samples (default 3)")
    parser.add_argument("--quick", action="store_const", dest="epochs", const=1,
                        help="one epoch, to see that it runs: as --epochs 1")
    parser.add_argument("--every", type=int, default=5,
                        help="steps between checkpoints (default 5)")
    parser.add_argument("--workers", type=int, default=0,
                        help="of the data loader (default 0: none)")
    parser.add_argument("--pause", type=float, default=0.0,
                        help="seconds to sleep in each step, to be killed in (default 0)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    # seed_samples: the noise of a sample repeats on resuming, with any number of workers.
    loader = adabatch.AdaptiveDataLoader(
        NoisyPoints(options.samples), batch_size=16, shuffle=True, num_workers=options.workers,
        seed_samples=True,
    )
    # Large batches, so that some arrive in micro-batches; so short a run measures every step.
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=adabatch.CABS(scale=8.0), batch_sizes=(8, 64),
        micro_batches=20, measure="all")
    parts = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    seen: list[list[int]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        adabatch.load_state_dict(saved["run"], **parts)
        seen = saved["seen"]
    batch: list[int] = []
    while loader.batch_sampler.epoch < options.epochs:
        for indices, inputs, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            batch += indices.tolist()
            if loader.is_last_micro_batch:
                seen.append(batch)
                batch = []
                if len(seen) % options.every == 0:
                    save({"run": adabatch.state_dict(**parts), "seen": seen}, checkpoint)
            time.sleep(options.pause)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    save({"seen": seen, "weights": weights}, options.out / "result.pt")
    sizes = [len(indices) for indices in seen]
    print(json.dumps({"steps": len(seen), "samples": sum(sizes),
                      "batch_sizes": [min(sizes), max(sizes)]}))


if __name__ == "__main__":
    main()
