"""The report of check(): its table, its reasons, its plain values."""

import json

import pytest
import torch
from torch import nn

from adabatch import check
from tests.check.models import D, Positions, T, network, square_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_table_is_printed_and_aligned(capsys):
    report = check(Positions(leading=True), torch.randn(5, T, D), square_loss)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = str(report).splitlines()
    head = lines[0]
    assert head.split() == [
        "layer",
        "type",
        "rule",
        "parameters",
        "layout",
        "variance",
        "cost",
        "error",
        "status",
    ]
    for line, row in zip(lines[1:3], report.rows, strict=True):
        assert line.startswith(row.name)
        assert line[head.index("layout") :].startswith(row.layout.value)
        assert line[: head.index("parameters") + len("parameters")].endswith(str(row.n_parameters))
    assert "number of samples read from: inputs.shape[0]" in printed
    check(network(), torch.randn(5, D), square_loss, verbose=False)
    assert capsys.readouterr().out == ""


def test_equal_reasons_are_listed_once():
    deep = nn.Sequential(
        *(layer for _ in range(6) for layer in (nn.Linear(D, D), nn.BatchNorm1d(D)))
    )
    table = str(check(deep, torch.randn(6, D), square_loss, verbose=False))
    assert table.count("training mode") == 1
    assert "0, 1, 2 and 9 more" in table


def test_to_dict_is_plain():
    report = check(network(), torch.randn(5, D), square_loss, verbose=False)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["version"] == 1
    assert [row["layout"] for row in values["rows"]] == ["batch_first"] * 2
    assert values["batch_size_source"] == {"position": 0, "name": "input", "path": [], "dim": 0}
    with pytest.raises(KeyError, match=r"no layer 'x'.*'0', '2'"):
        report["x"]
