"""Data sets whose samples say which they are, and what tests of loaders do with them."""

import io
import random
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class Numbers(Dataset):
    """0 … n − 1."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return index


class Augmented(Numbers):
    """(index, what the three global generators gave)."""

    def __getitem__(self, index):
        return index, torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002


class Counting(IterableDataset):
    """0 … n − 1, divided among the workers: worker w of k gives w, w + k, …; can be resumed."""

    def __init__(self, n, restarts=False):
        self.n, self.restarts, self.at = n, restarts, 0

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        while worker + self.at * workers < self.n:
            self.at += 1
            yield worker + (self.at - 1) * workers
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Plain(IterableDataset):
    """0 … n − 1, without a state."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(start, self.n, step))


class Restartable:
    """An order that can be saved: 7, 8, …, n − 1, 0, …, 6."""

    def __init__(self, n):
        self.n, self.at = n, 0

    def __len__(self):
        return self.n

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            yield (self.at - 1 + 7) % self.n
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def flat(batches):
    return list(chain.from_iterable(batches))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def drawn(loader, sizes=(), stop=None):
    """Batches of one epoch as lists, the next size set after each; left after `stop` batches."""
    sizes, batches = iter(sizes), []
    if stop == 0:
        return batches
    for batch in loader:
        batches.append(batch.tolist())
        loader.batch_size = next(sizes, loader.batch_size)
        if len(batches) == stop:
            break
    return batches
