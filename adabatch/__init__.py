"""adabatch: training that chooses its own batch size."""

from importlib import import_module
from typing import TYPE_CHECKING

from adabatch.check import check
from adabatch.checkpoint import load_checkpoint, load_state_dict, save_checkpoint, state_dict
from adabatch.config import (
    BatchSizes, Coupling, CrossRank, Every, MicroBatch, MicroBatches, PerSample,
)
from adabatch.controllers import CABS
from adabatch.data import AdaptiveDataLoader, ResizableBatchSampler
from adabatch.diagnostics import Diagnostics
from adabatch.estimators import GradientMoments
from adabatch.grad_sample import GradSampleHooks, register_grad_sampler
from adabatch.monitor import Monitor, monitor
from adabatch.scheduler.scheduler import BatchSizeScheduler
from adabatch.wrap import wrap

__version__ = "0.2.0"


if TYPE_CHECKING:
    from adabatch import schedules as schedules
else:
    def __getattr__(name: str) -> object:
        """adabatch.schedules, which few runs use, is imported with its first use."""
        if name != "schedules":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module("adabatch.schedules")


__all__ = [
    "CABS", "AdaptiveDataLoader", "BatchSizeScheduler", "BatchSizes", "Coupling", "CrossRank",
    "Diagnostics", "Every", "GradSampleHooks", "GradientMoments", "MicroBatch", "MicroBatches",
    "Monitor", "PerSample", "ResizableBatchSampler", "check", "load_checkpoint", "load_state_dict",
    "monitor", "register_grad_sampler", "save_checkpoint", "state_dict", "wrap",
]
