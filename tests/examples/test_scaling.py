"""The benchmark of many processes: its model against made data, its figures, and a quick run."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from collective_model import CHECKSUM, HOPS, fit, shares
from global_order import MAKERS, costs
from scaling import finite, fits_of, step_figures

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "scaling.py"
ALPHA, BANDWIDTH = 7e-5, 2e9
POINTS = [(world, 2**power) for world in (2, 3, 4) for power in range(3, 13)]
HOPS_BY_HAND = {"tree": {2: 1, 3: 2, 4: 2}, "ring": {2: 2, 3: 4, 4: 6}}


def made(hops):
    latency = HOPS_BY_HAND[hops]
    return [(world, length,
             ALPHA * latency[world] + 2 * (world - 1) / world * 8 * length / BANDWIDTH)
            for world, length in POINTS]


@pytest.mark.parametrize("hops", ["tree", "ring"])
def test_fit_recovers_the_constants_of_made_data(hops):
    found = fit(made(hops), hops)
    assert found.latency == pytest.approx(ALPHA, rel=1e-6)
    assert found.bandwidth == pytest.approx(BANDWIDTH, rel=1e-5)
    assert max(map(abs, found.residuals)) < 1e-6
    assert found.latency_error < 1e-6 * ALPHA


def test_standard_errors_are_the_spread_over_noisy_data():
    generator = np.random.default_rng(0)
    fits = [fit([
        (world, length, t * math.exp(0.05 * generator.standard_normal()))
        for world, length, t in made("tree")]) for _ in range(200)]
    # 1/B, in which the model is linear.
    per_byte = [(1 / found.bandwidth, found.bandwidth_error / found.bandwidth**2) for found in fits]
    for pairs, truth in (
        ([(found.latency, found.latency_error) for found in fits], ALPHA), (per_byte, 1 / BANDWIDTH)
    ):
        values, errors = np.array(pairs).T
        assert values.mean() == pytest.approx(
            truth, abs=4 * values.std(ddof=1) / math.sqrt(len(fits)))
        assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.2)
    assert np.mean([found.spread for found in fits]) == pytest.approx(0.05, rel=0.1)


def test_the_wrong_law_fits_worse():
    assert fit(made("ring"), "ring").spread < 1e-6 < 0.1 < fit(made("ring"), "tree").spread


def test_runs_that_share_cores_can_be_left_out():
    points = [
        {"world": world, "length": length, "median": t * (1 if world < 3 else 30)}
        for world, length, t in made("tree")]
    assert fits_of(points)["tree"].latency > 3 * ALPHA
    assert fits_of(points, 2)["tree"].latency == pytest.approx(ALPHA, rel=1e-6)
    assert fits_of(points, 1) == {}


def test_times_that_do_not_grow_have_no_bandwidth():
    found = fit([(2, 2**power, 1e-4 * (1 - power / 1000)) for power in range(3, 13)])
    assert found.bandwidth == math.inf
    assert found.latency == pytest.approx(1e-4, rel=0.02)
    assert finite({"a": [found.bandwidth, 1.0]}) == {"a": [None, 1.0]}


@pytest.mark.parametrize("points", [[], [(2, 8, 1e-4)] * 2, [(2, 8, 1e-4)] * 5])
def test_too_few_points_are_refused(points):
    with pytest.raises(ValueError, match="three points that differ"):
        fit(points)


@pytest.mark.parametrize("world", [2, 3, 7, 8, 9, 1000, 1024, 1025, 16384])
def test_hops(world):
    inner = math.ceil(math.sqrt(world))
    assert HOPS["tree"](world) == math.ceil(math.log2(world))
    assert HOPS["ring"](world) == 2 * world - 2
    assert HOPS["two rings"](world) == 2 * (inner - 1) + 2 * (math.ceil(world / inner) - 1)


def test_shares_of_a_step():
    row = shares([8], 20, latency=1e-3, bandwidth=1e6, step=0.5, check_every=10)[0]
    vector, check = (2 * 7 / 8 * 8 * length / 1e6 for length in (20, CHECKSUM))
    assert row["tree"]["seconds"] == pytest.approx(3e-3 + vector)
    assert row["ring"]["share"] == pytest.approx((14e-3 + vector) / 0.5)
    assert row["tree"]["share_apart"] == pytest.approx(
        (3e-3 + vector - check + (3e-3 + check) / 10) / 0.5)


def test_figures_of_a_step_are_paired():
    plain = [1.0, 2.0, 1.0, 4.0, 1.0, 2.0, 1.0]
    steps = {
        "Plain": plain, "Local": [1.1 * each for each in plain],
        "Whole": [1.12 * each for each in plain]}
    figures = step_figures({
        "world": 2, "length": 20, "steps": steps,
        "settled": {"Local": [0.01] * 7, "Whole": [0.02] * 7}})
    assert figures["whole"]["median"] == pytest.approx(1.12)
    for bound in ("median", "min", "max"):
        assert figures["distributed"][bound] == pytest.approx(0.02)
    assert figures["settled"]["median"] == pytest.approx(0.01)
    assert figures["plain_ms"] == 1000


@pytest.mark.parametrize("kind", MAKERS)
def test_memory_of_the_order_does_not_grow_with_the_epoch(kind):
    # A table of the order would have 80 GB.
    found = costs(kind, (10**10, 4096, 6, 8))
    assert max(found["resident"], found["allocated"]) < 50e6
    assert found["seconds"]["first_batch"][0] < 1


def test_quick_run_on_two_processes(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=240).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 30 s of two cores that have nothing else to do.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["world"] for row in found["steps"]] == [2]
    assert found["steps"][0]["doubles"] > CHECKSUM
    assert {point["length"] for point in found["all_reduce"]} == {8, 64, 512, 4096}
    assert found["fits"].keys() == {"tree", "ring"}
    assert [row["world"] for row in found["extrapolation"]["assumed"]] == [
        2**power for power in range(3, 15)]
    assert all(row["samples"] == 10**9 and row["resident"] < 50e6 for row in found["order"])
    report = (tmp_path / "scaling.md").read_text()
    assert report.strip() in printed
    assert "Extrapolated: nothing below was run" in report
