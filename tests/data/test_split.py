"""Batches whose memory runs out come again in smaller micro-batches."""

import pytest
import torch

from adabatch.data import AdaptiveDataLoader
from tests.micro_batches.runs import LOSSES, make, train
from tests.scripted import Indexed


def run_out(above, calls):
    def forward_hook(module, args):
        calls.append(len(args[0]))
        if len(args[0]) > above:
            raise torch.OutOfMemoryError("CUDA out of memory (a fake)")

    return forward_hook


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
def test_retrying_halves_and_loses_nothing(workers, collate_in):
    options = {"num_workers": workers, "collate_in": collate_in}
    _, expected = train(*make(None, loader_options=options), epochs=1)
    model, optimizer, loader, scheduler = make(40, loader_options=options)
    calls = []
    model[2].register_forward_pre_hook(run_out(9, calls))
    done = []
    for indices, inputs, targets in loader:
        with loader.retrying():
            optimizer.zero_grad()
            loss = LOSSES["mean"](model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            done.append(indices.tolist())
    assert loader.micro_batches.limit <= 9
    assert max(calls) > 9
    for ours, theirs in zip(model.parameters(), expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert scheduler.samples_seen == 240


def test_retrying_in_the_middle_of_a_batch_starts_it_anew():
    model, optimizer, loader, scheduler = make(8, proposals=[32])
    loader.batch_size = 32
    failing = iter([False, False, True, *[False] * 1000])
    pieces = []
    for indices, inputs, targets in loader:
        with loader.retrying():
            loss = LOSSES["mean"](model(inputs), targets)
            loss.backward()
            if next(failing):
                raise torch.OutOfMemoryError("a fake")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
        pieces.append(indices.tolist())
    assert [len(piece) for piece in pieces[:11]] == [8, 8, 8, *[4] * 8]
    assert [index for piece in pieces[3:11] for index in piece] == list(range(32))
    whole = make(None, proposals=[32])
    whole[2].batch_size = 32
    _, expected = train(*whole, epochs=1)
    for ours, theirs in zip(model.parameters(), expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def failing_loop(loader, error, change=False):
    for _, inputs, _ in loader:
        with loader.retrying():
            if change:
                inputs += 1
            raise error


def test_what_cannot_be_retried_is_raised():
    loader = make(8)[2]
    with pytest.raises(ValueError, match="mine"):
        failing_loop(loader, ValueError("mine"))
    with pytest.raises(torch.OutOfMemoryError):
        failing_loop(loader, torch.OutOfMemoryError("even one sample is too much"))
    assert loader.micro_batches.limit == 1
    with pytest.raises(RuntimeError, match="steps on the last micro-batch"):
        failing_loop(AdaptiveDataLoader(Indexed(), 4), torch.OutOfMemoryError("a fake"))


def test_a_batch_changed_in_place_is_not_tried_again():
    with pytest.raises(RuntimeError, match=r"changed in place.*inputs = inputs / 255"):
        failing_loop(make(8)[2], torch.OutOfMemoryError("a fake"), change=True)


def test_a_step_that_was_taken_is_not_taken_twice():
    model, optimizer, loader, _ = make(8)

    def loop():
        for _, inputs, targets in loader:
            with loader.retrying():
                LOSSES["mean"](model(inputs), targets).backward()
                optimizer.step()
                if loader.is_last_micro_batch:
                    raise torch.OutOfMemoryError("after the step")

    with pytest.raises(torch.OutOfMemoryError, match="after the step"):
        loop()


def test_retrying_is_refused_in_one_of_many():
    loader = AdaptiveDataLoader(Indexed(20), 8, rank=1, world_size=4)
    loader.micro_batches.accumulates = True
    with pytest.raises(RuntimeError, match="would leave the others waiting"), loader.retrying():
        pass
