"""The kernels in Triton, under the names and with the signatures of their definitions in reference.py. Importing this module imports Triton.

float16, bfloat16 and float32, also mixed; float64 is handed to the definition. Products are formed in the inputs' type if they agree, else in float32, and in
float32 they are exact to its last bits unless torch.backends.cuda.matmul asks for tf32. Sums are kept and returned in float32.
"""

from adabatch.kernels.triton_affine import affine_sq_norms
from adabatch.kernels.triton_conv import conv_second_moment, conv_sq_norms, conv_weight_grad_moments
from adabatch.kernels.triton_embedding import embedding_sq_norms
from adabatch.kernels.triton_outer import outer_second_moment, outer_sq_norms, preconditioned_trace, weight_grad_moments

__all__ = [
    "affine_sq_norms",
    "conv_second_moment",
    "conv_sq_norms",
    "conv_weight_grad_moments",
    "embedding_sq_norms",
    "outer_second_moment",
    "outer_sq_norms",
    "preconditioned_trace",
    "weight_grad_moments",
]
