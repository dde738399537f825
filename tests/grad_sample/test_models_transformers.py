"""Models of the transformers library with random weights, two layers of width 64, four samples:
variance trace within 1e-4 of the oracle."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import close
from tests.grad_sample.same_forward import SEED, grads_of_one_forward

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY, HIDDEN, N, T = 50, 64, 4, 7
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128}
TEXT = {**SIZES, "vocab_size": VOCABULARY}
STAGES = {"hidden_sizes": [16, 64], "depths": [1, 1], "num_labels": 3}
SPEECH = {f"{part}_{what}": size for part in ("encoder", "decoder")
          for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def ids(length=T):
    return torch.randint(3, VOCABULARY, (N, length))


def text():
    return {"input_ids": ids()}


def texts():
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def speech():
    return {"input_features": torch.randn(N, 8, 20), "decoder_input_ids": ids(5)}


def image():
    return {"pixel_values": torch.randn(N, 3, 16, 16)}


def token_loss(model, batch):
    """Mean over the tokens of each sample, of the last ids in the batch."""
    logits, targets = model(**batch).logits, list(batch.values())[-1]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(len(logits), -1).mean(1)


def class_loss(model, batch):
    logits = model(**batch).logits
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")


MODELS = {
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}, text, token_loss,
    ),
    "Llama": ("LlamaForCausalLM", TEXT, text, token_loss),
    "Qwen3": (
        "Qwen3ForCausalLM", {**TEXT, "head_dim": 16, "num_key_value_heads": 2}, text, token_loss,
    ),
    "BERT": ("BertForMaskedLM", TEXT, text, token_loss),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_layers": 2,
         "num_heads": 4, "decoder_start_token_id": 0},
        texts,
        token_loss,
    ),
    "ViT": (
        "ViTForImageClassification",
        {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3}, image, class_loss,
    ),
    "ConvNeXt": ("ConvNextForImageClassification", {**STAGES, "num_stages": 2}, image, class_loss),
    "ResNet": (
        "ResNetForImageClassification",
        {**STAGES, "embedding_size": 16, "layer_type": "basic"}, image, class_loss,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, **SPEECH, "num_mel_bins": 8,
         "max_source_positions": 10, "max_target_positions": 20, **TOKENS},
        speech,
        token_loss,
    ),
    "MobileNetV2": (
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.35, "image_size": 16, "num_labels": 3}, image, class_loss,
    ),
    "Mamba": ("MambaForCausalLM", {**TEXT, "state_size": 8}, text, token_loss),
}


def build(name):
    """The model in evaluation mode (dropout off, running batch-norm statistics), batch and loss."""
    torch.manual_seed(0)
    architecture, options, batch, loss_fn = MODELS[name]
    model = getattr(transformers, architecture)
    return model(model.config_class(**options)).eval(), batch(), loss_fn


@pytest.mark.parametrize("name", MODELS)
def test_variance_trace(name):
    model, batch, loss_fn = build(name)
    expected = float(oracle.variance_trace(oracle.per_sample_grads(model, loss_fn, batch)))
    hooks = GradSampleHooks(model)
    for _ in range(2):  # the first pass finds out what must be traced
        model.zero_grad()
        loss_fn(model, batch).mean().backward()
        assert hooks.collect().variance_trace == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "T5", "ViT", "Whisper"])
def test_training_with_dropout(name):
    model, batch, loss_fn = build(name)
    grads = grads_of_one_forward(model.train(), batch, loss_fn)
    hooks = GradSampleHooks(model)
    torch.manual_seed(SEED)
    loss_fn(model, batch).mean().backward()
    close(hooks.collect().sq_norms, oracle.sq_norms(grads), 1e-4)


def test_a_mixture_of_experts_is_refused_by_name():
    """Its experts see another number of rows in every pass, which belong to no fixed sample."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_key_value_heads=2)
    model = transformers.MixtralForCausalLM(config).eval()
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="experts"):
        token_loss(model, text()).mean().backward()
