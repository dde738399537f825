"""Tests lie where a reader looks for them: tests/<folder>/test_<module>.py, or
test_<module>_<aspect>.py, for each module adabatch/<folder>/<module>.py."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# What belongs to no module alone, and which test files are about it.
SUBJECTS = {
    "": {"import", "naming", "oracle", "readme", "typing"},
    "controllers": {"against_oracle", "contract"},
    "distributed": {"elastic"},
    "estimators": {"coverage"},
    "grad_sample": {"compile", "distributed", "models"},
    "kernels": {"ahead_of_time"},
    "schedules": {"against_bs_scheduler", "differences"},
}
FOLDERS = sorted({"" if path.parent == TESTS else path.parent.name
                  for path in TESTS.rglob("test_*.py")} - {"examples"})  # those name scripts


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_file_is_named_after_a_module(folder):
    source = ROOT / ("kernels" if folder == "kernels" else f"adabatch/{folder}")
    modules = source.glob("*.py") if folder == "" else source.rglob("*.py")
    known = {path.stem.strip("_") for path in modules} | SUBJECTS.get(folder, set())
    known |= {path.name for path in source.iterdir() if path.is_dir() and folder}
    for path in (TESTS / folder).glob("test_*.py"):
        words = path.stem.split("_")[1:]
        names = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
        assert names & known, f"{path} is named after no module of {source}"
