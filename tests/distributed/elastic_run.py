"""A run under torchrun whose processes kill themselves: in attempt a < kills one of them sends
itself SIGKILL at a random moment. See test_elastic.py."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import adabatch
from adabatch.checkpoint import load_checkpoint, save_checkpoint

SAMPLES, EPOCHS, EVERY = 151, 3, 3


class Numbered(Dataset):
    """Samples that know their index."""

    def __init__(self) -> None:
        self.points = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.points[index]


class Seen:
    """(epoch, index) of all samples that all processes trained on, as a part of the checkpoint."""

    def __init__(self) -> None:
        self.pairs: list[list[int]] = []

    def state_dict(self) -> dict[str, Any]:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, self.pairs)
        return {"pairs": [pair for share in shares for pair in share]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs = state["pairs"] if dist.get_rank() == 0 else []


def kill_at_random(kills: int, seed: int) -> threading.Timer | None:
    """A timer that kills this process, if it is the victim of this attempt."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    chance = random.Random(f"{seed} {attempt}")
    victim, seconds = chance.randrange(dist.get_world_size()), chance.uniform(0.0, 0.6)
    if attempt >= kills or victim != dist.get_rank():
        return None
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    return timer


def main(folder: Path, kills: int, seed: int) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(Numbered(), batch_size=8, shuffle=True, generator=generator)
    sizes = {"controller": adabatch.CABS(scale=8.0), "batch_sizes": (5, 16)}
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, measure="all", **sizes)
    seen = Seen()
    parts = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler,
             "seen": seen}
    load_checkpoint(folder, **parts)
    timer = kill_at_random(kills, seed)
    if timer is not None:
        timer.start()
    while loader.batch_sampler.epoch < EPOCHS:
        for indices, inputs in loader:
            epoch = loader.batch_sampler.epoch
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), inputs.sum(1, keepdim=True))
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            seen.pairs += [[epoch, index] for index in indices.tolist()]
            time.sleep(0.005)
            if scheduler.step_count % EVERY == 0:
                save_checkpoint(folder, **parts)
    if timer is not None:
        time.sleep(1.0)  # faster than the timer: killed here, it ends with the last checkpoint
    save_checkpoint(folder, **parts)
    pairs = seen.state_dict()["pairs"]
    if dist.get_rank() == 0:
        torch.save({"seen": pairs, "steps": scheduler.step_count}, folder / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
