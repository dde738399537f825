"""Ways to train a step with the variance trace of its gradient: ours, and those of other tools
where they are installed.

A method is made from a workload's model and answers step(batch) -> trace, or None for a step that
measures nothing. The step is a whole one: zero_grad, forward, backward, measurement, optimizer.step
(plain SGD with lr 0.01).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Batch, Workload
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import adabatch
from adabatch.grad_sample.cost import Measurement, within_budget

LR = 0.01


class Plain:
    """The step without any measurement."""

    title = "plain"
    warm_up = 1  # steps before the timed ones
    first_trace: float | None = None
    first_batch: Batch | None = None  # that of the first trace, if not the one given

    def __init__(self, work: Workload, model: nn.Module):
        self.work, self.model = work, model
        self.optimizer = torch.optim.SGD(model.parameters(), LR)
        self.prepare()

    def prepare(self) -> None:
        """Set up what the measurement needs."""

    def step(self, batch: Batch) -> float | None:
        """One optimizer step; returns the trace, if it was measured."""
        self.optimizer.zero_grad()
        inputs, targets = batch
        self.work.losses(self.model(inputs), targets).mean().backward()
        trace = self.trace()
        self.optimizer.step()
        return trace

    def trace(self) -> float | None:
        """T̂ of the gradient just computed."""
        return None

    def cycle(self, batch: Batch, seconds: Callable[[Plain, Batch], float]) -> float:
        """Seconds per step of the way the method is used; `seconds` times one step."""
        return seconds(self, batch)

    def predicted(self, samples: int) -> float | None:
        """The share of a step that the cost model expects for a batch of `samples`, or None."""
        return None


class Exact(Plain):
    """Ours, all samples."""

    title = "adabatch, exact"

    def prepare(self) -> None:
        self.hooks = adabatch.GradSampleHooks(self.model)

    def trace(self) -> float | None:
        return self.hooks.collect().variance_trace

    def predicted(self, samples: int) -> float:
        return self.hooks.cost().share(samples)


class Budget(Exact):
    """Ours with measure=0.05: the first step measures all samples and shows the shapes, then the
    budget's plan holds."""

    title = "adabatch, measure=0.05"
    overhead = 0.05
    plan: Measurement | None = None

    def step(self, batch: Batch) -> float | None:
        trace = super().step(batch)
        if self.plan is None:
            self.plan = within_budget(self.hooks.cost(), len(batch[0]), self.overhead)
            self.hooks.samples = self.plan.samples
        return trace

    def trace(self) -> float | None:
        return self.hooks.collect().variance_trace if self.hooks.enabled else None

    def cycle(self, batch: Batch, seconds: Callable[[Plain, Batch], float]) -> float:
        """The mean over one measured step and those up to the next one, which carry the hooks and
        measure nothing."""
        spent = 0.0
        for step in range(self.plan.every):
            self.hooks.enabled = step == 0
            spent += seconds(self, batch)
        self.hooks.enabled = True
        return spent / self.plan.every

    def predicted(self, samples: int) -> float:
        return self.plan.share


class Vmap(Plain):
    """torch.func: vmap of grad, all per-sample gradients at once, whose mean is the gradient."""

    title = "vmap"

    def step(self, batch: Batch) -> float:
        from torch.func import functional_call, grad, vmap

        trained = {name: parameter for name, parameter in self.model.named_parameters()
                   if parameter.requires_grad}
        parameters = {name: parameter.detach() for name, parameter in trained.items()}

        def loss(parameters: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
            outputs = functional_call(self.model, parameters, (sample.unsqueeze(0),))
            return self.work.losses(outputs, target.unsqueeze(0)).mean()

        grads = vmap(grad(loss), (None, 0, 0))(parameters, *batch)
        sq_norms, mean_sq_norm = 0.0, 0.0
        for name, parameter in trained.items():
            parameter.grad = grads[name].mean(0)
            sq_norms = sq_norms + torch.linalg.vector_norm(grads[name].flatten(1), dim=1).square()
            mean_sq_norm = mean_sq_norm + parameter.grad.square().sum()
        self.optimizer.step()
        return _trace(sq_norms, mean_sq_norm)


class Opacus(Plain):
    """Opacus's GradSampleModule; `mode` is its grad_sample_mode."""

    title = "Opacus, hooks"
    mode = "hooks"

    def prepare(self) -> None:
        from opacus import GradSampleModule
        from opacus.grad_sample import GradSampleModuleExpandedWeights

        wrapper = GradSampleModuleExpandedWeights if self.mode == "ew" else GradSampleModule
        self.model = wrapper(self.model, batch_first=True, loss_reduction="mean")

    def trace(self) -> float:
        sq_norms, mean_sq_norm = 0.0, 0.0
        for parameter in self.model.parameters():
            grads, parameter.grad_sample = parameter.grad_sample, None
            if parameter.grad is None:  # expanded weights leave the sum to the caller
                parameter.grad = grads.mean(0)
            sq_norms = sq_norms + torch.linalg.vector_norm(grads.flatten(1), dim=1).square()
            mean_sq_norm = mean_sq_norm + parameter.grad.square().sum()
        return _trace(sq_norms, mean_sq_norm)


class OpacusExpandedWeights(Opacus):
    """Opacus on torch's expanded weights."""

    title = "Opacus, ew"
    mode = "ew"


class OpacusGhost(Plain):
    """Opacus's fast gradient clipping with ghost norms, one backward pass of it: no clipping, so
    that the gradient is the plain one."""

    title = "Opacus, ghost"

    def prepare(self) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.model = GradSampleModuleFastGradientClipping(
            self.model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0,
            use_ghost_clipping=True)

    def trace(self) -> float:
        norms = [parameter._norm_sample for parameter in self.model.parameters()]
        mean_sq_norm = sum(parameter.grad.square().sum() for parameter in self.model.parameters())
        return _trace(torch.stack(norms).square().sum(0), mean_sq_norm)


class BackpackExtension(Plain):
    """BackPACK on a torch.nn.Sequential; `extension` is the quantity it computes."""

    title = "BackPACK, SumGradSquared"
    extension = "SumGradSquared"

    def prepare(self) -> None:
        import backpack

        self.model = backpack.extend(self.model)

    def step(self, batch: Batch) -> float:
        import backpack

        self.optimizer.zero_grad()
        inputs, targets = batch
        samples = inputs.shape[0]
        loss = self.work.losses(self.model(inputs), targets).mean()
        with backpack.backpack(getattr(backpack.extensions, self.extension)()):
            loss.backward()
        parameters = list(self.model.parameters())
        trace = self.moments(parameters, samples)
        self.optimizer.step()
        return trace

    def moments(self, parameters: list[Any], samples: int) -> float:
        """T̂ from what the extension left on the parameters; its gradients carry the loss's 1/m."""
        mean = samples * sum(parameter.sum_grad_squared.sum() for parameter in parameters)
        grad_sq_norm = sum(parameter.grad.square().sum() for parameter in parameters)
        return float(mean - grad_sq_norm) / (1 - 1 / samples)


class BackpackNorms(BackpackExtension):
    """BackPACK's per-sample norms."""

    title = "BackPACK, BatchL2"
    extension = "BatchL2Grad"

    def moments(self, parameters: list[Any], samples: int) -> float:
        sq_norms = sum(parameter.batch_l2 for parameter in parameters) * samples**2
        return _trace(sq_norms, sum(parameter.grad.square().sum() for parameter in parameters))


class CockpitCabs(BackpackExtension):
    """Cockpit's CABS quantity, lr · trace / loss with the trace by the divisor m, at every step; it
    has BackPACK's limits."""

    title = "Cockpit, CABS"

    def prepare(self) -> None:
        from cockpit import Cockpit, quantities
        from cockpit.utils.schedules import linear

        super().prepare()
        self.quantity, self.steps = quantities.CABS(track_schedule=linear(1)), 0
        self.cockpit = Cockpit(self.model.parameters(), quantities=[self.quantity])

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        inputs, targets = batch
        losses = self.work.losses(self.model(inputs), targets)
        loss = losses.mean()
        info = {"batch_size": len(inputs), "individual_losses": losses.detach(), "loss": loss,
                "optimizer": self.optimizer}
        with self.cockpit(self.steps, info=info):
            loss.backward(create_graph=self.cockpit.create_graph(self.steps))
        proposal = self.quantity.get_output().pop(self.steps)
        self.steps += 1
        self.optimizer.step()
        return proposal * loss.item() / LR / (1 - 1 / len(inputs))


def _trace(sq_norms: Tensor, grad_sq_norm: Tensor) -> float:
    return float(sq_norms.double().mean() - grad_sq_norm) / (1 - 1 / len(sq_norms))


class Repeated(Dataset):
    """Samples of one batch, over and over: 256 batches."""

    def __init__(self, batch: Batch):
        self.batch, self.samples = batch, len(batch[0])

    def __len__(self) -> int:
        return 256 * self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index % self.samples] for tensor in self.batch)


def endless(loader: Any) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


class Loop(Plain):
    """A training loop with torch's loader and optimizer; its steps take their batches from it."""

    title = "plain loop"

    def options(self, size: int) -> dict[str, Any] | None:
        """Of wrap, for batches of `size`; None to leave it out."""
        return None

    def prepare(self) -> None:
        _, batch = self.work.setting()
        size = len(batch[0])
        loader: Any = DataLoader(Repeated(batch), batch_size=size, shuffle=True)
        self.scheduler = None
        options = self.options(size)
        if options is not None:
            self.optimizer, loader, self.scheduler = adabatch.wrap(
                self.model, self.optimizer, loader, batch_sizes=(size, size), **options)
        self.batches = endless(loader)

    def step(self, batch: Batch) -> float | None:
        inputs, targets = batch = next(self.batches)
        self.first_batch = self.first_batch or batch
        self.optimizer.zero_grad()
        loss = self.work.losses(self.model(inputs), targets).mean()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step(loss)
        return self.trace()

    def trace(self) -> float | None:
        if self.scheduler is None or self.first_trace is not None:
            return None
        trace = self.scheduler.diagnostics.latest.variance_trace
        return trace if math.isfinite(trace) else None

    def cycle(self, batch: Batch, seconds: Callable[[Plain, Batch], float]) -> float:
        """The mean over a block of steps, of whole intervals between measurements."""
        every = 1 if self.scheduler is None else self.scheduler.measurement_plan.every
        steps = every * math.ceil(self.work.block / every)
        return sum(seconds(self, batch) for _ in range(steps)) / steps

    def predicted(self, samples: int) -> float | None:
        share = math.nan if self.scheduler is None else self.scheduler.measurement_plan.share
        return share if math.isfinite(share) else None


class LoopExact(Loop):
    """All samples at every step."""

    title = "loop, measure='all'"

    def options(self, size: int) -> dict[str, Any]:
        return {"measure": "all"}


class LoopDefault(Loop):
    """The default: within a twentieth of the time. Its plan is settled in the first steps."""

    title = "loop, default"
    warm_up = 24

    def options(self, size: int) -> dict[str, Any]:
        return {"measure": "auto"}


class LoopScheduled(Loop):
    """A schedule of batch sizes, which measures nothing."""

    title = "loop, Scheduled"

    def options(self, size: int) -> dict[str, Any]:
        return {"controller": adabatch.controllers.Scheduled(f"0:{size}")}


class LoopVmap(Vmap):
    """The loop with torch.func's per-sample gradients."""

    title = "loop, vmap"
    prepare, options = Loop.prepare, Loop.options

    def step(self, batch: Batch) -> float:
        batch = next(self.batches)
        self.first_batch = self.first_batch or batch
        return super().step(batch)


OURS: tuple[Callable[..., Plain], ...] = (Plain, Exact, Budget)
PEERS: tuple[Callable[..., Plain], ...] = (
    Vmap, Opacus, OpacusGhost, OpacusExpandedWeights, BackpackExtension, BackpackNorms, CockpitCabs)
LOOPS: tuple[Callable[..., Plain], ...] = (
    Loop, LoopExact, LoopDefault, LoopScheduled, LoopVmap)
METHODS = {method.__name__: method for method in (*OURS, *PEERS, *LOOPS)}
