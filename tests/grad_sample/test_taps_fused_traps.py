"""Fused backward passes where they could go wrong: odd memory layouts and shapes, hooks of users,
passes that differ from plain training, two processes."""

import collections
import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, close, squared_error
from tests.grad_sample.parallel import needs_gloo, shard
from tests.grad_sample.test_taps_fused import (
    fused,
    grads_of,
    make_images,
    make_tokens,
    plain_grads,
    same_grads,
)


def convolutions(**options):
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 6, 3, **options), nn.Conv2d(6, 4, 3, **options)
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.Flatten())


def image_batch(model, samples=5):
    inputs = torch.randn(samples, 4, 9, 9)
    return inputs, torch.randn(samples, model(inputs).shape[1])


def is_exact(model, batch, names, rtol=1e-5):
    """Gradients are autograd's and norms the oracle's over two steps; the named layers were
    fused."""
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads, rtol)
        same_grads(model, expected, rtol)
    assert fused(hooks) == names
    hooks.remove()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"padding": 2, "padding_mode": "circular"}, []),
        ({"padding": 1, "padding_mode": "reflect"}, []),
        ({"padding": "same"}, ["0", "2"]),
        ({"padding": "same", "dilation": 2, "groups": 2}, ["0", "2"]),
        ({"padding": "valid", "stride": 2}, ["0", "2"]),
    ],
    ids=str,
)
def test_padding_and_geometry(options, names):
    model = convolutions(**options)
    is_exact(model, image_batch(model), names)


def test_transposed_convolutions_have_no_fused_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 2, 3, stride=2), nn.Flatten())
    is_exact(model, image_batch(model), ["0"])


def test_channels_last_keeps_the_layouts_of_gradients():
    model = convolutions(padding=1)
    inputs, targets = image_batch(model)
    model = model.to(memory_format=torch.channels_last)
    batch = (inputs.to(memory_format=torch.channels_last).requires_grad_(), targets)
    backward(model, batch)
    layouts = {name: parameter.grad.stride() for name, parameter in model.named_parameters()}
    input_grad, batch[0].grad = batch[0].grad, None
    model.zero_grad()
    is_exact(model, (batch[0].detach(), targets), ["0", "2"])
    hooks = GradSampleHooks(model)
    backward(model, batch)
    assert fused(hooks)
    close(batch[0].grad, input_grad, 1e-5)
    assert batch[0].grad.stride() == input_grad.stride()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == layouts[name]


@pytest.mark.parametrize("make", [make_tokens, make_images])
@pytest.mark.parametrize("loss", ["expanded", "transposed", "every second"])
def test_inputs_and_output_gradients_of_any_strides(make, loss):
    """A sum gives a gradient of stride 0; slices and permutations give others."""
    model, (inputs, _) = make()
    inputs = inputs.transpose(-1, -2).contiguous().transpose(-1, -2)
    last = {
        "expanded": lambda out: out.flatten(1).sum(1),
        "transposed": lambda out: out.transpose(-1, -2).flatten(1).cumsum(1).sum(1),
        "every second": lambda out: out[..., ::2].square().flatten(1).sum(1),
    }
    model = nn.Sequential(*(
        layer for layer in model
        if not isinstance(layer, nn.Flatten) or layer.end_dim != -1 or layer.start_dim != 1))

    def loss_fn(model, batch):
        return last[loss](model(batch))

    grads, copied = oracle.per_sample_grads(model, loss_fn, inputs), copy.deepcopy(model)
    backward(copied, inputs, loss_fn)
    hooks = GradSampleHooks(model)
    backward(model, inputs, loss_fn)
    assert fused(hooks)
    agrees(hooks.collect(), grads)
    same_grads(model, grads_of(copied), 1e-5)


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("make", [make_tokens, make_images])
def test_one_sample_and_none(make, samples):
    model, batch = make(samples=max(1, samples))
    batch = tuple(tensor[:samples] for tensor in batch)
    copied = copy.deepcopy(model)
    backward(copied, batch, loss_reduction="sum")
    grads = oracle.per_sample_grads(model, squared_error, batch) if samples else {}
    hooks = GradSampleHooks(model, loss_reduction="sum")
    backward(model, batch, loss_reduction="sum")
    same_grads(model, grads_of(copied), 1e-5)
    if samples:
        close(hooks.collect().sq_norms, oracle.sq_norms(grads), 1e-5)


def test_one_position():
    """[N, 1, I] gets a pass-through tap, as its norms are products of norms. So does a convolution
    over one position, or it is fused: exact either way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    is_exact(model, (torch.randn(5, 1, 6), torch.randn(5, 2)), [])
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    batch = (torch.randn(5, 4, 3, 3), torch.randn(5, 2))
    grads, plain = oracle.per_sample_grads(model, squared_error, batch), plain_grads(model, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    agrees(hooks.collect(), grads)
    same_grads(model, plain, 1e-5)


def test_users_hooks_fire_once_with_the_whole_gradient():
    """On weights before and after accumulation, and on the layer's backward pass."""
    model, batch = make_tokens()
    expected, seen = plain_grads(model, batch), collections.defaultdict(list)
    for name, parameter in model.named_parameters():
        parameter.register_hook(
            lambda grad, name=name: seen["before", name].append(grad.clone()))
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen["after", name].append(p.grad.clone()))
    model[2].register_full_backward_hook(
        lambda layer, inputs, outputs: seen["layer"].append((inputs, outputs)))
    hooks = GradSampleHooks(model)
    backward(model, batch)
    assert len(fused(hooks)) == 3
    for (_, name), grads in ((key, value) for key, value in seen.items() if key != "layer"):
        assert len(grads) == 1
        close(grads[0], expected[name], 1e-5)
    assert len(seen) == 1 + 2 * len(expected)
    assert [tuple(grads[0].shape) for grads in seen["layer"][0]] == [(5, 16, 9), (5, 16, 9)]


def test_spectral_norm_has_no_fused_backward():
    model, batch = make_tokens()
    model = model.eval()
    parametrizations.spectral_norm(model[2])
    is_exact(model, batch, ["0", "4"], 1e-4)


def test_gradients_are_added_to_those_that_are_there():
    model, batch = make_images()
    expected = plain_grads(model, batch)
    hooks = GradSampleHooks(model, accumulate=2)
    for set_to_none in (True, False):
        model.zero_grad(set_to_none=set_to_none)
        for _ in range(2):
            backward(model, batch)
        hooks.collect()
        same_grads(model, {name: 2 * grad for name, grad in expected.items()}, 1e-5)
    assert fused(hooks)


def test_a_graph_differentiated_twice_is_refused():
    """Its passes have the same samples; accumulate= counts each pass's as others."""
    model, batch = make_tokens()
    hooks = GradSampleHooks(model, accumulate=2)
    loss = squared_error(model, batch).mean()
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one forward pass was differentiated.*add the losses"):
        (loss / 2).backward()
    hooks.remove()


def test_hooks_removed_before_the_backward_pass():
    model, batch = make_images()
    expected = plain_grads(model, batch)
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    hooks.remove()
    loss.backward()
    same_grads(model, expected, 1e-5)


def test_copies_and_pickles_of_a_model_are_plain():
    model, batch = make_tokens()
    expected = plain_grads(model, batch)
    state = copy.deepcopy(model.state_dict())
    hooks = GradSampleHooks(model)
    backward(model, batch)
    hooks.collect()
    copied = copy.deepcopy(model)
    copied.zero_grad()
    backward(copied, batch)
    same_grads(copied, expected, 0)
    for name, value in pickle.loads(pickle.dumps(copied.state_dict())).items():
        assert torch.equal(value, state[name])
    hooks.remove()
    restored = pickle.loads(pickle.dumps(model))
    restored.zero_grad()
    backward(restored, batch)
    same_grads(restored, expected, 0)


def test_an_evaluation_pass_between_forward_and_backward():
    model, batch = make_images()
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    with torch.no_grad():
        model(batch[0][:1])
    with torch.inference_mode():
        model(batch[0][:3])
    loss.backward()
    agrees(hooks.collect(), grads)
    same_grads(model, expected, 1e-5)


def test_checkpointed_passes_of_different_sizes_in_one_backward():
    """What is run again in backward must get the tap it had, whatever pass came later: fused for a
    long sequence, pass-through for a single position."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    model = nn.ModuleList([part])
    batches = torch.randn(5, 17, 6).split([16, 1], 1)

    def losses(model, batches):
        return sum(checkpoint(model[0], batch, use_reentrant=False).square().flatten(1).sum(1)
                   for batch in batches)

    grads, copied = oracle.per_sample_grads(model, losses, batches), copy.deepcopy(model)
    losses(copied, batches).mean().backward()
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        losses(model, batches).mean().backward()
        agrees(hooks.collect(), grads)
        same_grads(model, grads_of(copied), 1e-5)


def in_process(rank, path, sharded):
    """One of two processes: each sees half of the batch; gradients are averaged, norms are of its
    samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, batch = make_tokens(samples=6)
    expected = plain_grads(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    own = slice(3 * rank, 3 * rank + 3)
    run = (shard(model, 0, 2, 4, world_size=2) if sharded
           else nn.parallel.DistributedDataParallel(model))
    hooks = GradSampleHooks(run)
    for _ in range(2):
        model.zero_grad()
        backward(run, tuple(tensor[own] for tensor in batch))
        moments = hooks.collect()
        assert len(fused(hooks)) == 3
        close(moments.sq_norms, oracle.sq_norms(grads)[own], 1e-5)
        grad_sq_norm = sum(float(grad.square().sum()) for grad in expected.values())
        close(moments.grad_sq_norm, grad_sq_norm, 1e-4)
        for name, parameter in model.named_parameters():
            close(parameter.grad.full_tensor() if sharded else parameter.grad, expected[name], 1e-5)
    dist.barrier()
    dist.destroy_process_group()
    # On busy cores torch's threads abort about one in some dozen interpreters that exit normally.
    os._exit(0)


@needs_gloo
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes(tmp_path, sharded):
    torch.multiprocessing.spawn(in_process, args=(str(tmp_path / "store"), sharded), nprocs=2)
