"""The snippets of adabatch/grad_sample/README.md run, one after another."""

import re
import textwrap
from pathlib import Path

import adabatch.grad_sample

README = Path(adabatch.grad_sample.__file__).with_name("README.md")


def test_snippets_run(capsys):
    text = README.read_text(encoding="utf-8")
    given = {"__name__": "readme"}
    for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE):
        exec(textwrap.dedent(block), given)
    printed = capsys.readouterr().out
    assert "torch.Size([32])" in printed
    assert "set layer.sparse = False" in printed


def test_every_path_and_name_exists():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`(\w+/|\w+(?:/\w+)*\.py)`", text):
        roots = README.parent, README.parents[2]
        assert any((root / path).exists() for root in roots), path
