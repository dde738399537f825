"""Triton kernels of an embedding's norms, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch.kernels import reference
from tests.kernels.triton_cases import DTYPES, close, kernel_device

DEVICE = kernel_device()

from adabatch.kernels import triton, triton_gram, triton_tuning  # noqa: E402 (only where there is a device)

# id: (N, T, D, V); under the interpreter samples of more than 8 positions are sorted, and walked through in blocks of 16 and splits of 8 or more
SHAPES = {
    "gram": (3, 7, 5, 4),
    "runs": (2, 40, 5, 6),
    "runs-longer-than-a-block": (2, 70, 3, 2),
    "one-run": (2, 60, 17, 1),
    "all-different": (2, 33, 3, 10**6),
    "one-wide": (2, 20, 1, 3),
    "one-sample": (1, 50, 3, 9),
    "one-position": (3, 1, 4, 5),
    "no-samples": (0, 20, 3, 4),
    "no-positions": (2, 0, 3, 4),
}


def make(shape, dtype):
    samples, positions, width, rows = shape
    torch.manual_seed(0)
    ids = torch.randint(rows, (positions, samples), device=DEVICE).T
    return ids, torch.randn(samples, width, positions, device=DEVICE).to(dtype).mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_embedding_sq_norms(shape, dtype):
    ids, backprops = make(shape, dtype)
    expected = reference.embedding_sq_norms(ids, backprops.double())
    close(triton.embedding_sq_norms(ids, backprops), expected)
    close(triton_gram.gram_norms(ids, backprops), expected)


@pytest.mark.parametrize("processors", [1, 64])
def test_runs_across_splits_are_counted_once(processors, monkeypatch):
    """Splits of one and of eight positions, in runs that begin, end or lie within them."""
    from adabatch.kernels import triton_embedding

    monkeypatch.setattr(triton_embedding, "processors", lambda device: processors)
    monkeypatch.setattr(triton_embedding, "SHORTEST_SPLIT", 1 if processors == 64 else 8)
    for rows in (1, 2, 3, 11, 100):
        ids, backprops = make((2, 41, 3, rows), torch.float32)
        close(triton.embedding_sq_norms(ids, backprops), reference.embedding_sq_norms(ids, backprops.double()))


def test_ids_of_32_bits():
    ids, backprops = make((2, 20, 3, 4), torch.float32)
    close(triton.embedding_sq_norms(ids.int(), backprops), reference.embedding_sq_norms(ids, backprops.double()))
    close(triton.embedding_sq_norms(ids[:, :5].int(), backprops[:, :5]), reference.embedding_sq_norms(ids[:, :5], backprops[:, :5].double()))


def test_the_interpreter_takes_the_smallest_configuration():
    assert (DEVICE.type == "cpu") == triton_tuning.INTERPRETED


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 20), st.integers(1, 30)), st.sampled_from(DTYPES))
def test_any_shape(shape, dtype):
    ids, backprops = make(shape, dtype)
    close(triton.embedding_sq_norms(ids, backprops), reference.embedding_sq_norms(ids, backprops.double()))
