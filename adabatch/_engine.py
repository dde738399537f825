"""Autograd's engine: which backward pass is running, and callbacks for its end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

# The id of the backward pass that runs in this thread, -1 outside of one.
running_backward = torch._C._current_graph_task_id


def at_backward_end(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running has ended and the gradients are final.

    Queued twice: DistributedDataParallel writes the averaged gradients in a callback that it queues
    during the pass, so that a callback queued once may run before it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> handle = weight.register_hook(
        ...     lambda grad: at_backward_end(lambda: print(weight.grad.item())))
        >>> (3 * weight).sum().backward()
        3.0
    """
    engine = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(callback))
