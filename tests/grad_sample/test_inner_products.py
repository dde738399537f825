"""⟨g_i, g⟩ through the hooks, against the oracle's per-sample gradients, for models, scales, passes
and subsets of all kinds."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from adabatch.estimators.loss_scale import LossScale
from tests import oracle
from tests.cases import CASES
from tests.grad_sample.measuring import agrees, backward, close, make_batch, make_mlp, squared_error


class Tied(nn.Module):
    """A tied table, a layer called twice, a class token and a position table."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 9)
        self.head.weight = self.table.weight
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(5, 6))

    def forward(self, ids):
        hidden = torch.cat((self.token.expand(len(ids), -1, -1), self.table(ids)), 1)
        hidden = hidden + self.positions
        return self.head(self.norm(self.cell(torch.tanh(self.cell(hidden))))).mean(1)


class Recurrent(nn.Module):
    """Layers that are run again for each sample."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, inputs):
        hidden = self.lstm(inputs)[0]
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


def image_model():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Conv2d(4, 3, 3, groups=1, stride=2),
        nn.Flatten(), nn.Linear(3, 3))


MODELS = {
    "mlp": (make_mlp, lambda n: make_batch(n)),
    "tied": (Tied, lambda n: (torch.randint(9, (n, 4)), torch.randn(n, 9))),
    "recurrent": (Recurrent, lambda n: (torch.randn(n, 5, 4), torch.randn(n, 3))),
    "image": (image_model, lambda n: (torch.randn(n, 2, 6, 6), torch.randn(n, 3))),
}
every_model = pytest.mark.parametrize(("make", "make_batch_of"), MODELS.values(), ids=MODELS)


def oracle_products(grads, shares=None):
    """⟨g_i, g⟩ with g = Σ a_i g_i, [N]; and ‖g_i − g‖²."""
    flat = torch.cat([rows.flatten(1) for rows in grads.values()], 1)
    mean = flat.mean(0) if shares is None else shares @ flat
    return flat @ mean, (flat - mean).square().sum(1)


def inner_products_agree(moments, grads, rtol=1e-5, shares=None):
    inner_products, centred = oracle_products(grads, shares)
    rows = torch.arange(len(inner_products)) if moments.indices is None else moments.indices
    scale = float(oracle.sq_norms(grads).max())
    close = torch.testing.assert_close
    close(moments.inner_products.double(), inner_products[rows], rtol=rtol, atol=rtol * scale)
    close(moments.centred_sq_norms, centred[rows], rtol=rtol, atol=4 * rtol * scale)
    return inner_products, centred[rows]


@every_model
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_models(make, make_batch_of, samples, loss_reduction):
    torch.manual_seed(0)
    model, batch = make(), make_batch_of(7)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, samples=samples,
                            statistics=["inner_products"])
    for _ in range(2):
        model.zero_grad()
        backward(model, batch, loss_reduction=loss_reduction)
        moments = hooks.collect()
        _, centred = inner_products_agree(moments, grads)
        agrees(moments, grads)
        close(moments.variance_trace, 7 / 6 * float(centred.mean()), 1e-4)
        assert moments.n_measured == (samples or 7)


@pytest.mark.parametrize("case", [case for case in CASES if not case.id.startswith("batch-norm")],
                         ids=lambda case: case.id)
def test_every_rule(case):
    torch.manual_seed(0)
    layer = case.make_layer(torch.float64)
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return
    inputs = case.make_inputs(torch.float64)
    def loss_fn(model, batch):
        return torch.sin(3 * model(batch)).reshape(len(batch), -1).sum(1)

    grads = oracle.per_sample_grads(layer, loss_fn, inputs)
    hooks = GradSampleHooks(layer, statistics=["inner_products"])
    backward(layer, inputs, loss_fn)
    inner_products_agree(hooks.collect(), grads, rtol=1e-9)


@pytest.mark.parametrize("mean", [True, False])
def test_contributions_of_batch_norm(mean):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), make_batch()
    grads = oracle.contributions(model, squared_error, batch)
    hooks = GradSampleHooks(model, statistics=["inner_products"],
                            loss_reduction="mean" if mean else "sum")
    with pytest.warns(UserWarning, match="contribution"):
        backward(model, batch, loss_reduction="mean" if mean else "sum")
    inner_products_agree(hooks.collect(), grads)


@every_model
@pytest.mark.parametrize("sizes", [(4, 4), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_accumulated_passes(make, make_batch_of, sizes, samples, loss_reduction):
    """The mean gradient is known after the last pass only. Of unequal passes
    T̂ = mean d_i/(1 − 2a_i + 1/m_eff), as E d_i = T·(1 − 2a_i + 1/m_eff)."""
    torch.manual_seed(0)
    k, m, mean = len(sizes), sum(sizes), loss_reduction == "mean"
    model, batches = make(), [make_batch_of(size) for size in sizes]
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    grads = oracle.per_sample_grads(model, squared_error, whole)
    shares = torch.cat([
        torch.full((size,), 1 / (k * size) if mean else 1 / m, dtype=torch.float64)
        for size in sizes])
    hooks = GradSampleHooks(model, accumulate=k, samples=samples, loss_reduction=loss_reduction,
                            statistics=["inner_products"])
    for batch in batches:
        backward(model, batch, loss_reduction=loss_reduction, divisor=k if mean else 1)
    moments = hooks.collect()
    _, centred = inner_products_agree(moments, grads, shares=shares)
    rows = torch.arange(m) if moments.indices is None else moments.indices
    trace = float((centred / (1 - 2 * shares[rows] + shares.square().sum())).mean())
    close(moments.variance_trace, trace, 1e-4)
    assert len(moments.inner_products) == sum(min(size, samples or size) for size in sizes)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("sizes", [(2, 7, 3), (5, 5)], ids=str)
def test_norms_of_parameters_and_second_moments_of_accumulated_passes(sizes, samples):
    model, k = make_mlp(), len(sizes)
    batch = make_batch(sum(sizes))
    grads = oracle.per_sample_grads(model, squared_error, batch)
    for inner_products in (False, True):
        model.zero_grad()
        hooks = GradSampleHooks(
            model, accumulate=k, samples=samples, per_parameter=True,
            statistics=["second_moment", *["inner_products"] * inner_products])
        for part in zip(*(tensor.split(sizes) for tensor in batch), strict=True):
            backward(model, part, divisor=k)
        moments = hooks.collect()
        hooks.remove()
        rows = torch.arange(sum(sizes)) if moments.indices is None else moments.indices
        assert moments.by_parameter.keys() == moments.second_moment.keys() == grads.keys()
        for name, grad in grads.items():
            close(moments.by_parameter[name], grad.flatten(1).square().sum(1)[rows], 1e-5)
            close(moments.second_moment[name], grad[rows].square().sum(0), 1e-5)


def test_each_group_has_its_inner_products():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    param_groups = [list(model[0].parameters()), list(model[2].parameters())]
    hooks = GradSampleHooks(model, statistics=["inner_products"], param_groups=param_groups)
    backward(model, batch)
    moments = hooks.collect()
    inner_products_agree(moments, grads)
    for group, layer in enumerate(("0", "2")):
        own = {name: rows for name, rows in grads.items() if name.startswith(layer)}
        inner_products_agree(moments.by_group[group], own)
    traces = [part.variance_trace for part in moments.by_group.values()]
    assert sum(traces) == pytest.approx(moments.variance_trace, rel=1e-5)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_the_loss_scale_is_undone(loss_reduction):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, statistics=["inner_products"])
    (1024 * getattr(squared_error(model, batch), loss_reduction)()).backward()
    inner_products_agree(hooks.collect(loss_scale=1024), grads)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_of_a_grad_scaler_is_read_before_it_changes(accumulate):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooks = GradSampleHooks(model, statistics=["inner_products"], accumulate=accumulate)
    scale = LossScale(scaler)
    hooks.on_backward_end.append(scale.record)
    for step in range(3):
        optimizer.zero_grad()
        for part in zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True):
            scaler.scale(squared_error(model, part).mean() / accumulate).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 256 * 2 ** (step + 1)
        moments = hooks.collect(loss_scale=scale.take())
        inner_products_agree(moments, grads)
        agrees(moments, grads)


def test_a_disabled_grad_scaler_scales_nothing():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    hooks, scale = GradSampleHooks(model), LossScale(scaler)
    hooks.on_backward_end.append(scale.record)
    scaler.scale(squared_error(model, batch).mean()).backward()
    agrees(hooks.collect(loss_scale=scale.take()), grads)


def test_scales_that_do_not_fit_are_explained():
    model, batch = make_mlp(), make_batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    message = r"grad_scaler must be a torch\.amp\.GradScaler, got float; a number goes to step"
    with pytest.raises(TypeError, match=message):
        LossScale(4.0)
    plain, scaled = GradSampleHooks(make_mlp()), GradSampleHooks(model, accumulate=2)
    recorded = LossScale(scaler)
    scaled.on_backward_end.append(recorded.record)
    for scale in (0, -1.0, float("nan"), float("inf"), scaler, True):
        other = make_mlp()
        plain = GradSampleHooks(other)
        backward(other, batch)
        message = r"loss_scale must be a positive number.*wrap\(grad_scaler=\)"
        with pytest.raises(ValueError, match=message):
            plain.collect(loss_scale=scale)
    for _ in range(2):
        scaler.scale(squared_error(model, batch).mean() / 2).backward()
        scaler.update(new_scale=8.0)
    message = r"loss scale changed between the backward passes of a step \(\[4\.0, 8\.0\]\)"
    with pytest.raises(RuntimeError, match=message):
        scaled.collect(loss_scale=recorded.take())
    for _ in range(2):
        scaler.scale(squared_error(model, batch).mean() / 2).backward()
    with pytest.raises(ValueError, match="omit loss_scale="):
        recorded.take(8.0)


def test_non_reentrant_checkpointing_and_autocast():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_mlp()

        def forward(self, inputs):
            return checkpoint(self.body, inputs, use_reentrant=False)

    model, batch = Model(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    backward(model, batch)
    inner_products_agree(hooks.collect(), grads)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        backward(model, batch)
    moments = hooks.collect()
    assert moments.inner_products.dtype == torch.float32
    inner_products_agree(moments, grads, rtol=3e-2)


def test_a_skipped_branch_and_frozen_parameters():
    model, batch = make_mlp(), make_batch()
    model[0].bias.requires_grad_(False)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, statistics=["inner_products"], per_parameter=True)
    backward(model, batch)
    inner_products_agree(hooks.collect(), grads)
    model.zero_grad()
    def head_loss(head, batch):
        return squared_error(head, (batch[0].repeat(1, 2)[:, :6], batch[1]))

    half = (lambda _, batch: head_loss(model[2], batch), batch)
    expected = oracle.per_sample_grads(model[2], head_loss, batch)
    backward(model, half[1], half[0])
    inner_products_agree(hooks.collect(), expected)


def test_a_failed_pass_leaves_nothing_behind():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda parameter: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model, batch)
    handle.remove()
    model.zero_grad()
    backward(model, batch)
    inner_products_agree(hooks.collect(), grads)


def test_an_input_buffer_that_is_filled_again_between_passes_is_refused():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model, statistics=["inner_products"], accumulate=2)
    backward(model, batch, divisor=2)
    batch[0].copy_(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match=r"0\.weight was run with.*changed in place.*clone"):
        backward(model, batch, divisor=2)
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        hooks.collect()
    # A subset holds copies of its rows.
    subset = GradSampleHooks(fresh := make_mlp(), statistics=["inner_products"], accumulate=2,
                             samples=3)
    for _ in range(2):
        backward(fresh, batch, divisor=2)
        batch[0].add_(1)
    assert subset.collect().n_measured == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_held_when_the_step_has_ended(accumulate):
    model = make_mlp()
    hooks = GradSampleHooks(model, statistics=["inner_products"], accumulate=accumulate)
    seen = []
    handle = model[2].register_forward_pre_hook(
        lambda layer, args: seen.append(weakref.ref(args[0].untyped_storage())))
    for _ in range(accumulate):
        backward(model, make_batch(), divisor=accumulate)
    handle.remove()
    assert len(seen) == accumulate
    assert not hooks._kept  # factors go when the last pass ends, not when they are collected
    assert hooks.collect().inner_products is not None
    assert all(storage() is None for storage in seen)


COMPILED = r"(?s)inner_products cannot be measured on a compiled model.*do not compile"


@pytest.mark.parametrize("compiled", [
    lambda model: torch.compile(model, backend="eager"),
    lambda model: model.compile(backend="eager") or model,
])
def test_a_compiled_model_is_refused_at_attach(compiled):
    with pytest.raises(ValueError, match=COMPILED):
        GradSampleHooks(compiled(make_mlp()), statistics=["inner_products"])
    torch._dynamo.reset()


def test_a_compiled_part_is_refused_by_name_unless_nothing_in_it_is_measured():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    model[0].compile(backend="eager")
    with pytest.raises(ValueError, match="do not compile 0 "):
        GradSampleHooks(model, statistics=["inner_products"])
    hooks = GradSampleHooks(model, statistics=["inner_products"], ignore=["0"])
    backward(model, batch)
    last = {name: rows for name, rows in grads.items() if name.startswith("2")}
    inner_products_agree(hooks.collect(), last)
    torch._dynamo.reset()


def test_a_model_compiled_after_attaching_is_refused():
    model = make_mlp()
    GradSampleHooks(model, statistics=["inner_products"])
    message = "needs the finished gradient, which a compiled graph cannot do"
    with pytest.raises(Exception, match=message):
        backward(torch.compile(model, backend="aot_eager", fullgraph=True), make_batch())
    torch._dynamo.reset()


def test_without_inner_products_nothing_changes():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    backward(model, batch)
    moments = hooks.collect()
    assert moments.inner_products is None
    for name in ("std_error", "centred_sq_norms"):
        message = rf"{name} needs the inner products.*inner_products.*residuals"
        with pytest.raises(ValueError, match=message):
            getattr(moments, name)
    with pytest.raises(ValueError, match="inner_products"):
        moments.interval(0.9)
