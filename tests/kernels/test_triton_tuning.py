"""How a configuration is chosen: timed once per key, the first that fits where nothing may be
timed, and never one that the device lacks memory for."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources

from adabatch.kernels.triton import tuning
from adabatch.kernels.triton.tuning import (
    bucket,
    compute_type,
    launch,
    precision,
    split_positions,
    split_samples,
)

CPU = torch.device("cpu")


@pytest.fixture
def chosen(monkeypatch):
    """Runs launch with made-up times, the configurations being their names; an infinite time is a
    configuration that does not fit."""
    timed = []
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def choose(times, key=("key",), deterministic=False):
        def run(config):
            if times[config] == math.inf:
                raise OutOfResources(2, 1, "shared memory")
            return config

        def time(config, run):
            timed.append(config)
            return times[config]

        monkeypatch.setattr(tuning, "_time", time)
        return launch(key, list(times), run, deterministic)

    choose.timed = timed
    return choose


def test_the_fastest_is_timed_once_per_key(chosen):
    times = {"first": 3.0, "too large": math.inf, "fast": 1.0, "last": 2.0}
    assert chosen(times) == chosen(times) == "fast"
    assert chosen.timed == list(times)
    chosen(times, key=("other",))
    assert chosen.timed == 2 * list(times)


@pytest.mark.parametrize("larger", [{}, {"too large": math.inf}], ids=["first", "first-that-fits"])
def test_a_deterministic_call_times_nothing(chosen, larger):
    chosen({"fast": 1.0, "last": 2.0})
    del chosen.timed[:]
    times = {**larger, "first": 3.0, "fast": 1.0}
    assert chosen(times, deterministic=True) == "first"
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(times, deterministic=None) == "first"
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen.timed == []


def test_nothing_is_timed_while_a_graph_is_captured(chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen({"first": 3.0, "fast": 1.0}) == "first"


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_device_without_memory_for_any_is_an_error(chosen, deterministic):
    with pytest.raises(OutOfResources, match="shared memory"):
        chosen({"first": math.inf, "last": math.inf}, deterministic=deterministic)


def test_the_interpreter_takes_the_last(chosen, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    assert chosen({"first": 1.0, "last": 2.0}) == "last"


def test_batch_sizes_are_tuned_by_powers_of_two():
    assert [bucket(size) for size in (0, 1, 3, 64, 65)] == [0, 1, 4, 64, 128]


def test_float32_products_are_rounded_only_where_torch_is_set_to():
    float32 = compute_type(torch.zeros(1))
    assert compute_type(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)) == float32
    before = torch.get_float32_matmul_precision()
    try:
        assert precision(float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_samples_and_positions_are_split_to_fill_the_device(monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda device: 8)
    assert split_samples(n_samples=100, tiles=16, device=CPU) == (100, 1)
    assert split_samples(n_samples=100, tiles=4, device=CPU) == (25, 4)
    assert split_samples(n_samples=3, tiles=1, device=CPU) == (1, 3)
    assert split_samples(n_samples=0, tiles=1, device=CPU) == (1, 0)
    assert split_positions(1000, programs=32, shortest=64, device=CPU) == (1000, 1)
    assert split_positions(1000, programs=8, shortest=64, device=CPU) == (250, 4)
    assert split_positions(1000, programs=1, shortest=64, device=CPU) == (67, 15)
    assert split_positions(0, programs=1, shortest=64, device=CPU) == (0, 1)
