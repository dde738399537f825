"""Hand-written layers under the names that transformers, timm and torchvision give theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def named(full_name: str):
    """Decorator that gives a class this full name."""

    def rename(cls: type) -> type:
        cls.__module__, _, cls.__qualname__ = full_name.rpartition(".")
        return cls

    return rename


def wide(inputs: Tensor) -> Tensor:
    """In float32 at least, as the originals compute."""
    return inputs if inputs.dtype == torch.float64 else inputs.float()


@named("transformers.pytorch_utils.Conv1D")
class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


@named("transformers.models.llama.modeling_llama.LlamaRMSNorm")
class RootMeanSquare(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = wide(hidden_states)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


@named("transformers.models.gemma.modeling_gemma.GemmaRMSNorm")
class OnePlus(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        hidden = wide(x)
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (1.0 + self.weight)


@named("transformers.models.cohere.modeling_cohere.CohereLayerNorm")
class WithoutBias(RootMeanSquare):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = wide(hidden_states)
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


@named("transformers.models.convnext.modeling_convnext.ConvNextLayerNorm")
class EitherOrder(nn.LayerNorm):
    def __init__(self, width: int, data_format: str):
        super().__init__(width, eps=0.3)
        self.data_format = data_format

    def forward(self, features: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return super().forward(features)
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@named("timm.layers.norm.LayerNorm2d")
class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        normed = F.layer_norm(x.permute(0, 2, 3, 1), shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)
