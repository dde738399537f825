"""check() must find the layout that each model was built to have."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from adabatch import check
from tests.check.models import (
    Attention,
    ClassToken,
    D,
    Positions,
    Recurrent,
    Stack,
    T,
    inputs_for,
    square_loss,
)

LAYOUTS = ("batch_first", "batch_second", "flat_batch_major", "flat_time_major")


def layouts(report):
    return {name: layout.value for name, layout in report.layouts.items()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "samples", [2, 3, 8, 11]
)  # T is 3: as many positions as samples must not confuse; 11 are cut down to 8
@pytest.mark.parametrize("model_type", [Stack, ClassToken])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_and_norm(layout, model_type, samples):
    report = check(model_type(layout), inputs_for(layout, samples), square_loss, verbose=False)
    assert layouts(report) == dict.fromkeys(("first", "norm", "last"), layout)
    assert str(report.batch_size_source) == f"inputs.shape[{int(layout == 'batch_second')}]"
    assert report.n_samples == min(samples, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_precision(layout, dtype):
    report = check(
        Stack(layout).to(dtype), inputs_for(layout, 5).to(dtype), square_loss, verbose=False
    )
    assert layouts(report) == dict.fromkeys(("first", "norm", "last"), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_without_cutting_the_batch(layout):
    """A loss that only works for this batch size: the rows alone decide."""
    samples = T

    def loss_fn(model, inputs):
        return model(inputs).square().reshape(samples, -1).sum(1)

    assert layouts(
        check(Stack(layout), inputs_for(layout, samples), loss_fn, verbose=False)
    ) == dict.fromkeys(("first", "norm", "last"), layout)


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("positions", [3, 5, 10])  # 5 samples: fewer, as many, twice as many
def test_position_embedding_without_a_batch_dimension_is_shared(leading, positions):
    report = check(
        Positions(leading, positions), torch.randn(5, positions, D), square_loss, verbose=False
    )
    assert layouts(report) == {"table": "shared", "last": "batch_first"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("hidden_only", [True, False])
def test_recurrent_layers(kind, batch_first, hidden_only):
    layout = "batch_first" if batch_first else "batch_second"
    report = check(
        Recurrent(kind, batch_first, hidden_only), inputs_for(layout, 3), square_loss, verbose=False
    )
    assert layouts(report) == {"rnn": layout, "head": "batch_first"}
    assert report["rnn"].n_parameters == sum(
        parameter.numel() for parameter in kind(D, 5).parameters()
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_counts_its_output_projection_and_keeps_its_dropout_mask(batch_first):
    layout = "batch_first" if batch_first else "batch_second"
    report = check(Attention(batch_first), inputs_for(layout, 3), square_loss, verbose=False)
    assert layouts(report) == {"attention": layout, "head": layout}
    assert report["attention"].n_parameters == sum(
        parameter.numel() for parameter in nn.MultiheadAttention(D, 2).parameters()
    )
    assert "mixes" not in report["attention"].reason


def test_dict_and_tuple_inputs_keyword_call_and_dict_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(6, D), nn.Linear(D, 2)

        def forward(self, features, *, ids):
            return {"scores": (self.head(torch.tanh(self.words(ids) + features)), None)}

    def loss_fn(model, batch):
        inputs, (weights,) = batch
        return (
            model(inputs["features"], ids=inputs["ids"])["scores"][0].square().mean((0, 2))
        ) * weights

    batch = {"features": torch.randn(T, 10, D), "ids": torch.randint(6, (T, 10))}, [torch.rand(10)]
    report = check(Model(), batch, loss_fn, verbose=False)
    assert layouts(report) == {"words": "batch_second", "head": "batch_second"}
    assert str(report.batch_size_source) == "features.shape[1]"
    assert report.batch_size_source.read((torch.zeros(T, 4, D),), {}) == 4


def test_integer_inputs_with_as_many_positions_as_samples():
    model = nn.Sequential(nn.Embedding(6, D), nn.Tanh(), nn.Linear(D, 2))
    report = check(
        model,
        torch.randint(6, (5, 5)),
        lambda model, ids: model(ids).square().mean((0, 2)),
        verbose=False,
    )
    assert set(layouts(report).values()) == {"batch_second"}
    assert report.batch_size_source.dim == 1


def test_one_position_counts_as_batch_first():
    assert (
        layouts(check(Stack("flat_time_major"), torch.randn(4, 1, D), square_loss, verbose=False))[
            "first"
        ]
        == "batch_first"
    )


def test_a_layer_called_twice_has_one_layout_or_is_refused():
    class Twice(nn.Module):
        def __init__(self, transpose):
            super().__init__()
            self.layer, self.transpose = nn.Linear(D, D), transpose

        def forward(self, inputs):
            once = torch.tanh(self.layer(inputs))
            return (
                self.layer(once.transpose(0, 1)).transpose(0, 1)
                if self.transpose
                else self.layer(once)
            )

    assert layouts(check(Twice(False), torch.randn(4, T, D), square_loss, verbose=False)) == {
        "layer": "batch_first"
    }
    refused = check(Twice(True), torch.randn(4, T, D), square_loss, verbose=False)
    assert "different layouts: batch_first and batch_second" in refused.refused["layer"]


def test_rows_in_no_known_order_are_refused_as_such():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, 2)

        def forward(self, inputs):
            order = torch.randperm(inputs.shape[0] * T, generator=torch.Generator().manual_seed(1))
            return self.layer(inputs.flatten(0, 1)[order])[order.argsort()].unflatten(0, (-1, T))

    report = check(Interleaved(), torch.randn(4, T, D), square_loss, verbose=False)
    assert "none of the known layouts" in report.refused["layer"]


def test_packed_sequences_are_refused_with_the_fix():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(D, 2, batch_first=True)

        def forward(self, inputs):
            return pad_packed_sequence(
                self.rnn(pack_padded_sequence(inputs, [3, 2, 2], batch_first=True))[0],
                batch_first=True,
            )[0]

    report = check(Packed(), torch.randn(3, T, D), square_loss, verbose=False)
    assert "pad the sequences" in report.refused["rnn"]


def test_container_that_owns_parameters_and_lists_of_parameters():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.scales, self.layer = (
                nn.Parameter(torch.randn(1, 1, D)),
                nn.ParameterList([torch.randn(D), torch.randn(D)]),
                nn.Linear(D, D),
            )

        def forward(self, inputs):
            tokens = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], 1)
            return self.layer(tokens * self.scales[0]) * self.scales[1]

    report = check(nn.Sequential(Tokens()), torch.randn(4, T, D), square_loss, verbose=False)
    assert layouts(report) == {"0": "batch_first", "0.layer": "batch_first"}
    assert (report["0"].n_parameters, report["0.layer"].n_parameters) == (3 * D, D * D + D)
    assert not any("outside" in reason for reason in report.refused.values())


def test_parametrized_layer_answers_for_its_parametrizations():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(D, 3)), nn.Tanh(), nn.Linear(3, 2)
    )
    report = check(model, torch.randn(5, D), square_loss, verbose=False)
    assert [row.name for row in report.rows] == ["0", "2"]
    assert report["0"].n_parameters == 3 * D + 3 + 3


def test_activation_checkpointing_and_compiled_model():
    class Checkpointed(Stack):
        def forward(self, inputs):
            return torch.utils.checkpoint.checkpoint(super().forward, inputs, use_reentrant=False)

    assert set(
        layouts(
            check(
                Checkpointed("batch_second"),
                inputs_for("batch_second", 3),
                square_loss,
                verbose=False,
            )
        ).values()
    ) == {"batch_second"}
    compiled = torch.compile(Stack("flat_time_major"), backend="eager")
    assert set(
        layouts(check(compiled, torch.randn(3, T, D), square_loss, verbose=False)).values()
    ) == {"flat_time_major"}
