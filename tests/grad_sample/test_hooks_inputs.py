"""Unusual inputs: sparse, complex, empty ones; expected values come from dense, whole batches."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import adabatch
from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, make_batch, measure, squared_error

SPARSE = {"coo": torch.Tensor.to_sparse_coo, "csr": torch.Tensor.to_sparse_csr,
          "csc": torch.Tensor.to_sparse_csc}


class Product(nn.Module):
    """x W + b, in operations: without a rule where it is a layer of its own."""

    def __init__(self, function, head=True):
        super().__init__()
        self.function, self.head = function, nn.Linear(3, 3) if head else None
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, inputs):
        outputs = self.function(inputs, self.weight) + self.bias
        return outputs if self.head is None else self.head(outputs)


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("options", [
    {}, {"samples": 3}, {"statistics": ["inner_products"]}, {"statistics": ["second_moment"]}],
    ids=str)
@pytest.mark.parametrize("make", [
    lambda: nn.Linear(4, 3), lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3)),
    lambda: Product(torch.sparse.mm), lambda: Product(lambda x, w: nn.functional.linear(x, w.T)),
    lambda: nn.Sequential(Product(torch.matmul, head=False))],
    ids=["linear", "two", "mm", "functional", "run again"])
@pytest.mark.filterwarnings("ignore:Sparse C")
def test_sparse_inputs_are_exact(form, options, make):
    torch.manual_seed(0)
    model, (inputs, targets) = make(), make_batch()
    inputs = inputs * (torch.rand_like(inputs) > 0.5)

    def losses(model, batch):
        return squared_error(lambda inputs: model(SPARSE[form](inputs)), batch)

    grads = oracle.per_sample_grads(model, squared_error, (inputs, targets))
    agrees(measure(model, (inputs, targets), losses, **options), grads)


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse C")
def test_check_takes_sparse_batches(form):
    for samples in (6, 20):
        report = adabatch.check(
            nn.Linear(4, 3), SPARSE[form](torch.randn(samples, 4)),
            lambda model, inputs: model(inputs).square().sum(1), verbose=False)
        assert report.ok
        assert report[""].error < 1e-5


class Spectral(nn.Module):
    """A real signal, its spectrum changed by a parameter, and back."""

    def __init__(self, change, *shape, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.change, self.body, self.head = change, nn.Linear(4, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(*shape, dtype=dtype))

    def forward(self, inputs):
        spectrum = torch.fft.rfft(self.body(inputs))
        return self.head(torch.fft.irfft(self.change(spectrum, self.weight), n=6))


COMPLEX = {
    "gain": (lambda x, w: x * w, 4),
    "gain first": (lambda x, w: w * x, 4),
    "offset": (lambda x, w: x + w, 4),
    "complex gain": (lambda x, w: x * torch.view_as_complex(w), 4, 2),
    "complex offset": (lambda x, w: x + torch.view_as_complex(w), 4, 2),
    "modes": (lambda x, w: torch.einsum("ni,io->no", x, torch.view_as_complex(w)), 4, 4, 2),
    "parts": (lambda x, w: x * torch.complex(w[0], w[1]), 2, 4),
    "phase": (lambda x, w: x * torch.exp(1j * w), 4),
}


@pytest.mark.parametrize("change", COMPLEX)
@pytest.mark.parametrize("samples", [None, 3])
def test_real_parameters_that_meet_complex_values_are_exact(change, samples):
    model, batch = Spectral(*COMPLEX[change]), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch, samples=samples), grads)


@pytest.mark.parametrize(("make", "name"), [
    (lambda: Spectral(lambda x, w: x * w, 4, dtype=torch.cfloat), "weight"),
    (lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.cfloat)), "0.weight"),
    (lambda: nn.Sequential(nn.Conv1d(1, 3, 2, dtype=torch.cfloat)), "0.bias")],
    ids=["spectral", "linear", "conv"])
def test_complex_parameters_are_refused_by_name(make, name):
    model = make()
    with pytest.raises(ValueError, match=rf"{name} is complex: .*view_as_complex.*ignore="):
        GradSampleHooks(model)


def test_check_refuses_a_complex_parameter_and_both_fixes_work():
    wrong, batch = Spectral(lambda x, w: x * w, 4, dtype=torch.cfloat), make_batch()
    report = adabatch.check(wrong, batch, squared_error, verbose=False)
    assert list(report.refused) == [""]
    assert "weight is complex" in report.refused[""]
    right = Spectral(*COMPLEX["complex gain"])
    right.load_state_dict({name: torch.view_as_real(value) if value.is_complex() else value
                           for name, value in wrong.state_dict().items()})
    grads = oracle.per_sample_grads(right, squared_error, batch)
    agrees(measure(right, batch), grads)
    assert adabatch.check(right, batch, squared_error, verbose=False).ok
    del grads["weight"]
    agrees(measure(wrong, batch, ignore=["weight"]), grads)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 3, batch_first=True)

    def forward(self, inputs):
        return self.rnn(inputs.unsqueeze(2))[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(1, 1, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = inputs.unsqueeze(2)
        return self.head(self.attention(hidden, hidden, hidden)[0].squeeze(2))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.points = nn.Bilinear(4, 4, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, inputs):
        return torch.cdist(self.pair(inputs, inputs), self.points)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.PReLU()), Recurrent, Attention,
    Pairs, lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4))],
    ids=["rules", "recurrent", "attention", "run again and traced", "conv"])
@pytest.mark.parametrize("empty_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"statistics": ["inner_products"]}], ids=str)
def test_an_empty_micro_batch_adds_nothing(make, empty_first, options):
    torch.manual_seed(0)
    model, batch = make(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction="sum", accumulate=2, **options)
    for samples in ((0, 8) if empty_first else (8, 0)):
        backward(model, [each[:samples] for each in batch], loss_reduction="sum")
    agrees(hooks.collect(), grads)
    model.zero_grad()
    for _ in range(2):
        backward(model, [each[:0] for each in batch], loss_reduction="sum")
    empty = hooks.collect()
    with pytest.raises(ValueError, match="at least 2 samples, got a batch of 0"):
        print(empty.variance_trace)


class Dropping(nn.Module):
    """Leaves out the samples whose first input is negative, in some place."""

    def __init__(self, place):
        super().__init__()
        torch.manual_seed(0)
        self.place, self.first, self.last = place, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        keep = inputs[:, 0] > 0
        hidden = self.first(inputs[keep] if self.place == "inputs" else inputs)
        if self.place == "between":
            hidden = hidden[keep]
        if self.place == "back":
            outputs = hidden.new_zeros(len(inputs), 3)
            outputs[keep] = self.last(hidden[keep])
            return outputs
        return self.last(hidden)


def kept_losses(model, batch):
    """Σ over the outputs for kept samples, 0 of others."""
    losses = model(batch[0]).square().sum(1)
    return losses * (batch[0][:, 0] > 0)


@pytest.mark.parametrize("place", ["inputs", "between", "back"])
def test_samples_left_out_in_the_model_are_refused_and_the_fix_works(place):
    model, batch = Dropping(place), make_batch(9)
    batch[0][:, 0] = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, -1, 1])
    with pytest.raises(RuntimeError, match="keep their rows and set their losses to 0"):
        measure(model, batch, lambda model, batch: model(batch[0]).square().sum(1))
    right = Dropping("nowhere")
    grads = oracle.per_sample_grads(right, kept_losses, batch)
    agrees(measure(right, batch, kept_losses), grads)
    assert adabatch.check(right, batch, kept_losses, verbose=False).ok


@pytest.mark.parametrize("options", [{}, {"samples": 4}, {"statistics": ["inner_products"]}],
                         ids=str)
def test_losses_of_chosen_rows_count_the_others_as_zero(options):
    """The mean over k of N rows is that over N of N/k times them, and of zeros."""
    model, batch, chosen = Dropping("nowhere"), make_batch(9), torch.tensor([0, 2, 3, 7])

    def losses(model, batch):
        return model(batch[0]).square().sum(1)

    factors = torch.zeros(9).index_fill(0, chosen, 9 / len(chosen))
    grads = {name: grad * factors.view(9, *[1] * (grad.dim() - 1))
             for name, grad in oracle.per_sample_grads(model, losses, batch).items()}
    agrees(measure(model, batch, lambda *each: losses(*each)[chosen], **options), grads)


LENGTHS = torch.tensor([4, 3, 1])


class OfSequences(nn.Module):
    """Sums over the positions of sequences, packed or padded with their lengths."""

    def __init__(self, first, head=False):
        super().__init__()
        self.first, self.head = first, nn.Linear(3, 3) if head else nn.Identity()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, sequences, lengths=None):
        if isinstance(sequences, dict):
            sequences = sequences["tokens"][0]
        if lengths is None:
            hidden = PackedSequence((self.first(sequences.data) * self.weight).tanh(),
                                    *sequences[1:])
            hidden = pad_packed_sequence(hidden, batch_first=True)[0]
        else:
            hidden = (self.first(sequences) * self.weight).tanh()
            hidden = hidden * (torch.arange(4) < lengths[:, None]).unsqueeze(2)
        return self.head(hidden.sum(1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [
    lambda: OfSequences(nn.Linear(4, 3)), lambda: OfSequences(nn.Linear(4, 3), head=True),
    lambda: OfSequences(nn.Embedding(9, 3)),
    lambda: OfSequences(Product(torch.matmul, head=False))],
    ids=["linear", "with a head", "embedding", "run again"])
@pytest.mark.parametrize("options", [{}, {"samples": 2}], ids=str)
def test_the_rows_of_packed_inputs_are_no_samples(make, nested, options):
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(3, 4, 4)
    if isinstance(model.first, nn.Embedding):
        inputs = inputs.argmax(2)
    packed = pack_padded_sequence(inputs, LENGTHS, batch_first=True)
    hooks = GradSampleHooks(model, **options)
    with pytest.raises(RuntimeError, match=r"PackedSequence.*call it with the padded"):
        model({"tokens": (packed,)} if nested else packed).square().sum(1).mean().backward()
    hooks.remove()
    model.zero_grad()

    def losses(model, batch):
        return model(*batch).square().sum(1)

    batch = inputs, LENGTHS
    agrees(measure(model, batch, losses, **options), oracle.per_sample_grads(model, losses, batch))


def test_packed_inputs_that_are_padded_before_the_first_layer_are_exact():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, packed):
            return self.layer(pad_packed_sequence(packed, batch_first=True)[0]).tanh()

    def packed_losses(model, inputs):
        packed = pack_padded_sequence(inputs, LENGTHS, batch_first=True)
        return model(packed).square().sum((1, 2))

    def losses(model, inputs):
        return model.layer(inputs).tanh().square().sum((1, 2))

    torch.manual_seed(0)
    model, inputs = Padding(), torch.randn(3, 4, 4)
    inputs = inputs * (torch.arange(4) < LENGTHS[:, None]).unsqueeze(2)
    agrees(measure(model, inputs, packed_losses), oracle.per_sample_grads(model, losses, inputs))
