"""Runs the tests of the Triton kernels under the interpreter, and tests how the kernels are registered, found and replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adabatch import kernels
from adabatch.kernels import operators, reference

HERE = Path(__file__).parent
INTERPRETED = sorted(str(path) for path in HERE.glob("test_triton_*.py") if path.name != "test_triton_compile.py")
GEOMETRY = ((4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1)


def make_cases():
    """{operator: (args, kwargs of the operation)}"""
    torch.manual_seed(0)
    a, b, ids = torch.randn(3, 4, 5), torch.randn(3, 4, 6), torch.randint(3, (3, 4))
    conv = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3), *GEOMETRY
    return {
        "weight_grad_moments": ((a, b), {"second_moment": True, "deterministic": True}),
        "outer_sq_norms": ((a, b), {}),
        "outer_second_moment": ((a, b), {}),
        "preconditioned_trace": ((a, b, torch.rand(6, 5)), {}),
        "affine_sq_norms": ((a, a, None, torch.rand(3, 4, 1)), {}),
        "embedding_sq_norms": ((ids, b), {}),
        "conv_weight_grad_moments": (conv, {"second_moment": False, "deterministic": False}),
        "conv_sq_norms": (conv, {}),
        "conv_second_moment": (conv, {}),
    }


CASES = make_cases()
operator_names = pytest.mark.parametrize("name", operators.__all__)


def run_python(source, **environment):
    return subprocess.run([sys.executable, "-c", source], env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the files themselves")
def test_all_kernels_under_the_interpreter():
    """In a process of their own: Triton decides when it is imported whether it interprets, and other tests must not be interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert "skipped" not in result.stdout, result.stdout


def test_every_operator_has_a_case():
    assert set(CASES) == set(operators.__all__)
    assert set(operators.__all__) <= set(reference.__all__)


@operator_names
def test_operators_keep_torchs_rules(name):
    args, kwargs = CASES[name]
    torch.library.opcheck(getattr(torch.ops.adabatch, name).default, args, kwargs)


@operator_names
def test_operators_compile_and_run_the_definition_on_the_cpu(name, monkeypatch):
    monkeypatch.setitem(kernels.BACKENDS, "cpu", (operators,))
    torch._dynamo.reset()
    args, kwargs = CASES[name]
    expected = getattr(reference, name)(*args, **kwargs)
    operation = getattr(kernels, name)
    for results in (operation(*args, **kwargs), torch.compile(operation, fullgraph=True, backend="aot_eager")(*args, **kwargs)):
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_one_graph_for_all_batch_sizes(monkeypatch):
    monkeypatch.setitem(kernels.BACKENDS, "cpu", (operators,))
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    function = torch.compile(lambda a, b: kernels.weight_grad_moments(a, b)[:2], fullgraph=True, backend="aot_eager")
    for samples in (6, 5, 9):
        a, b = torch.randn(samples, 4, 5), torch.randn(samples, 4, 6)
        for tensor in (a, b):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(function(a, b), reference.weight_grad_moments(a, b)[:2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_determinism_follows_torch_unless_the_caller_chooses(monkeypatch):
    asked = []
    operator = torch.ops.adabatch.weight_grad_moments
    monkeypatch.setattr(torch.ops.adabatch, "weight_grad_moments", lambda *args, **kwargs: asked.append(kwargs["deterministic"]) or operator(*args, **kwargs))
    (a, b), _ = CASES["weight_grad_moments"]
    operators.weight_grad_moments(a, b)
    operators.weight_grad_moments(a, b, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        operators.weight_grad_moments(a, b)
        operators.weight_grad_moments(a, b, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, True, False]


def test_cuda_tensors_take_the_operators():
    assert kernels.BACKENDS["cuda"] == (operators,)
    keys = [torch._C._dispatch_has_kernel_for_dispatch_key(f"adabatch::{name}", key) for name in operators.__all__ for key in ("CPU", "CUDA")]
    assert all(keys)


def test_triton_is_imported_when_it_is_first_needed_and_not_before():
    result = run_python("import sys, adabatch.kernels; assert not any('triton' in name for name in sys.modules if name.startswith('adabatch'))")
    assert result.returncode == 0, result.stderr


def test_without_triton_the_cpu_is_silent_and_the_gpu_warned_once():
    source = """
import sys, warnings
sys.modules["triton"] = None
warnings.simplefilter("error")
import torch
from adabatch import kernels
from adabatch.kernels import operators
kernels.outer_sq_norms(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert operators.triton_kernels() is None
    assert operators.triton_kernels() is None
assert len(caught) == 1, caught
assert "pip install 'adabatch[triton]'" in str(caught[0].message)
try:
    kernels.triton
except ImportError:
    pass
else:
    raise AssertionError("adabatch.kernels.triton was imported without Triton")
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr


def test_the_triton_kernels_have_the_definitions_names_and_signatures():
    pytest.importorskip("triton", reason="Triton is not installed")
    source = """
import inspect
from adabatch import kernels
from adabatch.kernels import operators, reference, triton
assert kernels.triton is triton
assert set(triton.__all__) == set(operators.__all__)
for name in triton.__all__:
    expected = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(triton, name)) == inspect.signature(getattr(operators, name)) == expected, name
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_is_no_kernel():
    with pytest.raises(AttributeError, match="no attribute 'cuda'"):
        kernels.cuda  # noqa: B018
