"""Many processes: one global batch, one measurement, one decision.

adabatch.wrap finds the process group by itself; what is here is what it uses, and checkpoints that any number of processes can read.
"""

from adabatch.distributed.checkpoint import load_checkpoint, save_checkpoint
from adabatch.distributed.data_parallel import DataParallel
from adabatch.distributed.ranks import Ranks

__all__ = ["DataParallel", "Ranks", "load_checkpoint", "save_checkpoint"]
