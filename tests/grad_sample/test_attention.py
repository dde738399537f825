"""nn.MultiheadAttention and the transformer layers made of it, dropout included, against one
backward pass per sample under the same draws."""

import pytest
import torch
from torch import nn

import adabatch
from adabatch import GradSampleHooks
from tests.grad_sample.same_forward import double, exact, outputs_loss

N, T, S, E = 5, 3, 4, 8


class Attention(nn.Module):
    """Returns output and attention weights side by side, so that both carry a gradient."""

    def __init__(self, need_weights=True, average=True, batch_first=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=batch_first, **options)
        self.options = {"need_weights": need_weights, "average_attn_weights": average}

    def forward(self, query, key, value, padding=None):
        output, weights = self.attention(
            query, key, value, key_padding_mask=padding, **self.options)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)


def padding():
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, 2:] = mask[3, 1:] = True
    return mask


OPTIONS = {
    "default": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average": False},
    "dropout": {"dropout": 0.3},
    "dropout, no weights": {"dropout": 0.3, "need_weights": False},
    "dropout, each head": {"dropout": 0.3, "average": False},
    "no bias": {"bias": False},
    "zero attention": {"add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 5, "dropout": 0.2},
    "other widths, no bias": {"kdim": 6, "vdim": 5, "bias": False},
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_attention(options, samples):
    torch.manual_seed(0)
    model = Attention(**options)
    exact(model, torch.randn(N, T, E), torch.randn(N, S, options.get("kdim", E)),
          torch.randn(N, S, options.get("vdim", E)), padding(), samples=samples)


class SelfAttention(nn.Module):
    def __init__(self, call, **options):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(E, 2, batch_first=True, **options), call

    def forward(self, x):
        return self.call(self.attention, x)


def causal(attention, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def mask_of_each_sample(attention, x):
    mask = torch.zeros(2 * len(x), x.shape[1], x.shape[1], dtype=x.dtype)
    mask[:, :, 3:] = -1e9
    mask[0] = 0
    return attention(x, x, x, attn_mask=mask)[0]


CALLS = {
    "self": lambda attention, x: attention(x, x, x)[0],
    "twice": lambda attention, x: attention(*[attention(x, x, x, need_weights=False)[0]] * 3)[0],
    "another query": lambda attention, x: attention(x.tanh(), x, x)[0],
    "keywords": lambda attention, x: attention(key=x, query=x, value=x)[0],
    "causal": causal,
    "mask of each sample": mask_of_each_sample,
    "weights only": lambda attention, x: attention(x, x, x)[1],
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_self_attention(call, dropout, samples):
    torch.manual_seed(0)
    exact(SelfAttention(call, dropout=dropout), torch.randn(N, 6, E), samples=samples)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(E, 2, 1, 1, 16, batch_first=True)

    def forward(self, source, target):
        return self.transformer(source, target)


def encoder(layers=1, **options):
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, **options)
    return nn.Sequential(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
                         nn.Linear(E, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [6, N], ids=["T", "T = N"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoders_with_their_default_dropout(norm_first, length, training):
    torch.manual_seed(0)
    exact(encoder(2, norm_first=norm_first).train(training), torch.randn(N, length, E))


def test_a_whole_transformer():
    torch.manual_seed(0)
    exact(EncoderDecoder(), torch.randn(N, 6, E), torch.randn(N, 4, E))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(E, 2, 16), nn.Linear(E, 2)

    def forward(self, x):
        return self.head(self.layer(x)).transpose(0, 1)


@pytest.mark.parametrize("length", [6, N], ids=["T", "T = N"])
def test_time_first(length):
    """Where the sequence is as long as the batch, only check() tells them apart."""
    torch.manual_seed(0)
    model, batch = TimeFirst().double(), double((torch.randn(length, N, E),))
    layout = adabatch.check(model, batch, outputs_loss, verbose=False)
    exact(model, *batch, layout=layout)


def test_time_first_cross_attention():
    torch.manual_seed(0)
    model = Attention(batch_first=False, dropout=0.3)
    batch = double((torch.randn(T, N, E), torch.randn(S, N, E), torch.randn(S, N, E), padding()))
    exact(model, *batch)


def test_bfloat16_autocast():
    torch.manual_seed(0)
    exact(encoder(2), torch.randn(N, 6, E), rtol=3e-2,
          around=lambda: torch.autocast("cpu", torch.bfloat16))


def test_frozen_parameters_are_left_out():
    torch.manual_seed(0)
    model = encoder()
    attention = model[0].layers[0].self_attn
    attention.in_proj_bias.requires_grad_(False)
    attention.out_proj.weight.requires_grad_(False)
    exact(model, torch.randn(N, 6, E))


def test_trainable_bias_kv_is_refused():
    with pytest.raises(ValueError, match="bias_k and bias_v are appended"):
        GradSampleHooks(nn.MultiheadAttention(E, 2, add_bias_kv=True))


def test_a_query_without_a_batch_is_refused():
    model = nn.MultiheadAttention(E, 2)
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="without a batch dimension"):
        model(*[torch.randn(6, E)] * 3)


def test_compiled_dropout_is_refused():
    """A compiled graph draws its own random numbers."""
    torch._dynamo.reset()
    model = nn.MultiheadAttention(E, 2, dropout=0.2, batch_first=True)
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="cannot be drawn again when it is compiled"):
        torch.compile(model, backend="aot_eager")(*[torch.randn(N, 6, E)] * 3)
    torch._dynamo.reset()
