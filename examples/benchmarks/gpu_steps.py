"""Training steps on a GPU with and without measurement: a part of gpu.py.

Legend: N samples, T positions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import Vit, resnet
from models import Gpt, class_losses, token_losses
from report import median_interval
from torch import Tensor, nn

import adabatch
from adabatch.grad_sample.cost import within_budget

MODELS = ("gpt", "cnn", "vit")
# What is measured: None for nothing, else the measure= of wrap.
WAYS: dict[str, tuple[bool, float | None]] = {
    "plain": (False, None), "all samples": (True, None), "measure=0.05": (True, 0.05),
}
FEWEST = 5  # repeats, however short the time

Setting = tuple[str, nn.Module, Tensor, Tensor, Callable, bool]


def setting_of(name: str, device: str, small: bool) -> Setting:
    """(title, model, inputs, targets, losses, whether compiled) of one of MODELS."""
    torch.manual_seed(0)
    if name == "gpt":
        rows, tokens, vocabulary = (4, 16, 64) if small else (8, 1024, 50304)
        model = Gpt(1, 32, 2, tokens, vocabulary) if small else Gpt(12, 768, 12, tokens, vocabulary)
        ids = torch.randint(vocabulary, (2, rows, tokens), device=device)
        return f"GPT-2-small-like, N={rows}, T={tokens}, compiled", model, *ids, token_losses, True
    images, size = (4, 32) if small else (64, 224)
    pictures = torch.randn(images, 3, size, size, device=device)
    classes = torch.randint(1000, (images,), device=device)
    if name == "cnn":
        model = resnet((1, 1), 8) if small else resnet()
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        return f"ResNet-50-like, N={images}", model, pictures, classes, class_losses, False
    model = Vit(1, 32, 2, size) if small else Vit(12, 384, 6, size)
    return f"ViT-S-like, N={images}", model, pictures, classes, class_losses, False


class Steps:
    """Training steps of a copy of the model that measure nothing, all samples, or what a budget
    allows.

    As with BatchSizeScheduler, a step's numbers are read while the next step runs: nothing in a
    step waits for the device.

    Args:
        setting: of setting_of().
        device: where to train.
        measured: whether the copy carries hooks.
        overhead: the share that measuring may cost, planned by the shapes of a first step, which is
            not compiled; None: all samples at every step.
    """

    def __init__(
        self, setting: Setting, device: str, measured: bool, overhead: float | None = None
    ):
        _, model, self.inputs, self.targets, self.losses, compiled = setting
        self.model, self.device = copy.deepcopy(model).to(device), device
        self.every, self.samples = 1, len(self.inputs)
        self.hooks = None
        if measured:
            self.hooks = adabatch.GradSampleHooks(self.model, capacity=self.samples)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.forward: Callable = self.model
        self._pending: Any = None
        if overhead is not None:
            self.step()
            plan = within_budget(self.hooks.cost(), self.samples, overhead)
            self.hooks.samples, self.every = plan.samples, plan.every
            self.samples = plan.samples or self.samples
        self.forward = torch.compile(self.model) if compiled else self.model

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.losses(self.forward(self.inputs), self.targets).mean()
        loss.backward()
        self.optimizer.step()
        before, self._pending = self._pending, None
        if self.hooks and self.hooks.enabled:
            self._pending = self.hooks.observe()
        if before is not None:
            before.moments()

    def trace(self) -> float:
        """The variance trace of the last step; 0 where nothing was measured."""
        before, self._pending = self._pending, None
        return 0.0 if before is None else before.moments().variance_trace

    def cycle(self) -> float:
        """Milliseconds a step, the mean over a measured one and those up to the next one."""
        spent = 0.0
        for step in range(self.every):
            if self.hooks:
                self.hooks.enabled = step == 0
            spent += _once(self.step)
        if self.hooks:
            self.hooks.enabled = True
        return spent / self.every


def compare(
    setting: Setting, device: str, repeats: int, end: float, save: Callable[[list[dict]], None]
) -> list[dict]:
    """Rows of one model, passed to `save` after each repeat; fewer repeats, but at least five, if
    time is short. A way that fails costs only its row."""
    steps: dict[str, Steps] = {}
    failed: dict[str, str] = {}
    traces: dict[str, float] = {}
    for name, (measured, overhead) in WAYS.items():
        try:
            each = Steps(setting, device, measured, overhead)
            each.step()
            traces[name] = float(each.trace())
            each.cycle()  # compiles the form that measures nothing too
            each.step()
            steps[name] = each
        except Exception as error:  # a compiler or a device may come up with anything
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    if "plain" not in steps:
        raise RuntimeError(f"the plain step failed: {failed['plain']}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    rows: list[dict] = []
    for repeat in range(repeats):
        if repeat >= FEWEST and time.monotonic() > end:
            break
        for name, each in steps.items():
            times[name].append(each.cycle())
        plain = times["plain"]
        rows = [_row(name, steps[name], times[name], plain, traces[name]) for name in steps]
        rows += [{"way": name, "failed": why} for name, why in failed.items()]
        save(rows)
    return rows


def _row(name: str, each: Steps, own: list[float], plain: list[float], trace: float) -> dict:
    """Time over that of the plain step beside it: median of the pairs, and its interval."""
    way = name if name == "plain" else f"{name}: {each.samples} samples at one step in {each.every}"
    ratios = [mine / other for mine, other in zip(own, plain, strict=True)]
    return {"way": way, "ms": sorted(own)[len(own) // 2], "trace": trace, **median_interval(ratios)}


def _once(step: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return 1e3 * (time.perf_counter() - begin)
