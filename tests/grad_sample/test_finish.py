"""Several backward passes: accumulation, order, retained graphs, and passes that do not fit."""

import warnings

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.grad_sample.backward.finish import check_all_seen
from tests import oracle
from tests.grad_sample import measuring
from tests.grad_sample.measuring import (
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    measure,
    squared_error,
)


def joined(*batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def split(batch, sizes):
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 9, 1), (5,)], ids=str)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_accumulated_passes(loss_reduction, samples, sizes):
    """The gradient is Σ a_i g_i with a_i = 1/(k m_j) under a mean loss; with m_eff = 1/Σ a_i², T̂
    is unbiased (FORMULAS: unequal micro-batches)."""
    model, k, mean = make_mlp(), len(sizes), loss_reduction == "mean"
    batch = make_batch(sum(sizes))
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, accumulate=k, samples=samples)
    for part in split(batch, sizes):
        backward(model, part, loss_reduction=loss_reduction, divisor=k if mean else 1)
    moments = hooks.collect()

    weights = torch.tensor([1 / (k * size) if mean else 1 / sum(sizes)
                            for size in sizes for _ in range(size)], dtype=torch.float64)
    m_eff = float(1 / weights.square().sum())
    sq_norms = oracle.sq_norms(grads)
    if samples is not None:
        assert moments.n_measured == sum(min(samples, size) for size in sizes)
        if moments.indices is not None:
            sq_norms = sq_norms[moments.indices]
    grad_sq_norm = float(sum((weights @ rows.flatten(1)).square().sum() for rows in grads.values()))
    assert moments.batch_size == sum(sizes)
    close(moments.sq_norms, sq_norms, 1e-5)
    close(moments.grad_sq_norm, grad_sq_norm, 1e-5)
    trace = (float(sq_norms.mean()) - grad_sq_norm) / (1 - 1 / m_eff)
    close(moments.variance_trace, trace, 1e-4)
    close(moments.true_grad_sq_norm, grad_sq_norm - trace / m_eff, 1e-4)


def test_measured_rows_are_counted_through_the_passes():
    model, batch = make_mlp(), make_batch(20)
    hooks = GradSampleHooks(model, accumulate=2, samples=4)
    for part in split(batch, (10, 10)):
        backward(model, part)
    rows = hooks.collect().indices
    assert set(rows[:4].tolist()) <= set(range(10))
    assert set(rows[4:].tolist()) <= set(range(10, 20))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"capacity": 2}], ids=str)
def test_two_forward_passes_before_two_backward_passes(order, options):
    """The second batch is beyond the length of the probe and of the rows' keys: what the first one
    chose and reports to must stay."""
    model = make_mlp()
    batches = [make_batch(6), make_batch(1500)]
    first, second = (
        oracle.per_sample_grads(model, squared_error, (inputs[:6], targets[:6]))
        for inputs, targets in batches)
    hooks = GradSampleHooks(model, loss_reduction="sum", accumulate=2, **options)
    losses = [squared_error(model, batch).sum() for batch in batches]
    for index in order:
        losses[index].backward()
    moments = hooks.collect()
    rows = torch.arange(1506) if moments.indices is None else moments.indices
    assert rows.unique().numel() == len(rows)
    starts = (0, 6) if order == (0, 1) else (1500, 0)
    checked = 0
    for start, grads in zip(starts, (first, second), strict=True):
        sq_norms = oracle.sq_norms(grads)
        for value, row in zip(moments.sq_norms, rows.tolist(), strict=True):
            if start <= row < start + 6:
                checked += 1
                close(value, sq_norms[row - start], 1e-5)
    assert checked >= (12 if "samples" not in options else 3)


def test_pipelined_passes_of_a_layer_called_once_and_then_twice():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs, times=1):
            for _ in range(times):
                inputs = torch.tanh(self.layer(inputs))
            return self.head(inputs)

    torch.manual_seed(0)
    model, once, twice = Model(), make_batch(5), make_batch(5)

    def twice_called(model, batch):
        return squared_error(lambda inputs: model(inputs, 2), batch)

    calls = [(squared_error, once), (twice_called, twice)]
    expected = [oracle.sq_norms(oracle.per_sample_grads(model, loss_fn, batch))
                for loss_fn, batch in calls]
    hooks = GradSampleHooks(model, loss_reduction="sum", accumulate=2)
    losses = [loss_fn(model, batch).sum() for loss_fn, batch in calls]
    for loss in losses:
        loss.backward()
    close(hooks.collect().sq_norms, torch.cat(expected), 1e-5)


def test_two_backward_passes_without_accumulate_raise_and_the_next_step_is_good():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, make_batch(5))
    backward(model, batch)
    message = r"saw 2 backward passes.*accumulate=1.*pass accumulate=k.*add several losses"
    with pytest.raises(RuntimeError, match=message):
        hooks.collect()
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        hooks.collect()


def test_fewer_backward_passes_than_accumulate_raise():
    hooks = GradSampleHooks(model := make_mlp(), accumulate=3)
    backward(model, make_batch())
    with pytest.raises(RuntimeError, match=r"saw 1 backward passes.*accumulate=3"):
        hooks.collect()


@pytest.mark.parametrize("shape", ["one output", "two heads"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_forward_pass_under_two_backward_passes_is_refused_and_their_sum_is_exact(
        shape, accumulate):
    torch.manual_seed(0)
    body, heads = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    model, inputs = nn.ModuleList([body, heads]), torch.randn(5, 4)

    def losses():
        hidden = body(inputs)
        if shape == "one output":
            return hidden[:, 0].square(), hidden[:, 1].exp()
        return heads[0](hidden).square().sum(1), heads[1](hidden).exp().sum(1)

    hooks = GradSampleHooks(model, accumulate=accumulate)
    first, second = losses()
    first.mean().backward(retain_graph=True)
    message = "add" if accumulate == 1 else "one forward pass was differentiated by several"
    def rest():
        second.mean().backward()
        hooks.collect()

    with pytest.raises(RuntimeError, match=message):
        rest()
    hooks.remove()
    hooks = GradSampleHooks(model)  # as the message says
    model.zero_grad()
    sum(losses()).mean().backward()
    used = [each for each in model.parameters() if each.grad is not None]
    grads = [torch.autograd.grad(loss, used, retain_graph=True) for loss in sum(losses())]
    expected = [sum(part.square().sum() for part in each) for each in grads]
    close(hooks.collect().sq_norms, torch.stack(expected), 1e-5)


def test_a_paused_pass_does_not_count():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    with hooks.paused():
        backward(model, make_batch(3))
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_a_retained_graph_can_be_differentiated_again():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    loss.backward(retain_graph=True)
    agrees(hooks.collect(), grads)
    model.zero_grad()
    loss.backward()
    agrees(hooks.collect(), grads)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_not_computed_by_a_backward_to_the_leaves_raise_and_leave_nothing(tied):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if tied:
        model[2].weight = model[0].weight
    batch = make_batch(targets=4)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for take in (torch.autograd.grad, lambda loss, inputs: loss.backward(inputs=inputs)):
        take(squared_error(model, batch).mean(), list(model.parameters()))
        message = (r"torch\.autograd\.grad or backward\(inputs=\.\.\.\).*"
                   r"call loss\.backward\(\)")
        with pytest.raises(RuntimeError, match=message):
            hooks.collect()
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_gradients_that_an_optimizer_inside_backward_took_away_raise():
    model = make_mlp()
    GradSampleHooks(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: setattr(parameter, "grad", None))
    message = (r"no gradient when the backward pass ends: 0\.weight, 0\.bias, 2\.weight, 2\.bias\."
               ".*keep the gradients")
    with pytest.raises(RuntimeError, match=message):
        backward(model, make_batch())


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_loss_scale_is_undone(loss_reduction):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, statistics=["second_moment"])
    (1024 * getattr(squared_error(model, batch), loss_reduction)()).backward()
    moments = hooks.collect(loss_scale=1024.0)
    agrees(moments, grads)
    for name, moment in oracle.second_moment(grads).items():
        close(moments.second_moment[name], moment, 1e-5)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_bfloat16_autocast_is_exact_to_its_rounding(backward_inside):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 9)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.norm(torch.tanh(self.mix(self.table(ids))))).mean(1)

    torch.manual_seed(0)
    model, batch = Tied(), (torch.randint(9, (8, 4)), torch.randn(8, 9))
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = squared_error(model, batch).mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    moments = hooks.collect()
    assert moments.sq_norms.dtype == torch.float32
    agrees(moments, grads, rtol=2e-2)


def test_models_in_bfloat16():
    model, batch = make_mlp(torch.bfloat16), make_batch(dtype=torch.bfloat16)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch), grads, rtol=3e-2)


def test_as_many_parameters_seen_as_asked_about_are_not_the_same_ones():
    unseen = nn.Parameter(torch.zeros(2))
    unseen.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="no tap saw: late"):
        check_all_seen({"early"}, {"late": unseen.grad})


def steps_of(model, hooks, order, steps=6):
    """A loop of `order`: z zero_grad(), k the same that keeps the gradients' memory, b a measured
    backward pass, p a paused one, s the end of a step; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in order * steps:
            if part in "zk":
                model.zero_grad(set_to_none=part == "z")
            elif part == "b":
                backward(model, make_batch(6), divisor=hooks.accumulate)
            elif part == "p":
                with hooks.paused():
                    backward(model, make_batch(6))
            else:
                hooks.collect()
    assert all(each.filename == measuring.__file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(("wrong", "right", "accumulate"), [
    ("bs", "zbs", 1), ("zpbs", "pzbs", 1), ("kpbs", "kbps", 1), ("bbs", "zbbs", 2)])
def test_gradients_that_were_not_zeroed_are_said_once(wrong, right, accumulate):
    model = make_mlp()
    hooks = GradSampleHooks(model, accumulate=accumulate)
    (message,) = steps_of(model, hooks, wrong)
    assert "0.weight" in message
    assert "optimizer.zero_grad()" in message
    model.zero_grad()
    hooks = GradSampleHooks(model, accumulate=accumulate)
    assert steps_of(model, hooks, right) == []
    assert steps_of(model, hooks, right[1:] + right[0]) == []  # zeroed after the step


def test_a_zero_grad_that_is_forgotten_later_is_said():
    model = make_mlp()
    hooks = GradSampleHooks(model)
    assert steps_of(model, hooks, "zbs", 20) == []
    assert len(steps_of(model, hooks, "bs", 8)) == 1
