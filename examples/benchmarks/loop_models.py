"""Models whose whole training loop is timed: transformers' own, from configurations with random
weights (nothing is downloaded), and a small network on which Python's time shows.

Legend: N samples, T positions, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from models import Batch, Workload, class_losses, images, squared_losses, token_losses
from torch import Tensor, nn


class Field(nn.Module):
    """A model of transformers whose forward pass gives one field of its answer."""

    def __init__(self, model: nn.Module, field: str):
        super().__init__()
        self.model, self.field = model, field

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)[self.field]


def from_config(
    architecture: str, options: dict[str, Any], field: str = "logits"
) -> Callable[[], nn.Module]:
    """What makes transformers' `architecture` with these options of its configuration."""

    def make() -> nn.Module:
        model = getattr(importlib.import_module("transformers"), architecture)
        return Field(model(model.config_class(**options)), field)

    return make


def small_network() -> nn.Module:
    """64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def loop_workloads(
    layers: int = 4, width: int = 256, positions: int = 128, samples: int = 16, side: int = 96,
    block: int = 50,
) -> dict[str, Workload]:
    """The workloads by letter: N = `samples`, T = `positions`, D = `width`, images of side².

    `block` steps of the small network are timed together.
    """
    vocabulary, ends = 2 * width, {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8,
             "intermediate_size": 4 * width}
    text = {**sizes, "vocab_size": vocabulary, "use_cache": False}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": 8, "vocab_size": vocabulary,
            "n_positions": positions, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "use_cache": False, **ends}
    vit = {**sizes, **no_dropout, "image_size": side, "patch_size": 8, "num_labels": 10}
    channels = [width // 8, width // 4, width // 2, width]
    stages = {"hidden_sizes": channels, "depths": [1] * 4, "num_labels": 10}
    resnet = {**stages, "embedding_size": width // 8, "layer_type": "basic"}
    speech = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": 8,
              "encoder_ffn_dim": 4 * width, "num_mel_bins": 40, "dropout": 0.0,
              "max_source_positions": positions}

    def texts() -> Batch:
        shape = (samples, positions)
        return torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)

    def spectra() -> Batch:
        return torch.randn(samples, 40, 2 * positions), torch.randn(samples, positions, width)

    def whisper_encoder() -> nn.Module:
        whisper = importlib.import_module("transformers.models.whisper.modeling_whisper")
        config = whisper.WhisperConfig(**speech)
        return Field(whisper.WhisperEncoder(config), "last_hidden_state")

    pictures = images(samples, 3, side, side)
    sized = f"{layers} layers, d={width}, T={positions}, m={samples}"
    pictured = f"{channels[0]} to {width} channels, 3x{side}x{side}, m={samples}"
    works = [
        _transformers("i", f"GPT-2, {sized}", from_config("GPT2LMHeadModel", gpt2), texts,
                      token_losses),
        _transformers("j", f"Llama, {sized}", from_config("LlamaForCausalLM", {**text, **ends}),
                      texts, token_losses),
        _transformers("k", f"BERT, {sized}",
                      from_config("BertForMaskedLM", {**text, **no_dropout}), texts, token_losses),
        _transformers("l", f"ViT, {layers} layers, d={width}, {(side // 8) ** 2} patches, "
                      f"m={samples}", from_config("ViTForImageClassification", vit), pictures,
                      class_losses),
        _transformers("m", f"ConvNeXt, {pictured}",
                      from_config("ConvNextForImageClassification", stages), pictures,
                      class_losses),
        _transformers("n", f"Mamba, {sized}",
                      from_config("MambaForCausalLM", {**text, **ends, "state_size": 16}), texts,
                      token_losses),
        _transformers("o", f"ResNet, batch norm, {pictured}",
                      from_config("ResNetForImageClassification", resnet), pictures, class_losses,
                      alone=False),
        _transformers("p", f"Whisper's encoder, {sized}", whisper_encoder, spectra,
                      squared_losses),
        Workload("q", "MLP 64-64-10, m=16", small_network, images(16, 64), class_losses,
                 loop=True, block=block),
        Workload("r", "MLP 64-64-10, m=256", small_network, images(256, 64), class_losses,
                 loop=True, block=block),
    ]
    return {work.name: work for work in works}


def _transformers(name: str, title: str, *rest: Any, alone: bool = True) -> Workload:
    return Workload(
        name, f"transformers' {title}", *rest, alone=alone, loop=True, needs="transformers")
