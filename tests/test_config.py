"""The option objects check themselves where they are made."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch import config
from adabatch.config import (
    BatchSizes,
    Coupling,
    CrossRank,
    Every,
    MicroBatch,
    MicroBatches,
    PerSample,
)
from adabatch.controllers import AdaScale
from adabatch.diagnostics import Diagnostics

ERRORS = {
    "minimum": (lambda: BatchSizes(0), "minimum must be a positive integer, got 0"),
    "maximum": (lambda: BatchSizes(maximum=None), "maximum must be a positive integer, got None"),
    "float": (lambda: BatchSizes(8.0), "minimum must be a positive integer, got 8.0"),
    "bool": (lambda: BatchSizes(multiple_of=True), "multiple_of must be a .* got True"),
    "order": (lambda: BatchSizes(64, 16), r"minimum \(64\) must not exceed maximum \(16\)"),
    "multiple": (lambda: BatchSizes(4, 6, multiple_of=7), "no multiple of 7 lies between"),
    "ratio": (lambda: BatchSizes(size_ratio=1), "size_ratio must be a number > 1 or None, got 1"),
    "ratio-text": (lambda: BatchSizes(size_ratio="a"), "size_ratio must be a number > 1"),
    "cooldown": (lambda: BatchSizes(cooldown=-1), "cooldown must be an integer >= 0, got -1"),
    "hysteresis": (lambda: BatchSizes(hysteresis="a"), "hysteresis must be a number >= 0"),
    "all": (lambda: BatchSizes(0, cooldown=-1), "BatchSizes: minimum.*; cooldown"),
    "pair": (lambda: BatchSizes.of(16), r"pair \(minimum, maximum\).* got 16: pass e.g."),
    "rule": (lambda: Coupling("cubic"), r"rule must be one of \('none', .* got 'cubic'"),
    "rule-class": (lambda: Coupling(dict), "or a callable .batch_size.* got <class 'dict'>"),
    "base": (lambda: Coupling("sqrt", base_batch_size=0), "base_batch_size must be a positive"),
    "on-limit": (lambda: Coupling(on_limit="lr"), r"on_limit must be one of \('keep', 'lower_lr'"),
    "short": (lambda: Coupling(short_batch="no"), "short_batch must be one of .* got 'no'"),
    "betas": (lambda: Coupling(scale_betas="yes"), "scale_betas must be True or False, got 'yes'"),
    "every": (lambda: Every(0), "k must be a positive integer, got 0"),
    "samples": (lambda: Every(2, samples=2.5), "samples must be a positive integer or None"),
    "layout": (lambda: PerSample(layout=5), "layout must be what adabatch.check.* got 5"),
    "ignore": (lambda: PerSample(ignore="head"), "ignore must be a list of names of modules"),
    "ignore-numbers": (lambda: PerSample(ignore=[0]), r"modules or parameters, got \[0\]"),
    "seed": (lambda: PerSample(seed=None), "seed must be an integer, got None"),
    "parameters": (lambda: PerSample(per_parameter="yes"), "per_parameter must be True or False"),
    "comm-hook": (lambda: CrossRank(comm_hook=1), r"comm_hook must be a callable .*, got 1"),
    "comm-state": (lambda: CrossRank(comm_state=1), "comm_state is passed to comm_hook"),
    "size": (lambda: MicroBatches("all"), "size must be a positive integer, 'auto' or None"),
    "auto": (lambda: MicroBatches("auto"), "size='auto' tries steps: pass loss_fn="),
    "criterion": (lambda: MicroBatches("auto", loss_fn=nn.CrossEntropyLoss()),
                  r"loss_fn must be a function \(model, batch\) -> loss, got CrossEntropyLoss"),
    "norm": (lambda: MicroBatches(8, max_grad_norm="1"), "max_grad_norm must be a number > 0"),
    "lr": (lambda: MicroBatches(8, lr_scheduler=1), "lr_scheduler must be a torch.optim"),
    "measure": (lambda: config.measure_of("some"), "measure must be 'auto', a share .* 'some'"),
    "share": (lambda: config.measure_of(0), "measure must be 'auto', a share .*> 0 .* got 0"),
    "percent": (lambda: config.measure_of(10), "a share .* up to 1, .*Every.k.* got 10"),
    "keeps-all": (lambda: BatchSizes(hysteresis=1.0), "hysteresis must be .* < 1, .* got 1.0"),
    "false": (lambda: BatchSizes(hysteresis=False), "hysteresis must be a number .* got False"),
    "complex": (lambda: BatchSizes(hysteresis=0j), "hysteresis must be a number .* got 0j"),
    "tensor": (lambda: BatchSizes(hysteresis=torch.tensor(0.0)), "hysteresis must .* tensor"),
    "array": (lambda: BatchSizes(hysteresis=np.zeros(2)), "hysteresis must .* got array"),
    "array-choice": (lambda: Coupling(on_limit=np.array(["keep"])), "on_limit must be one of"),
    "ignore-dict": (lambda: PerSample(ignore={"a": 1}), "ignore must be a list of names"),
    "class": (lambda: CrossRank(int), "comm_hook must be a callable .*, got <class 'int'>"),
    "records": (lambda: Diagnostics(max_records="a"), "max_records must be an integer .* 'a'"),
    "two-sizes": (lambda: AdaScale(16, 128), r"did you mean AdaScale\(batch_size=128, base"),
    "plateau": (lambda: MicroBatches(8, lr_scheduler=ReduceLROnPlateau(SGD([torch.ones(1)]))),
                "is a ReduceLROnPlateau, .*step it in your loop"),
    "switch": (lambda: config.measure_of(True), "measure must be 'auto', .* got True"),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS)
def test_a_bad_option_is_refused_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_short_forms_stand_for_the_objects():
    def rule(batch_size, base, noise):
        return 1.0

    assert BatchSizes.of([8, 32]) == BatchSizes(8, 32)
    assert Coupling.of(rule).rule is rule
    assert MicroBatches.of(8) == MicroBatches(8)
    assert MicroBatches.of(None) == MicroBatches()
    assert config.measure_of("all") == Every(1)
    for options in (BatchSizes(8, 32), Coupling("sqrt"), MicroBatches(8)):
        assert type(options).of(options) is options


@pytest.mark.parametrize("kind", [BatchSizes, Coupling, Every, PerSample, MicroBatch, MicroBatches])
def test_options_are_values(kind):
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), field.name, None)


def test_lowest_and_highest_are_multiples():
    sizes = BatchSizes(10, 30, multiple_of=8)
    assert (sizes.lowest, sizes.highest) == (16, 24)


def test_the_trial_of_micro_batches_takes_the_loss():
    assert MicroBatches("auto", loss_fn=lambda model, batch: nn.Identity()(batch)).size == "auto"


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_numpy_numbers_are_numbers(whole):
    sizes = BatchSizes(whole(4), whole(64), cooldown=whole(2), hysteresis=np.float32(0.25))
    assert sizes == BatchSizes(4, 64, cooldown=2, hysteresis=0.25)
    assert {type(sizes.minimum), type(sizes.maximum), type(sizes.cooldown)} == {int}
    assert type(sizes.hysteresis) is float
    assert BatchSizes(whole(100), whole(120), multiple_of=whole(50)).lowest == 100
    assert Every(whole(3), samples=whole(8)) == Every(3, samples=8)
    assert Coupling("sqrt", base_batch_size=whole(16)) == Coupling("sqrt", base_batch_size=16)
    assert MicroBatches.of(whole(8)) == MicroBatches(8)
    assert PerSample(seed=whole(7)) == PerSample(seed=7)
    assert config.measure_of(np.float32(0.25)) == 0.25
    model = nn.Linear(2, 1)
    _, _, scheduler = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(torch.ones(64, 2)), 4),
        batch_sizes=(whole(4), whole(64)), accumulate=whole(2))
    assert type(scheduler.accumulate) is int
    scheduler.remove()
    with pytest.raises(ValueError, match=r"minimum must be a positive integer, got .*True"):
        BatchSizes(np.bool_(True))


WRONG = {"loss_reduction": np.array(["mean"]), "accumulate": None, "grad_scaler": 1,
         "diagnostics": 2, "measure": "some", "estimator": 3}


@pytest.mark.parametrize("monitored", [False, True], ids=["wrap", "monitor"])
def test_all_wrong_arguments_are_listed_at_once(monitored):
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.ones(64, 2)))
    more = {} if monitored else {"batch_sizes": 5, "coupling": "cubic", "micro_batches": -1,
                                 "controller": 4}
    given = (model, optimizer) if monitored else (model, optimizer, loader)
    call = adabatch.monitor if monitored else adabatch.wrap
    with pytest.raises(ValueError, match="arguments are wrong:") as error:
        call(*given, **WRONG, **more)
    text = str(error.value)
    assert text.count("\n  - ") == len(WRONG) + len(more)
    assert all(f"  - {name} must be" in text for name in WRONG)
    assert "Coupling: rule must" in text or monitored
    for name, value in WRONG.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            call(*given, **{name: value})
    call(*given)[-1].remove() if not monitored else call(*given).remove()


@pytest.mark.parametrize("make", [
    lambda: PerSample(ignore=torch.tensor(3)), lambda: MicroBatches(np.array([1, 2])),
    lambda: BatchSizes(hysteresis=np.array([0.1, 0.2]))], ids=["ignore", "size", "hysteresis"])
def test_arrays_are_refused_like_other_wrong_types(make):
    with pytest.raises(ValueError, match=r"(ignore|size|hysteresis) must be"):
        make()
