"""Parts of a user's own through the public surface: statistic, controller, estimator, source."""

import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch.estimators import GradientMoments
from adabatch.interfaces import BatchSource, Estimator, Statistic
from adabatch.schedules import BSScheduler, VirtualBatchSize
from tests import oracle


class Peak(Statistic):
    """The largest absolute entry of each sample's gradient, over all parameters, [S]."""

    name = "peak"

    def of_factor(self, name, factor, grad=None):
        return factor.dense().flatten(1).abs().amax(1)

    def pool(self, passes, scales, gradient):
        return torch.cat([torch.stack(list(values.values())).amax(0) * scale
                          for values, scale in zip(passes, scales, strict=True)])

    def metrics(self, pooled):
        return {"peak": float(pooled.max())}


class Reader:
    """Proposes one size, and keeps what it was passed."""

    requires = ("peak",)

    def __init__(self):
        self.peaks = []

    def propose(self, moments, *, loss, lr):
        self.peaks.append(moments.statistics["peak"])
        return 16


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=16)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def peaks_of(model, batch):
    grads = oracle.per_sample_grads(model, cross_entropy, batch)
    return torch.stack([grad.flatten(1).abs().amax(1) for grad in grads.values()]).amax(0)


def train(model, optimizer, loader, after=lambda loss: None, accumulate=1):
    """Train one epoch; [the oracle's peaks of each step]."""
    expected, parts = [], []
    for index, batch in enumerate(loader):
        parts.append(peaks_of(model, batch))
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        (loss / accumulate).backward()
        stepped = (index + 1) % accumulate == 0
        if stepped:
            optimizer.step()
        after(loss) if stepped else None
        if stepped and getattr(loader, "is_last_micro_batch", True):
            expected.append(torch.cat(parts))
            parts.clear()
            optimizer.zero_grad()
    return expected


@pytest.mark.parametrize("options", [
    {}, {"micro_batches": 8}, {"accumulate": 2, "batch_sizes": (32, 32)},
], ids=["plain", "micro-batches", "accumulated"])
def test_a_statistic_reaches_controller_and_history(options):
    model, optimizer, loader = make()
    controller, accumulate = Reader(), options.get("accumulate", 1)
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=controller, measure="all",
        estimator=adabatch.PerSample(statistics=[Peak()]),
        **{"batch_sizes": (16, 16), **options})
    expected = train(model, optimizer, loader, scheduler.step, accumulate)
    assert len(expected) == scheduler.step_count > 1
    for found, right in zip(controller.peaks, expected, strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=1e-4, atol=1e-6)
    largest = [float(each.max()) for each in expected]
    np.testing.assert_allclose(scheduler.diagnostics.column("peak"), largest, rtol=1e-4)
    assert scheduler.diagnostics.latest.metrics["peak"] == pytest.approx(largest[-1], rel=1e-4)


def test_monitor_records_a_statistic_and_files_keep_it(tmp_path):
    model, optimizer, loader = make()
    watched = adabatch.monitor(model, optimizer, measure=adabatch.Every(2),
                               estimator=adabatch.PerSample(statistics=[Peak()]))
    expected = train(model, optimizer, loader)
    history, path = watched.diagnostics, tmp_path / "history.jsonl"
    column = history.column("peak")
    np.testing.assert_allclose(column[::2], [float(each.max()) for each in expected][::2], 1e-4)
    assert np.isnan(column[1::2]).all()
    history.to_jsonl(path)
    np.testing.assert_array_equal(adabatch.Diagnostics.from_jsonl(path).column("peak"), column)
    history.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().splitlines()[0].endswith(",dropped,peak")
    assert "peak" in history[0]._repr_html_()
    assert hash(history[0])
    assert pickle.loads(pickle.dumps(history[0])).metrics == history[0].metrics
    with pytest.raises(ValueError, match=r"no field 'peaks'; it has .*, peak$"):
        history.column("peaks")


def test_a_required_statistic_that_nobody_passed_is_named_with_the_fix():
    model, optimizer, loader = make()
    with pytest.raises(ValueError, match=r"got 'peak': .*PerSample\(statistics=\[...\]\)"):
        adabatch.wrap(model, optimizer, loader, controller=Reader())
    adabatch.wrap(model, optimizer, loader, controller=Reader(),
                  estimator=adabatch.PerSample(statistics=[Peak()]))


@pytest.mark.parametrize("bad", [3, None, "second_moment", Peak(), [3], {"a": 1}, ["skewness"],
                                 [Peak(), Peak()], [type("Anonymous", (Peak,), {"name": 1})()]],
                         ids=str)
def test_statistics_are_checked_where_the_options_are_made(bad):
    with pytest.raises(ValueError, match=r"PerSample: seed must be .*; .*(statistic|name)"):
        adabatch.PerSample(statistics=bad, seed="a")


class Counting(adabatch.controllers.Controller):
    """Reports a metric of its own, and keeps a state."""

    init_args, state_attrs = ("start",), ("count",)

    def __init__(self, start=16, count=0):
        self.start, self.count = start, count

    def propose(self, moments, *, loss, lr):
        self.count = self.count + 1
        return self.start

    def metrics(self):
        return {"proposals": self.count, "f_star": 0.5, "loss": 7.0}


def test_a_controllers_metrics_are_columns_and_never_replace_fields():
    model, optimizer, loader = make()
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=Counting(), measure="all")
    train(model, optimizer, loader, scheduler.step)
    history = scheduler.diagnostics
    assert history.column("proposals").tolist() == [1, 2, 3, 4]
    assert history.latest.f_star == 0.5
    assert history.latest.loss != 7
    assert history.latest.metrics == {"proposals": 4, "loss": 7}


@pytest.mark.parametrize("count", [np.float64(0), np.int64(0), np.float32(0)], ids=repr)
def test_numpy_numbers_in_a_state_are_read_back(count):
    model, optimizer, loader = make()
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=Counting(count=count), measure="all")
    train(model, optimizer, loader, scheduler.step)
    file = io.BytesIO()
    torch.save(adabatch.state_dict(scheduler=scheduler), file)
    file.seek(0)
    scheduler.controller.count = 0
    adabatch.load_state_dict(torch.load(file, weights_only=True), scheduler=scheduler)
    assert scheduler.controller.count == 4


@pytest.mark.parametrize("count", [{1}, np.zeros(2), [object()], lambda: 0],
                         ids=["set", "array", "object", "function"])
def test_a_state_that_could_not_be_read_back_is_refused_when_saved(count):
    model, optimizer, loader = make()
    _, _, scheduler = adabatch.wrap(model, optimizer, loader, controller=Counting(count=count))
    with pytest.raises(TypeError, match=r"state of the controller\['count'\].* must be a number"):
        adabatch.state_dict(scheduler=scheduler)
    scheduler.controller.count = 1
    adabatch.state_dict(scheduler=scheduler)


class Growing(BSScheduler):
    """Adds `by` every epoch; `seen` is what a state may hold, or not."""

    def __init__(self, dataloader, by, seen=None, **bounds):
        self.by, self.seen = by, seen
        super().__init__(dataloader, **bounds)

    def get_new_bs(self):
        return self.batch_size + (self.by if self.last_epoch else 0)


def test_a_schedules_attributes_are_saved_or_refused_and_never_dropped():
    state = Growing(None, np.int64(3), batch_size_manager=VirtualBatchSize(8)).state_dict()
    resumed = Growing(None, 1, batch_size_manager=VirtualBatchSize(8))
    resumed.load_state_dict(state)
    resumed.step()
    assert resumed.batch_size == 11
    assert type(state["attributes"]["by"]) is int
    refused = Growing(None, 3, {8}, batch_size_manager=VirtualBatchSize(8))
    with pytest.raises(TypeError, match=r"Growing\.seen must be a number"):
        refused.state_dict()
    refused.unsaved = (*refused.unsaved, "seen")
    assert "seen" not in refused.state_dict()["attributes"]


class Halves(Estimator):
    """Only what the interface demands: a step's gradient stands for all samples."""

    def __init__(self, model):
        self.parameters = dict(model.named_parameters())

    def observe(self, *, weights=None, loss_scale=None):
        square = sum(float(each.grad.square().sum()) for each in self.parameters.values())
        return Ready(GradientMoments(16, torch.full((16,), 3 * square), square))


class Ready:
    """Moments that are there already."""

    lags = False

    def __init__(self, given):
        self.given = given

    def moments(self):
        return self.given


class Slices(BatchSource):
    """Only what the interface demands: consecutive rows."""

    def __init__(self, tensors, batch_size):
        self.tensors, self.batch_size, self.drop_last = tensors, batch_size, False
        self.taken, self.delivered = 0, []

    position = property(lambda self: self.taken)
    n_batches = property(lambda self: len(self.delivered))
    recent = property(lambda self: self.delivered[-8:])
    runs_ahead = property(lambda self: False)

    def __iter__(self):
        self.taken = 0
        while self.taken < len(self.tensors[0]):
            rows = slice(self.taken, self.taken + self.batch_size)
            batch = [each[rows] for each in self.tensors]
            self.taken += len(batch[0])
            self.delivered.append((self.batch_size, len(batch[0])))
            yield batch


def test_an_estimator_and_a_source_of_ones_own():
    model, optimizer, loader = make()
    source = Slices(loader.dataset.tensors, 16)
    scheduler = adabatch.BatchSizeScheduler(
        optimizer, source, Halves(model), Counting(16), batch_sizes=(16, 32), coupling="sqrt")
    train(model, optimizer, source, scheduler.step)
    assert scheduler.diagnostics.n_measured == scheduler.step_count == 4
    latest = scheduler.diagnostics.latest
    assert latest.variance_trace == pytest.approx(2 * latest.grad_sq_norm * 16 / 15)
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    scheduler.remove()
    with pytest.raises(ValueError, match=r"adabatch\.BatchSizeScheduler\("):
        adabatch.wrap(model, optimizer, loader, estimator=Halves(model))


def test_a_source_that_lacks_what_is_read_cannot_be_made():
    class Short(BatchSource):
        batch_size, drop_last = 8, False

    with pytest.raises(TypeError, match=r"abstract.*n_batches"):
        Short()
