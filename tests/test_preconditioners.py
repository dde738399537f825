"""tr(PΣ) and CABS beyond SGD against float64 sums over full per-sample gradients, the
preconditioner from the optimizer's update itself."""

import numpy as np
import pytest
import torch
from torch import nn

import adabatch
from adabatch import CABS, GradSampleHooks
from adabatch.grad_sample.statistics import PreconditionedTrace
from adabatch.interfaces import RunContext
from adabatch.preconditioners import preconditioned_trace, preconditioner_of, preconditioner_reader
from tests import oracle

OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-3),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, alpha=0.9),
    "rmsprop centered": lambda groups: torch.optim.RMSprop(groups, lr=0.01, alpha=0.9,
                                                           centered=True, momentum=0.5, eps=1e-2),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, lr_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1) / 2


def trained(make, steps=4, seed=0, groups=1):
    """A model a few steps into its training, and the optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    parameters = list(model.parameters())
    optimizer = make([{"params": parameters}] if groups == 1 else [
        {"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.003}
    ])
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch_of(9)).mean().backward()
        optimizer.step()
    return model, optimizer


def batch_of(size):
    return torch.randn(size, 3), torch.randn(size, 2) + 1


def contraction(optimizer):
    return PreconditionedTrace(preconditioner_reader(optimizer))


def measured(model, batch, optimizer=None, **options):
    """Moments by second moments, or, with an optimizer, by its preconditioner."""
    statistic = "second_moment" if optimizer is None else contraction(optimizer)
    hooks = GradSampleHooks(model, statistics=[statistic], **options)
    model.zero_grad()
    losses = loss_fn(model, batch)
    (losses.sum() if options.get("loss_reduction") == "sum" else losses.mean()).backward()
    moments = hooks.collect()
    hooks.remove()
    return moments


def update_per_gradient(optimizer, parameter, coming=False):
    """P by torch's documented updates, in float64, a momentum summed up as a series; coming: after
    a step more, each squared gradient being the mean so far."""
    group = next(group for group in optimizer.param_groups if any(
        parameter is one for one in group["params"]
    ))
    state = {name: value.double() if isinstance(value, torch.Tensor) else value
             for name, value in optimizer.state[parameter].items()}
    step = float(state["step"])

    def followed(kept, keep):
        return keep * kept + (1 - keep) * (kept / (1 - keep**step)).mean() if coming else kept

    if "betas" in group:
        beta = group["betas"][1]
        squares = followed(state["exp_avg_sq"], beta)
        squares = torch.maximum(squares, state["max_exp_avg_sq"]) if group["amsgrad"] else squares
        return 1 / (squares.sqrt() / (1 - beta ** (step + coming)) ** 0.5 + group["eps"])
    if "alpha" in group:
        variance = followed(state["square_avg"], group["alpha"]) - (
            state["grad_avg"] ** 2 if group["centered"] else 0
        )
        return sum(group["momentum"] ** k for k in range(200)) / (variance.sqrt() + group["eps"])
    squares = state["sum"] + state["sum"].mean() / step * coming
    return 1 / (squares.sqrt() + group["eps"]) / (1 + (step - 1 + coming) * group["lr_decay"])


def expected_trace(model, optimizer, batch, lr, coming=False):
    grads = oracle.per_sample_grads(model, loss_fn, batch)
    total = 0.0
    for name, parameter in model.named_parameters():
        group = next(group for group in optimizer.param_groups if any(
            parameter is one for one in group["params"]
        ))
        total += float((
            update_per_gradient(optimizer, parameter, coming) * grads[name].var(0, correction=1)
        ).sum()) * group["lr"] / lr
    return total


@every_optimizer
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("contracted", [False, True])
def test_the_trace_is_that_of_full_per_sample_gradients(make, groups, loss_reduction, contracted):
    model, optimizer = trained(make, groups=groups)
    batch = batch_of(11)
    expected = expected_trace(model, optimizer, batch, lr=0.007, coming=contracted)
    moments = measured(model, batch, optimizer if contracted else None,
                       loss_reduction=loss_reduction)
    assert preconditioned_trace(moments, dict(model.named_parameters()), optimizer,
                                0.007) == pytest.approx(expected, rel=1e-4)
    assert contracted == ("preconditioned_trace" in moments.statistics)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert preconditioned_trace(moments, dict(model.named_parameters()), optimizer,
                                0.007) == pytest.approx(expected, rel=1e-4)


def test_a_subset_is_unbiased():
    model, optimizer = trained(OPTIMIZERS["adam"])
    batch = batch_of(24)
    expected = expected_trace(model, optimizer, batch, lr=0.01)
    hooks = GradSampleHooks(model, statistics=["second_moment"], samples=8)
    traces = []
    for _ in range(300):
        model.zero_grad()
        loss_fn(model, batch).mean().backward()
        traces.append(preconditioned_trace(hooks.collect(), dict(model.named_parameters()),
                                           optimizer, 0.01))
    assert np.mean(traces) == pytest.approx(expected, abs=4 * np.std(traces) / len(traces) ** 0.5)


@every_optimizer
def test_cabs_proposes_lr_times_the_trace_over_the_loss(make):
    model, optimizer = trained(make)
    batch = batch_of(11)
    expected = expected_trace(model, optimizer, batch, lr=0.02)
    rule = CABS(scale=2.0, f_star=0.1)
    rule.bind(RunContext(optimizer, dict(model.named_parameters())))
    assert rule.requires == {"preconditioned_trace"}
    assert not rule.needs_effective_lr
    proposal = rule.propose(measured(model, batch), loss=0.6, lr=0.02)
    assert proposal == pytest.approx(2 * 0.02 * expected / 0.5, rel=1e-4)


@every_optimizer
def test_wrap_trains_with_any_of_them_and_measures_what_is_needed(make):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch_of(200)),
                                         batch_size=10)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, batch_sizes=(4, 50),
                                                 measure="all")
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_fn(model, batch).mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert np.isfinite(
        scheduler.diagnostics.column("proposed_batch_size")[1:]
    ).all()  # the first backward pass found no state
    assert not scheduler.diagnostics.dropped
    assert scheduler.diagnostics.column("measured").all()
    assert scheduler.diagnostics.latest.lr == optimizer.param_groups[0]["lr"]


def image_model():
    """Layers whose taps replace the backward pass, pass through, look up and are used twice."""
    torch.manual_seed(0)
    head = nn.Linear(6, 6)
    shared = nn.Sequential(head, nn.Tanh(), head)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
                         nn.Flatten(2), Transposed(), nn.Linear(6, 6), shared, nn.LayerNorm(6))


class Transposed(nn.Module):
    def forward(self, inputs):
        return inputs.mT


@pytest.mark.parametrize("options", [{}, {"samples": 4}, {"statistics": ["inner_products"]}],
                         ids=str)
def test_every_kind_of_tap_contracts_and_keeps_no_copy_of_the_parameters(options):
    model = image_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = torch.randn(8, 2, 4, 4)

    def losses(model, batch):
        return model(batch).square().flatten(1).sum(1)

    losses(model, batch).mean().backward()
    optimizer.step()
    model.zero_grad()
    grads = oracle.per_sample_grads(model, losses, batch)
    options = dict(options)
    names = options.pop("statistics", [])
    hooks = GradSampleHooks(model, statistics=[contraction(optimizer), *names], **options)
    assert hooks.statistics == {"preconditioned_trace", *names}
    losses(model, batch).mean().backward()
    moments = hooks.collect()
    rows = range(8) if moments.indices is None else moments.indices.tolist()
    squares = moments.statistics["preconditioned_trace"].squares
    assert squares.keys() == grads.keys()
    for name, parameter in model.named_parameters():
        weights = update_per_gradient(optimizer, parameter, coming=True)
        assert squares[name].shape == ()
        expected = float((weights * grads[name][list(rows)].square().sum(0)).sum())
        assert float(squares[name]) == pytest.approx(expected, rel=1e-4)


@every_optimizer
def test_the_p_of_the_step_to_come_is_what_a_step_of_mean_gradients_leaves(make):
    """A centered RMSprop's mean gradient, which it subtracts, is 0 here before and after."""
    parameter = nn.Parameter(torch.randn(6))
    optimizer = make([parameter])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    reader = preconditioner_reader(optimizer)
    first, found = torch.tensor([3.0, -1.0, 2.0, 0.5, 0.0, 0.0]), []
    for grad in (first, first.square().mean().sqrt().expand(6)):
        parameter.grad = grad.clone()
        optimizer.step()
        if "grad_avg" in optimizer.state[parameter]:
            optimizer.state[parameter]["grad_avg"].zero_()
        found.append((reader(parameter), update_per_gradient(optimizer, parameter)))
    torch.testing.assert_close(found[0][0].double(), found[1][1], rtol=1e-5, atol=0)


def test_inputs_that_are_rare_count_as_the_optimizer_steps_them():
    """The state of the step before has P = 1/ε for them: the trace was up to a million times that
    of the P which the step then used."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    parameters = dict(model.named_parameters())
    shares, ratios = 2.0 / torch.arange(1, 41), []
    for step in range(60):
        batch = (torch.randn(16, 40) * (torch.rand(16, 40) < shares), torch.randn(16, 3))
        if step:
            expected_in_backward = preconditioned_trace(measured(model, batch, optimizer),
                                                        parameters, optimizer, 0.003)
        moments = measured(model, batch)
        optimizer.step()
        if step:
            ratios.append(expected_in_backward / preconditioned_trace(moments, parameters,
                                                                      optimizer, 0.003))
    assert 0.9 < np.mean(ratios) < 1.15
    assert min(ratios) > 0.8
    assert max(ratios) < 1.4


@every_optimizer
def test_a_parameter_without_any_gradient_so_far_does_not_count(make):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make([parameter])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert preconditioner_reader(optimizer)(parameter).tolist() == [0.0, 0.0]


def test_a_compiled_model_is_contracted_when_its_pass_has_ended():
    model, optimizer = trained(OPTIMIZERS["adam"])
    batch = batch_of(11)
    expected = expected_trace(model, optimizer, batch, lr=0.01, coming=True)
    hooks = GradSampleHooks(model, statistics=[contraction(optimizer)])
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_fn(compiled, batch).mean().backward()
    moments = hooks.collect()
    squares = moments.statistics["preconditioned_trace"].squares
    assert all(value.shape == () for value in squares.values())
    assert preconditioned_trace(moments, dict(model.named_parameters()), optimizer,
                                0.01) == pytest.approx(expected, rel=1e-4)


def test_accumulated_passes_are_contracted_alike():
    model, optimizer = trained(OPTIMIZERS["adam"])
    batch = batch_of(12)
    expected = expected_trace(model, optimizer, batch, lr=0.01, coming=True)
    hooks = GradSampleHooks(model, statistics=[contraction(optimizer)], accumulate=2)
    model.zero_grad()
    for half in (slice(0, 6), slice(6, 12)):
        (loss_fn(model, tuple(part[half] for part in batch)).mean() / 2).backward()
    assert preconditioned_trace(hooks.collect(), dict(model.named_parameters()), optimizer,
                                0.01) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("contracted", [False, True])
def test_before_the_first_step_the_proposal_is_nan_and_the_size_holds(contracted):
    model, optimizer = trained(OPTIMIZERS["adam"], steps=0)
    rule = CABS()
    rule.bind(RunContext(optimizer, dict(model.named_parameters())))
    assert np.isnan(rule.propose(measured(model, batch_of(5), optimizer if contracted else None),
                                 loss=1.0, lr=0.1))
    assert rule.trace.count == 0


def test_an_effective_lr_of_the_users_own_wins():
    model, optimizer = trained(OPTIMIZERS["adam"])
    rule = CABS(effective_lr=lambda group: group["lr"])
    rule.bind(RunContext(optimizer, dict(model.named_parameters())))
    assert rule.needs_effective_lr
    assert not rule.requires


def test_gradients_that_are_gone_and_missing_moments_are_explained():
    model, optimizer = trained(OPTIMIZERS["adam"])
    moments = measured(model, batch_of(5))
    model.zero_grad()
    with pytest.raises(ValueError, match="before zero_grad"):
        preconditioned_trace(moments, dict(model.named_parameters()), optimizer, 0.1)
    bare = adabatch.GradientMoments(4, torch.ones(4), 0.5)
    with pytest.raises(ValueError, match="'second_moment'"):
        preconditioned_trace(bare, {}, optimizer, 0.1)
    assert preconditioner_of(torch.optim.Adadelta(model.parameters())) is None


@pytest.mark.parametrize("norm", [0.5, 100.0])
def test_clipping_lowers_the_effective_lr(norm):
    moments = adabatch.GradientMoments(2, torch.tensor([8.0, 8.0]), 4.0)  # T = 8, ‖g‖ = 2
    proposal = CABS(max_grad_norm=norm).propose(moments, loss=1.0, lr=0.1)
    assert proposal == pytest.approx(0.1 * min(1, norm / 2) * 8, rel=1e-5)
