"""The fused backward passes of normalization layers: gradients equal to autograd's, norms equal to
the oracle's, and where the layer gets a pass-through tap."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from adabatch.grad_sample.layers import normalization
from tests import oracle
from tests.grad_sample import stand_ins
from tests.grad_sample.measuring import TOLERANCE, agrees, backward, close, squared_error
from tests.grad_sample.test_taps_fused import fused, plain_grads, same_grads


def group_norms():
    """Groups of several channels, of one, and a single one, on images, sequences and vectors, with
    in-place activations behind."""
    return [
        nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.GroupNorm(4, 4, eps=0.3),
        nn.Flatten(2), nn.GroupNorm(1, 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool1d(2),
        nn.Flatten(), nn.GroupNorm(2, 8),
    ]


def batch_norms():
    """Of images, volumes and sequences; without running statistics, and of vectors. Between them
    what keeps gradients from cancelling."""
    return [
        nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=0.3, track_running_stats=False), nn.Tanh(), nn.Unflatten(2, (3, 1)),
        nn.BatchNorm3d(4, momentum=None), nn.Tanh(), nn.Flatten(2),
        nn.AdaptiveAvgPool1d(2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(8),
    ]


def batch_norms_in_eval_mode():
    """By running statistics of their own."""
    model = nn.Sequential(*(each for each in batch_norms()
                            if getattr(each, "track_running_stats", True))).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return [*model]


def layer_norms():
    """Of one dimension and two, with and without positions, a bias or a permutation around."""
    return [
        stand_ins.EitherOrder(6, "channels_first"), nn.ReLU(inplace=True),
        stand_ins.ChannelsFirst(6, bias=False), nn.Flatten(2), nn.LayerNorm(20, bias=False),
        nn.Tanh(), nn.Unflatten(2, (5, 4)), nn.LayerNorm((5, 4)), nn.Tanh(), nn.Conv2d(6, 6, 3),
        Transposed(), stand_ins.EitherOrder(3, "channels_last"), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8, eps=0.3),
    ]


class Transposed(nn.Module):
    def forward(self, inputs):
        return inputs.mT


KINDS = {"group": (group_norms, ["0", "3", "5", "9"]),
         "batch": (batch_norms, ["0", "3", "6", "10"]),
         "batch, eval": (batch_norms_in_eval_mode, ["0", "5", "9"]),
         "layer": (layer_norms, ["0", "2", "4", "7", "11", "15"])}
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:.*batch normalization in train mode")


@pytest.fixture(autouse=True)
def no_sample_is_too_small(monkeypatch):
    monkeypatch.setattr(normalization, "ALONE", 1)


def make(kind, dtype=torch.float32, samples=5):
    torch.manual_seed(0)
    model = nn.Sequential(*KINDS[kind][0]()).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, (torch.randn(samples, 6, 5, 4, dtype=dtype), torch.randn(samples, 8, dtype=dtype))


def grads_by(kind, model, batch):
    reference = oracle.contributions if kind == "batch" else oracle.per_sample_grads
    return reference(model, squared_error, batch)


def fused_norms(model, hooks):
    return [name for name in fused(hooks) if not isinstance(model[int(name)], nn.Conv2d)]


@kinds
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"per_parameter": True, "statistics": ["second_moment"]}], ids=str)
def test_gradients_and_norms(kind, dtype, options):
    model, batch = make(kind, dtype)
    batch[0].requires_grad_()
    expected = plain_grads(model, batch)
    input_grad, batch[0].grad = batch[0].grad, None
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        grads = grads_by(kind, model, batch)
        model.zero_grad()
        batch[0].grad = None
        backward(model, batch)
        moments = hooks.collect()
        agrees(moments, grads, 10 * TOLERANCE[dtype])
        same_grads(model, expected, TOLERANCE[dtype])
        close(batch[0].grad, input_grad, TOLERANCE[dtype])
        for name, value in moments.second_moment.items():
            close(value, oracle.second_moment(grads)[name], 10 * TOLERANCE[dtype])
    assert fused_norms(model, hooks) == KINDS[kind][1]


@kinds
@pytest.mark.parametrize("how", ["subset", "checkpointed", "strided", "frozen", "no samples"])
def test_a_pass_through_tap_elsewhere(kind, how):
    model, batch = make(kind)
    run = model
    if how == "checkpointed":
        run = lambda inputs: checkpoint(model, inputs, use_reentrant=False)  # noqa: E731
    if how == "strided":
        batch = (batch[0].mT.contiguous().mT, batch[1])
    if how == "frozen":
        model[0].bias.requires_grad_(False)
    if how == "no samples":
        if kind == "batch":
            pytest.skip("torch refuses a batch without samples")
        batch = tuple(tensor[:0] for tensor in batch)
    expected = plain_grads(model, batch)
    if how != "no samples":
        grads = grads_by(kind, model, batch)
    hooks = GradSampleHooks(model, samples=4 if how == "subset" else None)
    backward(run, batch)
    assert ("0" in fused(hooks)) == (kind == "layer" and how == "strided")
    if how != "no samples":
        agrees(hooks.collect(), grads, 1e-4)
        same_grads(model, expected, 1e-5)


@pytest.mark.parametrize("norm", [
    nn.GroupNorm(2, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6).eval(), nn.LayerNorm(4)], ids=str)
def test_a_layer_called_twice(norm):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, inputs):
            return self.norm(torch.relu(self.norm(inputs)) + inputs).flatten(1)

    torch.manual_seed(0)
    model = Twice()
    nn.init.normal_(model.norm.weight)
    batch = torch.randn(5, 6, 4), torch.randn(5, 24)
    expected = plain_grads(model, batch)
    grads = grads_by("batch" if norm.training and isinstance(norm, nn.BatchNorm1d) else "group",
                     model, batch)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads, 1e-4)
        same_grads(model, expected, 1e-5)


def test_running_statistics_are_those_of_a_plain_step():
    (plain, batch), (measured, _) = make("batch"), make("batch")
    hooks = GradSampleHooks(measured)
    for model in (plain, measured):
        backward(model, batch)
    hooks.collect()
    for (name, expected), buffer in zip(plain.named_buffers(), measured.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0, msg=name)


def test_running_statistics_that_changed_since_the_forward_pass():
    """They are what the backward pass needs, as autograd says without taps, too."""
    model, (inputs, targets) = make("batch, eval")
    hooks = GradSampleHooks(model)
    loss = squared_error(model, (inputs, targets)).mean()
    model[0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    hooks.reset()
    model.zero_grad()
    grads = oracle.per_sample_grads(model, squared_error, (inputs, targets))
    backward(model, (inputs, targets))
    agrees(hooks.collect(), grads, 1e-4)


def test_another_mode_since_the_forward_pass():
    model, batch = make("batch")
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    model.eval()
    with pytest.raises(RuntimeError, match="changed between train and eval mode"):
        loss.backward()
    hooks.reset()
    model.zero_grad()
    model.train()
    grads = oracle.contributions(model, squared_error, batch)
    backward(model, batch)
    agrees(hooks.collect(), grads, 1e-4)


def test_small_samples_share_calls():
    model, batch = make("layer")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(normalization, "ALONE", 100)
        grads = oracle.per_sample_grads(model, squared_error, batch)
        hooks = GradSampleHooks(model)
        backward(model, batch)
        agrees(hooks.collect(), grads, 1e-4)
    assert fused_norms(model, hooks) == ["0", "2", "4", "7"]


class Rotated(nn.LayerNorm):
    """The same numbers as of channels first, from other rows in another order."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)


class OfDoubled(nn.LayerNorm):
    def forward(self, x):
        return super().forward((2 * x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("cls", [Rotated, OfDoubled])
def test_a_node_of_another_input_is_not_read(cls):
    """Both compute a layer normalization over channels, up to ε."""
    stand_ins.named("timm.layers.norm.LayerNorm2d")(cls)
    torch.manual_seed(0)
    model = nn.Sequential(cls(6, eps=1e-12), nn.Flatten())
    batch = torch.randn(5, 6, 3, 2), torch.randn(5, 36)
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    agrees(hooks.collect(), grads, 1e-4)
    same_grads(model, expected, 1e-5)
    assert fused(hooks) == []
