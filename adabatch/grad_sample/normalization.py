"""Rules for normalization layers, y = x̂ ∘ weight + bias: G_n = Σ b_n ∘ x̂_n for the weight and Σ b_n for the bias, summed over the positions that share them.

Legend: N samples, T positions before the normalized dimensions, P the normalized dimensions, C channels, S positions after the channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from adabatch.grad_sample.factors import Dense, Factor
from adabatch.grad_sample.registry import register_grad_sampler
from adabatch.kernels.chunks import accumulation_dtype

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


@register_grad_sampler(nn.LayerNorm, parameters=("weight", "bias"))
def layer_norm_grad_sample(layer: nn.LayerNorm, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """LayerNorm over any number of last dimensions.

    Args:
        layer: the layer.
        activations: [N, *T, *P].
        backprops: [N, *T, *P].

    Raises:
        ValueError: the input has no batch dimension before the normalized ones.

    Example:
        >>> import torch
        >>> factors = layer_norm_grad_sample(nn.LayerNorm(2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
        >>> factors["weight"].dense().round(decimals=3), factors["bias"].dense()
        (tensor([[ 1., -1.]]), tensor([[1., 1.]]))
    """
    _check_trailing(layer, activations)
    normalized = F.layer_norm(activations.to(accumulation_dtype(activations)), layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normalized, backprops, tuple(range(1, activations.dim() - len(layer.normalized_shape))))


@register_grad_sampler(nn.RMSNorm, parameters=("weight",))
def rms_norm_grad_sample(layer: nn.RMSNorm, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """RMSNorm over any number of last dimensions; it has no bias. eps=None is the machine epsilon of the type the forward pass computed in.

    Args:
        layer: the layer.
        activations: [N, *T, *P].
        backprops: [N, *T, *P].

    Raises:
        ValueError: the input has no batch dimension before the normalized ones.

    Example:
        >>> import torch
        >>> rms_norm_grad_sample(nn.RMSNorm(2), torch.tensor([[3.0, 3.0]]), torch.ones(1, 2))["weight"].dense()
        tensor([[1., 1.]])
    """
    _check_trailing(layer, activations)
    normalized = F.rms_norm(activations.to(accumulation_dtype(activations)), layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normalized, backprops, tuple(range(1, activations.dim() - len(layer.normalized_shape))))


@register_grad_sampler(nn.GroupNorm, parameters=("weight", "bias"))
def group_norm_grad_sample(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """GroupNorm.

    Args:
        layer: the layer.
        activations: [N, C, *S].
        backprops: [N, C, *S].

    Example:
        >>> import torch
        >>> factors = group_norm_grad_sample(nn.GroupNorm(1, 2), torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, 1))
        >>> factors["weight"].dense().round(decimals=3)
        tensor([[ 1., -1.]])
    """
    normalized = F.group_norm(activations.to(accumulation_dtype(activations)), layer.num_groups, eps=layer.eps)
    return _affine(layer, normalized, backprops, tuple(range(2, activations.dim())))


@register_grad_sampler(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, parameters=("weight", "bias"))
def instance_norm_grad_sample(layer: _InstanceNorm, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """InstanceNorm, by each sample's own statistics, or in eval mode by the running ones if the layer tracks them.

    Args:
        layer: the layer, affine.
        activations: [N, C, *S].
        backprops: [N, C, *S].

    Raises:
        ValueError: the input has no batch dimension.

    Example:
        >>> import torch
        >>> factors = instance_norm_grad_sample(nn.InstanceNorm1d(1, affine=True), torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
        >>> factors["weight"].dense().round(decimals=3)
        tensor([[1.]])
    """
    if activations.dim() != layer._get_no_batch_dim() + 1:
        raise ValueError(_no_batch_dimension(layer, activations, f"{layer._get_no_batch_dim() + 1}"))
    inputs = activations.to(accumulation_dtype(activations))
    own_statistics = layer.training or not layer.track_running_stats
    normalized = F.instance_norm(inputs, eps=layer.eps) if own_statistics else _by_running_statistics(layer, inputs)
    return _affine(layer, normalized, backprops, tuple(range(2, activations.dim())))


def batch_norm_mixes_samples(layer: _BatchNorm) -> bool:
    """Whether the layer, as it is now, normalizes by the statistics of the batch.

    Example:
        >>> batch_norm_mixes_samples(nn.BatchNorm1d(2)), batch_norm_mixes_samples(nn.BatchNorm1d(2).eval())
        (True, False)
    """
    return layer.training or (layer.running_mean is None and layer.running_var is None)


@register_grad_sampler(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, full_batch=batch_norm_mixes_samples, parameters=("weight", "bias"))
def batch_norm_grad_sample(layer: _BatchNorm, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """BatchNorm. By running statistics: per-sample gradients. By the batch's: each sample's contribution b_n ∘ x̂_n to the gradient.

    Contributions add up exactly to the gradient, but x̂_n and b_n depend on the rest of the batch: their variance is a proxy of the variance over fresh batches.

    Args:
        layer: the layer.
        activations: [N, C, *S]; all rows of the batch if batch_norm_mixes_samples(layer).
        backprops: [N, C, *S].

    Example:
        >>> import torch
        >>> factors = batch_norm_grad_sample(nn.BatchNorm1d(1), torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [2.0]]))
        >>> factors["weight"].dense().round(decimals=3).T
        tensor([[ 1., -2.]])
    """
    inputs = activations.to(accumulation_dtype(activations))
    mixed = batch_norm_mixes_samples(layer)
    normalized = F.batch_norm(inputs, None, None, training=True, eps=layer.eps) if mixed else _by_running_statistics(layer, inputs)
    return _affine(layer, normalized, backprops, tuple(range(2, activations.dim())))


def _affine(layer: nn.Module, normalized: Tensor, backprops: Tensor, shared: tuple[int, ...]) -> dict[str, Factor]:
    """Factors of weight and bias, each shared by the positions along the dimensions `shared`."""
    factors: dict[str, Factor] = {}
    if layer.weight is not None and layer.weight.requires_grad:
        products = backprops * normalized
        factors["weight"] = Dense(products.sum(shared) if shared else products)
    bias = getattr(layer, "bias", None)
    if bias is not None and bias.requires_grad:
        factors["bias"] = Dense(backprops.sum(shared, dtype=accumulation_dtype(backprops)) if shared else backprops)
    return factors


def _by_running_statistics(layer: _BatchNorm | _InstanceNorm, inputs: Tensor) -> Tensor:
    return F.batch_norm(inputs, layer.running_mean.to(inputs.dtype), layer.running_var.to(inputs.dtype), training=False, eps=layer.eps)


def _check_trailing(layer: nn.LayerNorm | nn.RMSNorm, activations: Tensor) -> None:
    if activations.dim() <= len(layer.normalized_shape):
        raise ValueError(_no_batch_dimension(layer, activations, f"{len(layer.normalized_shape) + 1} or more"))


def _no_batch_dimension(layer: nn.Module, activations: Tensor, allowed: str) -> str:
    return (
        f"{type(layer).__name__} got an input of shape {tuple(activations.shape)}: without a batch dimension there are no samples to tell apart. "
        f"Allowed are {allowed} dimensions, samples first. Add one with inputs.unsqueeze(0), or stack several samples."
    )
