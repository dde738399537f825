"""The fused backward pass of group normalization: gradients equal to autograd's, norms equal to the
oracle's, and where the layer gets a pass-through tap."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import TOLERANCE, agrees, backward, close, squared_error
from tests.grad_sample.test_taps_fused import fused, plain_grads, same_grads


def make(dtype=torch.float32, samples=5):
    """Groups of several channels, of one, and a single one, on images, sequences and vectors, with
    in-place activations behind."""
    torch.manual_seed(0)
    layers = [
        nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.GroupNorm(4, 4, eps=0.3),
        nn.Flatten(2), nn.GroupNorm(1, 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool1d(2),
        nn.Flatten(), nn.GroupNorm(2, 8),
    ]
    model = nn.Sequential(*layers).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, (torch.randn(samples, 6, 5, 4, dtype=dtype), torch.randn(samples, 8, dtype=dtype))


def fused_norms(hooks):
    return [name for name in fused(hooks) if name != "2"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"per_parameter": True, "statistics": ["second_moment"]}], ids=str)
def test_gradients_and_norms(dtype, options):
    model, batch = make(dtype)
    batch[0].requires_grad_()
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    input_grad, batch[0].grad = batch[0].grad, None
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        model.zero_grad()
        batch[0].grad = None
        backward(model, batch)
        moments = hooks.collect()
        agrees(moments, grads, 10 * TOLERANCE[dtype])
        same_grads(model, expected, TOLERANCE[dtype])
        close(batch[0].grad, input_grad, TOLERANCE[dtype])
        for name, value in moments.second_moment.items():
            close(value, oracle.second_moment(grads)[name], 10 * TOLERANCE[dtype])
    assert fused_norms(hooks) == ["0", "3", "5", "9"]


@pytest.mark.parametrize("how", ["subset", "checkpointed", "strided", "frozen", "no samples"])
def test_a_pass_through_tap_elsewhere(how):
    model, batch = make()
    run = model
    if how == "checkpointed":
        run = lambda inputs: checkpoint(model, inputs, use_reentrant=False)  # noqa: E731
    if how == "strided":
        batch = (batch[0].mT.contiguous().mT, batch[1])
    if how == "frozen":
        model[0].bias.requires_grad_(False)
    if how == "no samples":
        batch = tuple(tensor[:0] for tensor in batch)
    expected = plain_grads(model, batch)
    if how != "no samples":
        grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=4 if how == "subset" else None)
    backward(run, batch)
    assert "0" not in fused(hooks)
    if how != "no samples":
        agrees(hooks.collect(), grads, 1e-4)
        same_grads(model, expected, 1e-5)


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, inputs):
            return self.norm(torch.relu(self.norm(inputs)) + inputs).flatten(1)

    torch.manual_seed(0)
    model = Twice()
    nn.init.normal_(model.norm.weight)
    batch = torch.randn(5, 6, 4), torch.randn(5, 24)
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads, 1e-4)
        same_grads(model, expected, 1e-5)
