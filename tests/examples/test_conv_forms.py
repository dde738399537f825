"""The measurement of a convolution's forms: what it writes is the table that is read."""

import importlib.util
import math

import conv_forms
import pytest
import torch

from adabatch.kernels import conv_timings


def test_the_table_written_is_the_module_read(monkeypatch, tmp_path):
    threads, shapes = torch.get_num_threads(), []

    def times(shape, limit):
        shapes.append(shape)
        return {"weight gradient": 1.0, "windows": float(sum(shape)), "groups": 1234.5678}

    monkeypatch.setattr(conv_forms, "times", times)
    monkeypatch.setattr(conv_forms, "microseconds", lambda run, limit: 2.0)
    monkeypatch.setattr(conv_forms, "TARGET", tmp_path / "conv_timings.py")
    conv_forms.main(["--write"])
    torch.set_num_threads(threads)
    specification = importlib.util.spec_from_file_location("written", conv_forms.TARGET)
    written = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(written)
    assert written.AXES == conv_timings.AXES
    assert written.WINDOWS[0][1][2][1] == sum(axis[index] for axis, index in zip(
        written.AXES, (0, 1, 2, 1), strict=True))
    assert written.GROUPS[0][0][0][0] == 1230
    assert vars(written).keys() == vars(conv_timings).keys()
    assert len(shapes) == math.prod(map(len, written.AXES))


def test_quick_prints_a_coarse_grid_and_writes_nothing(capsys):
    threads = torch.get_num_threads()
    conv_forms.main(["--quick"])
    torch.set_num_threads(threads)
    assert "PRODUCTS = " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        conv_forms.main(["--quick", "--write"])
