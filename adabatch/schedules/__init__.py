"""Open-loop schedules: of the batch size, with bs-scheduler's names, arguments and sizes; of the lr, by steps or by samples.

A user of bs-scheduler 1.0 or linearlr changes the import. The sizes and ``finished`` flags are theirs, except where theirs are defects:

1. Over torch's BatchSampler with drop_last=True a change of theirs holds from the next epoch; ours holds from the next batch, with drop_last or without.
2. Their state_dict holds the manager and with it the loader, and after loading drives the old loader. Ours is plain numbers, loads under
   ``torch.load(weights_only=True)`` and sets the size of the loader the new schedule was built over. Loading leaves the argument as it was.
3. What theirs checks by assert raises ValueError (a value out of range) or TypeError (a wrong type), with the value in the text. What theirs
   checks after it changed the loader is checked before. Factors that are not finite are refused at once, not when a size overflows.
4. Theirs accepts min_batch_size=0, against its own message; a batch of 0 is no batch: ValueError.
5. For a data set of unknown length and no max_batch_size, theirs takes 1 as the upper bound and so cuts every size to 1. Ours takes no upper bound;
   schedules that need one say so.
6. CyclicBS "triangular2" of theirs raises OverflowError after 1024 cycles; ours goes on.
7. A SequentialBS inside a SequentialBS loses its zeroth step in theirs, and a ChainedBSScheduler inside one raises AttributeError; ours runs both.
8. Without milestones, theirs SequentialBS takes ``Sequence[int]`` itself as the default; ours requires them.
9. linearlr's lr turns negative after T steps, and T <= 0 divides by zero or grows; ours stays 0, and T <= 0 is a ValueError.
"""

from adabatch.schedules.base import BSScheduler
from adabatch.schedules.composition import ChainedBSScheduler, SequentialBS
from adabatch.schedules.cosine import CosineAnnealingBS, CosineAnnealingBSWithWarmRestarts
from adabatch.schedules.cyclic import CyclicBS, OneCycleBS
from adabatch.schedules.functions import LambdaBS, MultiplicativeBS
from adabatch.schedules.linear_lr import LinearLR
from adabatch.schedules.managers import BatchSizeManager, CustomBatchSizeManager, DefaultBatchSizeManager, VirtualBatchSize
from adabatch.schedules.milestones import ConstantBS, MultiStepBS, StepBS
from adabatch.schedules.plateau import IncreaseBSOnPlateau
from adabatch.schedules.ramp_string import RampBS, check_divisible, doubling_ramp, increment_ramp, parse_count, parse_ramp, stepwise_ramp
from adabatch.schedules.ramps import ExponentialBS, LinearBS, PolynomialBS
from adabatch.schedules.sample_clock import SampleClock

__all__ = [
    "BSScheduler",
    "BatchSizeManager",
    "ChainedBSScheduler",
    "ConstantBS",
    "CosineAnnealingBS",
    "CosineAnnealingBSWithWarmRestarts",
    "CustomBatchSizeManager",
    "CyclicBS",
    "DefaultBatchSizeManager",
    "ExponentialBS",
    "VirtualBatchSize",
    "IncreaseBSOnPlateau",
    "LambdaBS",
    "LinearBS",
    "LinearLR",
    "MultiStepBS",
    "MultiplicativeBS",
    "OneCycleBS",
    "PolynomialBS",
    "RampBS",
    "SampleClock",
    "SequentialBS",
    "StepBS",
    "check_divisible",
    "doubling_ramp",
    "increment_ramp",
    "parse_count",
    "parse_ramp",
    "stepwise_ramp",
]
