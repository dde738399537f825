"""Models of the size that is trained on a GPU, with one fixed random batch each: letters f, g and h
of the overhead benchmark. Legend: N samples, T positions.

All run under bfloat16 autocast, the GPT compiled.
"""

from __future__ import annotations

import torch
from models import Gpt, TransformerBlock, Workload, class_losses, images, token_losses
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions with batch norm, and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        layers: list[nn.Module] = []
        shapes = ((width_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        for source, target, kernel, step in shapes:
            conv = nn.Conv2d(source, target, kernel, step, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(target), nn.ReLU()]
        self.main = nn.Sequential(*layers[:-1])
        same = stride == 1 and width_in == 4 * width
        self.around: nn.Module = nn.Identity()
        if not same:
            conv = nn.Conv2d(width_in, 4 * width, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.main(inputs) + self.around(inputs))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """ResNet-50's layout."""
    blocks, channels = [], width
    for level, depth in enumerate(depths):
        for index in range(depth):
            blocks.append(Bottleneck(channels, width * 2**level, 2 if level and not index else 1))
            channels = 4 * width * 2**level
    conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    stem = [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*stem, *blocks, *head)


class Vit(nn.Module):
    """Patches of 16 × 16, transformer blocks, mean over the patches."""

    def __init__(self, layers: int, width: int, heads: int, size: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Embedding((size // 16) ** 2, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        return self.head(self.norm(self.blocks(tokens + self.positions(places))).mean(1))


class UnderAutocast(nn.Module):
    """A model that computes in bfloat16 where autocast does, and answers in float32 at least."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            outputs = self.model(inputs)
        return outputs if outputs.dtype == torch.float64 else outputs.float()


def _ids(samples: int, positions: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(vocabulary, (2, samples, positions))
    return ids, targets


GPU_WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            "f", "GPT-2-small-like, 12 layers, d=768, T=1024, m=8, bfloat16, compiled",
            lambda: UnderAutocast(Gpt(12, 768, 12, 1024, 50304)), lambda: _ids(8, 1024, 50304),
            token_losses, compiled=True,
        ),
        Workload(
            "g", "ResNet-50-like, 3x224x224, m=64, bfloat16", lambda: UnderAutocast(resnet()),
            images(64, 3, 224, 224), class_losses, alone=False,
        ),
        Workload(
            "h", "ViT-S-like, 3x224x224, m=64, bfloat16",
            lambda: UnderAutocast(Vit(12, 384, 6, 224)), images(64, 3, 224, 224), class_losses,
        ),
    )
}
