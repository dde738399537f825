"""How operations are registered, dispatched and compiled, and when Triton is imported."""

import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adabatch import kernels
from adabatch.kernels import OPERATIONS
from tests.kernels.cases import SHAPES, make

OPERATORS = [name for name, operation in OPERATIONS.items() if operation.operator is not None]
MODULES = [f"adabatch.kernels.{m.name}" for m in pkgutil.iter_modules(kernels.__path__)]
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_operator = pytest.mark.parametrize("name", OPERATORS)


def first_case(name):
    return make(name, next(iter(SHAPES[name].values())), torch.float32)


def operator(name):
    return getattr(torch.ops.adabatch, name).default


@pytest.fixture
def cpu_takes_operators(monkeypatch):
    for operation in OPERATIONS.values():
        if operation.operator is not None:
            monkeypatch.setitem(operation.forms, "cpu", operation.operator)
            monkeypatch.setitem(operation.compiled, "cpu", operation.operator)
    torch._dynamo.reset()


def run_python(source, **environment):
    command = [sys.executable, "-c", source]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@every_operation
def test_every_form_has_the_definitions_name_and_signature(name):
    operation = OPERATIONS[name]
    expected = inspect.signature(operation.definition)
    assert getattr(kernels, name) is operation.call
    assert operation.call.__doc__ == operation.definition.__doc__
    for form in (operation.call, operation.operator, *operation.forms.values()):
        if form is not None:
            assert form.__name__ == name
            assert inspect.signature(form) == expected


def test_the_form_for_the_device_comes_first(monkeypatch):
    grad = torch.ones(2, 3)
    assert torch.equal(kernels.dense_sq_norms(grad), torch.full((2,), 3.0))
    monkeypatch.setitem(OPERATIONS["dense_sq_norms"].forms, "cpu", lambda grad: "form")
    assert kernels.dense_sq_norms(grad) == kernels.dense_sq_norms(grad=grad) == "form"
    assert kernels.has_kernel("dense_sq_norms", grad)
    assert not kernels.has_kernel("dense_dot", grad)


def test_the_definitions_can_be_forced():
    source = """
import torch
from adabatch import kernels
from adabatch.kernels import OPERATIONS
assert not any(operation.compiled for operation in OPERATIONS.values())
assert not any({"cpu", "cuda"} & set(operation.forms) for operation in OPERATIONS.values())
assert not kernels.has_kernel("weight_grad_moments", torch.zeros(1))
assert kernels.weight_grad_moments(torch.ones(2, 3, 4), torch.ones(2, 3, 4))[0].shape == (4, 4)
"""
    result = run_python(source, ADABATCH_KERNELS="reference")
    assert result.returncode == 0, result.stderr


def test_an_unknown_choice_of_kernels_is_refused_at_import():
    result = run_python("import adabatch.kernels", ADABATCH_KERNELS="cuda")
    assert result.returncode != 0
    assert "ADABATCH_KERNELS is 'cuda'; allowed are 'reference' and nothing" in result.stderr


@every_operator
def test_operators_keep_torchs_rules(name):
    case = first_case(name)
    kwargs = [case.kwargs]
    if case.kwargs:
        kwargs = [{"second_moment": s, "deterministic": not s} for s in (True, False)]
    for each in kwargs:
        torch.library.opcheck(operator(name), case.args, each)


@every_operator
def test_operators_compile_and_run_the_definition_on_the_cpu(name, cpu_takes_operators):
    case, operation = first_case(name), getattr(kernels, name)
    expected = OPERATIONS[name].definition(*case.args, **case.kwargs)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    for form in (operation, compiled):
        results = form(*case.args, **case.kwargs)
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_one_graph_for_all_batch_sizes(cpu_takes_operators):
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    function = torch.compile(
        lambda a, b: kernels.weight_grad_moments(a, b)[:2], fullgraph=True, backend="aot_eager"
    )
    definition = OPERATIONS["weight_grad_moments"].definition
    for samples in (6, 5, 9):
        a, b = torch.randn(samples, 4, 5), torch.randn(samples, 4, 6)
        for tensor in (a, b):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(function(a, b), definition(a, b)[:2])
    assert counters["unique_graphs"] - before == 1


class Calls(TorchDispatchMode):
    """Keyword arguments of the operators of this library that run."""

    def __init__(self):
        super().__init__()
        self.kwargs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adabatch":
            self.kwargs.append(kwargs)
        return func(*args, **(kwargs or {}))


def test_determinism_follows_torch_unless_the_caller_chooses():
    a, b = first_case("weight_grad_moments").args
    call = OPERATIONS["weight_grad_moments"].operator
    with Calls() as calls:
        call(a, b)
        call(a, b, deterministic=True)
        torch.use_deterministic_algorithms(True)
        try:
            call(a, b)
            call(a, b, deterministic=False)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [kwargs["deterministic"] for kwargs in calls.kwargs] == [False, True, True, False]


@every_operator
def test_cuda_tensors_take_the_operators(name):
    assert OPERATIONS[name].forms["cuda"] is OPERATIONS[name].operator
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adabatch::{name}", key)


@pytest.mark.parametrize("name", ["adabatch.kernels", *(m for m in MODULES if "triton" not in m)])
def test_examples_in_the_documentation(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_triton_is_imported_when_it_is_first_needed_and_not_before():
    source = """
import sys, adabatch.kernels
assert not any("triton" in name for name in sys.modules if name.startswith("adabatch"))
"""
    result = run_python(source)
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
    assert not operators.load_triton()
    assert not operators.load_triton()
assert len(caught) == 1, caught
assert "pip install 'adabatch[triton]'" in str(caught[0].message)
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr


def test_every_operator_has_a_triton_kernel_with_its_signature():
    pytest.importorskip("triton", reason="Triton is not installed")
    source = """
import inspect
from adabatch.kernels import OPERATIONS, operators
assert operators.load_triton()
for name, operation in OPERATIONS.items():
    assert ("triton" in operation.forms) == (operation.operator is not None), name
    if operation.operator:
        expected = inspect.signature(operation.definition)
        assert inspect.signature(operation.forms["triton"]) == expected, name
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the file itself")
def test_all_triton_kernels_under_the_interpreter():
    """In a separate process: Triton decides when it is imported whether it interprets, and other
    tests must not be interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = Path(__file__).parents[2]
    file = "tests/kernels/test_triton.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    options = {"env": {**os.environ, "TRITON_INTERPRET": "1"}, "cwd": root, "check": False}
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert "skipped" not in result.stdout, result.stdout
