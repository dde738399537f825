"""What the tests of the Triton kernels share: a device to run them on, and the comparison with float64."""

import os

import pytest
import torch

# Inputs are rounded to their type before both sides see them, so only the kernels' own float32 sums differ from float64: one tolerance for all types.
RTOL = 1e-4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_device():
    """A GPU where there is one; the CPU under Triton's interpreter, in the process that test_triton.py starts; else the whole file is skipped."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported: test_triton.py runs this file so", allow_module_level=True)


def close(actual, expected, rtol=RTOL):
    """Relative to the largest element, as cancelled sums keep the error of what was cancelled."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double().cpu(), expected.cpu(), rtol=rtol, atol=rtol * largest)


def all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)
