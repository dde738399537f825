"""Data parallel training on digits that continues from a checkpoint when a process is lost.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp.py --fsdp --every 10
    torchrun --nproc-per-node 2 examples/ddp.py --quick --out out/ddp_quick       # one epoch

On gloo without GPUs, one process per GPU on nccl with them. Every few steps all processes write a
checkpoint together; started again, with any number of processes, the run continues from the last
whole one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch import load_checkpoint, save_checkpoint

HELD_OUT = 300


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true",
                        help="shard parameters by fully_shard instead of copying them")
    parser.add_argument("--epochs", type=int, default=5,
                        help="passes over the training set (default 5)")
    parser.add_argument("--quick", action="store_const", dest="epochs", const=1,
                        help="one epoch, to see that it runs: as --epochs 1")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD (default 0.1)")
    parser.add_argument("--max-batch-size", type=int, default=256,
                        help="of all processes together (default 256)")
    parser.add_argument("--every", type=int, default=20,
                        help="steps between checkpoints (default 20)")
    parser.add_argument("--out", type=Path, default=Path("out/ddp"),
                        help="folder of the checkpoints to resume from (default out/ddp)")
    return parser.parse_args()


def parallel(model: nn.Sequential, sharded: bool) -> nn.Module:
    """Data parallel, with copies or with shards of the parameters."""
    if not sharded:
        return DistributedDataParallel(model)
    for layer in (*(part for part in model if isinstance(part, nn.Linear)), model):
        fully_shard(layer)
    return model


def main() -> None:
    options = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    images = torch.tensor(images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(labels)[order]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = parallel(model, options.fsdp)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    train_set = TensorDataset(images[HELD_OUT:], labels[HELD_OUT:])
    loader = DataLoader(train_set, batch_size=16, shuffle=True)
    # All sizes are those of the whole batch: 16 samples are 8 on each of two processes.
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, batch_sizes=(16, options.max_batch_size))

    parts = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    resumed = load_checkpoint(options.out, **parts)
    while loader.batch_sampler.epoch < options.epochs:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            if scheduler.step_count % options.every == 0:
                save_checkpoint(options.out, **parts)
    save_checkpoint(options.out, **parts)

    with torch.no_grad():
        found = model(images[:HELD_OUT].to(device)).argmax(1).cpu()
    if dist.get_rank() == 0:
        accuracy = (found == labels[:HELD_OUT]).float().mean().item()
        sizes = [record.batch_size for record in scheduler.diagnostics]
        result = {"processes": dist.get_world_size(), "steps": scheduler.step_count,
                  "resumed_at": resumed, "accuracy": round(accuracy, 4)}
        print(json.dumps(result | {"batch_sizes": [min(sizes), max(sizes)]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
