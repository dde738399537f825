"""Parameters without a layer of their own: traced to where they meet samples. Every case against
one backward pass per sample, or a clear error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import adabatch
from adabatch import GradSampleHooks
from tests.grad_sample.same_forward import double, exact, outputs_loss

N, T, D = 5, 6, 4


class Around(nn.Module):
    """A Linear layer `inner`, raw parameters `a` and `b`, and whatever the case makes of them."""

    def __init__(self, forward, a=(D,), b=None, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(D, D)
        self.a = nn.Parameter(0.3 * torch.randn(a) + 0.5)
        if b is not None:
            self.b = nn.Parameter(0.3 * torch.randn(b) + 0.5)
        for name, part in parts.items():
            self.add_module(name, part)
        self.case = forward

    def forward(self, inputs):
        return self.case(self, inputs)


def in_place(m, x):
    hidden = m.inner(x)
    hidden += m.a[: x.shape[1]]
    hidden *= m.b
    hidden.add_(m.b)
    return hidden.tanh_()


def in_place_on_samples(m, x):
    hidden = x.clone()
    hidden += m.a
    return m.inner(hidden)


def item_of_samples(m, x):
    hidden = x.clone()
    hidden[:, 0] = m.a
    return m.inner(hidden)


def item_of_zeros(m, x):
    hidden = x.new_zeros(x.shape)
    hidden[:, 0] = m.a
    hidden[:, 1:] = x[:, 1:]
    return m.inner(hidden)


def item_by_mask(m, x):
    hidden = x.clone()
    hidden[x[..., 0] > 0] = m.a
    return m.inner(hidden)


def item_of_parameters(m, x):
    table = torch.zeros(T, D, dtype=x.dtype)
    table[2:] = m.a
    return m.inner(x + table)


CASES = {
    "layer scale": (lambda m, x: m.inner(x) * m.a, {}),
    "reflected": (lambda m, x: 1 - m.a - m.inner(x), {}),
    "on the inputs": (lambda m, x: m.inner(x * m.a), {}),
    "class token, expand": (lambda m, x: m.inner(torch.cat([m.a.expand(len(x), -1, -1), x], 1)),
                            {"a": (1, 1, D)}),
    "class token, repeat": (lambda m, x: m.inner(torch.cat([m.a.repeat(len(x), 1, 1), x], 1)),
                            {"a": (1, 1, D)}),
    "class token, stack": (lambda m, x: m.inner(torch.stack([m.a] * len(x)))[:, None] + x, {}),
    "class token, cat": (lambda m, x: m.inner(torch.cat([m.a] * len(x)))[:, None] + x,
                         {"a": (1, D)}),
    "class token, zeros": (lambda m, x: m.inner(torch.zeros(len(x), D, dtype=x.dtype) + m.a)[
        :, None] + x, {}),
    "position table": (lambda m, x: m.inner(x + m.a[: x.shape[1]]), {"a": (9, D)}),
    "in place": (in_place, {"a": (9, D), "b": (D,)}),
    "in place on samples": (in_place_on_samples, {}),
    "item of samples": (item_of_samples, {}),
    "item of zeros": (item_of_zeros, {}),
    "item by mask": (item_by_mask, {}),
    "item of parameters": (item_of_parameters, {}),
    "where": (lambda m, x: m.inner(torch.where(x[..., :1] > 0, m.a, x)), {}),
    "two operations": (lambda m, x: torch.sigmoid(m.inner(x) * m.a) + x @ torch.diag(m.a), {}),
    "derived": (lambda m, x: m.inner(x * torch.exp(-m.a.exp())) * torch.exp(-m.a), {}),
    "functional linear": (lambda m, x: F.linear(m.inner(x), m.a, m.b), {"a": (3, D), "b": (3,)}),
    "functional use of a layer's weight": (
        lambda m, x: m.inner(x).tanh() @ m.inner.weight * m.a, {}),
    "einsum": (lambda m, x: torch.einsum("ntd,kd->nkt", m.inner(x), m.a), {"a": (3, D)}),
    "softmax over layers": (lambda m, x: sum(
        w * h for w, h in zip(m.a.softmax(0), [x, m.inner(x), x.tanh()], strict=True)),
        {"a": (3,)}),
    "scalar": (lambda m, x: m.inner(x) * m.a.exp(), {"a": ()}),
    "chunks": (lambda m, x: m.inner(x) * m.a.chunk(2)[0] + m.a.chunk(2)[1], {"a": (2 * D,)}),
    "rows in a loop": (lambda m, x: m.inner(torch.stack([
        x[:, t] + row for t, row in enumerate(m.a)], 1)), {"a": (T, D)}),
    "functional embedding": (lambda m, x: m.inner(F.embedding(torch.arange(T), m.a) + x),
                             {"a": (9, D)}),
    "embedding of positions": (lambda m, x: m.inner(m.table(torch.arange(T)) + x * m.a),
                               {"table": nn.Embedding(9, D)}),
    "embedding of expanded positions": (lambda m,
                                        x: m.inner(
                                            m.table(torch.arange(T)[None].expand(N, -1)) + x * m.a),
                                            {"table": nn.Embedding(9, D)}),
    "layers on a table": (lambda m, x: m.inner(x) + m.norm(m.linear(m.a)),
                          {"a": (T, D), "linear": nn.Linear(D, D), "norm": nn.LayerNorm(D)}),
    "weights by a layer": (lambda m, x: m.inner(x * m.a) @ m.linear(torch.ones(
        D, dtype=x.dtype)).view(D, D), {"linear": nn.Linear(D, D * D)}),
    "without a gradient in one place": (lambda m, x: m.inner(x) * m.a + x * m.a.detach(), {}),
    "branch": (lambda m, x: m.inner(x) * m.a if x.sum() > 1e9 else m.inner(x) + m.a, {}),
}


@pytest.mark.parametrize(("forward", "options"), CASES.values(), ids=CASES)
def test_exact(forward, options):
    torch.manual_seed(1)
    exact(Around(forward, **options), torch.randn(N, T, D))


def rows(m, x):
    return m.inner(x).flatten(1)[:, :D]


# Operations whose backward formula reads their result, or one of their results.
READ_THEIR_RESULT = {
    "cdist": lambda m, x: torch.cdist(rows(m, x), m.a),
    "pairwise_distance": lambda m, x: F.pairwise_distance(rows(m, x), m.a[0])[:, None],
    "cosine_similarity": lambda m, x: F.cosine_similarity(rows(m, x), m.a[0])[:, None],
    "hypot": lambda m, x: torch.hypot(rows(m, x), m.a[0]),
    "float_power": lambda m, x: torch.float_power(rows(m, x).exp(), m.a[0]),
    "pow": lambda m, x: rows(m, x).exp() ** m.a[0],
    "addcdiv": lambda m, x: torch.addcdiv(rows(m, x), m.a[0], m.a[1].exp()),
    "logaddexp": lambda m, x: torch.logaddexp(rows(m, x), m.a[0]),
    "softmax of a sum": lambda m, x: F.gumbel_softmax(rows(m, x) * m.a[0] + 1, dim=-1) * 0 + m.a[0]
    + rows(m, x),
    "maximum": lambda m, x: torch.maximum(rows(m, x), m.a[0]),
    "atan2": lambda m, x: torch.atan2(rows(m, x), m.a[0]),
    "linalg.solve": lambda m, x: torch.linalg.solve(
        m.a + 3 * torch.eye(D), rows(m, x)[..., None])[..., 0],
    "linalg.solve_triangular": lambda m, x: torch.linalg.solve_triangular(
        m.a + 3 * torch.eye(D), rows(m, x)[..., None], upper=True)[..., 0],
    "two results": lambda m, x: sum(torch.linalg.slogdet(
        rows(m, x)[:, None] * m.a + 3 * torch.eye(D)))[:, None],
    "attention": lambda m, x: F.scaled_dot_product_attention(
        m.inner(x), m.a[None].expand(len(x), -1, -1), x[:, :D]).flatten(1),
}


@pytest.mark.parametrize("then", [lambda y: y, lambda y: y.mul_(2).add_(1)],
                         ids=["", "changed in place"])
@pytest.mark.parametrize("operation", READ_THEIR_RESULT.values(), ids=READ_THEIR_RESULT)
def test_operations_whose_backward_formula_reads_their_result(operation, then):
    torch.manual_seed(1)
    exact(Around(lambda m, x: then(operation(m, x).clone()), a=(D, D)), torch.randn(N, T, D))


@pytest.mark.parametrize("name", ["position table", "in place", "class token, repeat",
                                  "item by mask", "embedding of positions"])
def test_exact_on_a_subset(name):
    forward, options = CASES[name]
    torch.manual_seed(1)
    moments = exact(Around(forward, **options), torch.randn(N, T, D), samples=2)
    assert moments.n_measured == 2


COINCIDENCES = ["position table", "class token, expand", "class token, zeros", "layer scale",
                "embedding of positions", "embedding of expanded positions"]


@pytest.mark.parametrize("checked", [False, True], ids=["assumed", "checked"])
@pytest.mark.parametrize("name", COINCIDENCES)
def test_exact_where_the_sequence_is_as_long_as_the_batch(name, checked):
    global T
    forward, options = CASES[name]
    torch.manual_seed(1)
    before, T = T, N
    try:
        model, batch = Around(forward, **options), (torch.randn(N, N, D),)
        layout = adabatch.check(model.double(), double(batch), outputs_loss,
                                verbose=False) if checked else None
        exact(model, *batch, layout=layout)
    finally:
        T = before


def test_a_constant_table_as_long_as_the_batch_is_found_by_check():
    torch.manual_seed(1)
    model = Around(lambda m, x: m.inner(x * m.a) + m.linear(torch.ones(N, D, dtype=x.dtype)),
                   linear=nn.Linear(D, D)).double()
    batch = (torch.randn(N, N, D).double(),)
    exact(model, *batch, layout=adabatch.check(model, batch, outputs_loss, verbose=False))


REFUSED = {
    "samples last": (lambda m, x: torch.einsum("ntd,kd->ktn", m.inner(x), m.a).permute(2, 0, 1),
                     {"a": (3, D)}, "do not lie along the first dimension"),
    "time first": (lambda m, x: (m.inner(x).transpose(0, 1) * m.a).transpose(0, 1), {},
                   "do not lie along the first dimension"),
    "flattened, no rule": (lambda m, x: F.bilinear(*[m.inner(x).flatten(0, 1)] * 2, m.a).view(
        N, T, 3), {"a": (3, D, D)}, "do not lie along the first dimension"),
    "dropout of a parameter": (lambda m, x: m.inner(x * F.dropout(m.a, 0.5)), {},
                               "draws random numbers"),
}


@pytest.mark.parametrize(("forward", "options", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(forward, options, match):
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match=match):
        exact(Around(forward, **options), torch.randn(N, T, D))


def test_a_write_to_chosen_samples_is_refused():
    def forward(m, x):
        hidden = m.inner(x)
        hidden[0] = m.a
        return hidden

    with pytest.raises(RuntimeError, match="written to chosen samples only"):
        exact(Around(forward), torch.randn(N, T, D))


def test_a_buffer_that_changed_after_it_met_a_parameter_is_refused():
    model = Around(lambda m, x: m.inner(x) * m.case_of_buffer())
    model.register_buffer("steps", torch.ones(D))

    def scaled():
        # a recipe of the parameter and the buffer
        scale = torch.exp(model.a.detach() * 0) * model.a + model.steps
        model.steps.add_(1)
        return scale

    model.case_of_buffer = scaled
    with pytest.raises(RuntimeError, match="has changed in place since"):
        exact(model, torch.randn(N, T, D))


LEARNED_STATES = {
    "GRUCell": (nn.GRUCell(D, D), (D,), lambda m,
                x: m.cell(x[:, 1], m.cell(x[:, 0], m.a.expand(len(x), -1)))),
    "LSTM": (nn.LSTM(D, D, batch_first=True), (1, 1, D), lambda m,
             x: m.cell(x, (m.a.expand(1, len(x), D).contiguous(), m.a.repeat(1, len(x), 1)))[0]),
    "pooling query": (nn.MultiheadAttention(D, 2, dropout=0.2, batch_first=True), (1, 1, D),
                      lambda m, x: m.cell(m.a.repeat(len(x), 1, 1), x, x)[0]),
    "Linear": (nn.Linear(D, D), (1, 1, D), lambda m, x: x + m.cell(m.a.expand(len(x), -1, -1))),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize(("cell", "shape", "forward"), LEARNED_STATES.values(), ids=LEARNED_STATES)
def test_learned_rows_given_to_layers(cell, shape, forward, samples):
    torch.manual_seed(1)
    exact(Around(lambda m, x: m.inner(forward(m, x)), a=shape, cell=cell), torch.randn(N, T, D),
          samples=samples)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("shape", [(1, 2, T, T), (T, T)], ids=["4 dimensions", "2 dimensions"])
def test_a_learned_attention_bias_with_dropout(shape, samples):
    """As T5 has it: the attention draws its dropout and cannot be run again, so that the bias gets
    a row for each sample before."""

    def forward(m, x):
        heads = m.inner(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(
            heads, heads, heads, attn_mask=m.a * 2, dropout_p=0.3).transpose(1, 2)

    torch.manual_seed(1)
    model = Around(forward, a=shape)
    if len(shape) == 2:
        with pytest.raises(RuntimeError, match="draws random numbers"):
            exact(model, torch.randn(N, T, D), samples=samples)
    else:
        exact(model, torch.randn(N, T, D), samples=samples)


REPARAMETRIZED = {
    "weight norm, by hooks": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, by hooks": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", REPARAMETRIZED.values(), ids=REPARAMETRIZED)
def test_reparametrized_layers(wrap, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), wrap(nn.Linear(D, N)), nn.Tanh(),
                          wrap(nn.Linear(N, 2))).train(training)
    exact(model, torch.randn(N, D))
    images = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.ReLU(inplace=True),
                           wrap(nn.Conv2d(4, 2, 3)), nn.Flatten()).train(training)
    exact(images, torch.randn(N, 3, 6, 6))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(D, D), nn.Parameter(torch.randn(D))
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.2, batch_first=True)

    def forward(self, inputs):
        hidden = self.attention(inputs, inputs, inputs, need_weights=False)[0]
        return inputs + self.linear(hidden).tanh() * self.scale


def test_checkpointed_blocks_with_traced_parameters():
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(), Block()])

    def forward(m, x):
        x = x + m.a[: x.shape[1]]
        for block in m.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return m.inner(x)

    exact(Around(forward, a=(9, D), blocks=blocks), torch.randn(N, T, D))


def all_in_place(m, x):
    hidden = m.inner(x)
    hidden *= m.a
    hidden += m.a
    hidden[:, 0] = m.a
    return hidden


CHECKPOINTED = {
    "layer scale": lambda m, x: m.inner(x) * m.a,
    "before the layer": lambda m, x: m.inner(x * m.a),
    "no layer": lambda m, x: torch.tanh(x * m.a) + m.a.exp(),
    "in place": all_in_place,
    "a table of positions": lambda m, x: m.inner(x * m.a + m.table(torch.arange(T))),
    "functional": lambda m, x: F.linear(x, m.inner.weight) * m.a,
    "attention": lambda m, x: F.scaled_dot_product_attention(
        m.inner(x), x, x * m.a, dropout_p=0.3),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("function", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_parameters_in_checkpointed_functions(function, samples):
    model = Around(lambda m, x: m.head(checkpoint(
        lambda y: function(m, m.first(y)), x, use_reentrant=False)),
        table=nn.Embedding(9, D), head=nn.Linear(D, 2), first=nn.Linear(D, D))
    torch.manual_seed(1)
    exact(model, torch.randn(N, T, D), samples=samples)


def test_parts_called_directly_raise_with_the_cause():
    model = Around(lambda m, x: None, blocks=nn.ModuleList([Block()]))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.scale.*parts of the model are called"):
        exact(model, torch.randn(N, T, D), loss_fn=lambda m,
              batch: outputs_loss(m.blocks[0], batch))


def test_inputs_without_a_tensor_raise_with_the_cure():
    model = Around(lambda m, x: m.inner(torch.ones(3, D) * m.a))
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="number of samples, which measuring a needs"):
        model("three")
