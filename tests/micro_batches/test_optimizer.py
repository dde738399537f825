"""AccumulatingOptimizer: the same loop, gradients and measurements as with the whole batch."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import adabatch
from adabatch.data import AdaptiveDataLoader
from tests.micro_batches.runs import LOSSES, make, train
from tests.oracle import per_sample_grads
from tests.scripted import Indexed, Proposals, regression


@pytest.mark.parametrize("zero", ["first", "last"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("limit", [1, 3, 10, 100])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_the_same_run_as_with_whole_batches(limit, reduction, zero, optimizer):
    whole = make(optimizer=optimizer, loss_reduction=reduction)
    _, expected = train(*whole, reduction=reduction)
    cut = make(limit, optimizer=optimizer, loss_reduction=reduction)
    pieces, weights = train(*cut, reduction=reduction, zero=zero)
    assert max(map(len, pieces)) <= limit
    assert [index for piece in pieces for index in piece] == list(range(240))
    for ours, theirs in zip(weights[-1], expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    history, reference = cut[3].diagnostics, whole[3].diagnostics
    assert cut[3].step_count == whole[3].step_count
    for column in ("batch_size", "samples_seen", "next_batch_size"):
        assert list(history.column(column)) == list(reference.column(column))
    assert list(history.column("loss")) == pytest.approx(list(reference.column("loss")), rel=1e-10)
    passed, wanted = (
        [entry["moments"] for entry in run[3].controller.passed] for run in (cut, whole))
    for ours, theirs in zip(passed, wanted, strict=True):
        torch.testing.assert_close(ours.sq_norms, theirs.sq_norms, rtol=1e-9, atol=1e-12)
        assert ours.grad_sq_norm == pytest.approx(theirs.grad_sq_norm, rel=1e-9)
        assert ours.variance_trace == pytest.approx(theirs.variance_trace, rel=1e-8)


def test_micro_batches_are_nearly_equal_and_the_last_is_marked():
    model, optimizer, loader, scheduler = make(10, proposals=[25])
    loader.batch_size = 25
    sizes, last = [], []
    for indices, inputs, targets in loader:
        loss = LOSSES["mean"](model(inputs), targets)
        loss.backward()
        if loader.is_last_micro_batch:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
        sizes.append(len(indices))
        last.append(loader.is_last_micro_batch)
    assert sizes == [9, 8, 8] * 9 + [8, 7]
    assert last == [False, False, True] * 9 + [False, True]
    assert scheduler.step_count == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
def test_with_workers_and_collating_in_the_consumer(workers, collate_in):
    runs = []
    for limit in (None, 7):
        options = {"num_workers": workers, "collate_in": collate_in, "shuffle": True, "seed": 3}
        runs.append(train(*make(limit, loader_options=options))[1][-1])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_clipping_and_lr_scheduler_run_once_a_batch():
    clipped = {"max_grad_norm": 0.05, "lr_scheduler": lambda inner: ExponentialLR(inner, 0.9)}
    _, expected = train(*make(None, **clipped))
    parts = make(6, **clipped)
    _, weights = train(*parts)
    for ours, theirs in zip(weights[-1], expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert parts[1].param_groups[0]["lr"] == pytest.approx(0.05 * 0.9 ** parts[3].step_count)

    # The same by hand, in plain torch.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    optimizer, data, at = SGD(model.parameters(), lr=0.05), Indexed(), 0
    decay, history = ExponentialLR(optimizer, 0.9), parts[3].diagnostics
    for size in map(int, history.column("batch_size")[:-1]):  # the last is short, its lr scaled
        optimizer.zero_grad()
        inputs, targets = (x[at : at + size].double() for x in (data.inputs, data.targets))
        LOSSES["mean"](model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        decay.step()
        at += size
    steps = range(len(weights) - 1, 0, -1)
    last = next(k for k in steps if not torch.equal(weights[k][0], weights[k - 1][0]))
    for ours, theirs in zip(weights[last - 1], model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_grad_scaler_runs_on_the_last_micro_batch():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    parts = make(6, grad_scaler=scaler, max_grad_norm=0.05)
    _, weights = train(*parts, scaler=scaler)
    plain = make(None, max_grad_norm=0.05)
    _, expected = train(*plain)
    for ours, theirs in zip(weights[-1], expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 1024.0 * 2 ** (parts[3].step_count // 5)
    passed, wanted = parts[3].controller.passed, plain[3].controller.passed
    for ours, theirs in zip(passed, wanted, strict=True):
        expected_norm = pytest.approx(theirs["moments"].grad_sq_norm, rel=1e-9)
        assert ours["moments"].grad_sq_norm == expected_norm


def misuse_clip(model, optimizer, loader, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def misuse_scaler(model, optimizer, loader, loss):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.step(optimizer)


SCALER = torch.amp.GradScaler("cpu")


def misuse_unscale(model, optimizer, loader, loss):
    SCALER.scale(loss).backward()
    SCALER.unscale_(optimizer)
    optimizer.step()


def misuse_model_zero_grad(model, optimizer, loader, loss):
    model.zero_grad()
    loss.backward()
    optimizer.step()


def misuse_lr(model, optimizer, loader, loss):
    loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.9


def misuse_closure(model, optimizer, loader, loss):
    optimizer.step(lambda: loss)


def misuse_checkpoint(model, optimizer, loader, loss):
    loader.state_dict()


MISUSES = {
    "clip": (misuse_clip, r"changed between two micro-batches.*max_grad_norm="),
    "scaler": (misuse_scaler, r"not the batch's last.*grad_scaler="),
    "unscale": (misuse_unscale, r"unscale_\(\) has already been called"),  # torch says so
    "model.zero_grad": (misuse_model_zero_grad, r"optimizer.zero_grad\(\)"),
    "lr": (misuse_lr, r"learning rate changed.*lr_scheduler="),
    "closure": (misuse_closure, r"closure.*loss.backward\(\)"),
    "checkpoint": (misuse_checkpoint, r"between two micro-batches.*is_last_micro_batch"),
}


@pytest.mark.parametrize(("misuse", "message"), MISUSES.values(), ids=MISUSES)
def test_misuse_raises_with_the_fix(misuse, message):
    model, optimizer, loader, _ = make(6)

    def loop():
        for _, inputs, targets in loader:
            misuse(model, optimizer, loader, LOSSES["mean"](model(inputs), targets))

    with pytest.raises(RuntimeError, match=message):
        loop()


class Fused(SGD):
    """Counts on grad_scale and found_inf as fused optimizers do, where a scaler sets them."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        assert not hasattr(self, "grad_scale")
        return super().step(closure)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_loop_may_not_scale_twice(unscale, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    model, optimizer, loader, _ = make(6, grad_scaler=scaler, max_grad_norm=clip, optimizer=Fused)
    plain = make(6, max_grad_norm=clip)

    def loop():
        for _, inputs, targets in loader:
            scaler.scale(LOSSES["mean"](model(inputs), targets)).backward()
            if loader.is_last_micro_batch and unscale:
                scaler.unscale_(optimizer)
            optimizer.step()
            if loader.is_last_micro_batch:
                break

    if unscale and clip:
        with pytest.raises(RuntimeError, match="already been called"):
            loop()
        return
    loop()
    for _, inputs, targets in plain[2]:
        LOSSES["mean"](plain[0](inputs), targets).backward()
        plain[1].step()
        if plain[2].is_last_micro_batch:
            break
    for ours, theirs in zip(model.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="runs the scaler that was passed"):
        scaler.step(optimizer)


def test_manual_steps_are_allowed_on_the_last_micro_batch():
    model, optimizer, loader, scheduler = make(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    decay = ExponentialLR(optimizer, 0.9)
    scheduler.estimator.remove()
    for _, inputs, targets in loader:
        optimizer.zero_grad()
        scaler.scale(LOSSES["mean"](model(inputs), targets)).backward()
        if loader.is_last_micro_batch:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decay.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**15)


WRONG = {
    "zero": ({"limit": 0}, ValueError, "size must be a positive integer, .* got 0"),
    "float": ({"limit": 2.5}, ValueError, "size must be .* got 2.5"),
    "word": ({"limit": "big"}, ValueError, "'auto' or None, got 'big'"),
    "auto-without": ({"limit": "auto"}, ValueError, "pass loss_fn="),
    "accumulate": ({"limit": 4, "accumulate": 2}, ValueError, "leave accumulate at 1, got 2"),
    "plateau": ({"lr_scheduler": ReduceLROnPlateau}, ValueError, "is a ReduceLROnPlateau.*in your"),
    "other-optimizer": ({"lr_scheduler": lambda _: ExponentialLR(SGD([torch.zeros(1)], 1.0), 0.9)},
                        ValueError, "ExponentialLR of another SGD: make it with this optimizer"),
    "norm": ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be a number > 0"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_leave_nothing_behind(options, error, message):
    model = nn.Linear(3, 1).double()
    with pytest.raises(error, match=message):
        make(model=model, **options)
    assert not model._forward_hooks
    assert not model.weight._backward_hooks


# The estimator from micro-batches


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("limit", [None, 4])
def test_the_micro_batch_estimator_against_the_oracle(limit, reduction):
    parts = make(limit, proposals=[11], loss_reduction=reduction, estimator="micro_batch", lr=0.0)
    model, loader = parts[0], parts[2]
    assert not any(module._forward_hooks for module in model.modules())
    loader.batch_size = 11
    pieces, _ = train(*parts, reduction=reduction, epochs=1)
    data, scale = Indexed(), 1 if reduction == "mean" else 100
    grads = per_sample_grads(
        model, lambda model, batch: (model(batch[0]) - batch[1]).square()[:, 0],
        (data.inputs.double(), data.targets.double()),
    )
    flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1) / scale
    at = 0
    for entry in parts[3].controller.passed:
        sizes = []
        while sum(sizes) < entry["moments"].batch_size:
            sizes.append(len(pieces[at + len(sizes)]))
        rows = [flat[piece].mean(0) for piece in pieces[at : at + len(sizes)]]
        at += len(sizes)
        mean = sum(size * row for size, row in zip(sizes, rows, strict=True)) / sum(sizes)
        assert entry["moments"].grad_sq_norm == pytest.approx(float(mean.square().sum()), rel=1e-9)
        deviations = [float((row - mean).square().sum()) for row in rows]
        weighted = (size * each for size, each in zip(sizes, deviations, strict=True))
        trace = sum(weighted) / (len(sizes) - 1)
        assert entry["moments"].variance_trace == pytest.approx(trace, rel=1e-8)
    assert at == len(pieces)


def test_the_micro_batch_estimator_is_unbiased():
    data = regression(4096, width=3)
    model = nn.Linear(3, 1)
    traces = []
    loader = AdaptiveDataLoader(data, 64, True)
    controller = Proposals(64)
    parts = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.0), loader, controller=controller,
        estimator=adabatch.MicroBatch(), micro_batches=16,
    )
    for inputs, targets in parts[1]:
        loss = LOSSES["mean"](model(inputs), targets)
        loss.backward()
        parts[0].step()
        parts[0].zero_grad()
        parts[2].step(loss)
    traces = [entry["moments"].variance_trace for entry in controller.passed]
    residuals = 2 * (model(data.tensors[0]) - data.tensors[1]).detach()
    grads = torch.cat([residuals * data.tensors[0], residuals], 1).double()
    assert sum(traces) / len(traces) == pytest.approx(float(grads.var(0).sum()), rel=0.15)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_model(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    loaders = [DataLoader(Indexed(60), batch_size=16) for _ in range(2)]
    compiled = torch.compile(model, backend=backend)
    cut = adabatch.wrap(
        compiled, SGD(model.parameters(), lr=0.05), loaders[0], batch_sizes=(16, 64),
        controller=Proposals(20, 13), micro_batches=6,
    )
    whole = adabatch.wrap(
        twin, SGD(twin.parameters(), lr=0.05), loaders[1], batch_sizes=(4, 64),
        controller=Proposals(20, 13),
    )
    cut[2].size_rule = whole[2].size_rule
    train(compiled, *cut, epochs=1)
    train(twin, *whole, epochs=1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
