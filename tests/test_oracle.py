"""The oracle against closed forms, so that it can be trusted by all the others."""

import torch
from torch import nn

from tests import oracle


def squared_error(model, batch):
    return 0.5 * (model(batch["inputs"]) - batch["targets"]).square().sum(1)


def make_regression():
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False), {"inputs": torch.randn(6, 3), "targets": torch.randn(6, 1)}


def closed_form(model, batch):
    inputs, targets = batch["inputs"].double(), batch["targets"].double()
    return (inputs @ model.weight.detach().double().T - targets) * inputs


def test_per_sample_grads_of_linear_regression():
    model, batch = make_regression()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    expected = closed_form(model, batch)
    torch.testing.assert_close(grads, {"weight": expected.unsqueeze(1)})
    torch.testing.assert_close(oracle.sq_norms(grads), expected.square().sum(1))
    torch.testing.assert_close(
        oracle.second_moment(grads)["weight"], expected.square().sum(0, keepdim=True))
    torch.testing.assert_close(
        oracle.variance_trace(grads), (expected - expected.mean(0)).square().sum() / 5)


def test_contributions_are_per_sample_grads_where_nothing_mixes_samples():
    torch.manual_seed(0)
    first = nn.Linear(3, 3)
    model = nn.Sequential(first, nn.Tanh(), first, nn.LayerNorm(3), nn.Linear(3, 1))
    model[3].bias.requires_grad_(False)
    _, batch = make_regression()
    torch.testing.assert_close(
        oracle.contributions(model, squared_error, batch),
        oracle.per_sample_grads(model, squared_error, batch))


def test_contributions_through_batch_norm_add_up_and_follow_the_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    _, batch = make_regression()
    batch = {name: tensor.double() for name, tensor in batch.items()}
    contributions = oracle.contributions(model, squared_error, batch)
    squared_error(model, batch).sum().backward()
    torch.testing.assert_close(
        {name: rows.sum(0) for name, rows in contributions.items()},
        {name: p.grad for name, p in model.named_parameters()})

    hidden = model[0](batch["inputs"]).detach()
    normalized = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + model[1].eps).sqrt()
    outputs = (normalized * model[1].weight + model[1].bias).detach().requires_grad_()
    (backprops,) = torch.autograd.grad(
        (0.5 * (model[3](model[2](outputs)) - batch["targets"]).square()).sum(), outputs)
    torch.testing.assert_close(contributions["1.weight"], backprops * normalized)
    torch.testing.assert_close(contributions["1.bias"], backprops)


def test_the_model_is_left_alone():
    model, batch = make_regression()
    before = model.weight.clone()
    oracle.per_sample_grads(model, squared_error, batch)
    oracle.contributions(model, squared_error, batch)
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    assert "forward" not in vars(model)
