"""wrap(max_grad_norm=) reaches CABS, wherever it sits, and its proposal is that of the clipped
step."""

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from adabatch import CABS
from adabatch.controllers import Annealed, AtMost, NormTest
from adabatch.interfaces import RunContext
from tests import oracle
from tests.grad_sample.measuring import make_batch, make_mlp, mean_grad_sq_norm, squared_error


def first_proposal(norm, controller, batch, lr=0.05):
    model = make_mlp()
    data = torch.utils.data.TensorDataset(*batch)
    optimizer, loader, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=lr), DataLoader(data, batch_size=len(data)),
        controller=controller, batch_sizes=(2, 64), measure="all",
        micro_batches=adabatch.MicroBatches(max_grad_norm=norm),
    )  # fmt: skip
    for part in loader:
        optimizer.zero_grad()
        loss = squared_error(model, part).mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    scheduler.remove()
    return scheduler.diagnostics.latest.proposed_batch_size


@pytest.mark.parametrize("norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("wrapped", [lambda rule: rule, lambda rule: AtMost(rule, 1e9),
                                     lambda rule: AtMost(AtMost(rule, 1e9), 1e9)])
def test_the_proposal_is_of_the_clipped_step(norm, wrapped):
    model, batch = make_mlp(), make_batch(12)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    length = mean_grad_sq_norm(grads) ** 0.5
    assert length > 0.5
    kept = 1.0 if norm is None else min(1.0, norm / length)
    loss = float(squared_error(model, batch).mean().detach())
    assert first_proposal(norm, wrapped(CABS()), batch) == pytest.approx(
        0.05 * kept * float(oracle.variance_trace(grads)) / loss, rel=1e-4
    )


def test_the_cap_of_annealed_takes_the_norm_and_other_rules_ignore_it():
    cap = CABS(f_star=0.1)
    rule = Annealed(1000, 4, cap=cap, rule="linear")
    rule.bind(RunContext(SGD([torch.zeros(1)], lr=0.1), max_grad_norm=0.5))
    assert cap.max_grad_norm == 0.5
    first_proposal(0.5, NormTest(), make_batch(8))
    first_proposal(0.5, CABS.reference(), make_batch(8))


def test_two_norms_are_refused_and_one_given_twice_is_not():
    assert first_proposal(0.5, CABS(max_grad_norm=0.5), make_batch(8)) > 0
    with pytest.raises(ValueError,
                       match=r"CABS\(max_grad_norm=1.0\), but optimizer.step\(\) clips to 0.5"):
        first_proposal(0.5, CABS(max_grad_norm=1.0), make_batch(8))


def test_the_clipping_factor_is_in_the_state():
    rule, fresh = CABS(), CABS()
    rule.bind(RunContext(SGD([torch.zeros(1)], lr=0.1), max_grad_norm=0.5))
    moments = adabatch.GradientMoments(2, torch.tensor([4.0, 8.0]), 4.0)
    first = rule.propose(moments, loss=1.0, lr=0.1)
    fresh.bind(RunContext(SGD([torch.zeros(1)], lr=0.1), max_grad_norm=0.5))
    fresh.load_state_dict(rule.state_dict())
    proposals = [each.propose(moments, loss=1.0, lr=0.1) for each in (fresh, rule)]
    assert proposals[0] == proposals[1] == pytest.approx(first)
    assert first == pytest.approx(0.1 * 0.25 * 4.0, rel=1e-5)
