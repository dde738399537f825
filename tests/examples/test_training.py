"""The loop of the examples, on a task small enough for a test."""

import json

import pytest
import torch
from compare import draw, table
from torch import nn
from torch.utils.data import TensorDataset
from training import accuracy, image_sets, train


def make_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(140, 2, 2, generator=generator)
    labels = images.flatten(1)[:, :3].argmax(dim=1)
    return image_sets(images[:100], labels[:100], images[100:], labels[100:])


def run_of(data, out, batch_size=None, seed=0, budget=230):
    return train(
        make_network, data, lr=0.1, budget=budget, seed=seed, out=out, batch_size=batch_size)


@pytest.mark.parametrize(("batch_size", "name"), [(None, "cabs"), (32, "fixed-32")])
def test_leaves_history_and_plot(data, tmp_path, batch_size, name):
    run = run_of(data, tmp_path, batch_size)
    _header, *lines = (
        json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines())
    assert len(lines) == run.history.n_steps
    assert [line["samples_seen"] for line in lines] == torch.tensor(
        [line["batch_size"] for line in lines]).cumsum(0).tolist()
    assert (tmp_path / name / "history.png").read_bytes().startswith(b"\x89PNG")
    assert name in run.summary()


@pytest.mark.parametrize("batch_size", [None, 7, 32, 100, 500])
def test_stops_with_the_step_that_reaches_the_budget(data, tmp_path, batch_size):
    run = run_of(data, tmp_path, batch_size)
    assert run.samples[-1] == run.history.latest.samples_seen
    assert run.samples[-1] - run.history.latest.batch_size < 230 <= run.samples[-1]
    assert len(run.samples) == len(run.seconds) == len(run.accuracy) <= 25


@pytest.mark.parametrize("batch_size", [7, 32, 100, 500])
def test_fixed_size_is_fixed(data, tmp_path, batch_size):
    assert set(run_of(data, tmp_path, batch_size).history.column("batch_size").tolist()) == {
        min(batch_size, 100)}


def test_fixed_size_is_plain_training(data, tmp_path):
    """The losses are those of SGD written out by hand on the batches that torch's loader draws."""
    run = run_of(data, tmp_path, batch_size=20, seed=3, budget=100)
    torch.manual_seed(3)
    weight, bias = (
        parameter.detach().clone().requires_grad_() for parameter in make_network().parameters())
    loader = torch.utils.data.DataLoader(
        data[0], batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(3))
    for (inputs, targets), loss in zip(loader, run.history.column("loss"), strict=True):
        expected = -(inputs.flatten(1) @ weight.T + bias).log_softmax(1)[range(20), targets].mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(expected, (weight, bias))
        with torch.no_grad():
            weight, bias = (
                (value - 0.1 * gradient).requires_grad_()
                for value, gradient in zip((weight, bias), gradients, strict=True))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_the_seed_decides(data, tmp_path, batch_size):
    first, again, other = (run_of(data, tmp_path, batch_size, seed) for seed in (0, 0, 1))
    for column in ("batch_size", "next_batch_size", "loss"):
        assert first.history.column(column).tolist() == again.history.column(column).tolist()
    assert first.accuracy == again.accuracy
    assert first.history.column("loss").tolist() != other.history.column("loss").tolist()


def test_accuracy_counts_right_answers():
    scores = torch.eye(3)[[0, 1, 2, 0]]
    network = nn.Identity()
    assert accuracy(network, TensorDataset(scores, torch.tensor([0, 1, 2, 2]))) == 0.75
    assert network.training


def test_images_are_scaled_by_the_training_pixels():
    train_set, test_set = image_sets(
        torch.tensor([[[0, 0]], [[2, 2]]]), torch.tensor([0, 1]), torch.tensor([[[1, 3]]]),
        torch.tensor([1]))
    std = (4 / 3) ** 0.5
    torch.testing.assert_close(
        train_set.tensors[0], torch.tensor([[[[-1.0, -1.0]]], [[[1.0, 1.0]]]]) / std)
    torch.testing.assert_close(test_set.tensors[0], torch.tensor([[[[0.0, 2.0]]]]) / std)


def test_comparison_shows_every_run(data, tmp_path):
    runs = [run_of(data, tmp_path, batch_size) for batch_size in (None, 16, 64)]
    left, right = draw(runs).axes
    for panel, attribute in ((left, "samples"), (right, "seconds")):
        assert [line.get_label() for line in panel.lines] == ["cabs", "fixed-16", "fixed-64"]
        assert [line.get_xdata().tolist() for line in panel.lines] == [
            pytest.approx(getattr(run, attribute)) for run in runs]
    for run in runs:
        assert f"{run.name} " in table(runs)
