"""Open-loop schedules of the batch size, with bs-scheduler's names, arguments and sizes, and of the
lr, by steps or by samples. To port code from bs-scheduler 1.0 or linearlr, change the import;
adabatch/schedules/README.md lists the defects of theirs that are fixed here.
"""

from adabatch.schedules.base import BSScheduler
from adabatch.schedules.composition import ChainedBSScheduler, SequentialBS
from adabatch.schedules.factors import (
    ConstantBS, ExponentialBS, IncreaseBSOnPlateau, LambdaBS, LinearBS, MultiplicativeBS,
    MultiStepBS, PolynomialBS, StepBS,
)
from adabatch.schedules.lr import LinearLR, SampleClock
from adabatch.schedules.managers import (
    BatchSizeManager, CustomBatchSizeManager, DefaultBatchSizeManager, VirtualBatchSize,
)
from adabatch.schedules.ramp_string import (
    RampBS, check_divisible, doubling_ramp, increment_ramp, parse_count, parse_ramp, stepwise_ramp,
)
from adabatch.schedules.waves import (
    CosineAnnealingBS, CosineAnnealingBSWithWarmRestarts, CyclicBS, OneCycleBS,
)

__all__ = [
    "BSScheduler", "BatchSizeManager", "ChainedBSScheduler", "ConstantBS", "CosineAnnealingBS",
    "CosineAnnealingBSWithWarmRestarts", "CustomBatchSizeManager", "CyclicBS",
    "DefaultBatchSizeManager", "ExponentialBS", "IncreaseBSOnPlateau", "LambdaBS", "LinearBS",
    "LinearLR", "MultiStepBS", "MultiplicativeBS", "OneCycleBS", "PolynomialBS", "RampBS",
    "SampleClock", "SequentialBS", "StepBS", "VirtualBatchSize", "check_divisible",
    "doubling_ramp", "increment_ramp", "parse_count", "parse_ramp", "stepwise_ramp",
]
