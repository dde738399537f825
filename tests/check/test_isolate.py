"""check() leaves no trace, no matter what the model does and how it ends."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from adabatch import check
from tests.check.models import D, Recurrent, T, square_loss


def rich_model():
    """Everything that a forward pass may change: running statistics, power iterations, dropout."""
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(D, 5)),
        nn.BatchNorm1d(5),
        nn.Dropout(0.5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 2),
    )
    model[4].bias.requires_grad_(False)
    model[2].eval()
    return model


def loss_fn(model, inputs):
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    return square_loss(model, inputs)


def randomness():
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), random.getstate(), keys.tolist(), position


def hooks_of(model):
    return [
        sum(
            len(getattr(module, name))
            for name in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        )
        for module in model.modules()
    ]


def snapshot(model):
    return {
        "state": {
            name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()
        },
        "parameters": [id(parameter) for parameter in model.parameters()],
        "buffers": [id(buffer) for buffer in model.buffers()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [
            (id(parameter.grad), None if parameter.grad is None else parameter.grad.clone())
            for parameter in model.parameters()
        ],
        "hooks": hooks_of(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": randomness(),
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("with_grads", [True, False])
def test_model_and_random_states_are_restored_bit_for_bit(with_grads):
    model, inputs = rich_model(), torch.randn(6, D)
    if with_grads:
        square_loss(model, inputs).sum().backward()
    before = snapshot(model)
    check(model, inputs, loss_fn, verbose=False)
    after = snapshot(model)
    assert {key for key in before if not equal(before[key], after[key])} == set()


def test_a_forward_pass_that_fails_half_way_leaves_no_trace():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(D, D), nn.Parameter(torch.ones(D))

        def forward(self, inputs):
            self.layer(inputs * self.scale)
            raise ArithmeticError("half way")

    model, inputs = Failing(), torch.randn(4, D)
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="half way"):
        check(model, inputs, square_loss, verbose=False)
    assert equal(before, snapshot(model))


def test_tables_with_max_norm_keep_their_values():
    model, ids = (
        nn.Sequential(nn.Embedding(6, D, max_norm=0.1), nn.Linear(D, 2)),
        torch.randint(6, (5, T)),
    )
    before = snapshot(model)
    check(model, ids, square_loss, verbose=False)
    assert equal(before, snapshot(model))


def test_recurrent_layers_keep_their_flat_weights():
    model = Recurrent(nn.LSTM, batch_first=True)
    before = [id(weight) for weight in model.rnn._flat_weights]
    check(model, torch.randn(4, T, D), square_loss, verbose=False)
    assert (
        [id(weight) for weight in model.rnn._flat_weights]
        == before
        == [id(parameter) for parameter in model.rnn.parameters()]
    )


def test_optimizers_that_step_in_hooks_do_not_step():
    model = nn.Sequential(nn.Linear(D, 2))
    steps = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(steps.append)
    check(model, torch.randn(4, D), square_loss, verbose=False)
    assert steps == []
    square_loss(model, torch.randn(4, D)).sum().backward()
    assert len(steps) == 2


def test_the_next_training_step_is_the_same_with_and_without():
    model, inputs = rich_model(), torch.randn(6, D)
    other = copy.deepcopy(model)
    results = []
    for trained, checked in ((model, True), (other, False)):
        torch.manual_seed(3)
        if checked:
            check(trained, inputs, loss_fn, verbose=False)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        loss_fn(trained.train(), inputs).sum().backward()
        optimizer.step()
        results.append({**trained.state_dict(), "next": torch.rand(3)})
    assert equal(*results)


def test_inside_autocast_the_check_runs_without_it():
    types = set()
    model = nn.Sequential(nn.Linear(D, 2))
    model[0].register_forward_hook(lambda module, args, output: types.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, torch.randn(4, D), square_loss, verbose=False)
        assert model(torch.randn(4, D)).dtype == torch.bfloat16
    assert types == {torch.float32, torch.bfloat16}


def test_autocast_inside_the_loss_is_the_users():
    def loss_fn(model, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return square_loss(model, inputs)

    report = check(
        nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2)),
        torch.randn(T, 4, D),
        lambda m, x: loss_fn(m, x.transpose(0, 1)),
        verbose=False,
    )
    assert {layout.value for layout in report.layouts.values()} == {"batch_first"}


def test_it_runs_where_gradients_are_off():
    with torch.no_grad():
        assert check(
            nn.Sequential(nn.Linear(D, 2)), torch.randn(4, D), square_loss, verbose=False
        ).ok
