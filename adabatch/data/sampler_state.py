"""What a sampler's state must hold, and what is said where it cannot be resumed from."""

from __future__ import annotations

import warnings
from typing import Any

from adabatch.data.arguments import checked_int
from adabatch.data.orders import SHUFFLING, generator_of, is_stateful

VERSION = 1
_KEYS = {"version", "epoch", "position", "batch_size", "num_samples", "shuffle", "seed", "sampler", "generator"}


def checked_state(state: dict[str, Any], num_samples: int | None, shuffle: bool, sampler: Any) -> tuple[int, int, int, int]:
    """(epoch, position, batch_size, seed) of a state that belongs to an order of this kind.

    Raises:
        ValueError: an unknown version, missing or unknown entries, or a state of another data set or another kind of order.
        TypeError: an entry that should be an integer is none.
    """
    version = state.get("version")
    if version != VERSION:
        raise ValueError(f"Unknown version of the sampler's state: got {version!r}, this adabatch reads {VERSION}.")
    if state.keys() != _KEYS:
        raise ValueError(f"The sampler's state must have the entries {sorted(_KEYS)}, got {sorted(state)}.")
    saved = (state["num_samples"], state["shuffle"], state["sampler"] is not None, state["generator"] is not None)
    here = (num_samples, shuffle, is_stateful(sampler), generator_of(sampler) is not None)
    if saved != here:
        names = "num_samples", "shuffle", "sampler with a state_dict", "sampler with a generator"
        differing = ", ".join(f"{name}: saved {theirs}, here {ours}" for name, theirs, ours in zip(names, saved, here, strict=True) if theirs != ours)
        raise ValueError(f"The state belongs to another order of samples ({differing}). Build the sampler as in the run that saved it.")
    return (
        checked_int("epoch", state["epoch"], 0, 2**64 - 1),
        checked_int("position", state["position"], 0),
        checked_int("batch_size", state["batch_size"], 1),
        checked_int("seed", state["seed"], 0, 2**64 - 1),
    )


def warn_of_new_order(sampler: Any, position: int) -> None:
    """Warn where a random sampler of torch's without a generator cannot repeat its order."""
    if isinstance(sampler, SHUFFLING):
        warnings.warn(
            f"{type(sampler).__name__} has no generator, so its order cannot be repeated: resumed at position {position} of a new order, the "
            "epoch repeats some samples and leaves out others. Give the sampler a generator, or use shuffle=True of ResizableBatchSampler.",
            stacklevel=3,
        )
