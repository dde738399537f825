"""Fused backward passes: gradients equal to autograd's, norms equal to the oracle's, in every mode;
and where a layer gets a pass-through tap."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import TOLERANCE, agrees, backward, close, squared_error
from tests.grad_sample.parallel import needs_gloo, shard


class Checkpointed(nn.Module):
    """A model whose submodules are run again in backward."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs):
        for part in self.parts:
            inputs = checkpoint(part, inputs, use_reentrant=False)
        return inputs


def token_layers():
    return [nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 9, bias=False), nn.GELU(),
            nn.Linear(9, 2)]


def make_tokens(dtype=torch.float32, samples=5):
    """Linear layers on [N, 16, 6] with in-place activations, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*token_layers()).to(dtype)
    return model, (torch.randn(samples, 16, 6, dtype=dtype), torch.randn(samples, 32, dtype=dtype))


def make_images(dtype=torch.float32, samples=5):
    """Convolutions in one, two and three dimensions, of few and of more channels, 1 × 1 and with
    groups, and a batch."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 8, 3, stride=2, padding="valid", groups=2, bias=False), nn.Flatten(2),
        nn.Conv1d(8, 8, 4, padding=3, dilation=2), nn.ReLU(inplace=True),
        nn.Unflatten(2, (2, 2, 4)), nn.Conv3d(8, 2, 2), nn.Flatten(),
    ]
    model = nn.Sequential(*layers).to(dtype)
    inputs = torch.randn(samples, 2, 10, 10, dtype=dtype)
    return model, (inputs, torch.randn(samples, model(inputs).shape[1], dtype=dtype))


def grads_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


def plain_grads(model, batch, run=None):
    copied = copy.deepcopy(model)
    backward(run(copied) if run else copied, batch)
    return grads_of(copied)


def same_grads(model, expected, rtol):
    actual = grads_of(model)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert grad.dtype == expected[name].dtype
        close(grad, expected[name], rtol)


def fused(hooks):
    """Names of the layers with a fused backward pass."""
    return [site.name for site in hooks.sites if site.fused]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("make", "count"), [(make_tokens, 3), (make_images, 5)])
@pytest.mark.parametrize(
    "options", [{}, {"per_parameter": True, "statistics": ["second_moment"]}], ids=str)
def test_gradients_and_norms(make, count, dtype, options):
    model, batch = make(dtype)
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        agrees(moments, grads, TOLERANCE[dtype])
        same_grads(model, expected, TOLERANCE[dtype])
        for name, value in moments.second_moment.items():
            close(value, oracle.second_moment(grads)[name], 10 * TOLERANCE[dtype])
        for name, value in moments.by_parameter.items():
            close(value, oracle.sq_norms({name: grads[name]}), TOLERANCE[dtype])
    assert len(fused(hooks)) == count


def test_the_input_gets_its_gradient():
    model, (inputs, targets) = make_tokens()
    inputs.requires_grad_()
    backward(model, (inputs, targets))
    expected, inputs.grad = inputs.grad, None
    hooks = GradSampleHooks(model)
    backward(model, (inputs, targets))
    assert fused(hooks)
    close(inputs.grad, expected, 1e-5)


@pytest.mark.parametrize("samples", [1, 4])
def test_a_small_subset_gets_a_pass_through_tap(samples):
    model, batch = make_tokens()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    expected = plain_grads(model, batch)
    hooks = GradSampleHooks(model, samples=samples)
    backward(model, batch)
    assert bool(fused(hooks)) == (samples == 4)
    agrees(hooks.collect(), grads)
    same_grads(model, expected, 1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make", [make_tokens, make_images])
def test_compiled(make, backend):
    torch._dynamo.reset()
    model, batch = make()
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        backward(compiled, batch)
        agrees(hooks.collect(), grads)
        same_grads(model, expected, 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [make_tokens, make_images])
def test_checkpointed(make):
    model, batch = make()
    model = Checkpointed([model[:3], model[3:]])
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads)
        same_grads(model, expected, 1e-5)
    assert fused(hooks)


@pytest.mark.parametrize("make", [make_tokens, make_images])
def test_autocast(make):
    """Norms and gradients are autograd's to the rounding of bfloat16, in which the layers run;
    parameters keep their type."""
    model, batch = make()
    grads = oracle.per_sample_grads(model, squared_error, batch)

    def under_autocast(model):
        return lambda inputs: torch.autocast("cpu", torch.bfloat16)(model)(inputs).float()

    expected = plain_grads(model, batch, under_autocast)
    hooks = GradSampleHooks(model)
    backward(under_autocast(model), batch)
    assert fused(hooks)
    same_grads(model, expected, 0.03)
    close(hooks.collect().sq_norms, oracle.sq_norms(grads), 0.05)


def test_low_precision_parameters():
    model, batch = make_tokens(torch.bfloat16)
    expected = plain_grads(model, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    assert fused(hooks)
    hooks.collect()
    same_grads(model, expected, 0.03)


def test_tensor_hooks_and_accumulated_gradients_stay():
    model, batch = make_tokens()
    plain = plain_grads(model, batch)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: 2 * grad)
        parameter.grad = torch.ones_like(parameter)  # so that its sum is not compared
    hooks = GradSampleHooks(model, accumulate=2)
    for _ in range(2):
        backward(model, batch)
    assert fused(hooks)
    same_grads(model, {name: 4 * grad + 1 for name, grad in plain.items()}, 1e-5)


def test_parametrized_weights_have_no_fused_backward():
    model, batch = make_tokens()
    parametrizations.weight_norm(model[0])
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    assert "0" not in fused(hooks)
    agrees(hooks.collect(), grads, 1e-4)
    same_grads(model, expected, 1e-5)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_layer_with_a_frozen_parameter_gets_a_pass_through_tap(what):
    model, batch = make_tokens()
    model[0].get_parameter(what).requires_grad_(False)
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    assert fused(hooks) == ["2", "4"]
    agrees(hooks.collect(), grads)
    same_grads(model, expected, 1e-5)


class Tied(nn.Module):
    """A layer called twice, and a weight used by another layer or by a function after the layer has
    been tapped."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), how
        if how == "layers":
            self.second.weight = self.first.weight

    def forward(self, inputs):
        hidden = F.gelu(self.first(inputs))
        if self.how == "function":
            return self.second(F.linear(hidden, self.first.weight))
        return self.second(self.first(hidden) if self.how == "calls" else hidden)


@pytest.mark.parametrize("how", ["calls", "layers", "function"])
def test_several_uses(how):
    torch.manual_seed(0)
    model, batch = Tied(how), (torch.randn(5, 16, 6), torch.randn(5, 96))
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for _ in range(3):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads)
        same_grads(model, expected, 1e-5)


def test_inner_products_and_paused_steps():
    model, batch = make_tokens()
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    backward(model, batch)
    agrees(hooks.collect(), grads)
    same_grads(model, expected, 1e-5)
    model.zero_grad()
    with hooks.paused():
        backward(model, batch)
    same_grads(model, expected, 0)


def test_the_layers_own_node_is_dropped():
    """The layer ran once, its saved tensors are freed: only the tap lies between its output and its
    input."""
    model, (inputs, _) = make_tokens()
    GradSampleHooks(model[:1])
    outputs = model[0](inputs)  # they keep the node alive
    node = outputs.grad_fn
    assert "FusedBackwardTap" in node.name()
    assert all("Addmm" not in function.name() for function, _ in node.next_functions
               if function is not None)


@pytest.mark.usefixtures("one_process")
@needs_gloo
@pytest.mark.parametrize("sharded", [False, True])
def test_data_parallel(sharded):
    model, batch = make_tokens()
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    run = shard(model, 0, 2, 4) if sharded else nn.parallel.DistributedDataParallel(model)
    hooks = GradSampleHooks(run)
    for _ in range(2):
        model.zero_grad()
        backward(run, batch)
        agrees(hooks.collect(), grads)
        for name, parameter in model.named_parameters():
            close(parameter.grad.full_tensor() if sharded else parameter.grad, expected[name], 1e-5)
    assert fused(hooks)
