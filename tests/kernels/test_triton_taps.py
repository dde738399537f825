"""A model's taps reach the Triton kernels: per-sample norms and gradients of all its layers against one float64 backward pass per sample."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks, kernels
from adabatch.grad_sample.cost import LayerCost
from adabatch.grad_sample.layers import normalization
from tests import oracle
from tests.kernels.triton_cases import close, kernel_device

DEVICE = kernel_device()

from adabatch.kernels import triton  # noqa: E402 (only where there is a device)


class Both(nn.Module):
    """Token ids through an embedding, LayerNorm and Linear; images through convolutions and group norm; a Linear with T = 1 on what both give."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.wide = nn.Embedding(7, 12), nn.LayerNorm(12), nn.Linear(12, 20)
        self.conv, self.channels = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
        self.head = nn.Linear(26, 5)

    def forward(self, ids, images):
        words = torch.tanh(self.wide(self.norm(self.tokens(ids)))).mean(1)
        return self.head(torch.cat((words, torch.relu(self.channels(self.conv(images))).mean((2, 3))), dim=1))


def losses(model, batch):
    return model(*batch[:2]).log_softmax(1).gather(1, batch[2].unsqueeze(1))[:, 0].neg()


@pytest.fixture
def asked(monkeypatch):
    """Names of the Triton kernels that ran; operations that have one take it on any device."""
    found = []

    def recorded(name):
        return lambda *args, **kwargs: found.append(name) or getattr(triton, name)(*args, **kwargs)

    backend = SimpleNamespace(**{name: recorded(name) for name in triton.__all__})
    monkeypatch.setitem(kernels.BACKENDS, DEVICE.type, (backend,))
    monkeypatch.setattr(normalization, "takes_statistics", lambda activations: True)
    return found


WAYS = {"all": {}, "some": {"samples": 3}, "second moments": {"second_moment": True}, "weighed": {"preconditioner": torch.Tensor.exp}}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_all_layers_are_measured_by_triton(asked, options, monkeypatch):
    torch.manual_seed(0)
    model = Both().to(DEVICE)
    batch = (torch.randint(7, (4, 5)), torch.randn(4, 3, 6, 6), torch.randint(5, (4,)))
    batch = tuple(tensor.to(DEVICE) for tensor in batch)
    grads = oracle.per_sample_grads(model, losses, batch)
    monkeypatch.setattr(LayerCost, "fused_is_cheaper", lambda self, samples, measured: measured == samples)
    hooks = GradSampleHooks(model, **options)
    losses(model, batch).mean().backward()
    moments = hooks.collect()
    rows = slice(None) if moments.indices is None else moments.indices.cpu()
    close(moments.sq_norms, oracle.sq_norms(grads)[rows])
    for name, parameter in model.named_parameters():
        close(parameter.grad, grads[name].mean(0))
        if "second_moment" in options:
            close(moments.second_moment[name], grads[name].square().sum(0))
        if "preconditioner" in options:
            close(moments.second_moment[name], (parameter.detach().double().exp() * grads[name].square().sum(0)).sum())
    wanted = {"affine_sq_norms", "embedding_sq_norms", "outer_sq_norms"}
    wanted |= {"conv_sq_norms"} if "samples" in options else {"weight_grad_moments", "conv_weight_grad_moments"}
    if "second_moment" in options or "preconditioner" in options:
        wanted -= {"affine_sq_norms"}  # the gradients [N, P] themselves tell norms and moments
        wanted |= {"preconditioned_trace"} if "preconditioner" in options else {"outer_second_moment"}
    assert wanted <= set(asked)
