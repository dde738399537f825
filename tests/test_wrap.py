"""wrap: one call turns a plain training loop into one that chooses its batch size."""

import copy
import gc
import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn
from torch.optim import SGD, Adadelta, Adam
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
)

import adabatch
from adabatch import CABS, AdaptiveDataLoader
from adabatch.controllers import Scheduled
from tests.scripted import Indexed, Proposals, ones, regression, train_epoch, wrapped


def test_the_loop_of_the_design_as_it_stands():
    torch.manual_seed(0)
    model = nn.Linear(200, 1)
    criterion = nn.MSELoss()
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(regression(20_000, width=200), batch_size=600, shuffle=True)
    original = optimizer
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=adabatch.CABS(), batch_sizes=(16, 4096))

    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)

    assert scheduler.diagnostics.latest.noise_scale_ema > 0
    assert optimizer is original
    assert scheduler.samples_seen == 20_000
    assert scheduler.diagnostics[0].batch_size == 600


def test_every_step_measured_the_size_settles_where_theory_says():
    torch.manual_seed(0)
    model = nn.Linear(200, 1)
    loader = DataLoader(regression(20_000, width=200), batch_size=600, shuffle=True)
    options = {"batch_sizes": (16, 4096), "measure": "all"}
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, **options)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    # Near the optimum g_i = 2 r_i x_i with r_i of variance F, so that T = 4 F (200 + 1), and the
    # size settles at lr * T / F.
    assert scheduler.get_last_batch_size() == pytest.approx(0.1 * 4 * 201, rel=0.15)


ERRORS = {
    "no-batches": (
        {"loader": lambda: DataLoader(ones(8), batch_size=None)}, ValueError,
        "has no batch sampler"),
    "own-batches": (
        {"loader": lambda: DataLoader(
            ones(8), batch_sampler=BatchSampler(SequentialSampler(range(8)), 4, False))},
        ValueError,
        r"batch sampler \(BatchSampler\) cannot be set.*ResizableBatchSampler",
    ),
    "unordered": (
        {"loader": lambda: DataLoader(ones(8), num_workers=1, in_order=False)}, ValueError,
        "in_order=False"),
    "not-a-loader": (
        {"loader": lambda: [torch.ones(3, 3)]}, TypeError,
        "loader must be a torch.utils.data.DataLoader .* got list"),
    "not-an-optimizer": (
        {"optimizer": lambda model: "sgd"}, TypeError,
        "optimizer must be a torch.optim.Optimizer, got str"),
    "optimizer-class": (
        {"optimizer": lambda model: Adadelta}, TypeError,
        "optimizer must be .* got the class Adadelta: make one of the model's parameters"),
    "frozen": (
        {"model": lambda: nn.Linear(3, 1).requires_grad_(False)}, ValueError,
        "no trainable parameters"),
    "adadelta": (
        {"optimizer": lambda model: Adadelta(model.parameters())}, ValueError,
        "known for Adadelta.*effective_lr="),
    "bounds": ({"batch_sizes": (100, 64)}, ValueError, r"minimum \(100\) must not exceed"),
    "bound": ({"batch_sizes": 64}, ValueError, r"batch_sizes must be a pair .* got 64"),
    "reduction": (
        {"loss_reduction": "none"}, ValueError, r"loss_reduction must be one of .*'none'"),
    "typo": (
        {"batchsizes": (4, 8)}, TypeError,
        r"^wrap\(\) got an unexpected keyword argument 'batchsizes': did you mean batch_sizes=\?$",
    ),
    "far": ({"foo": 1}, TypeError, "keyword argument 'foo': it takes controller, .*, diagnostics$"),
    "coupling": ({"coupling": "cubic"}, ValueError, "rule must be one of .* got 'cubic'"),
    "estimator": ({"estimator": "per_sample"}, ValueError, "estimator must be .* got 'per_sample'"),
    "measure": ({"measure": "some"}, ValueError, "measure must be 'auto', .* got 'some'"),
    "micro": ({"micro_batches": 0}, ValueError, "size must be a positive integer, .* got 0"),
    "samples": (
        {"measure": adabatch.Every(1, samples=4), "estimator": adabatch.MicroBatch()},
        ValueError, r"chooses among samples, which estimator=MicroBatch\(\)",
    ),
    "nothing": ({"measure": None}, ValueError, "needs gradient moments, got measure=None"),
    "ignored": (
        {"estimator": adabatch.PerSample(ignore=["head"])}, ValueError,
        "ignore contains 'head', but the model has no module or parameter of that name",
    ),
    "accumulate": ({"accumulate": 0}, ValueError, "accumulate must be a positive integer"),
    "controller-name": (
        {"controller": "cabs"}, TypeError, r"controller must be .*got 'cabs'.*adabatch.CABS\(\)",
    ),
    "controller-class": ({"controller": CABS}, TypeError, r"controller must be .*CABS\(\)"),
    "controller-number": ({"controller": 64}, TypeError, "controller must be .*got 64"),
    "of-another-model": (
        {"optimizer": lambda model: SGD(nn.Linear(3, 1).parameters(), lr=0.1)}, ValueError,
        "no trainable parameters to measure, or the optimizer.* holds none of them",
    ),
    "no-common-multiple": (
        {"accumulate": 65}, ValueError, r"no multiple of 65 \(accumulate=65\) lies"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_leave_everything_as_it_was(options, error, message):
    options = {"batch_sizes": (4, 64), **options}
    model = options.pop("model", lambda: nn.Linear(3, 1))()
    optimizer = options.pop("optimizer", lambda model: SGD(model.parameters(), lr=0.1))(model)
    loader = options.pop("loader", lambda: AdaptiveDataLoader(ones(80), 2))()
    before = copy.copy(loader.__dict__) if isinstance(loader, AdaptiveDataLoader) else None
    with pytest.raises(error, match=message):
        adabatch.wrap(model, optimizer, loader, **options)
    assert not model._forward_hooks
    if isinstance(optimizer, torch.optim.Optimizer):
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    if before is not None:
        assert loader.__dict__ == before
        assert loader.batch_size == 2


def test_all_layers_that_cannot_be_measured_are_listed():
    model = nn.ModuleDict({
        "one": nn.Linear(3, 1), "two": nn.Embedding(4, 2, sparse=True),
        "three": nn.Embedding(4, 2, scale_grad_by_freq=True)})
    with pytest.raises(ValueError, match=r"Embedding \(two\)[\s\S]*Embedding \(three\)"):
        adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(ones(8)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps(backend):
    def run(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
        callable_model = model
        if compiled:
            callable_model = torch.compile(model, backend=backend, fullgraph=True)
        options = {"batch_sizes": (4, 64), "measure": "all"}
        parts = adabatch.wrap(
            callable_model, SGD(model.parameters(), lr=0.1), DataLoader(Indexed(), batch_size=16),
            **options)
        return train_epoch(callable_model, *parts), parts[2].diagnostics

    torch._dynamo.reset()
    (batches, history), (expected, reference) = run(True), run(False)
    assert batches == expected
    measured = history.column("measured")
    assert list(measured) == list(reference.column("measured"))
    assert list(history.column("variance_trace")[measured]) == pytest.approx(
        list(reference.column("variance_trace")[measured]), rel=1e-4)


def test_adam_with_an_effective_lr():
    model = nn.Linear(3, 1)
    optimizer = Adam(model.parameters(), lr=0.01)
    loader = DataLoader(Indexed(), batch_size=16)
    controller = CABS(effective_lr=lambda group: 10 * group["lr"])
    options = {"controller": controller, "batch_sizes": (16, 64), "measure": "all"}
    parts = adabatch.wrap(model, optimizer, loader, **options)
    train_epoch(model, *parts)
    assert set(parts[2].diagnostics.column("lr")) == {10 * 0.01}
    assert parts[2].diagnostics.n_measured == parts[2].diagnostics.n_steps


def test_two_param_groups_are_measured_apart():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = SGD([{"params": model[0].parameters(), "lr": 0.01},
                     {"params": model[1].parameters(), "lr": 0.02}])
    controller = Proposals(16)
    parts = adabatch.wrap(
        model, optimizer, DataLoader(Indexed(), batch_size=16), controller=controller)
    train_epoch(model, *parts)
    assert set(controller.passed[0]["moments"].by_group) == {0, 1}
    assert all(0.01 < passed["lr"] < 0.02 for passed in controller.passed)


def test_options_reach_their_places():
    model, optimizer, loader, scheduler = wrapped(
        DataLoader(Indexed(), batch_size=16), samples=6, seed=3, every=2, multiple_of=8,
        on_limit="lower_lr", short_batch="keep",
    )
    train_epoch(model, optimizer, loader, scheduler)
    passed = scheduler.controller.passed
    assert {entry["moments"].n_measured for entry in passed} == {6}
    assert scheduler.diagnostics.n_measured == math.ceil(scheduler.diagnostics.n_steps / 2)
    assert {int(size) % 8 for size in scheduler.diagnostics.column("next_batch_size")} == {0}
    scheduler.remove()
    assert not model._forward_hooks


def test_accumulation_end_to_end():
    """The loader's batches are a k-th of the step; loss / k is differentiated; propose gets the
    mean over the step."""
    model, optimizer, loader, scheduler = wrapped(
        DataLoader(regression(1000), batch_size=8), CABS(scale=2.0), accumulate=4)
    assert (loader.batch_size, scheduler.get_last_batch_size()) == (8, 32)
    losses, rows = [], []
    for inputs, targets in loader:
        loss = (model(inputs) - targets).square().mean()
        (loss / 4).backward()
        losses.append(loss.item())
        rows.append(len(inputs))
        if len(losses) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(sum(losses[-4:]) / 4)
    history = scheduler.diagnostics
    assert list(history.column("batch_size")) == [
        sum(rows[start : start + 4]) for start in range(0, len(rows) - 3, 4)]
    assert list(history.column("loss")) == [
        sum(losses[start : start + 4]) / 4 for start in range(0, len(losses) - 3, 4)]
    assert {4, 32} <= set(history.column("batch_size"))
    assert 1000 - 3 * loader.batch_size <= scheduler.samples_seen <= 1000


def test_an_accumulated_step_may_span_two_epochs():
    model, optimizer, loader, scheduler = wrapped(
        DataLoader(Indexed(), batch_size=16, shuffle=True), Proposals(39, 21, 60), accumulate=3)
    passes = samples = 0
    for _ in range(5):
        for _indices, inputs, targets in loader:
            ((model(inputs) - targets).square().mean() / 3).backward()
            passes, samples = passes + 1, samples + len(inputs)
            if passes % 3 == 0:
                optimizer.step()
                assert optimizer.param_groups[0]["lr"] == 0.05
                optimizer.zero_grad()
                scheduler.step(1.0)
                assert scheduler.samples_seen == samples
    assert scheduler.diagnostics.n_measured == passes // 3
    assert {39, 21, 60} <= set(scheduler.diagnostics.column("batch_size"))


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_ours_warns(compiled):
    """As under python -W error. torch.compile itself (2.13) instantiates torch.autograd.Function
    for any custom function, which torch warns of."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if compiled:
            warnings.filterwarnings(
                "ignore", "<class 'torch.autograd.function.Function'> should not be instantiated",
                DeprecationWarning)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        optimizer, loader, scheduler = adabatch.wrap(
            model, SGD(model.parameters(), lr=0.01), DataLoader(regression(64), 8, shuffle=True),
            batch_sizes=(8, 2048))
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(forward(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
    torch._dynamo.reset()
    assert scheduler.diagnostics[0].variance_trace > 0


@pytest.mark.parametrize("measuring", ["monitor", "hooks"])
def test_a_model_that_is_measured_already_is_refused(measuring):
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer, loader = SGD(model.parameters(), lr=0.1), DataLoader(Indexed(), batch_size=16)
    first = {
        "monitor": lambda: adabatch.monitor(model, optimizer),
        "hooks": lambda: adabatch.GradSampleHooks(model),
    }[measuring]()
    for second in (lambda: adabatch.wrap(model, optimizer, loader),
                   lambda: adabatch.monitor(model, optimizer)):
        with pytest.raises(ValueError, match=r"measured already: call remove\(\)"):
            second()
    first.remove()
    adabatch.wrap(model, optimizer, loader)[2].remove()


AGAIN = {
    "plain": {}, "micro-batches": {"micro_batches": 5},
    "nothing measured": {"controller": Scheduled("0:16")},
    "coupled": {"coupling": adabatch.Coupling("linear", base_batch_size=32)},
}


@pytest.mark.parametrize("same", ["model alone", "optimizer too", "all parts"])
@pytest.mark.parametrize("options", AGAIN.values(), ids=AGAIN)
def test_wrapping_again_takes_the_place_of_the_first_call(options, same):
    """As where a notebook's cell is run again: the second run is as if there had been no first."""
    def start():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        return model, SGD(model.parameters(), lr=0.05), DataLoader(Indexed(96), 16)

    def wrap(model, optimizer, loader):
        return adabatch.wrap(model, optimizer, loader, batch_sizes=(16, 16), measure="auto",
                             **options)

    model, optimizer, loader = start()
    expected = train_epoch(model, *(parts := wrap(model, optimizer, loader)))
    weights, record = model.weight.tolist(), parts[2].diagnostics.latest
    model, optimizer, loader = start()
    first = wrap(model, optimizer, loader)
    if same == "all parts":
        optimizer, loader, _ = first
    elif same == "model alone":
        optimizer = SGD(model.parameters(), lr=0.05)
    if same == "model alone" and "controller" in options:  # the first call put nothing on it
        second = wrap(model, optimizer, loader)
    else:
        with pytest.warns(UserWarning, match="was wrapped before") as caught:
            second = wrap(model, optimizer, loader)
        assert len(caught) == 1
    assert train_epoch(model, *second) == expected
    assert model.weight.tolist() == weights
    assert second[2].diagnostics.latest.variance_trace == pytest.approx(
        record.variance_trace, nan_ok=True)
    second[2].remove()
    assert not model._forward_hooks


def test_wrapping_again_after_remove_or_after_the_first_was_freed():
    model = nn.Linear(3, 1)
    loader = DataLoader(Indexed(96), 16)
    parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.05), loader)
    parts[2].remove()
    parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.05), loader)  # no warning
    del parts
    gc.collect()
    with pytest.warns(UserWarning, match="was wrapped before"):
        parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.05), loader)
    train_epoch(model, *parts)
    assert parts[2].diagnostics.latest.variance_trace_ema > 0


@pytest.mark.parametrize("other", ["module", "parameter"])
@pytest.mark.parametrize("by", ["wrap", "monitor"])
def test_parameters_of_another_module_are_named_and_the_cure_is_exact(by, other):
    torch.manual_seed(0)
    encoder = nn.Linear(3, 4)
    decoder = nn.Linear(4, 3) if other == "module" else nn.ParameterList([torch.ones(4)])
    inputs = torch.randn(16, 3)

    def loss_of(rows):
        hidden = encoder(rows)
        outputs = decoder(hidden) if other == "module" else hidden * decoder[0]
        return outputs.square().sum(1)

    def measure(model):
        optimizer = SGD([*encoder.parameters(), *decoder.parameters()], lr=0.0)
        if by == "wrap":
            return adabatch.wrap(model, optimizer, DataLoader(inputs, 16), batch_sizes=(16, 16),
                                 measure="all")[2], optimizer
        return adabatch.monitor(model, optimizer, measure="all"), optimizer

    with pytest.warns(UserWarning, match=r"also holds .* not the model's.*ModuleList"):
        measured, _ = measure(encoder)
    measured.remove()
    if other == "parameter":
        return
    both = [*encoder.parameters(), *decoder.parameters()]
    of_rows = [torch.autograd.grad(loss_of(row[None])[0], both) for row in inputs]
    grads = [torch.cat([each.flatten() for each in of_row]) for of_row in of_rows]
    measured, optimizer = measure(nn.ModuleList([encoder, decoder]))  # as the message says
    loss = loss_of(inputs).mean()
    loss.backward()
    optimizer.step()
    if by == "wrap":
        measured.step(loss)
    assert measured.diagnostics.latest.variance_trace == pytest.approx(
        float(torch.stack(grads).var(0).sum()), rel=1e-4)
    measured.remove()


@pytest.mark.parametrize("how", ["CABS", "effective_lr", "monitor"])
def test_lbfgs_is_refused_where_it_would_be_measured_and_the_cure_runs(how):
    model, loader = nn.Linear(3, 1), DataLoader(Indexed(64), 16)
    optimizer = torch.optim.LBFGS(model.parameters())
    lr = None if how == "CABS" else lambda group: group["lr"]
    attach = {"monitor": lambda: adabatch.monitor(model, optimizer)}.get(
        how, lambda: adabatch.wrap(model, optimizer, loader, controller=CABS(effective_lr=lr)))
    with pytest.raises(ValueError, match=r"LBFGS.*controllers\.Scheduled"):
        attach()
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=Scheduled("0:16"))
    for _, inputs, targets in loader:
        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        scheduler.step(optimizer.step(closure))
    assert scheduler.step_count == 4


DEFAULTS = {
    "controller": CABS, "batch_sizes": adabatch.BatchSizes, "coupling": adabatch.Coupling,
    "measure": lambda: "auto", "estimator": adabatch.PerSample,
    "micro_batches": adabatch.MicroBatches, "loss_reduction": lambda: "mean",
    "accumulate": lambda: 1, "grad_scaler": lambda: None, "process_group": lambda: None,
    "diagnostics": adabatch.Diagnostics,
}
DOCUMENTED = {
    "controller": None, "batch_sizes": (16, 2048), "coupling": "none", "estimator": None,
    "micro_batches": None, "diagnostics": None,
}


def few_steps(**options):
    """Weights and records of a short run."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    parts = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.05), DataLoader(Indexed(96), 16), **options
    )
    batches = train_epoch(model, *parts)
    columns = ("batch_size", "proposed_batch_size", "variance_trace", "loss", "lr", "measured")
    history = [parts[2].diagnostics.column(name).tolist() for name in columns]
    return repr((batches, history, model.weight.tolist(), parts[2].get_last_lr()))


def test_wrap_takes_few_keywords_all_with_a_default():
    parameters = inspect.signature(adabatch.wrap).parameters.values()
    keywords = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert keywords.keys() == DEFAULTS.keys()
    assert len(keywords) <= 13
    assert inspect.Parameter.empty not in keywords.values()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    names=strategies.sets(strategies.sampled_from(sorted(DEFAULTS))), short=strategies.booleans())
def test_a_default_passed_explicitly_changes_nothing(names, short):
    """Each default as itself, or as the object it stands for."""
    options = {name: DEFAULTS[name]() for name in names}
    if short:
        options |= {name: value for name, value in DOCUMENTED.items() if name in names}
    assert few_steps(**options) == few_steps()
