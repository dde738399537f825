"""READMEs: their snippets run, their commands, links and paths exist.

A Python block is run after the ones above it in the same README, with what `surroundings` takes
for granted; one with an ellipsis `(...)` or `# ... train ...` is filled in first.
"""

import ast
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adabatch

ROOT = Path(__file__).parents[1]
FOLDERS = ["controllers", "schedules", "scheduler", "data", "micro_batches", "grad_sample",
           "diagnostics", "distributed"]
NAMES = ["README.md", *(f"adabatch/{folder}/README.md" for folder in FOLDERS),
         "kernels/README.md", "examples/README.md", "examples/benchmarks/README.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
COMMANDS = ("pip ", "python ", "torchrun ", "srun ", "--", "TRITON")

# Blocks that only compile, by a line of them: they need several processes.
FRAGMENTS = ("torch.distributed.init_process_group",)
TRAINING = """
for inputs, targets in loader:
    optimizer.zero_grad()
    loss = criterion(model(inputs), targets)
    loss.backward()
    optimizer.step()
    scheduler.step(loss)
"""


def python_blocks(text):
    """Fenced blocks marked python, and indented ones that are not commands."""
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)(?:^    .*\n(?:\n(?=    ))?)+", outside, re.MULTILINE)
    indented = [textwrap.dedent(block) for block in indented]
    return fenced + [block for block in indented if not block.startswith(COMMANDS)]


def surroundings():
    """What the snippets take for granted: a model, data, an optimizer that is not wrapped yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    dataset = TensorDataset(torch.randn(300, 6), torch.randint(3, (300,)))
    criterion = nn.CrossEntropyLoss()
    return {
        "adabatch": adabatch, "torch": torch, "nn": nn, "__name__": "readme", "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "dataset": dataset,
        "criterion": criterion, "loader": DataLoader(dataset, 64, shuffle=True), "budget": 700,
        "device": "cpu",
        "loss_fn": lambda model, batch: criterion(model(batch[0]), batch[1]),
    }


def run(name, block, scope):
    """Run one block; fresh surroundings where it wraps or monitors, a wrapped run where it reads
    one."""
    if "adabatch.wrap(" in block or "adabatch.monitor(" in block or "online_step(" in block:
        scope |= surroundings()
        scope.pop("scheduler", None)
    elif "scheduler" in block and "scheduler" not in scope:
        scope |= surroundings()
        wrapped = adabatch.wrap(scope["model"], scope["optimizer"], scope["loader"])
        scope |= dict(zip(("optimizer", "loader", "scheduler"), wrapped, strict=True))
        if "diagnostics" in block:
            exec(TRAINING, scope)
    block = block.replace("Scheduled(...)", 'Scheduled("0:64 100K:128", unit="samples")')
    block = block.replace("# ... train ...", TRAINING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create 2 worker")
        exec(compile(block, name, "exec"), scope)


@pytest.mark.parametrize("name", NAMES)
def test_snippets_run(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    scope = surroundings()
    for block in python_blocks(TEXTS[name]):
        if any(line in block for line in FRAGMENTS):
            ast.parse(block)
        else:
            run(name, block, scope)
    check = CHECKS.get(name, lambda *_: None)
    check(scope, capsys.readouterr().out, {path.name for path in tmp_path.iterdir()})


def quickstart(scope, printed, files):
    """The summary is the one that the README shows, up to rounding on other machines."""
    shown = re.search(r"```text\n(\d+ steps.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    steps, found = (int(re.match(r"\d+", text)[0]) for text in (shown, printed))
    assert abs(steps - found) <= 0.05 * steps
    assert "20,480 samples" in shown.split("\n")[0]
    assert "20,480 samples" in printed.split("\n")[0]
    names = re.findall(r"[a-z ]+²?(?= [\d.])", shown.split("now:")[1].split("\n\n")[0])
    assert len(names) >= 4
    assert all(name.strip() in printed for name in names)
    assert files == {"checkpoints"}


def grad_sample(scope, printed, files):
    assert "torch.Size([32])" in printed
    assert "set layer.sparse = False" in printed
    assert re.search(r"^\[\d\.\d+\]$", printed, re.MULTILINE)  # the statistic's column


def schedules(scope, printed, files):
    assert printed.endswith("72\n")


def diagnostics(scope, printed, files):
    assert scope["noisiest"] in ("0", "2")
    assert files == {"run.csv", "run.jsonl", "run.png", "layers.csv", "layers.png"}


CHECKS = {"README.md": quickstart, "adabatch/grad_sample/README.md": grad_sample,
          "adabatch/schedules/README.md": schedules,
          "adabatch/diagnostics/README.md": diagnostics}


def test_the_front_page_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_what_exists(name):
    """Scripts, and options that stand in their own source or in that of what they share."""
    commands = re.findall(r"(examples/[\w/]+\.py)((?: (?:--[\w-]+|[\w./'\"^()-]+))*)", TEXTS[name])
    shared = "".join((ROOT / "examples" / each).read_text(encoding="utf-8")
                     for each in ("options.py", "either_data.py"))
    for script, options in commands:
        source = (ROOT / script).read_text(encoding="utf-8") + shared
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, f"{script} has no {option}"
    for path in re.findall(r"pytest (?:-[\w ]+ )*(tests/[\w/]+\.py)", TEXTS[name]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_exist(name):
    here = (ROOT / name).parent
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name]):
        assert (here / path).exists(), path
    for path in re.findall(r"`(\w+/|\w+(?:/\w+)*\.py)`", TEXTS[name]):
        assert (ROOT / path).exists() or any(
            (folder / path).exists()
            for root in (here, ROOT / "tests" / here.name, ROOT / "kernels")
            for folder in (root, *root.glob("**/"))
        ), path


@pytest.mark.parametrize("name", NAMES)
def test_no_old_names(name):
    """Of arguments and attributes that are gone."""
    old = (r"get_last_coupling|spill=|dwell|ladder|\bdots\b|overhead=|confidence=|"
           r"max_micro_batch_size|get_last_batch_size|scheduler\.measurement\b")
    assert not re.findall(old, TEXTS[name])


@pytest.mark.parametrize("folder", ["diagnostics"])
def test_every_file_is_listed(folder):
    listed = re.findall(r"\w+\.py", TEXTS[f"adabatch/{folder}/README.md"].split("## Files")[1])
    modules = {path.name for path in (ROOT / "adabatch" / folder).glob("*.py")} - {"__init__.py"}
    assert set(listed) == modules
