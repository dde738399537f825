"""One list of layers with input shapes: every registered layer type must be in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.grad_sample import stand_ins

SAMPLES = 5


@dataclass(frozen=True)
class Case:
    """A layer to measure: how to make it, its inputs, and which parameters are frozen."""

    id: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    frozen: tuple[str, ...] = ()
    evaluation: bool = False

    def make_layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer with random parameters and buffers, also those that torch sets to 1 or 0."""
        layer = self.layer().to(dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(
                    torch.rand_like(buffer) + 0.5
                    if name.endswith("var") else torch.randn_like(buffer))
        for name in self.frozen:
            layer.get_parameter(name).requires_grad_(False)
        return layer.eval() if self.evaluation else layer

    def make_inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inputs [SAMPLES, ...]."""
        inputs = self.inputs()
        return inputs.to(dtype) if inputs.is_floating_point() else inputs


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape)


def _ids(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, (SAMPLES, *shape))


LINEAR = [
    Case("linear", lambda: nn.Linear(7, 4), _normal(7)),
    Case("linear-no-bias", lambda: nn.Linear(3, 5, bias=False), _normal(3)),
    Case("linear-one-wide", lambda: nn.Linear(1, 1), _normal(1)),
    Case("linear-tokens-gram", lambda: nn.Linear(9, 11), _normal(2, 9)),
    Case("linear-tokens-materialised", lambda: nn.Linear(3, 2), _normal(13, 3)),
    Case("linear-one-token", lambda: nn.Linear(3, 2), _normal(1, 3)),
    Case("linear-two-leading", lambda: nn.Linear(3, 4), _normal(2, 5, 3)),
    Case("linear-frozen-weight", lambda: nn.Linear(3, 4), _normal(5, 3), frozen=("weight",)),
    Case("linear-frozen-bias", lambda: nn.Linear(3, 4), _normal(3), frozen=("bias",)),
    Case("linear-frozen", lambda: nn.Linear(3, 4), _normal(3), frozen=("weight", "bias")),
]

CONV = [
    Case("conv1d", lambda: nn.Conv1d(3, 5, 4), _normal(3, 11)),
    Case("conv1d-one-wide", lambda: nn.Conv1d(1, 1, 1), _normal(1, 1)),
    Case(
        "conv1d-same-even", lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), _normal(2, 10)),
    Case(
        "conv1d-circular", lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"),
        _normal(2, 7)),
    Case("conv2d", lambda: nn.Conv2d(3, 4, (3, 2)), _normal(3, 7, 6)),
    Case("conv2d-no-bias", lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), _normal(3, 5, 5)),
    Case(
        "conv2d-left-over", lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=(1, 0)),
        _normal(2, 8, 7)),
    Case(
        "conv2d-dilated",
        lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=(2, 1), dilation=(2, 3)),
        _normal(2, 9, 8)),
    Case("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), _normal(4, 5, 6)),
    Case(
        "conv2d-depthwise", lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3),
        _normal(3, 6, 7)),
    Case(
        "conv2d-depthwise-large",
        lambda: nn.Conv2d(3, 3, (5, 7), stride=(2, 1), padding=(2, 3), groups=3), _normal(3, 8, 7)),
    Case("conv2d-valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), _normal(2, 5, 5)),
    Case("conv2d-same", lambda: nn.Conv2d(2, 3, 3, padding="same"), _normal(2, 5, 4)),
    Case(
        "conv2d-same-even", lambda: nn.Conv2d(2, 4, (2, 4), padding="same", groups=2),
        _normal(2, 5, 6)),
    Case(
        "conv2d-same-even-reflect",
        lambda: nn.Conv2d(2, 3, (4, 3), padding="same", padding_mode="reflect"), _normal(2, 6, 5)),
    Case(
        "conv2d-reflect", lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"),
        _normal(2, 5, 4)),
    Case(
        "conv2d-replicate",
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode="replicate"),
        _normal(2, 5, 4)),
    Case("conv2d-frozen-weight", lambda: nn.Conv2d(2, 3, 3), _normal(2, 5, 5), frozen=("weight",)),
    Case("conv2d-frozen-bias", lambda: nn.Conv2d(2, 3, 3), _normal(2, 5, 5), frozen=("bias",)),
    Case(
        "conv3d", lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)),
        _normal(2, 4, 5, 3)),
    Case(
        "conv3d-same-circular",
        lambda: nn.Conv3d(2, 2, 2, padding="same", padding_mode="circular", groups=2),
        _normal(2, 3, 4, 3)),
]

EMBEDDING = [
    Case("embedding", lambda: nn.Embedding(6, 3), _ids(6, 11)),
    Case("embedding-one-id", lambda: nn.Embedding(6, 3), _ids(6)),
    Case("embedding-one-wide", lambda: nn.Embedding(1, 1), _ids(1, 1)),
    Case("embedding-two-leading", lambda: nn.Embedding(4, 3), _ids(4, 2, 5)),
    Case("embedding-padding", lambda: nn.Embedding(4, 3, padding_idx=-2), _ids(4, 9)),
    Case("embedding-max-norm", lambda: nn.Embedding(4, 3, max_norm=0.5), _ids(4, 9)),
    Case("embedding-frozen", lambda: nn.Embedding(4, 3), _ids(4, 9), frozen=("weight",)),
]

NORMALIZATION = [
    Case("layer-norm", lambda: nn.LayerNorm(7), _normal(7)),
    Case("layer-norm-tokens", lambda: nn.LayerNorm(7, eps=0.3), _normal(4, 7)),
    Case("layer-norm-two-dims", lambda: nn.LayerNorm((3, 5)), _normal(4, 2, 3, 5)),
    Case("layer-norm-no-bias", lambda: nn.LayerNorm(7, bias=False), _normal(4, 7)),
    Case("layer-norm-one-wide", lambda: nn.LayerNorm(1, eps=1.0), _normal(4, 1)),
    Case("layer-norm-frozen-weight", lambda: nn.LayerNorm(7), _normal(4, 7), frozen=("weight",)),
    Case("layer-norm-frozen-bias", lambda: nn.LayerNorm(7), _normal(4, 7), frozen=("bias",)),
    Case("layer-norm-plain", lambda: nn.LayerNorm(7, elementwise_affine=False), _normal(4, 7)),
    Case("rms-norm", lambda: nn.RMSNorm(7), _normal(4, 7)),
    Case("rms-norm-two-dims", lambda: nn.RMSNorm((3, 5), eps=0.3), _normal(3, 5)),
    Case("rms-norm-frozen", lambda: nn.RMSNorm(7), _normal(4, 7), frozen=("weight",)),
    Case("group-norm", lambda: nn.GroupNorm(3, 6), _normal(6, 4, 5)),
    Case("group-norm-flat", lambda: nn.GroupNorm(2, 6, eps=0.3), _normal(6)),
    Case("group-norm-frozen-bias", lambda: nn.GroupNorm(1, 3), _normal(3, 5), frozen=("bias",)),
    Case("instance-norm1d", lambda: nn.InstanceNorm1d(3, affine=True), _normal(3, 7)),
    Case("instance-norm2d", lambda: nn.InstanceNorm2d(3, affine=True, eps=0.3), _normal(3, 4, 5)),
    Case("instance-norm3d", lambda: nn.InstanceNorm3d(1, affine=True), _normal(1, 2, 3, 4)),
    Case("instance-norm-plain", lambda: nn.InstanceNorm2d(3), _normal(3, 4, 5)),
    Case(
        "instance-norm-tracking",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), _normal(3, 4, 5)),
    Case(
        "instance-norm-tracking-eval",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), _normal(3, 4, 5),
        evaluation=True),
    Case(
        "instance-norm-eval", lambda: nn.InstanceNorm1d(3, affine=True), _normal(3, 4),
        evaluation=True),
    Case("batch-norm1d", lambda: nn.BatchNorm1d(3), _normal(3)),
    Case("batch-norm1d-positions", lambda: nn.BatchNorm1d(3, eps=0.3), _normal(3, 4)),
    Case("batch-norm1d-eval", lambda: nn.BatchNorm1d(3), _normal(3), evaluation=True),
    Case("batch-norm1d-one-wide", lambda: nn.BatchNorm1d(1), _normal(1)),
    Case("batch-norm2d", lambda: nn.BatchNorm2d(3), _normal(3, 4, 5)),
    Case("batch-norm2d-eval", lambda: nn.BatchNorm2d(3), _normal(3, 4, 5), evaluation=True),
    Case(
        "batch-norm2d-no-running-eval", lambda: nn.BatchNorm2d(3, track_running_stats=False),
        _normal(3, 4, 5), evaluation=True),
    Case(
        "batch-norm2d-frozen-weight", lambda: nn.BatchNorm2d(3), _normal(3, 4, 5),
        frozen=("weight",)),
    Case("batch-norm3d", lambda: nn.BatchNorm3d(2), _normal(2, 2, 3, 2)),
    Case("batch-norm3d-eval", lambda: nn.BatchNorm3d(2), _normal(2, 2, 3, 2), evaluation=True),
]

ACTIVATION = [
    Case("prelu", nn.PReLU, _normal(4, 3)),
    Case("prelu-flat", nn.PReLU, _normal()),
    Case("prelu-channels", lambda: nn.PReLU(4), _normal(4, 3, 2)),
    Case("prelu-channels-flat", lambda: nn.PReLU(4), _normal(4)),
    Case("prelu-frozen", nn.PReLU, _normal(4), frozen=("weight",)),
]

NAMED = [
    Case("conv1d-of-gpt2-tokens", lambda: stand_ins.Conv1D(4, 3), _normal(6, 3)),
    Case("conv1d-of-gpt2", lambda: stand_ins.Conv1D(3, 7), _normal(7)),
    Case("conv1d-of-gpt2-two-leading", lambda: stand_ins.Conv1D(3, 1), _normal(2, 3, 1)),
    Case(
        "conv1d-of-gpt2-frozen-bias", lambda: stand_ins.Conv1D(3, 2), _normal(4, 2),
        frozen=("bias",)),
    Case("rms-norm-of-llama", lambda: stand_ins.RootMeanSquare(7, eps=0.3), _normal(4, 7)),
    Case("rms-norm-of-llama-heads", lambda: stand_ins.RootMeanSquare(3), _normal(4, 2, 3)),
    Case("rms-norm-of-gemma", lambda: stand_ins.OnePlus(7), _normal(4, 7)),
    Case("layer-norm-of-cohere", lambda: stand_ins.WithoutBias(7), _normal(4, 7)),
    Case(
        "layer-norm-of-convnext", lambda: stand_ins.EitherOrder(3, "channels_last"),
        _normal(4, 5, 3)),
    Case(
        "layer-norm-of-convnext-channels-first",
        lambda: stand_ins.EitherOrder(3, "channels_first"), _normal(3, 4, 5)),
    Case("layer-norm-of-timm", lambda: stand_ins.ChannelsFirst(3), _normal(3, 4, 5)),
    Case(
        "layer-norm-of-timm-frozen", lambda: stand_ins.ChannelsFirst(3), _normal(3, 4, 5),
        frozen=("weight",)),
]

CASES = [*LINEAR, *CONV, *EMBEDDING, *NORMALIZATION, *ACTIVATION, *NAMED]
