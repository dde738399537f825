"""nn.Linear, and transformers' Conv1D, a Linear whose weight is [I, O]: rules, fused backward pass
and cost.

Legend: N samples, T positions (all dimensions between first and last), I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch.grad_sample.agreement import small_copy, wave
from adabatch.grad_sample.cost import PASS, LayerCost, elements_per_sample
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.outer import Outer
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import FusedBackward, FusedResult, Layer, register_grad_sampler
from adabatch.kernels import accumulation_dtype


class LinearBackward(FusedBackward):
    """For T > 1: the weight gradient is summed from the products that the norms need.

    Class attributes:
        transposed: whether the weight is [I, O].
    """

    transposed = False

    def supports(
        self, layer: nn.Module, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        if layout is Layout.SHARED or not output.requires_grad:
            return False
        return inputs.dim() > 2 or (inputs.dim() == 2 and layout is not Layout.BATCH_FIRST)

    def backward(
        self, layer: nn.Module, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        inputs, dtype, has_bias = saved[0], weight.dtype, layer.bias is not None
        matrix = weight.T if self.transposed else weight
        grad_inputs = backprops.matmul(matrix.to(backprops.dtype)) if needs_inputs else None
        if not norms:
            flat = backprops.flatten(0, -2)
            rows, columns = self._outer(flat, inputs.flatten(0, -2).to(flat.dtype))
            grads = {"weight": (rows.T @ columns).to(dtype)}
            if has_bias:
                grads["bias"] = flat.sum(0).to(dtype)
            return FusedResult(grad_inputs, grads)
        if layout is not Layout.BATCH_FIRST:
            inputs, backprops = (layout.split(each, n_samples) for each in (inputs, backprops))
        b_NTO = _positions(backprops)
        rows, columns = self._outer(b_NTO, _positions(inputs))
        moments = kernels.weight_grad_moments(columns, rows, second_moment=second_moment)
        bias = b_NTO.sum(1, dtype=accumulation_dtype(b_NTO)) if has_bias else None
        return weight_and_bias(grad_inputs, moments, bias, dtype)

    def _outer(self, backprops: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What gives the rows and the columns of the weight's gradient."""
        return (inputs, backprops) if self.transposed else (backprops, inputs)


class TransposedBackward(LinearBackward):
    """Of a weight [I, O]."""

    transposed = True


def weight_and_bias(
    grad_inputs: Tensor | None, moments: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None, dtype: torch.dtype,
) -> FusedResult:
    """The result from the weight's (Σ G_n, ‖G_n‖², Σ G_n² or None) and the bias's G_n [N, O]."""
    grad, sq_norms, second = moments
    result = FusedResult(grad_inputs, {"weight": grad.to(dtype)}, {"weight": sq_norms})
    if second is not None:
        result.second_moments["weight"] = second
    if bias is not None:
        result.grads["bias"] = bias.sum(0).to(dtype)
        result.sq_norms["bias"] = kernels.row_sq_norms(bias, bias.dtype)
        if second is not None:
            result.second_moments["bias"] = kernels.dense_second_moment(bias)
    return result


def linear_cost(
    layer: nn.Linear, input_shape: Sequence[int], output_shape: Sequence[int]
) -> LayerCost:
    """Of a weight [O, I]."""
    return _product_cost(layer.in_features, layer.out_features, input_shape, output_shape)


def transposed_cost(
    layer: Layer, input_shape: Sequence[int], output_shape: Sequence[int]
) -> LayerCost:
    """Of a weight [I, O]."""
    width_in, width_out = layer.weight.shape
    return _product_cost(width_in, width_out, input_shape, output_shape)


def _product_cost(
    width_in: int, width_out: int, input_shape: Sequence[int], output_shape: Sequence[int]
) -> LayerCost:
    """training: 3 T I O (forward, input and weight gradient) + 2 PASS (T I + T O).

    Norms: PASS (I + O) for T = 1. Else PASS T O for the bias, and what the kernels choose: Gram
    matrices, T² (I + O), or per-sample gradients, T I O + 2 PASS I O; 2 PASS I O where they also
    give the weight gradient.
    """
    positions = max(1.0, math.prod(output_shape) / max(1, output_shape[0]) / width_out)
    product, numel = positions * width_in * width_out, width_in * width_out
    training = 3 * product + 2 * PASS * elements_per_sample(input_shape, output_shape)
    if positions == 1:
        norms = PASS * (width_in + width_out)
        return LayerCost(training, norms, product=product, numel=numel)
    bias, gram = PASS * positions * width_out, positions**2 * (width_in + width_out)

    def norms_by(products: float, with_gradient: bool) -> float:
        form = kernels.outer_form(positions, width_in, width_out, with_gradient=with_gradient)
        return bias + (gram if form == "gram" else products + 2 * PASS * numel)

    return LayerCost(training, norms_by(product, False), norms_by(0, True), product, numel)


def no_batch_dimension(layer: nn.Module, inputs: Tensor, allowed: str) -> ValueError:
    """The error of a rule whose input has too few dimensions."""
    name = type(layer).__name__
    return ValueError(
        f"{name} got an input of shape {tuple(inputs.shape)}: without a batch dimension there are "
        f"no samples to tell apart. {name} needs {allowed} dimensions, samples first. Add one with "
        "inputs.unsqueeze(0), or stack several samples.")


def _positions(tensor: Tensor) -> Tensor:
    """[N, ..., width] as [N, T, width]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


@register_grad_sampler(
    nn.Linear, parameters=("weight", "bias"), fused=LinearBackward(), cost=linear_cost
)
def linear_grad_sample(
    layer: Layer, activations: Tensor, backprops: Tensor
) -> dict[str, Factor]:
    """Linear, y = W a + bias: G_n = Σ_t b_nt a_ntᵀ for the weight, Σ_t b_nt for the bias.

    Args:
        activations, backprops: a, [N, ..., I], and b, [N, ..., O]; without a batch dimension it
            raises a ValueError.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[2.0]])
        >>> factors = linear_grad_sample(nn.Linear(3, 1), a, b)
        >>> factors["weight"].sq_norms(), factors["bias"].sq_norms()
        (tensor([36.]), tensor([4.]))
    """
    if activations.dim() < 2:
        raise no_batch_dimension(layer, activations, "two or more")
    a_NTI, b_NTO = _positions(activations), _positions(backprops)
    factors: dict[str, Factor] = {}
    if layer.weight.requires_grad:
        factors["weight"] = Outer(left=b_NTO, right=a_NTI)
    if layer.bias is not None and layer.bias.requires_grad:
        single = b_NTO.shape[1] == 1
        bias = b_NTO[:, 0] if single else b_NTO.sum(1, dtype=accumulation_dtype(b_NTO))
        factors["bias"] = Dense(bias)
    return factors


def conv1d_example(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """For the comparison with autograd: 3 wide to 2, two samples of four positions."""
    return small_copy(layer, {"weight": (3, 2), "bias": (2,)}, nx=3, nf=2), wave(2, 4, 3)


@register_grad_sampler(
    "transformers.pytorch_utils.Conv1D", parameters=("weight", "bias"), fused=TransposedBackward(),
    cost=transposed_cost, example=conv1d_example,
)
def transposed_linear_grad_sample(
    layer: Layer, activations: Tensor, backprops: Tensor
) -> dict[str, Factor]:
    """y = a W + bias: G_n = Σ_t a_nt b_ntᵀ for the weight; the rest as for Linear."""
    factors = linear_grad_sample(layer, activations, backprops)
    weight = factors.get("weight")
    if isinstance(weight, Outer):
        factors["weight"] = Outer(left=weight.right, right=weight.left)
    return factors
