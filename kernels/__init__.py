"""Gradient-moment kernels: per-sample squared norms, second moments and inner products, straight
from a layer's activations and output gradients (see README.md). They import nothing of adabatch but
each other.

Example:
    >>> import torch
    >>> outer_sq_norms(torch.ones(2, 1, 4), torch.ones(2, 1, 1))
    tensor([4., 4.])
"""

from typing import TYPE_CHECKING

from adabatch.kernels import cpu, cpu_conv, reference, reference_affine, reference_conv
from adabatch.kernels.operators import (
    CHUNK_BYTES, OPERATIONS, accumulation_dtype, has_kernel, outer_form, row_sq_norms,
    sample_chunks,
)

if TYPE_CHECKING:  # the names added below, with their definitions' types
    from adabatch.kernels.reference import *  # noqa: F403
    from adabatch.kernels.reference_affine import *  # noqa: F403
    from adabatch.kernels.reference_conv import *  # noqa: F403

__all__ = ["CHUNK_BYTES", "OPERATIONS", "accumulation_dtype", "has_kernel", "outer_form"]
__all__ += ["cpu", "cpu_conv", "reference", "reference_affine", "reference_conv"]
__all__ += ["row_sq_norms", "sample_chunks", *OPERATIONS]
globals().update({name: operation.call for name, operation in OPERATIONS.items()})
