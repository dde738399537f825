"""The micro-batch estimator alone: with loader and optimizer see tests of the micro-batches."""

import pytest
import torch

from adabatch.data.split import BatchSplit
from adabatch.estimators.loss_scale import StepScale
from adabatch.estimators.micro_batch import MicroBatchEstimator
from adabatch.estimators.null import NullEstimator

GRADS = torch.tensor([[1.0, 2.0], [4.0, -2.0]], dtype=torch.float64)


class Run:
    """One parameter, and batches of 5 samples in two micro-batches with gradients GRADS."""

    def __init__(self, **options):
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.micro = BatchSplit()
        self.estimator = MicroBatchEstimator([self.weight], self.micro, **options)

    def backward(self, scale=1.0, passes=(0, 1)):
        self.weight.grad = None
        self.micro.start(5)
        sizes = self.micro.current_sizes
        for index in passes:
            self.micro.advance(index, sizes[index])
            (scale * (self.weight * GRADS[index]).sum()).backward()


@pytest.mark.parametrize("loss_scale", [8.0, StepScale([8.0, 8.0])], ids=["number", "recorded"])
def test_moments_by_their_definition(loss_scale):
    run, ended = Run(), []
    run.estimator.on_backward_end.append(lambda: ended.append(run.weight.grad.clone()))
    run.backward(scale=8.0)
    moments = run.estimator.observe(loss_scale=loss_scale).moments()
    # Without the optimizer's weights the two gradients are added up as they are.
    mean, sizes = GRADS.sum(0), torch.tensor([3.0, 2.0], dtype=torch.float64)
    trace = (sizes * (GRADS.square().sum(1) - mean @ mean)).sum()
    assert moments.batch_size == 5
    assert moments.grad_sq_norm == pytest.approx(float(mean @ mean))
    assert moments.variance_trace == pytest.approx(float(trace))
    torch.testing.assert_close(torch.stack(ended), 8 * GRADS.cumsum(0))


def test_summed_losses_are_divided_by_their_samples():
    run = Run(loss_reduction="sum")
    run.backward()
    moments = run.estimator.collect()
    norms, mean = (GRADS / torch.tensor([[3.0], [2.0]])).square().sum(1), GRADS.sum(0) / 5
    sizes = torch.tensor([3.0, 2.0], dtype=torch.float64)
    assert moments.variance_trace == pytest.approx(float((sizes * (norms - mean @ mean)).sum()))


@pytest.mark.parametrize(
    ("passes", "message"),
    [((0,), r"2 micro-batches, and .* at \[0\]"), ((1,), r"at \[1\]"), ((0, 1, 1), "than once")],
)
def test_one_pass_for_each_micro_batch(passes, message):
    run = Run()
    run.backward(passes=passes)
    with pytest.raises(RuntimeError, match=message):
        run.estimator.observe()
    run.backward()  # what was measured before is forgotten
    assert run.estimator.observe().moments().batch_size == 5


def test_paused_and_removed_it_measures_nothing():
    run = Run()
    with run.estimator.paused():
        run.backward()
    with pytest.raises(RuntimeError, match=r"at \[\]"):
        run.estimator.observe()
    run.estimator.remove()
    assert not run.weight._backward_hooks


def test_what_is_not_supported_is_refused():
    run = Run()
    with pytest.raises(ValueError, match="does not support weights"):
        run.estimator.observe(weights=[1.0] * 5)
    with pytest.raises(ValueError, match="version 7"):
        run.estimator.load_state_dict({"version": 7})
    with pytest.raises(ValueError, match="no trainable parameters"):
        MicroBatchEstimator([torch.zeros(1)], BatchSplit())
    with pytest.raises(RuntimeError, match="measures nothing"):
        NullEstimator().observe()
