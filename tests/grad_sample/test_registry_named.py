"""Layers known by their class's name: those of transformers itself, and what is not covered by a
name alone. (The rules are held against the oracle in test_registry, on tests/cases.py.)"""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks, register_grad_sampler
from adabatch.grad_sample import registry
from adabatch.grad_sample.factors.base import Dense
from adabatch.grad_sample.registry import find_grad_sampler
from tests import oracle
from tests.grad_sample import stand_ins

LAYERS = {
    "pytorch_utils.Conv1D": ((6, 5), {}, (4, 5)),
    "models.llama.modeling_llama.LlamaRMSNorm": ((6,), {}, (4, 6)),
    "models.mistral.modeling_mistral.MistralRMSNorm": ((6,), {"eps": 0.3}, (6,)),
    "models.qwen2.modeling_qwen2.Qwen2RMSNorm": ((6,), {}, (4, 2, 6)),
    "models.qwen3.modeling_qwen3.Qwen3RMSNorm": ((6,), {}, (4, 2, 6)),
    "models.gemma.modeling_gemma.GemmaRMSNorm": ((6,), {}, (4, 6)),
    "models.gemma3.modeling_gemma3.Gemma3RMSNorm": ((6,), {}, (4, 6)),
    "models.mamba.modeling_mamba.MambaRMSNorm": ((6,), {}, (4, 6)),
    "models.olmo2.modeling_olmo2.Olmo2RMSNorm": ((6,), {}, (4, 6)),
    "models.t5.modeling_t5.T5LayerNorm": ((6,), {}, (4, 6)),
    "models.imagegpt.modeling_imagegpt.ImageGPTLayerNorm": ((6,), {}, (4, 6)),
    "models.cohere.modeling_cohere.CohereLayerNorm": ((6,), {}, (4, 6)),
    "models.convnext.modeling_convnext.ConvNextLayerNorm": (
        (6,), {"data_format": "channels_first"}, (6, 3, 2)),
    "models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm": ((6,), {}, (3, 2, 6)),
    "models.sam.modeling_sam.SamLayerNorm": ((6,), {"data_format": "channels_first"}, (6, 2, 2)),
}


def squares(model, batch):
    return model(batch).square().flatten(1).sum(1)


def measured(model, inputs):
    expected = oracle.sq_norms(oracle.per_sample_grads(model, squares, inputs))
    hooks = GradSampleHooks(model)
    squares(model, inputs).mean().backward()
    found = hooks.collect().sq_norms
    hooks.remove()
    return found, expected.to(found.dtype)


def filled(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_transformers(name):
    pytest.importorskip("transformers")
    module, _, cls = f"transformers.{name}".rpartition(".")
    args, kwargs, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, inputs = filled(getattr(import_module(module), cls)(*args, **kwargs)), torch.randn(
        5, *shape)
    assert find_grad_sampler(layer) is not None
    torch.testing.assert_close(*measured(nn.Sequential(layer), inputs), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_with_layers_known_by_name():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        stand_ins.Conv1D(6, 5), stand_ins.RootMeanSquare(6), stand_ins.OnePlus(6))
    filled(model)
    inputs = torch.randn(5, 4, 5)
    expected = oracle.sq_norms(oracle.per_sample_grads(model, squares, inputs))
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    squares(compiled, inputs).mean().backward()
    torch.testing.assert_close(hooks.collect().sq_norms.double(), expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


class OfAnotherVersion(stand_ins.RootMeanSquare):
    def forward(self, hidden_states):
        return super().forward(hidden_states).abs()


class ScaledBefore(stand_ins.RootMeanSquare):
    def forward(self, hidden_states):
        scaled = hidden_states * self.weight
        return scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class WithAGate(stand_ins.RootMeanSquare):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class OtherNames(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, inputs):
        return self.gain * inputs * inputs.pow(2).mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("cls", [OfAnotherVersion, ScaledBefore, WithAGate, OtherNames])
def test_what_has_the_name_but_computes_something_else_is_measured_without_the_rule(cls):
    stand_ins.named("transformers.models.llama.modeling_llama.LlamaRMSNorm")(cls)
    torch.manual_seed(0)
    layer, inputs = filled(cls(6)), torch.randn(5, 4, 6)
    assert find_grad_sampler(layer) is None
    model = nn.Sequential(nn.Linear(6, 6), layer)
    torch.testing.assert_close(*measured(model, inputs), rtol=1e-4, atol=1e-6)


def test_a_layer_whose_forward_was_replaced_is_not_covered():
    layer = stand_ins.RootMeanSquare(6)
    assert find_grad_sampler(layer) is not None
    layer.forward = torch.relu
    assert find_grad_sampler(layer) is None


def test_subclasses_are_covered_as_long_as_they_do_not_override_forward():
    class Same(stand_ins.RootMeanSquare):
        pass

    assert find_grad_sampler(Same(6)) is find_grad_sampler(stand_ins.RootMeanSquare(6))


def test_the_comparison_changes_neither_layer_nor_random_state_and_takes_place_once(monkeypatch):
    calls = []

    class Counted(stand_ins.OnePlus):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    stand_ins.named("transformers.models.gemma.modeling_gemma.GemmaRMSNorm")(Counted)
    layers = [Counted(6) for _ in range(3)]
    before, state = [dict(vars(layer)) for layer in layers], torch.random.get_rng_state()
    with torch.device("meta"), torch.inference_mode():
        found = [find_grad_sampler(layer) for layer in layers]
    assert found[0] is not None
    assert found == [found[0]] * 3
    assert len(calls) == 1
    assert [dict(vars(layer)) for layer in layers] == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_registering_names(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", [*registry._BY_NAME])

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, inputs):
            return inputs + self.shift

    stand_ins.named("some.package.Shift")(Shift)
    assert find_grad_sampler(Shift()) is None
    with pytest.raises(TypeError, match=r"no example\. Pass example="):
        register_grad_sampler("some.package.Shift")

    @register_grad_sampler("some.*.Shift", example=lambda layer: (Shift(), torch.ones(2, 3)))
    def shift_grad_sample(layer, activations, backprops):
        return {"shift": Dense(backprops)}

    assert find_grad_sampler(Shift()).rule is shift_grad_sample
    torch.testing.assert_close(*measured(nn.Sequential(Shift()), torch.randn(5, 3)))


def test_no_library_is_imported():
    code = ("import sys, adabatch\n"
            "print([name for name in ('transformers', 'timm', 'torchvision') "
            "if name in sys.modules])")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"
