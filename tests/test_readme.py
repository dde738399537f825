"""The README's snippets run, its commands name scripts and options that exist, and its screen of the API names arguments that exist."""

import ast
import inspect
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
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", README, re.MULTILINE)]

# What runs, by a line of it, with what it takes for granted.
SNIPPETS = {
    "scheduler.diagnostics.latest.noise_scale_ema": "",
    "schedule = StepBS(loader, step_size=30)": "",
    "clock = adabatch.schedules.SampleClock": "start",
    "step = online_step(": "",
    "loader.batch_size = 96": "",
    'torch.save(state, "checkpoint.part")': "start",
    "scaler = torch.amp.GradScaler(device)": "",
    "max_micro_batch_size=32": "",
    "with loader.retrying():": "micro",
    "layers = scheduler.diagnostics.layers()": "layers",
    "Scheduled(StepBS(None, 30": "scheduled",
}


def surroundings():
    """What the snippets take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    dataset = TensorDataset(torch.randn(300, 6), torch.randint(3, (300,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"adabatch": adabatch, "torch": torch, "os": __import__("os"), "nn": nn, "model": model, "optimizer": optimizer, "dataset": dataset}
    given |= {"criterion": nn.CrossEntropyLoss(), "loader": DataLoader(dataset, 64, shuffle=True), "device": "cpu", "budget": 700}
    given["lr_scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    given["loss_fn"] = lambda model, batch: given["criterion"](model(batch[0]), batch[1])
    return given


def block_with(line):
    found = [block for block in BLOCKS if line in block]
    assert len(found) == 1, f"{line!r} stands in {len(found)} snippets of the README"
    return found[0]


LOOP = block_with("scheduler.diagnostics.latest.noise_scale_ema")


@pytest.mark.parametrize("line", SNIPPETS)
def test_snippet(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, block = surroundings(), block_with(line)
    kind = SNIPPETS[line]
    if kind == "start":
        given["optimizer"], given["loader"], given["scheduler"] = adabatch.wrap(given["model"], given["optimizer"], given["loader"])
    if kind == "micro":
        exec(block_with("max_micro_batch_size=32"), given)
    if kind == "scheduled":
        given["StepBS"] = adabatch.schedules.StepBS
        block = block.replace("Scheduled(...)", 'Scheduled("0:64 100K:128", unit="samples")')
    if kind == "layers":
        training = LOOP[LOOP.index("for ") : LOOP.index("scheduler.diagnostics")].strip()
        block = block.replace("# ... train ...", training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create 2 worker")
        exec(compile(block, "README.md", "exec"), given)
    if "scheduler" in given and "scheduler.step(loss)" in block:
        assert given["scheduler"].samples_seen >= 300
    if kind == "layers":
        assert (tmp_path / "layers.png").exists()


def test_python_blocks_parse():
    starts = ("pip ", "torchrun ", "srun ", "variance trace ", "now: ", "adabatch.wrap(model, optimizer, loader, controller=...,")
    for block in BLOCKS:
        if not block.startswith(starts):
            ast.parse(block)


def test_commands_name_what_exists():
    """Scripts, and options that stand in their own source or in that of the options they share."""
    kernels = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"(examples/[\w/]+\.py)((?: (?:--[\w-]+|[\w./'\"^()-]+))*)", README + kernels)
    assert len(commands) > 15
    shared = "".join((ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("options.py", "either_data.py"))
    for script, options in commands:
        source = (ROOT / script).read_text(encoding="utf-8") + shared
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, f"{script} has no {option}"
    for path in re.findall(r"pytest (?:-m slow )?(tests/[\w/]+\.py)", README):
        assert (ROOT / path).exists()


def test_the_screen_of_the_api_names_arguments_that_exist():
    screen = block_with("adabatch.wrap(model, optimizer, loader, controller=...,")
    for name, takes in (("wrap", (adabatch.wrap, adabatch.BatchSizeScheduler)), ("GradSampleHooks", (adabatch.GradSampleHooks,)), ("CABS", (adabatch.CABS,))):
        call = re.search(rf"adabatch\.{name}\((.*?)\)(?:\s|$)", screen, re.DOTALL)[1]
        known = {parameter for each in takes for parameter in inspect.signature(each).parameters}
        for argument in re.findall(r"(\w+)=", re.sub(r"#.*", "", call)):
            assert argument in known, f"{name} takes no {argument}"
