"""The choice of measured rows: drawn again each step, the same after a resume, with a state that
does not grow with the batch."""

import io

import pytest
import torch

from adabatch import GradSampleHooks
from adabatch.grad_sample.rows import RowSampler
from tests.grad_sample.measuring import backward, make_batch, make_mlp

CPU = torch.device("cpu")


def drawn(sampler, sizes):
    rows = []
    for size in sizes:
        sampler.redraw()
        rows.append(sampler.rows(size, CPU).tolist())
    return rows


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 10_000
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("capacity", [4, 1024, 100_000])
@pytest.mark.parametrize("grow", [False, True])
def test_a_resumed_sequence_of_draws_is_the_same(capacity, grow):
    """Also where the keys grew after they were drawn: the present step's rows are the same, and
    those of the steps to come."""
    whole = RowSampler(3, 0, capacity)
    drawn(whole, [4, 4])
    if grow:
        whole.rows(2 * capacity + 3, CPU)
        whole.rows(3 * capacity + 5, CPU)
    state = through_a_file(whole.state_dict())
    resumed = RowSampler(3, 1, capacity)
    resumed.load_state_dict(state)
    for size in (4, capacity, 3 * capacity + 5 if grow else capacity):
        assert torch.equal(resumed.rows(size, CPU), whole.rows(size, CPU))
    assert drawn(resumed, [4, 4, 2 * capacity]) == drawn(whole, [4, 4, 2 * capacity])


def test_a_sampler_with_more_room_keeps_it():
    small, large = RowSampler(2, 0, 8), RowSampler(2, 1, 64)
    large.rows(5, CPU)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.rows(8, CPU), small.rows(8, CPU))
    assert len(large._keys[CPU]) == 64


def test_a_state_of_all_rows_and_one_of_some_can_be_exchanged():
    every, some = RowSampler(None, 0, 8), RowSampler(2, 1, 8)
    some.load_state_dict(every.state_dict())
    every.choose(2)
    assert some.rows(8, CPU).tolist() == every.rows(8, CPU).tolist()
    fresh = RowSampler(None, 5, 8)
    fresh.load_state_dict(some.state_dict())
    fresh.choose(2)
    assert fresh.rows(8, CPU).tolist() == some.rows(8, CPU).tolist()


def test_a_state_is_a_snapshot():
    sampler = RowSampler(2, 0, 8)
    state = sampler.state_dict()
    rows = sampler.rows(8, CPU).tolist()
    drawn(sampler, [9, 20])
    other = RowSampler(2, 3, 8)
    other.load_state_dict(state)
    drawn(other, [9, 20])
    other.load_state_dict(state)
    assert other.rows(8, CPU).tolist() == rows


def test_hooks_resume_the_rows_of_the_steps_to_come():
    small, large = make_batch(40), make_batch(2000)

    def measured(model, hooks, batches):
        for batch in batches:
            model.zero_grad()
            backward(model, batch)
            yield hooks.collect().indices.tolist()

    model, other = make_mlp(), make_mlp()
    hooks, resumed = GradSampleHooks(model, samples=5), GradSampleHooks(other, samples=5, seed=1)
    list(measured(model, hooks, [small, small]))
    resumed.load_state_dict(through_a_file(hooks.state_dict()))
    assert list(measured(model, hooks, [small, large, small])) == list(measured(
        other, resumed, [small, large, small]))
