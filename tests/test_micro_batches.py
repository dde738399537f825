"""Micro-batches: the same loop, the same gradients, the same measurements as with the whole batch."""

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
from tests.oracle import per_sample_grads
from tests.scripted import Indexed, Wishes, regression

SIZES = (20, 7, 33, 12, 1, 40, 5, 23)
LOSSES = {"mean": lambda outputs, targets: (outputs - targets).square().mean(), "sum": lambda outputs, targets: (outputs - targets).square().sum() / 100}


def make(limit=None, *, proposals=SIZES, optimizer=SGD, lr=0.05, model=None, loss_reduction="mean", loader_options=None, n=240, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    inner = optimizer(model.parameters(), lr=lr)
    data = Indexed(n)
    data.inputs, data.targets = data.inputs.double(), data.targets.double()
    loader = AdaptiveDataLoader(data, 16, **(loader_options or {}))
    if callable(options.get("lr_scheduler")):
        options["lr_scheduler"] = options["lr_scheduler"](inner)
    options = {"min_batch_size": 1, "max_batch_size": 64, "effective_lr": lambda group: group["lr"], **options}
    controller = Wishes(*proposals)
    return model, *adabatch.wrap(model, inner, loader, controller=controller, loss_reduction=loss_reduction, max_micro_batch_size=limit, **options)


def train(model, optimizer, loader, scheduler, reduction="mean", zero="first", epochs=1, scaler=None):
    """The loop as it is without micro-batches; (indices of each piece, the weights after each)."""
    pieces, weights = [], []
    for _ in range(epochs):
        for indices, inputs, targets in loader:
            if zero == "first":
                optimizer.zero_grad()
            loss = LOSSES[reduction](model(inputs), targets)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            scheduler.step(loss)
            if zero == "last":
                optimizer.zero_grad()
            pieces.append(indices.tolist())
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return pieces, weights


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
    told, wanted = ([entry["moments"] for entry in run[3].controller.told] for run in (cut, whole))
    for ours, theirs in zip(told, wanted, strict=True):
        torch.testing.assert_close(ours.sq_norms, theirs.sq_norms, rtol=1e-9, atol=1e-12)
        assert ours.grad_sq_norm == pytest.approx(theirs.grad_sq_norm, rel=1e-9)
        assert ours.variance_trace == pytest.approx(theirs.variance_trace, rel=1e-8)


def test_pieces_are_nearly_equal_and_the_loader_says_which_is_last():
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
    for size in (int(size) for size in history.column("batch_size")[:-1]):  # the last one is short, and its lr scaled
        optimizer.zero_grad()
        LOSSES["mean"](model(data.inputs[at : at + size].double()), data.targets[at : at + size].double()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        decay.step()
        at += size
    last = next(index for index in range(len(weights) - 1, 0, -1) if not torch.equal(weights[index][0], weights[index - 1][0]))
    for ours, theirs in zip(weights[last - 1], model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_grad_scaler_runs_on_the_last_piece():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    parts = make(6, grad_scaler=scaler, max_grad_norm=0.05)
    _, weights = train(*parts, scaler=scaler)
    plain = make(None, max_grad_norm=0.05)
    _, expected = train(*plain)
    for ours, theirs in zip(weights[-1], expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 1024.0 * 2 ** (parts[3].step_count // 5)
    told, wanted = parts[3].controller.told, plain[3].controller.told
    for ours, theirs in zip(told, wanted, strict=True):
        assert ours["moments"].grad_sq_norm == pytest.approx(theirs["moments"].grad_sq_norm, rel=1e-9)


def misuse_clip(model, optimizer, loader, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def misuse_scaler(model, optimizer, loader, loss, scaler=None):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def misuse_unscale(model, optimizer, loader, loss):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
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
    "unscale": (misuse_unscale, r"scaler.unscale_.*grad_scaler="),
    "model.zero_grad": (misuse_model_zero_grad, r"optimizer.zero_grad\(\)"),
    "lr": (misuse_lr, r"learning rate changed.*lr_scheduler="),
    "closure": (misuse_closure, r"closure.*loss.backward\(\)"),
    "checkpoint": (misuse_checkpoint, r"between two micro-batches.*is_last_micro_batch"),
}


@pytest.mark.parametrize(("misuse", "message"), MISUSES.values(), ids=MISUSES)
def test_misuse_raises_with_the_cure(misuse, message):
    model, optimizer, loader, _ = make(6)

    def loop():
        for _, inputs, targets in loader:
            misuse(model, optimizer, loader, LOSSES["mean"](model(inputs), targets))

    with pytest.raises(RuntimeError, match=message):
        loop()


def test_by_hand_on_the_last_piece_everything_is_allowed():
    model, optimizer, loader, scheduler = make(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    decay = ExponentialLR(optimizer, 0.9)
    scheduler.hooks.remove()
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
    "zero": ({"limit": 0}, ValueError, "max_micro_batch_size must be an integer >= 1, got 0"),
    "float": ({"limit": 2.5}, TypeError, "max_micro_batch_size .* got 2.5"),
    "word": ({"limit": "big"}, ValueError, "'auto' or None, got 'big'"),
    "auto-without": ({"limit": "auto"}, ValueError, "pass loss_fn="),
    "accumulate": ({"limit": 4, "accumulate": 2}, ValueError, "leave accumulate at 1, got 2"),
    "estimator": ({"estimator": "ranks"}, ValueError, "estimator must be one of"),
    "plateau": ({"lr_scheduler": ReduceLROnPlateau}, TypeError, "takes no metric, got ReduceLROnPlateau"),
    "norm": ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be a number > 0"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_leave_nothing_behind(options, error, message):
    model = nn.Linear(3, 1).double()
    with pytest.raises(error, match=message):
        make(options.pop("limit", None) if "limit" in options else None, model=model, **copy.copy(options))
    assert not model._forward_hooks
    assert not model.weight._backward_hooks


# Running out of memory


def run_out(above, calls):
    def forward_hook(module, args):
        calls.append(len(args[0]))
        if len(args[0]) > above:
            raise torch.OutOfMemoryError("CUDA out of memory (a fake)")

    return forward_hook


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
def test_retrying_halves_and_loses_nothing(workers, collate_in):
    options = {"num_workers": workers, "collate_in": collate_in}
    _, expected = train(*make(None, loader_options=options), epochs=1)
    model, optimizer, loader, scheduler = make(40, loader_options=options)
    calls = []
    model[2].register_forward_pre_hook(run_out(9, calls))
    done = []
    for indices, inputs, targets in loader:
        with loader.retrying():
            optimizer.zero_grad()
            loss = LOSSES["mean"](model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            done.append(indices.tolist())
    assert loader.micro_batches.limit <= 9
    assert max(calls) > 9
    for ours, theirs in zip(model.parameters(), expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert scheduler.samples_seen == 240


def test_retrying_in_the_middle_of_a_batch_starts_it_anew():
    model, optimizer, loader, scheduler = make(8, proposals=[32])
    loader.batch_size = 32
    failing = iter([False, False, True, *[False] * 1000])
    pieces = []
    for indices, inputs, targets in loader:
        with loader.retrying():
            loss = LOSSES["mean"](model(inputs), targets)
            loss.backward()
            if next(failing):
                raise torch.OutOfMemoryError("a fake")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
        pieces.append(indices.tolist())
    assert [len(piece) for piece in pieces[:11]] == [8, 8, 8, *[4] * 8]
    assert [index for piece in pieces[3:11] for index in piece] == list(range(32))
    whole = make(None, proposals=[32])
    whole[2].batch_size = 32
    _, expected = train(*whole, epochs=1)
    for ours, theirs in zip(model.parameters(), expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def failing_loop(loader, error, change=False):
    for _, inputs, _ in loader:
        with loader.retrying():
            if change:
                inputs += 1
            raise error


def test_what_cannot_be_retried_is_raised():
    loader = make(8)[2]
    with pytest.raises(ValueError, match="mine"):
        failing_loop(loader, ValueError("mine"))
    with pytest.raises(torch.OutOfMemoryError):
        failing_loop(loader, torch.OutOfMemoryError("even one sample is too much"))
    assert loader.micro_batches.limit == 1
    with pytest.raises(RuntimeError, match="max_micro_batch_size"):
        failing_loop(AdaptiveDataLoader(Indexed(), 4), torch.OutOfMemoryError("a fake"))


def test_a_batch_changed_in_place_is_not_tried_again():
    with pytest.raises(RuntimeError, match=r"changed in place.*inputs = inputs / 255"):
        failing_loop(make(8)[2], torch.OutOfMemoryError("a fake"), change=True)


def test_a_step_that_was_taken_is_not_taken_twice():
    model, optimizer, loader, _ = make(8)

    def loop():
        for _, inputs, targets in loader:
            with loader.retrying():
                LOSSES["mean"](model(inputs), targets).backward()
                optimizer.step()
                if loader.is_last_micro_batch:
                    raise torch.OutOfMemoryError("after the step")

    with pytest.raises(torch.OutOfMemoryError, match="after the step"):
        loop()


def test_auto_finds_the_largest_that_fits_and_puts_everything_back():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1)).double()
    tried = []

    def loss_fn(model, batch):
        tried.append(len(batch[1]))
        if len(batch[1]) > 21:
            raise torch.OutOfMemoryError("a fake")
        return LOSSES["mean"](model(batch[1]), batch[2])

    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, optimizer, loader, _ = make("auto", model=model, optimizer=Adam, loss_fn=loss_fn, estimator="micro_batch", max_batch_size=200)
    assert loader.micro_batches.limit == int(21 * 0.9)
    assert tried[:5] == [2, 4, 8, 16, 32]
    assert max(tried) == 32
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auto_with_room_for_the_largest_batch():
    _, _, loader, _ = make("auto", loss_fn=lambda model, batch: model(batch[1]).mean(), max_batch_size=50)
    assert loader.micro_batches.limit == 50


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
    grads = per_sample_grads(model, lambda model, batch: (model(batch[0]) - batch[1]).square()[:, 0], (data.inputs.double(), data.targets.double()))
    flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1) / scale
    at = 0
    for entry in parts[3].controller.told:
        sizes = []
        while sum(sizes) < entry["moments"].batch_size:
            sizes.append(len(pieces[at + len(sizes)]))
        rows = [flat[piece].mean(0) for piece in pieces[at : at + len(sizes)]]
        at += len(sizes)
        mean = sum(size * row for size, row in zip(sizes, rows, strict=True)) / sum(sizes)
        assert entry["moments"].grad_sq_norm == pytest.approx(float(mean.square().sum()), rel=1e-9)
        trace = sum(size * float((row - mean).square().sum()) for size, row in zip(sizes, rows, strict=True)) / (len(sizes) - 1)
        assert entry["moments"].variance_trace == pytest.approx(trace, rel=1e-8)
    assert at == len(pieces)


def test_the_micro_batch_estimator_is_unbiased():
    data = regression(4096, width=3)
    model = nn.Linear(3, 1)
    traces = []
    loader = AdaptiveDataLoader(data, 64, True)
    controller = Wishes(64)
    parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.0), loader, controller=controller, estimator="micro_batch", max_micro_batch_size=16)
    for inputs, targets in parts[1]:
        loss = LOSSES["mean"](model(inputs), targets)
        loss.backward()
        parts[0].step()
        parts[0].zero_grad()
        parts[2].step(loss)
    traces = [entry["moments"].variance_trace for entry in controller.told]
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
    cut = adabatch.wrap(compiled, SGD(model.parameters(), lr=0.05), loaders[0], max_batch_size=64, controller=Wishes(20, 13), max_micro_batch_size=6)
    whole = adabatch.wrap(twin, SGD(twin.parameters(), lr=0.05), loaders[1], max_batch_size=64, controller=Wishes(20, 13), min_batch_size=4)
    cut[2].size_rule = whole[2].size_rule
    train(compiled, *cut, epochs=1)
    train(twin, *whole, epochs=1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
