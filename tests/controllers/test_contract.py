"""What every controller promises the scheduler: one row a controller."""

import inspect
import io
import itertools
import math

import pytest
import torch

import adabatch.controllers
from adabatch import CABS, GradientMoments
from adabatch.controllers import (
    AdaDamp,
    AdaScale,
    Annealed,
    AtLeast,
    AtMost,
    Average,
    Confident,
    GeoDamp,
    Goodput,
    GradientDiversity,
    InnerProductTest,
    Monotone,
    NoiseScale,
    NormTest,
    OnlineSelection,
    PadaDamp,
    Scheduled,
    Seesaw,
    Warmup,
)
from adabatch.schedules import ExponentialBS, VirtualBatchSize

CONTROLLERS = {
    "CABS": lambda: CABS(scale=0.5, f_star=0.1, smoothing=0.9, eps=0.01),
    "CABS with a floor": lambda: CABS(f_star="auto", max_grad_norm=2.0),
    "CABS.reference": lambda: CABS.reference(scale=0.5, smoothing=0.9, eps=0.01),
    "Scheduled": lambda: Scheduled(
        ExponentialBS(None, 1.1, batch_size_manager=VirtualBatchSize(10)), every=2),
    "Scheduled by samples": lambda: Scheduled("0:64 500:128 2K:256", unit="samples"),
    "Seesaw": lambda: Seesaw(batch_size=48, rule="linear"),
    "OnlineSelection": lambda: OnlineSelection(lambda: {64: 0.5, 32: 0.4}, candidates=(64, 32),
                                               pick="largest"),
    "NormTest": lambda: NormTest(theta=0.5, smoothing=0.8),
    "NormTest raw": lambda: NormTest(theta=0.5, signal="raw"),
    "InnerProductTest": lambda: InnerProductTest(theta=0.7, smoothing=0.8),
    "InnerProductTest augmented": lambda: InnerProductTest.augmented(theta=0.7, nu=0.3),
    "InnerProductTest augmented, raw": lambda: InnerProductTest(nu=0.3, signal="raw"),
    "NoiseScale": lambda: NoiseScale(scale=0.3, smoothing=0.9),
    "GradientDiversity": lambda: GradientDiversity(delta=0.7, epoch_samples=100),
    "AdaDamp": lambda: AdaDamp(24, f_star=0.1, smoothing=0.9),
    "PadaDamp": lambda: PadaDamp(24, rate=0.3),
    "GeoDamp": lambda: GeoDamp(24, factor=1.3, every=2),
    "AdaScale": lambda: AdaScale(96, base_batch_size=16),
    "Goodput": lambda: Goodput(16, clock=lambda: 0.0),
    "Annealed": lambda: Annealed(2000, 24, shape="cosine", final=0.05, rule="linear"),
    "Annealed to a measured cap": lambda: Annealed(1000, 24, shape="power",
                                                   cap=NoiseScale(scale=0.5), rule="sqrt"),
    "AtLeast": lambda: AtLeast(CABS(), 7.5, NoiseScale()),
    "AtMost": lambda: AtMost(CABS(), 123.5),
    "Average": lambda: Average(CABS(), NoiseScale(), 40, weights=(1, 2, 0.5)),
    "Confident": lambda: Confident(NoiseScale(), level=0.5),
    "Monotone": lambda: Monotone(CABS(scale=30.0)),
    "Warmup": lambda: Warmup(CABS(scale=1e3), growth=1.5, samples=50),
}
# No statistic: a size that is fixed, counted or decided once an epoch.
UNMEASURED_SIZE = {"GradientDiversity", "AdaScale", "Goodput", "Annealed to a measured cap",
                   "AtMost", "Warmup", "Confident"}
# A signal that is not above 0 leaves the ratio unbounded.
MAY_BE_INFINITE = {"NormTest", "InnerProductTest", "InnerProductTest augmented", "NoiseScale",
                   "GradientDiversity", "AtLeast", "Average", "AdaDamp", "Confident"}
every_controller = pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
MEASURING = {name: make for name, make in CONTROLLERS.items() if make().needs_moments}
every_measuring_controller = pytest.mark.parametrize("make", MEASURING.values(), ids=MEASURING)
REPEATABLE = {name: make for name, make in CONTROLLERS.items()
              if not name.startswith(("Scheduled", "OnlineSelection"))}
RATIOS = {name: make for name, make in MEASURING.items() if name not in UNMEASURED_SIZE}


def run(controller, seed, steps=20):
    """The proposals of a run of random moments, losses and rates."""
    generator = torch.Generator().manual_seed(seed)
    proposals = []
    for _ in range(steps):
        m = int(torch.randint(2, 65, (), generator=generator))
        sq_norms = torch.rand(m, generator=generator) * 30
        uniform = torch.rand(3, generator=generator).tolist()
        controller.on_step(samples=m, epoch=0)
        square = uniform[0] * float(sq_norms.mean())
        spread = torch.randn(m, generator=generator) * square**0.5
        inner_products = square + spread - spread.mean()
        given = inner_products if "inner_products" in controller.requires else None
        moments = GradientMoments(m, sq_norms, grad_sq_norm=square, inner_products=given)
        proposals.append(controller.propose(moments, loss=0.5 + uniform[1], lr=uniform[2]))
    return proposals


def test_every_public_controller_has_a_row():
    public = {getattr(adabatch.controllers, name) for name in adabatch.controllers.__all__
              if name != "Controller"}
    covered = {type(make()) for make in CONTROLLERS.values()}
    assert {item for item in public if inspect.isclass(item)} <= covered


@every_controller
def test_propose_takes_moments_and_the_loss_and_lr_by_name(make):
    parameters = inspect.signature(make().propose).parameters
    assert list(parameters) == ["moments", "loss", "lr"]
    assert parameters["loss"].kind is parameters["lr"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", CONTROLLERS)
def test_proposals_are_plain_finite_floats(name):
    proposals = run(CONTROLLERS[name](), seed=0)
    assert all(type(proposal) is float and proposal >= 0 for proposal in proposals)
    assert name in MAY_BE_INFINITE or math.inf not in proposals
    assert any(map(math.isfinite, proposals))


@pytest.mark.parametrize("make", RATIOS.values(), ids=RATIOS)
def test_proposals_are_neither_rounded_nor_bounded(make):
    moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([3e9, 3e9]), grad_sq_norm=0.7,
                              inner_products=torch.tensor([3e9, -3e9]))
    assert make().propose(moments, loss=1.0, lr=1.0) > 1e6
    assert any(proposal != round(proposal) for proposal in run(make(), seed=3))


@every_controller
def test_proposals_depend_on_the_arguments_only(make):
    torch.manual_seed(0)
    first = run(make(), seed=1)
    torch.manual_seed(1)
    assert run(make(), seed=1) == first


@every_controller
def test_a_saved_state_continues_bit_for_bit(make):
    unbroken = make()
    run(unbroken, seed=1)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert repr(resumed.state_dict()) == repr(unbroken.state_dict())  # NaN is not equal to itself
    assert run(resumed, seed=2) == run(unbroken, seed=2)


@every_controller
def test_an_initial_state_continues_too(make):
    used = make()
    run(used, seed=1)
    used.load_state_dict(make().state_dict())
    assert run(used, seed=2) == run(make(), seed=2)


@every_controller
@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_an_unknown_version_is_an_error_and_changes_nothing(make, version):
    controller = make()
    run(controller, seed=1)
    state = {**controller.state_dict(), "version": version}
    if version is None:
        del state["version"]
    twin = make()
    run(twin, seed=1)
    with pytest.raises(ValueError, match=rf"{type(controller).__name__} has version {version!r}"):
        controller.load_state_dict(state)
    assert run(controller, seed=2) == run(twin, seed=2)


@every_controller
def test_the_state_of_another_controller_is_an_error_and_changes_nothing(make):
    controller, twin = make(), make()
    run(controller, seed=1)
    run(twin, seed=1)
    for other in (CABS, NoiseScale, lambda: PadaDamp(8, rate=0.1), lambda: Seesaw(8),
                  lambda: AtMost(CABS(), 8)):
        if type(other()) is type(controller):
            continue
        names = type(other()).__name__, type(controller).__name__
        message = "the state of a controller {} cannot be loaded into {}".format(*names)
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(other().state_dict())
    assert repr(controller.state_dict()) == repr(twin.state_dict())


def test_the_state_of_another_child_is_an_error_and_changes_nothing():
    rule = Monotone(CABS())
    run(rule, seed=1)
    before = repr(rule.state_dict())
    with pytest.raises(ValueError,
                       match="state of a controller NoiseScale cannot be loaded into CABS"):
        rule.load_state_dict(Monotone(NoiseScale()).state_dict())
    assert repr(rule.state_dict()) == before


@every_controller
def test_a_state_is_a_snapshot(make):
    controller = make()
    run(controller, seed=1)
    state = controller.state_dict()
    before = repr(state)
    run(controller, seed=2)
    assert repr(state) == before


@pytest.mark.parametrize("make", REPEATABLE.values(), ids=REPEATABLE)
def test_the_repr_builds_the_same_controller(make):
    controller = make()
    package = adabatch.controllers
    twin = eval(repr(controller), {name: getattr(package, name) for name in package.__all__})
    assert type(twin) is type(controller)
    for either in (controller, twin):
        if hasattr(either, "clock"):  # two runs by the wall's clock differ
            either.clock = itertools.count().__next__
    assert run(twin, seed=1) == run(controller, seed=1)


@every_controller
def test_controllers_without_measurements_accept_none_as_moments(make):
    controller = make()
    if controller.needs_moments:
        pytest.skip("measures")
    controller.on_step(samples=16, epoch=1)
    assert type(controller.propose(None, loss=math.nan, lr=0.1)) is float
