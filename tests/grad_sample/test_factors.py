"""Factors against einsum in float64; select."""

import pytest
import torch
from torch.nn import functional as F

from adabatch.grad_sample.factors.affine import Scale, Shift
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.conv import ConvOuter
from adabatch.grad_sample.factors.merge import SumOfFactors
from adabatch.grad_sample.factors.outer import OneHotOuter, Outer
from adabatch.grad_sample.factors.viewed import Viewed

SAMPLES = 6


def make_outer(dtype):
    left, right = torch.randn(SAMPLES, 5, 3, dtype=dtype), torch.randn(SAMPLES, 5, 4, dtype=dtype)
    return Outer(left, right), torch.einsum("nto,nti->noi", left.double(), right.double())


def make_one_hot_outer(dtype):
    ids, right = torch.randint(4, (SAMPLES, 7)), torch.randn(SAMPLES, 7, 3, dtype=dtype)
    return OneHotOuter(ids, right, num_embeddings=4), torch.einsum(
        "ntv,ntd->nvd", F.one_hot(ids, 4).double(), right.double())


def make_conv_outer(dtype):
    activations = torch.randn(SAMPLES, 3, 9, dtype=dtype)
    backprops = torch.randn(SAMPLES, 4, 4, dtype=dtype)
    windows = F.pad(activations.double(), (1, 1)).unfold(2, 5, 2)[..., ::2]
    factor = ConvOuter(activations, backprops, (4, 3, 3), stride=(2,), padding=(1,), dilation=(2,),
                       groups=1)
    return factor, torch.einsum("nop,ncpk->nock", backprops.double(), windows)


def make_dense(dtype):
    grad = torch.randn(SAMPLES, 3, 2, dtype=dtype)
    return Dense(grad), grad.double()


def make_scale(dtype):
    activations, backprops = torch.randn(2, SAMPLES, 5, 3, dtype=dtype)
    mean, rstd = torch.randn(SAMPLES, 5, 1, dtype=dtype), torch.rand(SAMPLES, 5, 1, dtype=dtype)
    normalized = (activations.double() - mean.double()) * rstd.double()
    return Scale(activations, backprops, mean, rstd, (3,)), (normalized * backprops.double()).sum(1)


def make_shift(dtype):
    scale, _ = make_scale(dtype)
    return Shift(scale), scale.backprops.double().sum(1)


def make_sum(dtype):
    outer, lookup = make_outer(dtype), make_one_hot_outer(dtype)
    turned = Outer(outer[0].right, outer[0].left)  # [4, 3] as the table
    return SumOfFactors((turned, lookup[0])), outer[1].mT + lookup[1]


def make_viewed(dtype):
    inner, grads = make_dense(dtype)
    view = torch.empty(2, 5, 3)[:, 1:4, 0].T
    whole = torch.zeros(SAMPLES, 2, 5, 3, dtype=torch.float64)
    whole[:, :, 1:4, 0] = grads.mT
    return Viewed(inner, (2, 5, 3), view.shape, view.stride(), view.storage_offset()), whole


MAKERS = [make_outer, make_one_hot_outer, make_conv_outer, make_dense, make_scale, make_shift,
          make_sum, make_viewed]
makers = pytest.mark.parametrize("make", MAKERS,
                                 ids=lambda make: make.__name__.removeprefix("make_"))


def check(factor, grads, rtol):
    direction = torch.randn(grads.shape[1:], dtype=torch.float64)
    assert tuple(factor.shape) == tuple(grads.shape[1:])
    for actual, expected in [
        (factor.dense(), grads),
        (factor.sq_norms(), grads.flatten(1).square().sum(1)),
        (factor.second_moment(), grads.square().sum(0)),
        (factor.dot(direction), (grads * direction).flatten(1).sum(1)),
        (factor.total(), grads.sum(0)),
    ]:
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=rtol,
                                   atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "rtol"), [
    (torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str)
@makers
def test_statistics(make, dtype, rtol):
    torch.manual_seed(0)
    check(*make(dtype), rtol)


@makers
def test_select(make):
    torch.manual_seed(0)
    factor, grads = make(torch.float64)
    indices = torch.tensor([4, 0, 3])
    selected = factor.select(indices)
    assert type(selected) is type(factor)
    check(selected, grads[indices], 1e-10)


def test_every_factor_is_tested():
    ours = {each for each in Factor.__subclasses__() if each.__module__.startswith("adabatch.")}
    assert {type(make(torch.float32)[0]) for make in MAKERS} == ours
