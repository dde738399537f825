"""Uses of parameters that begin while training, and what changes gradients: exact, or refused.

Legend: N samples in a batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils.checkpoint import checkpoint

from adabatch import AdaptiveDataLoader, GradSampleHooks
from adabatch.interfaces import NotMeasured
from tests import oracle
from tests.grad_sample.measuring import agrees
from tests.options import make_scheduler

STARTS = [1, 2, 4, 6]  # steps, counted from 0; some are compared anyway, some by their pattern


class Model(nn.Module):
    """Its forward pass is `body(self, x)` once that is set; `spare` is called by no forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 5)
        self.norm, self.table = nn.LayerNorm(5), nn.Embedding(4, 5)
        self.body = None

    def forward(self, x):
        h = torch.tanh(self.norm(self.a(x)))  # nothing that is traced from the start
        return self.b(h if self.body is None else self.body(self, h))

    def score(self, x):
        h = torch.tanh(self.a(x))
        return self.b(torch.tanh(linear(h, self.a.weight)))


def losses(model, x):
    return model(x).square().mean(1)


def train(model, loss_fn, steps, change=lambda model: None, start=0, *, compare=False,
          dtype=torch.float64, **options):
    """(step, its moments, the oracle's gradients if `compare`); `change` happens before step
    `start`."""
    hooks = GradSampleHooks(model, seed=1, **options)
    try:
        for step in range(steps):
            if step == start:
                loss_fn = change(model) or loss_fn
            x = torch.randn(9 + step % 3, 5, dtype=dtype)
            model.zero_grad()
            loss_fn(model, x).mean().backward()
            try:
                moments = hooks.collect()
            except NotMeasured as error:
                moments = error
            grads = {}
            if compare:
                with ThreadPoolExecutor(1) as aside:  # a training loop has no such graphs
                    grads = aside.submit(oracle.per_sample_grads, model, loss_fn, x).result()
            yield step, moments, grads
    finally:
        hooks.remove()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


TRACED = {
    "the weight of a layer": lambda m, h: torch.tanh(linear(h, m.a.weight)),
    "its transpose": lambda m, h: h @ m.a.weight.T,
    "layer.forward": lambda m, h: torch.tanh(m.a.forward(h)),
    "the scale of a norm": lambda m, h: h * m.norm.weight,
    "a row of an embedding": lambda m, h: h + m.table.weight[1],
    "a bias twice": lambda m, h: (h + m.a.bias).tanh() + m.a.bias,
    "a layer that is never called": lambda m, h: torch.tanh(linear(h, m.spare.weight)),
}


def set_body(body):
    def change(model):
        model.body = body
    return change


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("body", TRACED.values(), ids=TRACED)
def test_a_use_in_the_forward_pass_that_begins_later_is_measured(model, body, start, samples):
    left_out = []
    steps = train(model, losses, start + 4, set_body(body), start, compare=True, samples=samples)
    for step, moments, grads in steps:
        if isinstance(moments, NotMeasured):
            left_out.append(step)
            assert "without calling its layer" in str(moments)
        else:
            agrees(moments, grads, 1e-9)
    assert left_out in ([], [start])


@pytest.mark.parametrize("where", [
    lambda: torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.save_on_cpu,
], ids=["autocast", "save_on_cpu"])
def test_where_inputs_are_not_kept_anyway_the_first_unlike_step_is_left_out(model, where):
    def losses_there(model, x):
        with where():
            return losses(model, x)

    start = 20  # all of the first 16 are compared where bfloat16 takes part
    change = set_body(lambda m, h: m.b(m.spare(h)) @ m.b.weight)
    steps = train(model.float(), losses_there, start + 4, change, start, samples=4,
                  dtype=torch.float32)
    left_out = [step for step, moments, _ in steps if isinstance(moments, NotMeasured)]
    assert start in left_out
    assert left_out in ([start], [start, start + 1])


@pytest.mark.parametrize("accumulate", [2, 3])
def test_steps_of_several_passes_are_compared_for_ever(model, accumulate):
    hooks = GradSampleHooks(model, accumulate=accumulate)

    def steps():
        for step in range(9):
            model.zero_grad()
            for _ in range(accumulate):
                of_sample = losses(model, torch.randn(6, 5, dtype=torch.float64))
                penalty = model.a.weight.square().sum() if step >= 5 else 0.0
                ((of_sample.mean() + penalty) / accumulate).backward()
            try:
                moments = hooks.collect()
            except NotMeasured as error:
                moments = error
            yield step, moments, {}

    is_refused(steps(), 5, r"do not add up.*a\.weight")


@pytest.mark.parametrize(("start", "seen"), [(8, 15), (16, 23)])
def test_a_use_in_place_of_an_operation_without_a_parameter_is_seen_before_long(model, start, seen):
    """It changes neither the layers called nor the number of autograd's nodes."""
    constant = torch.rand(5, dtype=torch.float64)
    model.body = lambda m, h: h * constant
    change = set_body(lambda m, h: h * m.norm.weight)
    for step, moments, grads in train(model, losses, seen + 2, change, start, compare=True):
        if step < start or step >= seen:
            agrees(moments, grads)


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("start", [0, 4])
def test_a_use_in_what_activation_checkpointing_runs_again(model, start, samples):
    """The layer gets the same tap again, though the use behind it was found after it."""
    def part(m, h):
        return torch.tanh(m.spare(h)) + (linear(h, m.spare.weight) if m.late else 0.0)

    model.late = False
    model.body = lambda m, h: checkpoint(part, m, h, use_reentrant=False)
    steps = train(model, losses, start + 4, lambda model: setattr(model, "late", True), start,
                  compare=True, samples=samples)
    for step, moments, grads in steps:
        if not isinstance(moments, NotMeasured):
            agrees(moments, grads)
        else:
            assert step == start == 4


def test_layers_that_take_turns_are_left_out_once_each(model):
    model.turns = nn.ModuleList(nn.Linear(5, 5) for _ in range(5)).double()
    model.body = lambda m, h: m.turns[m.turn](h)

    found = []
    hooks = GradSampleHooks(model)
    for step in range(20):
        model.turn = step % 5
        x = torch.randn(6, 5, dtype=torch.float64)
        with hooks.paused():
            grads = oracle.per_sample_grads(model, losses, x)
        model.zero_grad()
        losses(model, x).mean().backward()
        try:
            agrees(hooks.collect(), grads)
        except NotMeasured:
            found.append(step)
    assert all(step < 10 for step in found)
    assert len({step % 5 for step in found}) == len(found)


def compiled_helper(m, h):
    return torch.compile(linear, backend="aot_eager")(h, m.a.weight)


def scaled_call(m, x):
    return functional_call(m, {k: 0.5 * p for k, p in m.named_parameters()}, (x,)).square().mean(1)


def jacobian_beside(m, x):
    parameters = dict(m.named_parameters())
    jacobian = vmap(jacrev(lambda each: functional_call(m, parameters, (each[None],))[0]))(x)
    return losses(m, x) + jacobian.square().sum((1, 2))


BESIDE = {
    "a tied weight in the loss": lambda m, x: (m(x) @ m.b.weight).square().mean(1),
    "a penalty": lambda m, x: losses(m, x) + 0.05 * m.a.weight.square().sum(),
    "a weight before the model": lambda m, x: losses(m, torch.tanh(linear(x, m.a.weight))),
    "a method other than forward": lambda m, x: m.score(x).square().mean(1),
    "parts of the model": lambda m, x: m.b(m.a(x) @ m.a.weight).square().mean(1),
    "another weight": scaled_call,
    "torch.func": jacobian_beside,
}


def is_refused(steps, start, match):
    """Until `start` all steps are measured, from there on an error; at most one is left out."""
    seen = []
    with pytest.raises(RuntimeError, match=match):
        seen.extend(steps)
    assert start <= len(seen) <= start + 1
    assert all(step < start or isinstance(moments, NotMeasured) for step, moments, _ in seen)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loss_fn", BESIDE.values(), ids=BESIDE)
def test_a_use_beside_the_forward_pass_is_refused(model, loss_fn, start):
    steps = train(model, losses, start + 3, lambda model: loss_fn, start)
    is_refused(steps, start, r"do not add up.*[ab]\.weight|is not the parameter it was")


@pytest.mark.parametrize("start", [0, 2])
def test_a_compiled_helper_is_refused(model, start):
    steps = train(model, losses, start + 3, set_body(compiled_helper), start)
    is_refused(steps, start, r"do not add up.*a\.weight.*in a compiled function")


def hook_on_a(hook):
    return lambda model: model.a.weight.register_hook(hook) and None


HOOKS = {
    "clipping": lambda grad: grad.clamp(-1e-3, 1e-3),
    "a mask": lambda grad: grad * (torch.arange(5) > 2),
    "noise": lambda grad: grad + 0.01 * torch.randn_like(grad),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_that_changes_the_gradient_is_refused_by_name(model, hook, start):
    steps = train(model, losses, start + 3, hook_on_a(hook), start)
    is_refused(steps, start, r"A hook changes the gradient of a\.weight")


def double(parameter):
    parameter.grad.mul_(2)


def test_a_hook_that_changes_the_gradient_when_it_is_complete_is_refused(model):
    def change(model):
        model.a.weight.register_post_accumulate_grad_hook(double)

    is_refused(train(model, losses, 9, change, 5), 5, r"A hook changes the gradient of a\.weight")


def test_a_hook_that_reads_the_gradient_is_no_false_alarm(model):
    seen = []
    change = hook_on_a(lambda grad: seen.append(grad.norm()))
    for _, moments, grads in train(model, losses, 10, change, 3, compare=True):
        agrees(moments, grads, 1e-9)
    assert len(seen) == 7


@pytest.mark.parametrize("change", [
    lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    weight_norm, parametrizations.weight_norm, parametrizations.orthogonal,
    lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones_like(layer.weight))),
], ids=["prune", "weight_norm", "parametrizations.weight_norm", "orthogonal", "parametrize", "new"])
@pytest.mark.parametrize("start", [1, 6])
def test_a_layer_that_changes_is_named_and_measured_when_attached_again(model, change, start):
    model.body = lambda m, h: m.spare(h) + m.table.weight[0]
    steps = train(model, losses, start + 2, lambda model: change(model.a) and None, start)
    is_refused(steps, start, r"(replaced since.*: |^)a\.weight.*attach again")
    hooks = GradSampleHooks(model)
    x = torch.randn(7, 5, dtype=torch.float64)
    model.zero_grad()
    losses(model, x).mean().backward()
    with hooks.paused():  # a pruned model cannot be copied
        of_sample = [
            torch.autograd.grad(losses(model, row[None]).sum(), list(hooks.parameters.values()))
            for row in x]
    grads = {name: torch.stack(rows)
             for name, rows in zip(hooks.parameters, zip(*of_sample, strict=True), strict=True)}
    agrees(hooks.collect(), grads, 1e-9)


def test_the_scheduler_counts_the_step_that_was_left_out(model):
    data = torch.utils.data.TensorDataset(torch.randn(160, 5, dtype=torch.float64))
    loader = AdaptiveDataLoader(data, batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model))
    for step, (x,) in enumerate(loader):
        model.body = TRACED["the weight of a layer"] if step >= 4 else None
        optimizer.zero_grad()
        loss = losses(model, x).mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        loader.batch_size = 15 + step % 2  # what has N rows is settled by batches of unlike size
        if step == 7:
            break
    assert scheduler.diagnostics.dropped == {"a use outside of the layers began": 1}
    assert scheduler.diagnostics.n_measured == 7
