"""The snippets of adabatch/diagnostics/README.md run, one after another, and its files exist."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import adabatch
import adabatch.diagnostics

README = Path(adabatch.diagnostics.__file__).with_name("README.md")
TEXT = README.read_text(encoding="utf-8")


def train(loader, model, optimizer, scheduler):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)


def test_snippets_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(320, 4), torch.randint(3, (320,)))

    def given():
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(data, batch_size=16)
        return {"adabatch": adabatch, "model": model, "optimizer": optimizer, "loader": loader}

    names = ("loader", "model", "optimizer", "scheduler")
    scope = given()
    wrapped = adabatch.wrap(scope["model"], scope["optimizer"], scope["loader"])
    scope |= dict(zip(("optimizer", "loader", "scheduler"), wrapped, strict=True))
    train(*(scope[name] for name in names))
    for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", TEXT, re.MULTILINE):
        if "adabatch.wrap(" not in block:
            exec(textwrap.dedent(block), scope)
            continue
        before, after = textwrap.dedent(block).split("# ... train ...")
        scope = given()
        exec(before, scope)
        train(*(scope[name] for name in names))
        exec(after, scope)
    assert scope["noisiest"] in ("0", "2")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.csv", "run.jsonl", "run.png", "layers.csv", "layers.png"}


def test_every_file_exists():
    listed = re.findall(r"\w+\.py", TEXT.split("## Files")[1])
    modules = {path.name for path in README.parent.glob("*.py")} - {"__init__.py"}
    assert set(listed) == modules
