"""BatchSizeScheduler: from proposals to the sizes of the batches delivered, and the record of
it."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

import adabatch
from adabatch import (
    CABS,
    AdaptiveDataLoader,
    BatchSizeScheduler,
    Diagnostics,
    GradSampleHooks,
    ResizableBatchSampler,
)
from adabatch.controllers import Scheduled
from adabatch.diagnostics.layers import LayerStatistics
from tests import oracle
from tests.options import make_scheduler
from tests.scripted import (
    Proposals,
    Slope,
    ones,
    per_sample_loss,
    regression,
    slope_run,
    squared_error,
    steps,
)


def sizes(run, n_steps=None, **options):
    return [rows for rows, _ in steps(*run, n_steps, **options)]


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_sizes_follow_the_proposals_from_the_next_batch(scheduler_first):
    run = slope_run(Proposals(40, 20.5, 21.5, 3, 1, math.inf, 17.2, -math.inf))
    assert sizes(run, 9, scheduler_first=scheduler_first) == [16, 40, 20, 22, 3, 2, 64, 17, 2]
    assert run[3].get_last_batch_size() == 2
    assert run[2].batch_size == 2


def test_the_first_batch_has_the_loaders_size_within_the_bounds():
    assert sizes(slope_run(Proposals(10), batch_size=7), 1) == [7]
    assert sizes(slope_run(Proposals(10), batch_size=1), 1) == [2]
    assert sizes(slope_run(Proposals(10), batch_size=100), 1) == [64]
    assert sizes(slope_run(Proposals(10), batch_size=13, multiple_of=8), 1) == [16]


def test_multiples():
    assert sizes(slope_run(Proposals(3, 20, 28, 1000), multiple_of=8, max_batch_size=60),
                 5) == [16, 8, 16, 32, 56]


def test_cooldown_waits_and_counts_steps_that_did_not_measure():
    run = slope_run(Proposals(20, 30, 40, 50, 60), cooldown=2)
    assert sizes(run, 6) == [16, 20, 20, 20, 50, 50]
    assert sizes(slope_run(Proposals(20, 30), cooldown=3, every=2), 6) == [16, 20, 20, 20, 20, 30]
    assert sizes(slope_run(Proposals(20, math.nan, math.nan, 30), cooldown=2),
                 5) == [16, 20, 20, 20, 30]


def test_hysteresis_keeps_small_changes_out():
    run = slope_run(Proposals(17, 18, 14, 19, 20, 24), hysteresis=0.125)
    assert sizes(run, 7) == [16, 16, 16, 16, 19, 19, 24]


@pytest.mark.parametrize("every", [2, 3])
def test_every_measures_at_one_step_in_k_only(every):
    run = slope_run(Proposals(20, 30, 40), every=every)
    model, scheduler = run[0], run[3]
    nodes = []
    hook = model.register_forward_hook(lambda module, args,
                                       output: nodes.append(output.grad_fn.name()))
    delivered = sizes(run, 2 * every + 1)
    hook.remove()
    expected = [16] + [20] * every + [30] * every
    assert delivered == expected
    measured = [step % every == 0 for step in range(2 * every + 1)]
    assert ["Tap" in node for node in nodes] == measured
    assert list(scheduler.diagnostics.column("measured")) == measured
    for record in scheduler.diagnostics:
        fields = (record.proposed_batch_size, record.variance_trace, record.grad_sq_norm,
                  record.true_grad_sq_norm, record.noise_scale)
        assert [math.isnan(field) for field in fields] == [not record.measured] * len(fields)
    assert list(scheduler.diagnostics.column("batch_size")) == expected
    assert not scheduler.diagnostics.n_dropped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_around_a_bare_sampler(workers):
    sampler = ResizableBatchSampler(200, 16)
    model = Slope()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = make_scheduler(optimizer, sampler, GradSampleHooks(model), Proposals(20, 30),
                               min_batch_size=2, max_batch_size=64)
    loader = DataLoader(ones(200), batch_sampler=sampler, num_workers=workers)
    delivered = [rows for rows, _ in steps(model, optimizer, loader, scheduler)]
    assert delivered[:2] == [16, 16 if workers else 20]
    assert list(scheduler.diagnostics.column("batch_size")) == delivered
    assert scheduler.samples_seen == sum(delivered) == 200


def test_the_controller_gets_raw_moments_and_the_record_shows_them():
    data = regression(60)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    controller = Proposals(16)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = AdaptiveDataLoader(data, 16)
    expected = []
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model), controller,
                               min_batch_size=2)
    for inputs, targets in loader:
        scheduler.estimator.enabled = False
        grads = oracle.per_sample_grads(model, per_sample_loss, (inputs, targets))
        scheduler.estimator.enabled = True
        expected.append(float(oracle.variance_trace(grads)))
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        assert controller.passed[-1]["loss"] == loss.item()
    traces = [passed["moments"].variance_trace for passed in controller.passed]
    assert traces == pytest.approx(expected, rel=1e-5)
    history = scheduler.diagnostics
    assert list(history.column("variance_trace")) == pytest.approx(expected, rel=1e-5)
    assert list(history.column("samples_seen")) == [16, 32, 48, 60]
    assert list(history.column("step")) == [0, 1, 2, 3]
    assert list(history.column("next_batch_size")) == [16] * 4
    assert list(history.column("lr")) == [0.1] * 4
    assert math.isnan(history[0].seconds)
    assert history[1].seconds > 0
    averages = [math.isnan(value) for value in history.column("variance_trace_std_error")]
    assert averages == [True, False, False, False]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_passes_are_one_step_of_all_their_samples(accumulate):
    data = regression(96)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = AdaptiveDataLoader(data, 8)
    optimizer = SGD(model.parameters(), lr=0.0)
    controller = Proposals(30.0)
    hooks = GradSampleHooks(model, accumulate=accumulate)
    scheduler = make_scheduler(optimizer, loader, hooks, controller, min_batch_size=2,
                               max_batch_size=64)
    assert scheduler.get_last_batch_size() == 8 * accumulate
    groups, total = [[]], 0.0
    for inputs, targets in loader:
        groups[-1].append((inputs, targets))
        loss = squared_error(model(inputs), targets) / accumulate
        loss.backward()
        total += loss.item()
        if len(groups[-1]) == accumulate:
            optimizer.step()
            scheduler.step(total)
            optimizer.zero_grad()
            groups.append([])
            total = 0.0
    hooks.remove()
    assert [len(inputs) for inputs, _ in groups[1]] == [{2: 15, 4: 8}[accumulate]] * accumulate
    steps = zip(groups, controller.passed, scheduler.diagnostics, strict=False)
    for group, passed, record in steps:
        batch = tuple(torch.cat(parts) for parts in zip(*group, strict=True))
        grads = oracle.per_sample_grads(model, per_sample_loss, batch)
        assert passed["moments"].batch_size == record.batch_size == len(batch[0])
        # The step's gradient is Σ a_i g_i with a_i = 1/(k m_j); equal passes make it the mean, and
        # this the variance with divisor m - 1.
        weights = torch.cat([torch.full((len(inputs),), 1 / (accumulate * len(inputs)),
                                        dtype=torch.float64) for inputs, _ in group])
        flat = torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)
        spread = flat.square().sum(1).mean() - (weights @ flat).square().sum()
        assert passed["moments"].variance_trace == pytest.approx(
            float(spread / (1 - weights.square().sum())), rel=1e-5
        )
        assert passed["loss"] == pytest.approx(
            float(weights @ per_sample_loss(model, batch).double().detach()), rel=1e-5
        )


@pytest.mark.parametrize("every", [1, 2])
def test_a_summed_loss_is_recorded_as_its_mean(every):
    data = regression(48)
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=1e-3)
    loader = AdaptiveDataLoader(data, 16)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    controller = Proposals(16)
    scheduler = make_scheduler(optimizer, loader, hooks, controller, every=every)
    means = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().sum()
        loss.backward()
        means.append(loss.item() / len(inputs))
        scheduler.step(loss)
    assert list(scheduler.diagnostics.column("loss")) == pytest.approx(means)
    assert [passed["loss"] for passed in controller.passed] == pytest.approx(means[::every])


@pytest.mark.parametrize("drop_last", [False, True])
def test_no_batch_is_larger_than_an_epoch(drop_last):
    run = slope_run(Proposals(1000), n=40, batch_size=4, max_batch_size=2048,
                    short_batch="drop" if drop_last else "scale")
    moves = list(steps(*run, 4))
    assert [rows for rows, _ in moves] == ([4, 40, 40, 40] if drop_last else [4, 36, 40, 40])
    assert [move for _, move in moves] == pytest.approx([1.0, 1.0 if drop_last else 0.9, 1.0, 1.0],
                                                        rel=1e-5)
    assert run[3].get_last_batch_size() == 40


def test_a_smallest_batch_that_could_never_be_drawn():
    with pytest.raises(ValueError,
                       match=r"smallest batch \(64 samples\) is larger than an epoch \(40\).*"
                             "lower the minimum"):
        slope_run(Proposals(1), n=40, min_batch_size=64, short_batch="drop")
    assert sizes(slope_run(Proposals(1), n=40, min_batch_size=64), 2) == [40, 40]


def test_a_sampler_without_a_length_has_no_epoch_to_bound_it():
    class Endless(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(400))

    assert sizes(slope_run(Proposals(64), loader_options={"sampler": Endless()}), 3) == [16, 64, 64]


@pytest.mark.parametrize("form", [lambda loss: loss, lambda loss: loss.item(),
                                  lambda loss: loss.reshape(1), lambda loss: loss.detach().numpy()])
def test_forms_of_the_loss(form):
    model, _, loader, scheduler = slope_run(Proposals(16))
    (inputs,) = next(iter(loader))
    loss = model(inputs).mean() + 2
    loss.backward()
    scheduler.step(form(loss))
    assert scheduler.diagnostics.latest.loss == 2.0


def test_a_given_history_is_used():
    history = Diagnostics(smoothing=0.5)
    run = slope_run(Proposals(16), diagnostics=history)
    sizes(run, 2)
    assert run[3].diagnostics is history
    assert len(history) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "k must be a positive integer, got 0"),
        ({"every": True}, "k must be a positive integer, got True"),
        ({"on_limit": "batch"}, r"on_limit must be one of \('keep', 'lower_lr'\), got 'batch'"),
        ({"short_batch": None},
         r"short_batch must be one of \('scale', 'keep', 'drop'\), got None"),
        ({"short_batch": 1, "on_limit": 1}, "on_limit must be .* short_batch must be"),
        ({"min_batch_size": 65}, r"minimum \(65\) must not exceed maximum \(64\)"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        slope_run(Proposals(16), **options)


def test_wrong_parts():
    model = Slope()
    hooks, optimizer = GradSampleHooks(model), SGD(model.parameters(), lr=1.0)
    with pytest.raises(
        TypeError, match=r"got DataLoader without .*: pass a plain DataLoader to adabatch\.wrap"
    ):
        make_scheduler(optimizer, DataLoader(ones(8)), hooks)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Slope"):
        make_scheduler(model, AdaptiveDataLoader(ones(8)), hooks)
    with pytest.raises(ValueError,
                       match=r"CABS with this optimizer needs preconditioned_trace.*statistics.*"
                             "effective_lr="):
        make_scheduler(Adam(model.parameters()), AdaptiveDataLoader(ones(80)), hooks, CABS())
    assert not optimizer._optimizer_step_pre_hooks


class Doubling:
    """A user's object that knows no base class."""

    requires, needs_moments = ["inner_products"], False

    def __init__(self):
        self.samples = 0

    def on_step(self, *, samples, epoch):
        self.samples += samples

    def propose(self, moments, *, loss, lr):
        return 2 * self.samples


def test_a_plain_object_with_propose_is_a_controller():
    model = Slope()
    optimizer, loader = SGD(model.parameters(), lr=0.1), AdaptiveDataLoader(ones(400), 4)
    with pytest.raises(ValueError, match="Doubling with this optimizer needs inner_products"):
        BatchSizeScheduler(optimizer, loader, GradSampleHooks(model), Doubling())
    given = Doubling()
    scheduler = BatchSizeScheduler(optimizer, loader, None, given, batch_sizes=(2, 64))
    assert scheduler.controller is given
    rows = [len(inputs) for (inputs,) in loader if scheduler.step(1.0) is None]
    assert rows[:5] == [4, 8, 24, 64, 64]
    assert scheduler.state_dict()["controller"] == {"version": 1}
    for wrong in (Doubling, object()):
        with pytest.raises(TypeError, match="an object with propose"):
            BatchSizeScheduler(optimizer, loader, None, wrong)


def test_without_an_estimator():
    model = Slope()
    optimizer, loader = SGD(model.parameters(), lr=0.1), AdaptiveDataLoader(ones(40), 4)
    scheduler = BatchSizeScheduler(optimizer, loader, controller=Scheduled("0:8"))
    assert scheduler.get_last_batch_size() == loader.batch_size
    with pytest.raises(TypeError, match=r"got list without batch_size, drop_last, .*micro_batches"):
        BatchSizeScheduler(optimizer, [], GradSampleHooks(model))
    with pytest.raises(TypeError, match=r"got Slope without observe, cost, .*on_backward_end"):
        BatchSizeScheduler(optimizer, loader, model)


def test_the_repr_says_what_it_does():
    run = slope_run(Proposals(20, 24), n=400)
    assert repr(run[3]) == "BatchSizeScheduler(Proposals, batch 16 in [2, 64], step 0)"
    list(steps(*run, 2))
    text = repr(run[3])
    assert text.startswith("BatchSizeScheduler(Proposals, batch 20 → 24 in [2, 64], step 2, noise ")
    table = run[3]._repr_html_()
    assert "<td>20 → 24 in [2, 64]</td>" in table
    assert "<th>Proposals</th>" in table


def test_layers_are_looked_at_only_where_they_are_measured(monkeypatch):
    def fail(moments):
        raise AssertionError("no layer was measured alone")

    monkeypatch.setattr(LayerStatistics, "of_step", fail)
    run = slope_run(Proposals(16), n=64)
    assert len(list(steps(*run, 3))) == 3


def test_paused_passes_are_not_measured():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 3))
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, torch.utils.data.DataLoader(data, 8), batch_sizes=(8, 8), measure="all")
    for (inputs,) in loader:
        with scheduler.paused():
            model(inputs).square().mean().backward()
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.diagnostics.n_measured == scheduler.diagnostics.n_steps == 4
