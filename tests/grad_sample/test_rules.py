"""Operations in which parameters meet samples: their rules are exact, without running anything
again; what has no rule is run again."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import GradSampleHooks
from adabatch.grad_sample.functional import traced_op
from tests import oracle
from tests.grad_sample.measuring import TOLERANCE, agrees, backward, close
from tests.grad_sample.same_forward import grads_of_one_forward

N, T, D, V = 5, 3, 4, 6
SHAPES = {
    "token": (1, 1, D), "table": (1, T, D), "long": (T + 2, D), "scale": (D,), "number": (1,),
    "scalar": (), "shift": (D,), "matrix": (D, 2), "square": (D, D), "weight": (2, D),
    "both": (2 * D, D), "bias": (2,), "heads": (2, D, 3), "split": (D, 2, 3), "cube": (2, 3, D),
    "rows": (2, T), "words": (V, D), "levels": (V,), "kernel": (4, D // 2, 2),
    "kernel2": (3, T, 1, 2), "channels": (T,), "frames": (T, D), "low": (2, 1), "high": (1, D),
}


def flat(p, x):
    return x.reshape(-1, x.shape[-1])


RULES = {
    "added": lambda p, x, i: x + p["table"],
    "added on the left": lambda p, x, i: p["table"] + x,
    "a vector": lambda p, x, i: x + p["scale"],
    "a number": lambda p, x, i: torch.add(x, p["number"]),
    "a number without dimensions": lambda p, x, i: x + p["scalar"],
    "in place": lambda p, x, i: (2 * x).add_(p["table"]),
    "with a factor": lambda p, x, i: torch.add(x, p["table"], alpha=2),
    "with a factor on the left": lambda p, x, i: torch.add(p["table"], x, alpha=2),
    "subtracted": lambda p, x, i: x - p["table"],
    "subtracted from": lambda p, x, i: p["scale"] - x,
    "rsub": lambda p, x, i: torch.rsub(x, p["table"]),
    "rsub with a factor": lambda p, x, i: torch.rsub(p["table"], x, alpha=3),
    "isub": lambda p, x, i: (2 * x).__isub__(p["table"]),
    "broadcasting the samples": lambda p, x, i: x[:, :1] + p["table"],
    "sliced": lambda p, x, i: x + p["long"][:T],
    "sliced and expanded": lambda p, x, i: x + p["long"][None, 1 : T + 1].expand(1, -1, -1),
    "one row": lambda p, x, i: x + p["long"][2],
    "expanded, then added": lambda p, x, i: x + p["scale"].expand(len(x), T, D),
    "expanded as the samples": lambda p, x, i: p["table"].expand_as(x) + x,
    "looked up by constants": lambda p, x, i: x + p["long"][torch.tensor([0, 0, 2])],
    "embedded by constants": lambda p, x, i: x + F.embedding(torch.tensor([[2, 1, 2]]), p["long"]),
    "selected by constants": lambda p, x, i: x + p["long"].index_select(0, torch.tensor([4, 3, 4])),
    "turned": lambda p, x, i: x + p["long"][:T].flip(0),
    "doubled": lambda p, x, i: x + 2 * p["table"],
    "permuted and reshaped": lambda p, x, i: x[..., :2] + p["rows"].t().reshape(1, T, 2),
    "split": lambda p, x, i: x[..., :2] + p["table"].chunk(2, -1)[1] - p["table"].split(2, -1)[0],
    "unbound": lambda p, x, i: x + p["cube"].unbind(1)[2][1],
    "cast": lambda p, x, i: x + p["table"].to(x.dtype).contiguous(),
    "used again": lambda p, x, i: (x + p["table"]) * p["scale"] + p["table"],
    "multiplied": lambda p, x, i: x * p["scale"],
    "multiplied on the left": lambda p, x, i: p["table"] * x,
    "multiplied by a number": lambda p, x, i: x * p["number"],
    "multiplied in place": lambda p, x, i: (2 * x).mul_(p["scale"]),
    "imul": lambda p, x, i: (2 * x).__imul__(p["scale"]),
    "multiplied by channels": lambda p, x, i: (
        p["channels"][:, None] * x + p["channels"].view(-1, 1)),
    "multiplied by rows of itself": lambda p, x, i: x * p["token"].expand(len(x), -1, -1),
    "products of parameters": lambda p, x, i: x * (p["scale"] * p["shift"]),
    "exponentials": lambda p, x, i: x * -torch.exp(p["scale"]),
    "divided": lambda p, x, i: x / (p["scale"] + 9),
    "divided in place": lambda p, x, i: (2 * x).div_(p["table"] + 9),
    "divided by the samples": lambda p, x, i: p["table"] / (x.square() + 1),
    "true_divide": lambda p, x, i: torch.true_divide(x, p["number"] + 9),
    "where": lambda p, x, i: torch.where(x.detach() > 0, p["scale"], x),
    "where, on the other side": lambda p, x, i: torch.where(i.unsqueeze(-1) > 2, x, p["table"]),
    "lerp": lambda p, x, i: torch.lerp(x, p["table"], p["scale"].sigmoid()),
    "power": lambda p, x, i: (x.square() + 1) ** p["scale"],
    "maximum": lambda p, x, i: torch.maximum(x, p["table"]),
    "addcmul": lambda p, x, i: torch.addcmul(p["shift"], x, p["scale"], value=2),
    "masked": lambda p, x, i: x.masked_fill(i.unsqueeze(-1) > 2, p["scalar"]),
    "written": lambda p, x, i: written(p, x),
    "concatenated": lambda p, x, i: torch.cat([
        p["token"].expand(len(x), -1, -1), x, p["long"].expand(len(x), -1, -1)], 1),
    "concatenated on the last dimension": lambda p, x, i: torch.cat(
        (x, p["table"].expand(len(x), -1, -1)), dim=-1),
    "a token twice": lambda p, x, i: torch.cat([
        p["token"].expand(len(x), -1, -1), x, p["token"].expand(len(x), 2, -1)], 1),
    "stacked": lambda p, x, i: torch.stack([x, p["token"].expand(len(x), T, D)], 1),
    "linear": lambda p, x, i: F.linear(x, p["weight"], p["bias"]),
    "linear of vectors": lambda p, x, i: F.linear(x[:, 0], p["weight"], p["bias"]),
    "linear, transposed": lambda p, x, i: F.linear(x, p["matrix"].t(), p["bias"]),
    "linear of a slice": lambda p, x, i: F.linear(x, p["both"][D:]) + F.linear(x, p["both"][:D]),
    "linear of a reshaped weight": lambda p, x, i: F.linear(x, p["cube"].view(6, D)),
    "linear of a low rank": lambda p, x, i: F.linear(x, p["low"] @ p["high"]),
    "linear of a normalized weight": lambda p, x, i: F.linear(x, F.normalize(p["weight"], dim=-1)),
    "linear in one dimension": lambda p, x, i: F.linear(flat(p, x), p["weight"], p["bias"]).view(
        len(x), T, 2),
    "a layer in one dimension": lambda p, x, i: (
        flat(p, x) * p["scale"] / (p["shift"] + 9) + p["shift"]).view(x.shape),
    "addmm in one dimension": lambda p, x, i: torch.addmm(
        p["bias"], flat(p, x), p["matrix"], beta=2, alpha=3).view(len(x), T, 2),
    "addmm": lambda p, x, i: torch.addmm(p["bias"], x[:, 0], p["matrix"]),
    "mm": lambda p, x, i: torch.mm(x[:, 0], p["matrix"]),
    "matmul": lambda p, x, i: x @ p["matrix"],
    "matmul, a square": lambda p, x, i: x @ p["square"] + x @ p["square"].T,
    "matmul on the left": lambda p, x, i: p["rows"] @ x,
    "matmul by a vector": lambda p, x, i: x @ p["scale"],
    "a vector by matmul": lambda p, x, i: p["channels"] @ x,
    "matmul of heads": lambda p, x, i: x.unsqueeze(1) @ p["heads"],
    "matmul of heads on the left": lambda p, x, i: p["heads"].mT @ x.mT.unsqueeze(1),
    "bmm": lambda p, x, i: torch.bmm(x, p["matrix"].expand(len(x), -1, -1)),
    "bmm on the left": lambda p, x, i: torch.bmm(p["rows"].expand(len(x), -1, -1), x),
    "baddbmm": lambda p, x, i: torch.baddbmm(
        p["bias"], x, p["matrix"].unsqueeze(0).expand(len(x), -1, -1), alpha=2),
    "einsum": lambda p, x, i: torch.einsum("nti,io->nto", x, p["matrix"]),
    "einsum, transposed": lambda p, x, i: torch.einsum("oi,nti->not", p["weight"], x),
    "einsum of heads": lambda p, x, i: torch.einsum("nti,ihk->nthk", x, p["split"]),
    "einsum of the output's heads": lambda p, x, i: torch.einsum("nti,hki->nhtk", x, p["cube"]),
    "einsum with a label in all": lambda p, x, i: torch.einsum(
        "nti,tj->ntij", x, p["channels"][:, None]),
    "einsum by positions": lambda p, x, i: torch.einsum("nti,ti->nt", x, p["frames"]),
    "einsum of sums": lambda p, x, i: torch.einsum("nti,io->no", x, p["matrix"]),
    "embedding": lambda p, x, i: x + F.embedding(i, p["words"]),
    "embedding with padding": lambda p, x, i: x + F.embedding(i, p["words"], padding_idx=2),
    "embedding in one dimension": lambda p, x, i: x + F.embedding(i.view(-1), p["words"]).view(
        x.shape),
    "embedding of a sample": lambda p, x, i: x[:, 0] + F.embedding(i[:, 0], p["words"]),
    "tied embedding": lambda p, x, i: (x + F.embedding(i, p["words"])) @ p["words"].T,
    "picked": lambda p, x, i: x + p["words"][i],
    "picked numbers": lambda p, x, i: x + p["levels"][i].unsqueeze(-1),
    "picked negative": lambda p, x, i: x + p["words"][i - V],
    "index_select": lambda p, x, i: x[:, 0] + p["words"].index_select(0, i[:, 0]),
    "conv1d": lambda p, x, i: F.conv1d(x.mT, p["kernel"], p["scale"], padding=1, groups=2),
    "conv1d, strided": lambda p, x, i: F.conv1d(
        x.mT, p["kernel"], stride=(2,), dilation=2, groups=2, padding=1),
    "conv2d": lambda p, x, i: F.conv2d(
        x.unsqueeze(2), p["kernel2"], p["channels"], padding="valid"),
    "layer_norm": lambda p, x, i: F.layer_norm(x, (D,), p["scale"], p["shift"], 1e-3),
    "layer_norm of two dimensions": lambda p, x, i: F.layer_norm(x, (T, D), p["frames"]),
    "layer_norm with a bias only": lambda p, x, i: F.layer_norm(x, (D,), None, p["shift"]),
    "layer_norm in one dimension": lambda p, x, i: F.layer_norm(
        flat(p, x), (D,), p["scale"], p["shift"]).view(x.shape),
    "layer_norm of one plus the weight": lambda p, x, i: F.layer_norm(x, (D,), 1 + p["scale"]),
    "rms_norm": lambda p, x, i: F.rms_norm(x, (D,), p["scale"], 1e-3),
    "rms_norm without eps": lambda p, x, i: F.rms_norm(x, (D,), p["scale"]),
    "group_norm": lambda p, x, i: F.group_norm(x.mT, 2, p["scale"], p["shift"]),
}
RUN_AGAIN = {
    "attention with a bias": lambda p, x, i: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], p["frames"] @ p["frames"].T),
    "a kernel that is padded": lambda p, x, i: F.conv1d(
        x.mT, p["kernel"], padding="same", groups=2),
    "a channel of PReLU": lambda p, x, i: F.prelu(x, p["channels"]),
    "batch norm in evaluation mode": lambda p, x, i: F.batch_norm(
        x.mT, torch.zeros(D, dtype=x.dtype), torch.ones(D, dtype=x.dtype), p["scale"], p["shift"]),
    "einsum with dots": lambda p, x, i: torch.einsum("...i,io->...o", x, p["matrix"]),
    "distances": lambda p, x, i: torch.cdist(x, p["long"]),
    "rows not known to be one": lambda p, x, i: x + p["token"].expand(len(x), T, D).exp(),
}


def written(p, x):
    result = x.clone()
    result[:, 1] = p["scale"]
    return result * 2


class Uses(nn.Module):
    """An operation between two layers, and no parameter that the operation does not use."""

    def __init__(self, operation, frozen=()):
        super().__init__()
        used = {}

        class Recording(dict):
            def __missing__(self, name):
                used[name] = None
                self[name] = torch.randn(SHAPES[name])
                return self[name]

        operation(Recording(), torch.randn(N, T, D), torch.randint(V, (N, T)))
        self.layer, self.operation = nn.Linear(D, D), operation
        self.own = nn.ParameterDict({
            name: nn.Parameter(torch.randn(SHAPES[name])) for name in used})
        for name in frozen:
            self.own[name].requires_grad_(False)

    def forward(self, inputs, ids):
        return self.operation(dict(self.own.items()), self.layer(inputs), ids).sin()


def losses(model, batch):
    return (model(*batch).flatten(1) + 0.3).square().sum(1)


def make(operation, dtype=torch.float32, n_samples=N, **options):
    torch.manual_seed(0)
    model = Uses(operation, **options).to(dtype)
    return model, (torch.randn(n_samples, T, D, dtype=dtype), torch.randint(V, (n_samples, T)))


def is_exact(operation, dtype=torch.float32, make=make, **options):
    model, batch = make(operation, dtype)
    grads = oracle.per_sample_grads(model, losses, batch)
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch, losses)
        agrees(hooks.collect(), grads, TOLERANCE[dtype])


@pytest.fixture
def nothing_is_run_again(monkeypatch):
    monkeypatch.setattr(traced_op, "per_sample_grads", None)


@pytest.mark.parametrize(("dtype", "options"), [
    (torch.float32, {}), (torch.float64, {"samples": 3})], ids=str)
@pytest.mark.parametrize("operation", RULES.values(), ids=RULES)
@pytest.mark.usefixtures("nothing_is_run_again")
def test_exact_and_nothing_is_run_again(operation, dtype, options):
    is_exact(operation, dtype, **options)


@pytest.mark.parametrize("options", [{}, {"samples": 3}], ids=str)
@pytest.mark.parametrize("operation", RUN_AGAIN.values(), ids=RUN_AGAIN)
def test_what_has_no_rule_is_run_again(operation, options):
    is_exact(operation, **options)


@pytest.mark.parametrize("n_samples", [2, 3, 4, 6])
@pytest.mark.parametrize("operation", [*RULES.values(), *RUN_AGAIN.values()],
                         ids=[*RULES, *RUN_AGAIN])
def test_exact_where_another_size_is_that_of_the_batch(operation, n_samples):
    """2, T, D and V samples."""
    def other(operation, dtype):
        return make(operation, dtype, n_samples)

    is_exact(operation, make=other)


@pytest.mark.parametrize("frozen", ["scale", "shift"])
@pytest.mark.parametrize("how", ["lerp", "addcmul", "layer_norm", "products of parameters",
                                 "a layer in one dimension"])
@pytest.mark.usefixtures("nothing_is_run_again")
def test_beside_frozen_parameters(how, frozen):
    operation = RULES["group_norm" if how == "lerp" else how]
    is_exact(operation, make=lambda operation, dtype: make(operation, dtype, frozen=[frozen]))


@pytest.mark.parametrize("how", [*RULES][::7])
def test_accumulated(how):
    model, batch = make(RULES[how])
    grads = oracle.per_sample_grads(model, losses, batch)
    hooks = GradSampleHooks(model, accumulate=2)
    for _ in range(2):
        model.zero_grad()
        for part in (slice(3), slice(3, None)):
            (losses(model, [each[part] for each in batch]).sum() / N).backward()
        norms = hooks.collect().sq_norms
    expected = oracle.sq_norms(grads)
    # The factor on each pass's mean loss is the number of passes over N, not that of its samples.
    sizes = torch.tensor([3.0] * 3 + [2.0] * 2).double()
    close(norms, expected * (2 * sizes / N).square(), 1e-5)


@pytest.mark.parametrize("how", ["linear", "a layer in one dimension", "addmm in one dimension",
                                 "layer_norm", "matmul of heads", "embedding", "conv1d", "stacked"])
def test_under_autocast(how):
    model, batch = make(RULES[how])
    with torch.autocast("cpu", torch.bfloat16):
        grads = grads_of_one_forward(model, batch, losses)
        hooks = GradSampleHooks(model)
        for _ in range(2):
            model.zero_grad()
            losses(model, batch).mean().backward()
            close(hooks.collect().sq_norms, oracle.sq_norms(grads), 5e-2)


class Operations(nn.Module):
    """A few operations after each other, with residual connections, and parameters that several of
    them use: a layer without a rule, or, with a layer of its own, a container."""

    def __init__(self, draw, contains):
        super().__init__()
        keeps = [how for how, each in KEEPING_SHAPE.items() if how not in RUN_AGAIN
                 or draw.random() < 0.1]
        self.chosen = [KEEPING_SHAPE[how] for how in draw.choices(keeps, k=draw.randint(2, 5))]
        self.residual = [draw.random() < 0.5 for _ in self.chosen]
        self.inner = nn.Tanh() if contains else torch.tanh
        for name, shape in SHAPES.items():
            trained = draw.random() > 0.1
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2, trained))

    def forward(self, x, ids):
        for operation, residual in zip(self.chosen, self.residual, strict=True):
            found = operation(self._parameters, self.inner(x), ids).sin()
            x = x + found if residual else found
        return x


class Random(nn.Module):
    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.layer = nn.Linear(D, D)
        self.operations = Operations(draw, contains=seed % 2 == 0)
        self.times = 2 if draw.random() < 0.2 else 1

    def forward(self, x, ids):
        x = self.layer(x)
        for _ in range(self.times):
            x = self.operations(x, ids)
        return x


def keeping_shape():
    """The operations that give [N, T, D]."""
    for how, operation in {**RULES, **RUN_AGAIN}.items():
        try:
            own = {name: torch.rand(shape) for name, shape in SHAPES.items()}
            shape = operation(own, torch.rand(N, T, D), torch.randint(V, (N, T))).shape
        except RuntimeError:
            continue
        if shape == (N, T, D):
            yield how, operation


KEEPING_SHAPE = dict(keeping_shape())


def random_model_is_exact(seed):
    def made(seed, dtype):
        torch.manual_seed(seed)
        model, n_samples = Random(seed).to(dtype), random.Random(seed).randint(2, 7)
        return model, (torch.randn(n_samples, T, D, dtype=dtype),
                       torch.randint(V, (n_samples, T)))

    samples = 2 if seed % 3 == 0 else None
    is_exact(seed, torch.float64, make=made, samples=samples)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_models(first):
    for seed in range(first, first + 20):
        random_model_is_exact(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 5100, 100))
def test_many_random_models(first):
    for seed in range(first, first + 100):
        random_model_is_exact(seed)
