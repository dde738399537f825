"""Every row of the table of models on which other tools fail or are silently wrong, against one
backward pass per sample; and what else a step may hold."""

import copy
import gc
import io
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adabatch
from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, close
from tests.grad_sample.same_forward import double, exact, outputs_loss

N, T, D, V = 5, 6, 8, 11


class Language(nn.Module):
    """Tokens, positions looked up without a batch dimension, a raw scale and a class token; the
    head may be tied."""

    def __init__(self, tied=True, checkpointed=False, raw=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(2 * T, D)
        self.token = nn.Parameter(torch.randn(1, 1, D)) if raw else None
        self.block = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        if self.token is not None:
            hidden = torch.cat([self.token.expand(len(ids), -1, -1), hidden], 1)
        if self.checkpointed:
            hidden = checkpoint(self.block, hidden, use_reentrant=False)
        else:
            hidden = self.block(hidden)
        return self.head(hidden)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.outer(x)


class TimeFirst(nn.Module):
    def __init__(self, flattened=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 2)
        self.flattened = flattened

    def forward(self, x):
        length = len(x)
        x = x.flatten(0, 1) if self.flattened else x
        x = self.last(torch.tanh(self.norm(self.first(x))))
        return (x.unflatten(0, (length, -1)) if self.flattened else x).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(D, D, batch_first=True), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


class LayerScale(nn.Module):
    """Raw parameters and a custom normalization, as vision transformers have them."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(D, D), nn.Parameter(torch.rand(D))
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return (x + self.scale * torch.tanh(self.linear(x))) @ self.weight


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x):
        weight = self.layer.weight
        return F.linear(torch.tanh(F.linear(x, weight, self.layer.bias)), weight)


def vectors():
    return (torch.randn(N, T, D),)


def ids():
    return (torch.randint(0, V, (N, T)),)


def encoder():
    return nn.Sequential(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), nn.Linear(D, 2))


ROWS = {
    "tied embedding and head": (lambda: Language(raw=False), ids),
    "layer called in a loop": (Twice, vectors),
    "position embedding without a batch dimension": (lambda: Language(tied=False, raw=False), ids),
    "TransformerEncoderLayer": (encoder, vectors),
    "LSTM": (lambda: Recurrent(nn.LSTM), vectors),
    "GRU": (lambda: Recurrent(nn.GRU), vectors),
    "RNN": (lambda: Recurrent(nn.RNN), vectors),
    "raw parameters": (LayerScale, vectors),
    "class token and tied head": (Language, ids),
    "functional call on a layer's weight": (Functional, vectors),
    "activation checkpointing": (lambda: Language(checkpointed=True), ids),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("row", ROWS)
def test_exact(row, samples):
    torch.manual_seed(0)
    model, batch = ROWS[row]
    exact(model(), *batch(), samples=samples)


@pytest.mark.parametrize("flattened", [False, True])
def test_batch_in_dimension_1_and_flattened(flattened):
    torch.manual_seed(0)
    model, batch = TimeFirst(flattened).double(), double((torch.randn(T, N, D),))
    exact(model, *batch, layout=adabatch.check(model, batch, outputs_loss, verbose=False))


def test_flattened_without_check_raises():
    """All layers agree on 30 rows; that these are no samples shows in the model's inputs."""
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"saw 30 rows.*adabatch\.check"):
        exact(TimeFirst(flattened=True), torch.randn(T, N, D))


@pytest.mark.filterwarnings("ignore:.*batch normalization")
def test_batch_norm_in_train_mode_gives_contributions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 2))
    batch = (torch.randn(N, D),)
    expected = oracle.contributions(model, outputs_loss, batch)
    hooks = GradSampleHooks(model)
    outputs_loss(model, batch).mean().backward()
    close(hooks.collect().sq_norms, oracle.sq_norms(expected), 1e-5)
    close(model[3].weight.grad, expected["3.weight"].mean(0), 1e-5)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)], ids=["equal", "unequal"])
def test_accumulation_over_two_passes(sizes):
    torch.manual_seed(0)
    model, (batch,) = Language(), (torch.randint(0, V, (sum(sizes), T)),)
    grads = oracle.per_sample_grads(model, lambda m, b: outputs_loss(m, (b,)), batch)
    hooks = GradSampleHooks(model, loss_reduction="sum", accumulate=2)
    for part in batch.split(sizes):
        outputs_loss(model, (part,)).sum().backward()
    close(hooks.collect().sq_norms, oracle.sq_norms(grads), 1e-4)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "layer called in a loop"])
def test_bfloat16_autocast(row):
    torch.manual_seed(0)
    model, batch = ROWS[row]
    exact(model(), *batch(), rtol=6e-2, around=lambda: torch.autocast("cpu", torch.bfloat16))


def test_a_scaled_loss():
    torch.manual_seed(0)
    model, batch = Language(), ids()
    grads = oracle.per_sample_grads(model, outputs_loss, batch)
    hooks = GradSampleHooks(model)
    (1024 * outputs_loss(model, batch).mean()).backward()
    agrees(hooks.collect(loss_scale=1024.0), grads, 1e-4)


@dataclass
class Output:
    logits: torch.Tensor


class InContainer(nn.Module):
    """Two inputs; returns its result in the given container."""

    def __init__(self, container):
        super().__init__()
        self.bilinear, self.scale = nn.Bilinear(D, D, 3), nn.Parameter(torch.rand(3))
        self.container = container

    def forward(self, x, *, y):
        return self.container(self.bilinear(x, y) * self.scale)


CONTAINERS = {
    "tuple": lambda out: (out, None), "dict": lambda out: {"logits": out},
    "ordered": lambda out: OrderedDict(logits=out), "object": Output,
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_two_inputs_and_outputs_in_containers(container):
    def loss_fn(model, batch):
        output = model(batch[0], y=batch[1])
        if isinstance(output, Output):
            output = output.logits
        else:
            output = output["logits" if isinstance(output, dict) else 0]
        return outputs_loss(lambda: output, ())

    torch.manual_seed(0)
    exact(InContainer(container), torch.randn(N, D), torch.randn(N, D), loss_fn=loss_fn)


def test_a_gradient_penalty_raises():
    model, inputs = LayerScale(), torch.randn(N, T, D, requires_grad=True)
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("cut", ["detach", "no_grad", "skip", "frozen"])
def test_a_part_without_gradient(cut):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.scale = encoder(), nn.Parameter(torch.rand(2))
            self.rest = LayerScale().requires_grad_(cut != "frozen")

        def forward(self, x):
            if cut == "skip":
                return self.part(x) * self.scale
            with torch.set_grad_enabled(cut != "no_grad"):
                rest = self.rest(x)
            return self.part(x + (rest.detach() if cut == "detach" else rest)) * self.scale

    torch.manual_seed(0)
    exact(Model(), *vectors())


def test_evaluation_mode():
    torch.manual_seed(0)
    exact(nn.Sequential(encoder(), nn.Dropout()).eval(), *vectors())


def nodes_below(tensor):
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(below for below, _ in node.next_functions)
    return len(seen)


def test_removed_hooks_leave_nothing_and_paused_hooks_add_no_node():
    model, batch = Language(), ids()
    state, nodes, keys = set(model.__dict__), nodes_below(model(*batch)), model.state_dict().keys()
    hooks = GradSampleHooks(model)
    assert nodes_below(model(*batch)) > nodes
    with hooks.paused():
        assert nodes_below(model(*batch)) == nodes
    assert model.state_dict().keys() == keys
    torch.save(model.state_dict(), io.BytesIO())
    hooks.remove()
    assert nodes_below(model(*batch)) == nodes
    assert set(model.__dict__) == state
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_deep_copy_is_not_measured():
    model, batch = Language(), ids()
    hooks = GradSampleHooks(model)
    copied = copy.deepcopy(model)
    outputs_loss(copied, batch).mean().backward()
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        hooks.collect()
    outputs_loss(model, batch).mean().backward()
    assert hooks.collect().batch_size == N


def test_no_growth_over_200_steps():
    model, batch = Language(), ids()
    hooks = GradSampleHooks(model)
    counts = []
    gc.disable()
    try:
        for step in range(200):
            model.zero_grad()
            outputs_loss(model, batch).mean().backward()
            hooks.collect()
            if step in (99, 199):
                objects = gc.get_objects()
                counts.append(sum(issubclass(type(each), torch.Tensor) for each in objects))
                del objects
    finally:
        gc.enable()
    assert counts[1] == counts[0]


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        GradSampleHooks(nn.DataParallel(Language()))
