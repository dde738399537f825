"""Which kind of call a layer without a rule is run again by. Legend: N samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from adabatch.grad_sample.layers.attention import AttentionCall, RandomState
from adabatch.grad_sample.layers.generic import RecomputedCall, RecurrentCall
from adabatch.grad_sample.taps.base import TapSite


def rows_of_output(layer: nn.Module, leaves: Sequence[Any]) -> int | None:
    """N, for layers that say themselves along which dimension of their first output the samples lie; None for others.

    Example:
        >>> import torch
        >>> rows_of_output(nn.LSTM(2, 3), [torch.zeros(7, 4, 3)]), rows_of_output(nn.Linear(2, 3), [torch.zeros(4, 3)])
        (4, None)
    """
    return leaves[0].shape[0 if layer.batch_first else 1] if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) else None


def call_again(site: TapSite, layer: nn.Module, called: tuple[tuple, dict, Any], n_samples: int, random: RandomState | None) -> Any:
    """The call of a layer that is to be run again sample by sample.

    Args:
        site, layer: the layer.
        called: its arguments, its keyword arguments, and its output.
        n_samples: N.
        random: the random state from before the call, where attention dropped out.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionCall(site.name, layer, site.parameters, *called, random)
    if isinstance(layer, nn.RNNBase):
        return RecurrentCall(site.name, layer, site.parameters, *called, n_samples)
    return RecomputedCall(site.name, layer, site.parameters, *called, n_samples, site.layout)
