"""One state for all parts of a training run, and how it is loaded in the right order."""

from __future__ import annotations

from typing import Any

import torch

from adabatch._checks import check_version

# The loader before the scheduler, which writes the batch size last.
_ORDER = ("model", "optimizer", "grad_scaler", "lr_scheduler", "loader", "scheduler")


def state_dict(**parts: Any) -> dict[str, Any]:
    """The states of all parts, and torch's random states, as plain numbers and tensors: torch.save it, and torch.load(..., weights_only=True) reads it.

    Save after scheduler.step(loss), before the next batch is asked for; with micro-batches where loader.is_last_micro_batch is True.

    Args:
        parts: whatever has a state_dict(): scheduler=, loader=, optimizer=, model=, lr_scheduler=, grad_scaler=, or others under names of your own.

    Raises:
        TypeError: a part without state_dict and load_state_dict.
        RuntimeError: in the middle of a batch.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> sorted(state_dict(model=model))
        ['parts', 'random', 'version']
    """
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise TypeError(f"{name} must have state_dict and load_state_dict, got {type(part).__name__}")
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}
    return {"version": 1, "random": random, "parts": {name: part.state_dict() for name, part in parts.items()}}


def load_state_dict(state: dict[str, Any], **parts: Any) -> None:
    """Load what state_dict(...) gave into the same parts; the next iteration over the loader goes on where the state was saved.

    Args:
        state: from state_dict().
        parts: the same names as there.

    Raises:
        ValueError: an unknown version, or other parts than were saved. Nothing is loaded then.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> load_state_dict(state_dict(model=model), model=model)
    """
    check_version(state, 1, "a training run")
    if state["parts"].keys() != parts.keys():
        raise ValueError(f"the state holds {sorted(state['parts'])}, and was to be loaded into {sorted(parts)}: pass the same parts")
    for name in sorted(parts, key=lambda name: (_ORDER.index(name) if name in _ORDER else -1, name)):
        parts[name].load_state_dict(state["parts"][name])
    torch.set_rng_state(state["random"]["cpu"])
    if state["random"]["cuda"] and torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
