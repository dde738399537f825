"""check: find each layer's layout, and compare with exact per-sample gradients before training."""

from __future__ import annotations

from torch import nn

from adabatch._types import Batch, LossFn
from adabatch.check.report import CheckReport, CheckRow

__all__ = ["CheckReport", "CheckRow", "check"]


def check(model: nn.Module, batch: Batch, loss_fn: LossFn, *, verbose: bool = True) -> CheckReport:
    """Find out, layer by layer, whether and how a model's per-sample gradients can be measured.

    Two backward passes whose samples are weighted differently show which rows of a layer's output
    belong to which sample; a backward pass per sample gives exact gradients to compare with.
    Meanwhile batch norm uses its running statistics and autocast is off. The model and the random
    states are left as they were.

    Args:
        model: in the mode it is trained in, without GradSampleHooks; the module inside is checked
            where it is compiled or wrapped for data parallelism.
        batch: what loss_fn takes: a tensor, or tuples, lists, dicts and data classes of them. Only
            the first 8 samples are used, 4 are compared.
        loss_fn: (model, batch) -> per-sample losses [N], as they are in training; called about a
            dozen times. It must call the model that it is given.
        verbose: print the report.

    Returns:
        CheckReport: a row per layer that owns trainable parameters; `ok`; `layouts` and
        `batch_size_source`, for GradSampleHooks(layout=report).

    Raises:
        ValueError: losses that are not [N] with N of 2 or more, a model without trainable
            parameters, or a larger batch that cannot be cut.
        TypeError: model, batch, loss_fn or losses of another kind.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batch = torch.randn(7, 5, 3), torch.randn(7, 5, 2)  # 7 positions of 5 samples
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean((0, 2))
        >>> report = check(model, batch, loss_fn, verbose=False)
        >>> report["0"].layout.value, report["2"].layout.value, str(report.batch_size_source)
        ('batch_second', 'batch_second', 'input.shape[1]')
    """
    from adabatch.check.run import run_check  # few runs check: not imported with the package

    report = run_check(model, batch, loss_fn)
    if verbose:
        print(report)
    return report
