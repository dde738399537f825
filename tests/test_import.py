"""What few runs use is imported with its first use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adabatch

RARELY_USED = ("adabatch.schedules", "adabatch.controllers.goodput", "adabatch.check.run",
               "scipy", "matplotlib")


def test_what_few_runs_use_is_not_imported():
    code = f"import sys, adabatch; print([name for name in {RARELY_USED} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_name_is_there():
    for package in (adabatch, adabatch.controllers):
        assert all(getattr(package, name) is not None for name in package.__all__)
        assert set(package.__all__) <= set(dir(package))
    assert adabatch.schedules.StepBS.__name__ == "StepBS"


@pytest.mark.parametrize("package", [adabatch, adabatch.controllers], ids=["top", "controllers"])
def test_another_name_is_an_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = package.Nothing


def test_no_two_folders_import_each_other():
    root = Path(adabatch.__file__).parent
    imported = {(file.parent.relative_to(root).parts[0], *node.module.split(".")[1:2])
                for file in root.glob("*/**/*.py") for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("adabatch.")}
    between = {pair for pair in imported if len(pair) == 2 and (root / pair[1]).is_dir()}
    assert ("check", "grad_sample") in between
    assert {pair for pair in between if pair[0] < pair[1] and pair[::-1] in between} == set()
