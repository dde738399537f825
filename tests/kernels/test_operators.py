"""What stands behind an operation takes the arguments of its definition."""

import inspect

import pytest

from adabatch import kernels
from adabatch.kernels import reference


@pytest.mark.parametrize("name", reference.__all__)
def test_every_backend_has_the_definitions_arguments(name):
    expected = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(kernels, name)) == expected
    for backends in kernels.BACKENDS.values():
        for backend in backends:
            if hasattr(backend, name):
                assert list(inspect.signature(getattr(backend, name)).parameters) == list(expected.parameters)
