"""What the scheduler learns of a step's loss: GradScaler's factor, numbers of tokens, and sums
that a rule cannot use."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from adabatch import CABS, AdaptiveDataLoader, GradSampleHooks
from tests import oracle
from tests.options import make_scheduler
from tests.scripted import Proposals, per_sample_loss, regression, slope_run, squared_error


def run(controller=None, inner_products=False, loss_reduction="mean", grad_scaler=None, every=1):
    """(model, optimizer, batches of 8, scheduler) of a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.0)
    loader = AdaptiveDataLoader(regression(64), 8)
    statistics = ["inner_products"] if inner_products else []
    hooks = GradSampleHooks(model, statistics=statistics, loss_reduction=loss_reduction)
    options = {"min_batch_size": 8, "max_batch_size": 8, "every": every, "grad_scaler": grad_scaler}
    return model, optimizer, loader, make_scheduler(optimizer, loader, hooks,
                                                    controller or Proposals(8), **options)


def true_trace(model, batch):
    """The trace of the per-sample gradients, by the oracle."""
    bare = nn.Linear(3, 1)
    bare.load_state_dict(model.state_dict())
    return float(oracle.variance_trace(oracle.per_sample_grads(bare, per_sample_loss, batch)))


@pytest.mark.parametrize("inner_products", [False, True])
def test_a_loss_scale_is_undone(inner_products):
    model, optimizer, loader, scheduler = run(inner_products=inner_products)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        (512 * loss).backward()
        scheduler.step(loss, loss_scale=512)
        assert scheduler.diagnostics.latest.variance_trace == pytest.approx(
            true_trace(model, (inputs, targets)), rel=1e-4
        )
        assert scheduler.diagnostics.latest.loss == pytest.approx(loss.item())


@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize("inner_products", [False, True])
def test_a_grad_scaler_given_to_wrap_is_read_while_its_scale_holds(inner_products, scheduler_first):
    """Its scale doubles at every update: read in step(), the trace would be off by four."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    options = {"controller": Proposals(8), "batch_sizes": (8, 8), "measure": "all"}
    estimator = adabatch.PerSample(inner_products=inner_products)
    wrapped = adabatch.wrap(model, SGD(model.parameters(), lr=0.01), DataLoader(regression(64), 8),
                            estimator=estimator, grad_scaler=scaler, **options)
    optimizer, loader, scheduler = wrapped
    for inputs, targets in loader:
        expected = true_trace(model, (inputs, targets))
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        scaler.scale(loss).backward()
        if scheduler_first:
            scheduler.step(loss)
        scaler.step(optimizer)
        scaler.update()
        if not scheduler_first:
            scheduler.step(loss)
        assert scheduler.diagnostics.latest.variance_trace == pytest.approx(expected, rel=1e-4)
    assert scaler.get_scale() == 64 * 2**8


def test_a_step_whose_scaled_gradient_overflows_is_dropped():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    optimizer = SGD(model.parameters(), lr=0.01)
    loader = AdaptiveDataLoader(regression(64), 8)
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    scheduler = make_scheduler(optimizer, loader, hooks, Proposals(8), min_batch_size=8,
                               max_batch_size=8, grad_scaler=scaler)
    inputs, targets = next(iter(loader))
    loss = squared_error(model(1e3 * inputs), targets)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step(loss)
    assert scheduler.diagnostics.latest.dropped == "non-finite gradient"


def test_the_scaler_itself_is_refused_where_its_scale_may_have_changed():
    model, _, loader, scheduler = run()
    inputs, targets = next(iter(loader))
    loss = squared_error(model(inputs), targets)
    loss.backward()
    with pytest.raises(ValueError,
                       match=r"loss_scale must be a positive number.*"
                             r"pass a GradScaler to wrap\(grad_scaler=\)"):
        scheduler.step(loss, loss_scale=torch.amp.GradScaler("cpu"))


def scaled(scaler, known=None, fused=False, **options):
    """A linear model, and a function that takes one step scaled by `scaler`."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    options = {"controller": Proposals(8), "batch_sizes": (8, 8), "measure": "all", **options}
    optimizer = SGD(model.parameters(), lr=0.01, fused=fused)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, DataLoader(regression(64), 8),
                                                 grad_scaler=known, **options)

    def step(inputs, targets, **given):
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        scaler.scale(loss).backward()
        if getattr(loader, "is_last_micro_batch", True):
            scaler.step(optimizer)
            scaler.update()
        scheduler.step(loss, **given)

    return loader, scheduler, step


FORGOTTEN = {
    "per sample": {},
    "fused": {"fused": True},
    "micro-batches": {"estimator": adabatch.MicroBatch()},
}


@pytest.mark.parametrize("options", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_grad_scaler_that_wrap_does_not_know_is_detected(options):
    loader, _, step = scaled(torch.amp.GradScaler("cpu", init_scale=64.0), **options)

    def epoch():
        for inputs, targets in loader:
            step(inputs, targets)

    with pytest.raises(RuntimeError,
                       match=r"divided by 64 .*as a GradScaler does.*"
                             "Pass grad_scaler=scaler to adabatch.wrap"):
        epoch()


def test_a_scheduler_made_by_hand_notices_a_grad_scaler_too():
    torch.manual_seed(0)
    model, scaler = nn.Linear(3, 1), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = SGD(model.parameters(), lr=0.01)
    loader = adabatch.AdaptiveDataLoader(regression(64), 8)
    scheduler = make_scheduler(optimizer, loader, adabatch.GradSampleHooks(model), Proposals(8),
                               min_batch_size=8, max_batch_size=8)
    inputs, targets = next(iter(loader))
    loss = squared_error(model(inputs), targets)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"divided by 64 .*as a GradScaler does"):
        scheduler.step(loss)


def test_a_grad_scaler_whose_scale_is_passed_at_each_step_or_that_is_off():
    loader, scheduler, step = scaled(torch.amp.GradScaler("cpu", init_scale=64.0))
    for inputs, targets in loader:
        step(inputs, targets, loss_scale=64)
    passed = scheduler.diagnostics.column("variance_trace")
    loader, scheduler, step = scaled(torch.amp.GradScaler("cpu", enabled=False))
    for inputs, targets in loader:
        step(inputs, targets)
    assert passed.tolist() == pytest.approx(scheduler.diagnostics.column("variance_trace").tolist(),
                                          rel=1e-4)
    scheduler.remove()
    assert not scheduler.optimizer._optimizer_step_pre_hooks


def test_token_counts_reach_the_moments():
    proposals = Proposals(8)
    model, optimizer, loader, scheduler = run(proposals, inner_products=True)
    for inputs, targets in loader:
        counts = torch.randint(1, 9, (len(inputs),))
        shares = counts.double() / counts.sum()
        bare = nn.Linear(3, 1)
        bare.load_state_dict(model.state_dict())
        grads = torch.cat([rows.flatten(1) for rows in oracle.per_sample_grads(
            bare, per_sample_loss, (inputs, targets)
        ).values()], 1)
        optimizer.zero_grad()
        loss = (per_sample_loss(model, (inputs, targets)) * counts).sum() / counts.sum()
        loss.backward()
        scheduler.step(loss, weights=counts)
        expected = 8 / 7 * float(
            (8 * shares.unsqueeze(1) * (grads - shares @ grads)).square().sum(1).mean()
        )
        assert scheduler.diagnostics.latest.variance_trace == pytest.approx(expected, rel=1e-4)
        assert proposals.passed[-1]["moments"].weights is not None


def test_weights_need_inner_products_on_measuring_steps():
    model, _, loader, scheduler = run(every=2)
    for step, (inputs, targets) in enumerate(loader):
        loss = squared_error(model(inputs), targets)
        model.zero_grad()
        loss.backward()
        if step == 0:
            with pytest.raises(ValueError, match=r'statistics=\["inner_products"\]'):
                scheduler.step(loss, weights=torch.ones(8))
            return


@pytest.mark.parametrize("controller",
                         [CABS(), CABS.reference(), Proposals(8, needs_effective_lr=True), None])
def test_a_summed_loss_is_refused_by_rules_that_need_an_effective_lr(controller):
    with pytest.raises(ValueError,
                       match=r"With loss_reduction='sum' that is lr times the batch size.*"
                             "divide the loss by the batch size"):
        slope_run(controller, loss_reduction="sum")
    model = nn.Linear(3, 1)
    options = {"loss_reduction": "sum", "batch_sizes": (8, 16)}
    with pytest.raises(ValueError, match="divide the loss by the batch size"):
        adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(regression(64), 8),
                      controller=controller, **options)
    assert not model._forward_hooks


SUMS = {
    "mse": nn.functional.mse_loss, "smooth-l1": nn.functional.smooth_l1_loss,
    "huber": nn.functional.huber_loss,
    "bce": lambda outputs, targets, **options: nn.functional.binary_cross_entropy_with_logits(
        outputs, targets.sigmoid(), **options),
    "cross-entropy": lambda outputs, targets, **options: nn.functional.cross_entropy(
        torch.cat([outputs, -outputs], 1), (targets[:, 0] > 0).long(), **options),
}


@pytest.mark.parametrize("loss_fn", SUMS.values(), ids=SUMS)
def test_a_summed_loss_that_was_not_named_is_seen(loss_fn):
    def first_step(reduction, after=lambda loss: loss, loss_reduction="mean", **options):
        model, _, loader, scheduler = run(loss_reduction=loss_reduction)
        inputs, targets = next(iter(loader))
        loss = after(loss_fn(model(inputs), targets, reduction=reduction))
        loss.backward()
        scheduler.step(loss, **options)

    with pytest.raises(ValueError, match=r"the loss is a sum over the batch .*pass loss_red"):
        first_step("sum")
    first_step("mean")
    first_step("sum", loss_reduction="sum")
    first_step("sum", after=lambda loss: loss / 8)
    first_step("sum", loss_scale=8.0)


def test_a_summed_loss_serves_other_rules():
    assert slope_run(Proposals(16), loss_reduction="sum")[3].get_last_batch_size() == 16
