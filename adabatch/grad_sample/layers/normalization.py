"""Normalization layers, y = x̂ ∘ weight + bias: rules and fused backward passes.

G_n = Σ b_n ∘ x̂_n for the weight and Σ b_n for the bias, summed over the positions that share them.
A rule's activations and backprops are [N, *T, *P] for LayerNorm and RMSNorm, [N, C, *S] for the
others; without a batch dimension it raises a ValueError.

Legend: N samples, T positions before the normalized dimensions, P the normalized dimensions,
C channels, S positions after the channels, G groups.

x̂ goes to the kernels in the cheaper of two forms: on a GPU, whose kernel reads the input once, as
the layer's input with its mean and 1/σ, so that x̂ is never stored; on a CPU, where torch's
normalizations are faster than its reductions and x̂ fits a cache, x̂ itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adabatch import kernels
from adabatch.grad_sample.agreement import small_copy, wave
from adabatch.grad_sample.factors.affine import Scale, Shift
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.layers.linear import no_batch_dimension
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import FusedBackward, FusedResult, Layer, register_grad_sampler
from adabatch.kernels import accumulation_dtype

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
Factors = dict[str, Factor]
# Elements of a sample from which on a call of its own is faster than x̂ and its products.
ALONE = 4096

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _own_node(
    layer: nn.Module, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool, name: str
) -> Any:
    """The node of this name that the layer's output has, if a fused backward pass can read the
    layer's statistics from it: on a CPU in eager mode, of samples that come first, all of one type;
    outside activation checkpointing and other hooks on saved tensors, which would take the reading
    for backward. None otherwise."""
    if torch.compiler.is_compiling() or inputs.device.type != "cpu" or not all_rows:
        return None
    if layout is not Layout.BATCH_FIRST or _top_hooks is None or _top_hooks(False) is not None:
        return None
    one_type = inputs.dtype == output.dtype == layer.weight.dtype
    if not one_type or inputs.dtype not in (torch.float32, torch.float64) or not inputs.numel():
        return None
    node = _norm_node(output)
    return None if node is None or node.name() != name else node


def _norm_node(output: Tensor) -> Any:
    """The output's node, below a permutation."""
    node = output.grad_fn
    permuted = node is not None and node.name() == "PermuteBackward0"
    return node.next_functions[0][0] if permuted else node  # type: ignore[union-attr]


def _statistics(output: Tensor) -> tuple[Tensor, ...]:
    """Mean and 1/σ that the node of a normalization's output has saved."""
    node = _norm_node(output)
    return node._saved_result1.detach(), node._saved_result2.detach()


def _is_same(saved: Tensor | None, tensor: Tensor) -> bool:
    """Whether what a node has saved is this view of this memory."""
    return (saved is not None and saved.data_ptr() == tensor.data_ptr()
            and saved.shape == tensor.shape and saved.stride() == tensor.stride())


def _fused_result(
    grad_inputs: Tensor | None, per_sample: dict[str, Tensor], norms: bool, second_moment: bool
) -> FusedResult:
    """The result from per-sample gradients [N, *shape] by name."""
    result = FusedResult(grad_inputs, {name: grad.sum(0) for name, grad in per_sample.items()})
    for name, grad in per_sample.items() if norms else ():
        result.sq_norms[name] = kernels.dense_sq_norms(grad)
        if second_moment:
            result.second_moments[name] = kernels.dense_second_moment(grad)
    return result


class LayerNormBackward(FusedBackward):
    """torch's own backward pass, for the gradients of scale and shift called once for each sample,
    with the mean and 1/σ that the layer's own node has saved. Samples must be large enough for a
    call of their own.

    Class attributes:
        channels_first: whether dimension 1 is normalized, of [N, C, *S], as the last one between
            two permutations.
    """

    always, channels_first = True, False
    from_node = staticmethod(_statistics)

    def supports(
        self, layer: Layer, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        if inputs.numel() < ALONE * len(inputs):
            return False
        call = layer, inputs, output, layout, all_rows
        node = _own_node(*call, "NativeLayerNormBackward0")
        if node is None or (node is not output.grad_fn) != self.channels_first:
            return False
        normalized = inputs.movedim(1, -1) if self.channels_first else inputs
        return (tuple(node._saved_normalized_shape) == layer.weight.shape
                and _is_same(node._saved_weight, layer.weight)
                and _is_same(node._saved_input, normalized))

    def backward(
        self, layer: Layer, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        inputs, mean, rstd = saved
        bias, backprops = layer._parameters.get("bias"), backprops.to(inputs.dtype)
        if self.channels_first:
            inputs, backprops = inputs.movedim(1, -1), backprops.movedim(1, -1)
        inputs, backprops = inputs.contiguous(), backprops.contiguous()
        shape, backward = list(weight.shape), torch.ops.aten.native_layer_norm_backward
        own = zip(backprops.unbind(), inputs.unbind(), mean.unbind(), rstd.unbind(), strict=True)
        grads = [backward(b, a, shape, center, scale, weight, bias, [False, True, bias is not None])
                 for b, a, center, scale in own]
        per_sample = {"weight": torch.stack([grad for _, grad, _ in grads])}
        if bias is not None:
            per_sample["bias"] = torch.stack([grad for _, _, grad in grads])
        grad_inputs = None
        if needs_inputs:
            grad_inputs, _, _ = backward(
                backprops, inputs, shape, mean, rstd, weight, bias, [True, False, False])
            grad_inputs = grad_inputs.movedim(-1, 1) if self.channels_first else grad_inputs
        return _fused_result(grad_inputs, per_sample, norms, second_moment)


class ChannelsFirstBackward(LayerNormBackward):
    """Of [N, C, *S]."""

    channels_first = True


@register_grad_sampler(nn.LayerNorm, parameters=("weight", "bias"), fused=LayerNormBackward())
def layer_norm_grad_sample(layer: nn.LayerNorm, activations: Tensor, backprops: Tensor) -> Factors:
    """LayerNorm over any number of last dimensions.

    Example:
        >>> activations, backprops = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
        >>> factors = layer_norm_grad_sample(nn.LayerNorm(2), activations, backprops)
        >>> factors["weight"].dense().round(decimals=3), factors["bias"].dense()
        (tensor([[ 1., -1.]]), tensor([[1., 1.]]))
    """
    shape = _normalized_shape(layer, activations)
    return _layer_norm(layer, shape, layer.eps, activations, backprops)


def _layer_norm(
    layer: nn.Module, shape: list[int], eps: float, activations: Tensor, backprops: Tensor
) -> Factors:
    if takes_statistics(activations):
        _, mean, rstd = torch.native_layer_norm(activations, shape, None, None, eps)
        return _trailing(layer, shape, activations, backprops, mean, rstd)
    normalized = F.layer_norm(_wide(activations), shape, eps=eps)
    return _trailing(layer, shape, normalized, backprops)


@register_grad_sampler(nn.RMSNorm, parameters=("weight",))
def rms_norm_grad_sample(layer: nn.RMSNorm, activations: Tensor, backprops: Tensor) -> Factors:
    """RMSNorm over any number of last dimensions; it has no bias. eps=None is the machine epsilon
    of the type the forward pass computed in.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> rms_norm_grad_sample(nn.RMSNorm(2), 3 * ones, ones)["weight"].dense()
        tensor([[1., 1.]])
    """
    shape = _normalized_shape(layer, activations)
    return _rms_norm(layer, shape, layer.eps, activations, backprops)


def _rms_norm(
    layer: nn.Module, shape: list[int], eps: float | None, activations: Tensor, backprops: Tensor
) -> Factors:
    if takes_statistics(activations):
        dtype, dims = accumulation_dtype(activations), tuple(range(-len(shape), 0))
        norm = torch.linalg.vector_norm(activations, dim=dims, dtype=dtype)
        eps = torch.finfo(dtype).eps if eps is None else eps
        rstd = (norm.square() / math.prod(shape) + eps).rsqrt()
        return _trailing(layer, shape, activations, backprops, None, rstd)
    normalized = F.rms_norm(_wide(activations), shape, eps=eps)
    return _trailing(layer, shape, normalized, backprops)


# Norms of other libraries, known by their class's name. What a class computes is compared with
# autograd, so that the names may be wide. Their scale may be 1 + weight: the gradient is the same.
LIBRARIES = ("transformers", "timm", "torchvision")
RMS_NAMES = [f"{library}.*.*{name}" for library in LIBRARIES for name in ("RMSNorm", "RmsNorm")]
LAYER_NAMES = [f"{library}.*.*{name}" for library in LIBRARIES
               for name in ("LayerNorm", "LayerNorm2d")]


def _eps(layer: Layer) -> float:
    """Under the name that the layer has for it."""
    return layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps


def _norm_example(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """Two samples of three positions."""
    own = layer._parameters.items()
    shapes = {name: () if each is None else tuple(each.shape) for name, each in own}
    return small_copy(layer, shapes), wave(2, 3, *shapes["weight"])


def _channels_first_example(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """Two samples of two times three positions."""
    copied, _ = _norm_example(layer)
    return copied, wave(2, *copied.get_parameter("weight").shape, 2, 3)


@register_grad_sampler(
    *LAYER_NAMES, example=_channels_first_example, fused=ChannelsFirstBackward()
)
def named_channels_first_grad_sample(
    layer: Layer, activations: Tensor, backprops: Tensor
) -> Factors:
    """Layer normalization over dimension 1, of [N, C, *S]."""
    activations, backprops = (each.movedim(1, -1) for each in (activations, backprops))
    return named_layer_norm_grad_sample(layer, activations, backprops)


@register_grad_sampler(*LAYER_NAMES, example=_norm_example, fused=LayerNormBackward())
def named_layer_norm_grad_sample(layer: Layer, activations: Tensor, backprops: Tensor) -> Factors:
    """Layer normalization over the dimensions of the weight, with or without a bias."""
    return _layer_norm(layer, list(layer.weight.shape), _eps(layer), activations, backprops)


@register_grad_sampler(*RMS_NAMES, *LAYER_NAMES, example=_norm_example)
def named_rms_norm_grad_sample(layer: Layer, activations: Tensor, backprops: Tensor) -> Factors:
    """RMS normalization over the dimensions of the weight."""
    return _rms_norm(layer, list(layer.weight.shape), _eps(layer), activations, backprops)


class GroupNormBackward(FusedBackward):
    """torch's own backward pass, with every sample's channels in groups of their own.

    For an input [N, C, S] that pass sums the gradients of scale and shift over N. For [1, N C, S]
    in N G groups, with the scale repeated, it does the same arithmetic for the input's gradient and
    gives N C gradients in place of C. Mean and 1/σ are those that the layer's own node has saved.
    """

    always = True
    from_node = staticmethod(_statistics)

    def supports(
        self, layer: nn.GroupNorm, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        call = layer, inputs, output, layout, all_rows
        own = _own_node(*call, "NativeGroupNormBackward0") is not None
        return own and inputs.is_contiguous()

    def backward(
        self, layer: nn.GroupNorm, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        inputs, mean, rstd = saved
        samples, channels = inputs.shape[:2]
        rows = samples * channels
        grad_inputs, *grads = torch.ops.aten.native_group_norm_backward(
            backprops.to(inputs.dtype).contiguous(), inputs, mean, rstd, weight.repeat(samples), 1,
            rows, inputs.numel() // rows, mean.numel(), [needs_inputs, True, True])
        per_sample = {name: grad.view(samples, channels)
                      for name, grad in zip(("weight", "bias"), grads, strict=True)}
        grad_inputs = None if grad_inputs is None else grad_inputs.view_as(inputs)
        return _fused_result(grad_inputs, per_sample, norms, second_moment)


class BatchNormBackward(FusedBackward):
    """torch's own backward pass, with every sample's channels as channels of their own, [1, N C,
    S], which gives N C gradients in place of C, by the statistics of the forward pass.

    By running statistics the input's gradient comes out of the same call. By the batch's it depends
    on sums over all samples, and takes a call for the whole batch.
    """

    always = True

    def supports(
        self, layer: BatchNorm, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        call = layer, inputs, output, layout, all_rows
        own = _own_node(*call, "NativeBatchNormBackward0") is not None
        positions = math.prod(inputs.shape[2:])
        return own and positions > 1 and inputs.is_contiguous()

    @staticmethod
    def from_node(output: Tensor) -> tuple[Tensor, ...]:
        """The batch's mean and 1/σ, or the running mean and variance."""
        node = _norm_node(output)
        if node._saved_training:
            return _statistics(output)
        return node._saved_running_mean.detach(), node._saved_running_var.detach()

    def backward(
        self, layer: BatchNorm, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        inputs, *statistics = saved
        samples, channels = inputs.shape[:2]
        by_batch = batch_norm_mixes_samples(layer)
        backprops = backprops.to(inputs.dtype).contiguous()
        own_inputs, own_backprops = (each.view(1, samples * channels, -1)
                                     for each in (inputs, backprops))
        own = [each.repeat(samples) for each in statistics]
        backward = torch.ops.aten.native_batch_norm_backward
        grad_inputs, *grads = backward(
            own_backprops, own_inputs, weight.repeat(samples), *own, *own, by_batch, layer.eps,
            [needs_inputs and not by_batch, True, True])
        if needs_inputs and by_batch:
            grad_inputs, _, _ = backward(
                backprops, inputs, weight, *statistics, *statistics, True, layer.eps,
                [True, False, False])
        per_sample = {name: grad.view(samples, channels)
                      for name, grad in zip(("weight", "bias"), grads, strict=True)}
        grad_inputs = grad_inputs.view_as(inputs) if needs_inputs else None
        return _fused_result(grad_inputs, per_sample, norms, second_moment)


@register_grad_sampler(nn.GroupNorm, parameters=("weight", "bias"), fused=GroupNormBackward())
def group_norm_grad_sample(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor) -> Factors:
    """GroupNorm, by the statistics of each sample's groups of channels."""
    if takes_statistics(activations):
        statistics = _group_statistics(activations, layer.num_groups, layer.eps)
        return _channels(layer, activations, backprops, *statistics)
    normalized = F.group_norm(_wide(activations), layer.num_groups, eps=layer.eps)
    return _channels(layer, normalized, backprops)


@register_grad_sampler(
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, parameters=("weight", "bias")
)
def instance_norm_grad_sample(
    layer: InstanceNorm, activations: Tensor, backprops: Tensor
) -> Factors:
    """InstanceNorm, by each sample's own statistics, or in eval mode by the running ones if the
    layer tracks them."""
    dims = layer._get_no_batch_dim() + 1
    if activations.dim() != dims:
        raise no_batch_dimension(layer, activations, str(dims))
    if not layer.training and layer.track_running_stats:
        return _by_running_statistics(layer, activations, backprops)
    if takes_statistics(activations):
        statistics = _group_statistics(activations, layer.num_features, layer.eps)
        return _channels(layer, activations, backprops, *statistics)
    return _channels(layer, F.instance_norm(_wide(activations), eps=layer.eps), backprops)


def batch_norm_mixes_samples(layer: BatchNorm) -> bool:
    """Whether the layer, as it is now, normalizes by the statistics of the batch."""
    return layer.training or (layer.running_mean is None and layer.running_var is None)


@register_grad_sampler(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, full_batch=batch_norm_mixes_samples,
    parameters=("weight", "bias"), fused=BatchNormBackward(),
)
def batch_norm_grad_sample(layer: BatchNorm, activations: Tensor, backprops: Tensor) -> Factors:
    """BatchNorm. By running statistics: per-sample gradients. By the batch's: each sample's
    contribution b_n ∘ x̂_n to the gradient, of all rows of the batch.

    Contributions add up exactly to the gradient, but x̂_n and b_n depend on the rest of the batch:
    their variance is a proxy of the variance over fresh batches.

    Example:
        >>> activations, backprops = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [2.0]])
        >>> factors = batch_norm_grad_sample(nn.BatchNorm1d(1), activations, backprops)
        >>> factors["weight"].dense().round(decimals=3).T
        tensor([[ 1., -2.]])
    """
    if not batch_norm_mixes_samples(layer):
        return _by_running_statistics(layer, activations, backprops)
    if takes_statistics(activations):
        _, mean, rstd = torch.native_batch_norm(
            activations, None, None, None, None, True, 0.0, layer.eps)
        return _channels(layer, activations, backprops, mean.unsqueeze(0), rstd.unsqueeze(0))
    normalized = F.batch_norm(_wide(activations), None, None, training=True, eps=layer.eps)
    return _channels(layer, normalized, backprops)


def takes_statistics(activations: Tensor) -> bool:
    """Whether x̂ goes to the kernels as input and statistics."""
    return activations.device.type == "cuda"


def _trailing(
    layer: nn.Module, shape: list[int], inputs: Tensor, backprops: Tensor,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> Factors:
    """Factors of parameters of the last dimensions, `shape`, and statistics [N, *T, *1]."""
    samples, width = inputs.shape[0], math.prod(shape)
    positions = math.prod(inputs.shape[1 : inputs.dim() - len(shape)])
    inputs, backprops = (each.reshape(samples, positions, width) for each in (inputs, backprops))
    mean, rstd = (None if each is None else each.reshape(samples, positions, 1)
                  for each in (mean, rstd))
    return _affine(layer, inputs, backprops, mean, rstd)


def _channels(
    layer: nn.Module, inputs: Tensor, backprops: Tensor, mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Factors:
    """Factors of parameters of the channels, dimension 1, statistics [N or 1, C]."""
    inputs, backprops = (each.unsqueeze(1) if each.dim() == 2 else each.flatten(2).mT
                         for each in (inputs, backprops))
    mean, rstd = (None if each is None else each.unsqueeze(1) for each in (mean, rstd))
    return _affine(layer, inputs, backprops, mean, rstd)


def _affine(
    layer: nn.Module, inputs: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> Factors:
    """Factors of weight and bias from [N, T, P], and statistics as Scale takes them."""
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    factors: Factors = {}
    if weight is not None and weight.requires_grad:
        scale = Scale(inputs, backprops, mean, rstd, tuple(weight.shape))
        factors["weight"] = scale
        if bias is not None and bias.requires_grad:
            factors["bias"] = Shift(scale)
    elif bias is not None and bias.requires_grad:
        shift = backprops.sum(1, dtype=accumulation_dtype(backprops))
        factors["bias"] = Dense(shift.view(len(backprops), *bias.shape))
    return factors


def _by_running_statistics(
    layer: BatchNorm | InstanceNorm, activations: Tensor, backprops: Tensor
) -> Factors:
    dtype, (mean, var) = accumulation_dtype(activations), (layer.running_mean, layer.running_var)
    assert mean is not None, layer  # as torch itself demands
    assert var is not None, layer
    mean, var = mean.to(dtype), var.to(dtype)
    if takes_statistics(activations):
        rstd = (var + layer.eps).rsqrt()
        return _channels(layer, activations, backprops, mean.unsqueeze(0), rstd.unsqueeze(0))
    normalized = F.batch_norm(activations.to(dtype), mean, var, training=False, eps=layer.eps)
    return _channels(layer, normalized, backprops)


def _group_statistics(activations: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/σ [N, C] of each sample's groups; by layer normalization, which keeps them in
    float32 where group normalization rounds them."""
    samples, channels = activations.shape[:2]
    rows = activations.reshape(samples, groups, math.prod(activations.shape[1:]) // groups)
    _, mean, rstd = torch.native_layer_norm(rows, list(rows.shape[2:]), None, None, eps)
    mean, rstd = (each.reshape(samples, groups).repeat_interleave(channels // groups, 1)
                  for each in (mean, rstd))
    return mean, rstd


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))


def _normalized_shape(layer: nn.LayerNorm | nn.RMSNorm, activations: Tensor) -> list[int]:
    shape = list(layer.normalized_shape)
    if activations.dim() <= len(shape):
        raise no_batch_dimension(layer, activations, f"{len(shape) + 1} or more")
    return shape
