"""Checks that the taps see the whole gradient: contributions add up to it, and the loss reaches the
parameters through taps only.

Legend: N samples, G_i the contribution of sample i.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adabatch._transfers import is_remote
from adabatch.estimators.gradients import running_backward
from adabatch.grad_sample.factors.base import Factor
from adabatch.kernels import accumulation_dtype

DIFFERS = (
    "the samples' contributions do not add up to the gradient of these parameters: {listed}. "
    "{causes}. adabatch.check(model, batch, loss_fn) finds layers that mix samples; ignore=[...] "
    "leaves a layer out"
)
HOOKED = (
    "A hook changes the gradient of {listed} (register_hook, register_post_accumulate_grad_hook): "
    "change .grad after backward() instead"
)
NOT_CALLED = (
    "The model itself was not called, but one of its methods or parts, where weights that are used "
    "without calling their layer are not seen: call model(...)"
)
CAUSES = (
    "Possible causes: a term of the loss that does not pass through the samples, such as a penalty "
    "on the weights (use the optimizer's weight_decay, or add its gradient after backward()); a "
    "weight used where the hooks do not see it: in the loss function, before the model is called, "
    "in a compiled function, under torch.func (apply it inside the model's forward); what a layer "
    "keeps as an attribute and the loss function reads (return it); a forward method or class that "
    "was replaced since the hooks were attached (attach again); other weights "
    "in place of the layer's (torch.func.functional_call); a layer without a rule that mixes "
    "samples or changes its buffers while it runs (give it a rule with register_grad_sampler)"
)
UNVERIFIED = (
    "this step was not measured: the model ran unlike before, and with samples= under autocast, or "
    "where saved tensors are moved, only the next such pass can be compared with the gradient: "
    "leave this step out and continue"
)
NEW_GRAPH = (
    "this step was not measured: torch.compile compiled the model again, and only the next passes "
    "can be compared with the gradient: leave this step out and continue"
)
Node: TypeAlias = torch.autograd.graph.Node
COMPILED = "CompiledFunctionBackward"  # one node that holds layers and taps alike
IN_GRAPH = (
    "In a compiled graph a weight that is used without calling its layer (F.linear(x, "
    "layer.weight)) is not measured: run the model without torch.compile, which measures it, or "
    "pass ignore=[...]. Left from before the pass is a gradient where optimizer.zero_grad() was "
    "not called"
)
# Rounding in units of the eps of the coarsest type that took part: of the contributions, whose
# errors are independent, and of the gradient as a whole.
OF_SAMPLES, OF_GRADIENT = 4.0, 2.0
# Below this float32's eps is not trusted, as functions may be badly conditioned; on accelerators
# products of float32 may be rounded to 10 bits.
LEAST_EPS = {"cpu": 2.5e-5}
LEAST_EPS_ELSEWHERE = 2.0**-10
TYPES = {torch.finfo(each).eps: each
         for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# Rounding of a coarse type (bfloat16) may hide in one pass, of few samples above all, what a layer
# mixes; hardly in that many passes.
COARSE_EPS, COARSE_PASSES = 2.0**-8, 16
# What starts in passes of a known pattern stays unseen no longer than this.
EVERY_AT_FIRST, EVERY = 8, 64
# Passes that are compared because their pattern is new: so many, and one more in so many passes.
# Where inputs were not kept, they are for so many passes, in which the pattern may come again.
ALL = "all layers"  # no name of a layer
NEW_PATTERNS, PASSES_PER_PATTERN, PASSES_KEPT = 8, 256, 64
# Compared in compiled graphs at first, and after one was traced that was not.
PASSES_OF_GRAPH = 16


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, 8, ...: what is looked at ever more rarely.

    Example:
        >>> [n for n in range(1, 10) if is_power_of_two(n)]
        [1, 2, 4, 8]
    """
    return n & (n - 1) == 0


@dataclass
class _Sums:
    """Of one parameter, over its uses: Σ_i G_i as the check compares it, Σ_i ‖G_i‖², the coarsest
    type, and whether .grad was empty."""

    total: Tensor
    squares: Tensor
    dtype: torch.dtype
    fresh: bool
    sketched: bool = False  # total is uᵀ Σ_i G_i v


class GradientSumCheck:
    """Compares Σ_i G_i with p.grad for each measured parameter p, over all samples of a pass, also
    where a part of them is measured.

    Compared are, of the passes that come first in their step, 1, 2, 4, 8, then every 8th and from
    64 on every 64th, the first 16 where a coarse type takes part, all after one that did not add
    up, and those whose pattern was not seen before: the layers called and their modes, the numbers
    of autograd nodes made by them and by the loss, the parameters with hooks; and the number of
    nodes made before them. The latter two are each 8 at first and one more in 256 passes.

    Rounding errors of the N contributions are independent: their sum grows as √Σ‖G_i‖², and so does
    what is allowed, ‖Σ_i G_i − p.grad‖ <= eps·(4·√Σ‖G_i‖² + 2·‖p.grad‖). Matrices are multiplied by
    a random vector first, which needs no matrix of Σ_i G_i.

    In a compiled graph, which is the same for many passes, taps report uᵀ Σ_i G_i v with random
    vectors u and v, in a graph of its own for the passes that are due: these, the first 16, and 16
    after one in which another graph was traced. Only a change in the very pass that is the first
    one without sketches is seen one pass late.

    Left out are gradients that were not empty before the pass, and those that processes share.

    Attributes:
        is_first: the next pass is the first one of a step; others are not compared.
        sketches: compiled taps report uᵀ Σ_i G_i v in the next pass.
        traces: calls of layers in graphs that torch.compile has traced.
        unverified: why the last pass had to be compared, and was not; "" if it did not have to.
        task: the backward pass that runs, or ran last.
        in_graph: of the parameters found last, those that a compiled graph reported.
        running: a forward pass has begun since the last backward pass.
        was_due: the pass that runs, or ran last, is one of those to be compared.
        left_over: names of the parameters whose gradients were not zero before that pass, as far
            as it was compared; on an accelerator that is not looked at.

    Example:
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> check = GradientSumCheck({"weight": weight})
        >>> factors = {"weight": Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))}
        >>> check.observes()
        True
        >>> check.observe({"weight": "weight"}, factors, squares(factors), torch.float32)
        >>> weight.grad = torch.tensor([4.0, 6.0])
        >>> check.differing()
        []
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self._passes = self._keep_until = self._next_hook = 0
        self.traces, self._traced, self._sketch_until = 0, 0, PASSES_OF_GRAPH
        self._new = [0, 0]
        self._coarse = self.running = self._suspect = self.was_due = False
        self._patterns: set[object] = set()
        self.left_over: list[str] = []
        self._hooked: tuple[tuple[str | int, ...], ...] = ()
        self._directions: dict[tuple[int, torch.device], Tensor] = {}
        self._leaf = torch.zeros((), requires_grad=True)
        self._lock = threading.Lock()
        self._start, self._end, self._calls, self._thread, self._complete = 0, 0, 0, 0, True
        self._keeps_all = self.sketches = self.is_first = True
        self._compared_graph = False  # traced, and since then none that does not compare
        self.in_graph: list[str] = []
        self._forget(-2)  # -1 is what runs outside of backward passes

    def _forget(self, task: int) -> None:
        self.task, self._compares, self.unverified = task, False, ""
        self._sums: dict[str, _Sums] = {}

    # -- the forward pass

    def start(self, output: object) -> None:
        """Before the first tap of a forward pass."""
        node = output.grad_fn if isinstance(output, Tensor) else None
        self._start = self._next_node() if node is None else node._sequence_nr()
        self.running, self._calls, self._thread = True, 0, threading.get_ident()
        self._keeps_all, self._complete = self.is_due or self._passes < self._keep_until, True
        if RemovableHandle.next_id != self._next_hook:  # somebody has registered a hook
            self._next_hook = RemovableHandle.next_id
            self._hooked = tuple(
                (name, *(each._backward_hooks or ()), *(each._post_accumulate_grad_hooks or ()))
                for name, each in self._parameters.items() if _has_hooks(each))

    def count_call(self, layer: int, training: bool) -> None:
        """A layer was called."""
        self._calls = hash((self._calls, layer, training))

    def keeps(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
        """Whether a tap that measures some rows keeps all rows of its layer's input: in passes
        that are compared, and where autograd keeps them anyway, so that any pass may be."""
        if self._keeps_all:
            return True
        weight = layer._parameters.get("weight")
        kept = weight is not None and weight.requires_grad and (
            inputs.dtype is output.dtype or not inputs.is_floating_point())
        if kept:
            packs = torch._C._autograd._top_saved_tensors_default_hooks(True)
            kept = packs is None or packs[0].__module__ == "torch.utils.checkpoint"
        self._complete &= kept
        return kept

    @property
    def is_due(self) -> bool:
        """Whether the next pass is compared whatever its pattern."""
        n = self._passes + 1
        return self.is_first and (self._suspect or is_power_of_two(n)
                                  or n % (EVERY if n >= EVERY else EVERY_AT_FIRST) == 0
                                  or (self._coarse and n <= COARSE_PASSES))

    def choose_graph(self) -> None:
        """After a pass: whether compiled taps report for the check in the next one."""
        within = self.is_first and self._passes < self._sketch_until
        self.sketches = (within or self.is_due) and not is_distributed()

    def _next_node(self) -> int:
        """The number of the autograd node that this thread makes now."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        node = self._leaf.neg().grad_fn
        torch._C._set_grad_enabled(before)
        return -1 if node is None else node._sequence_nr()

    # -- the backward pass

    def observes(self, last: Node | None = None) -> bool:
        """Whether the taps of the backward pass that runs are to report all their rows; `last`: the
        node of the tap that asks, the first one of a pass being that of the last layer."""
        task = running_backward()
        if task != self.task:
            with self._lock:
                if task != self.task:
                    self._begin(task, last)
        return self._compares

    def _begin(self, task: int, last: Node | None) -> None:
        due = self.was_due = self.is_due
        self._forget(task)
        before = of_loss = 0
        if threading.get_ident() == self._thread:  # an accelerator's backward has its own
            now = self._next_node()
            before, of_loss, self._end = self._start - self._end, now - self._start, now
        if not self.is_first:
            return
        self._passes += 1
        of_layers = 0 if last is None else last._sequence_nr() - self._start
        # What runs before the model has a limit of its own: it may be anything, and never the same.
        patterns = ("before", before), (self._calls, of_layers, of_loss, self._hooked)
        limit = NEW_PATTERNS + self._passes // PASSES_PER_PATTERN
        new = [kind for kind, each in enumerate(patterns)
               if each not in self._patterns and self._new[kind] < limit]
        self.was_due |= bool(new)
        if not (due or new) or is_distributed():
            return
        for kind in () if due else new:
            self._new[kind] += 1
        self._compares = self._complete
        if self._complete:
            self._patterns.update(patterns)
        else:
            self.unverified = UNVERIFIED
            self._keep_until = self._passes + PASSES_KEPT

    def observe(
        self, names: Mapping[str, str], totals: Mapping[str, Factor | Tensor],
        sq_norms: Mapping[str, Tensor], *dtypes: torch.dtype,
    ) -> None:
        """A use, while the gradient is not complete.

        Args:
            names: {own name: name in the model}.
            totals: {own name: the factor over all samples, or Σ_i G_i}.
            sq_norms: {own name: Σ_i ‖G_i‖²}.
            dtypes: that the layer computed in, as autocast may have chosen them.
        """
        for own, whole in totals.items():
            name, parameter = names[own], self._parameters[names[own]]
            squares = sq_norms[own]
            total = self._reduced(whole, squares.device)
            dtype = _coarsest(parameter.dtype, *dtypes)
            self._coarse |= torch.finfo(dtype).eps >= COARSE_EPS
            with self._lock:
                sums = self._sums.get(name)
                if sums is None:
                    fresh = _is_empty(parameter.grad)
                    self._sums[name] = _Sums(total, squares, dtype, fresh)
                else:
                    sums.total, sums.squares = sums.total + total, sums.squares + squares
                    sums.dtype = _coarsest(sums.dtype, dtype)

    def vectors(self, *parameters: Tensor) -> dict[int, Tensor]:
        """The vectors of sketch() for these parameters. The first call draws them, which a compiled
        graph cannot."""
        return {width: self._direction(width, parameter.device)
                for parameter in parameters for width in _matrix_shape(parameter)}

    def observe_compiled(
        self, task: int, sums: Iterable[Tensor | None], layers: Sequence[Collection[str]]
    ) -> None:
        """The end of a pass in which compiled taps reported.

        Args:
            sums: [n_layers, 1 + 2 K] of a device, None where the pass was not due: of each layer
                the eps of the type that it computed in, 0 where it was not called, then
                uᵀ Σ_i G_i v and Σ_i ‖G_i‖² of its parameters.
            layers: names of the parameters of each.
        """
        if task != self.task:
            self._forget(task)
            self._passes += self.is_first
        new, self._traced = self.traces != self._traced, self.traces
        if not self.is_first or is_distributed():
            return
        reported = [each for each in sums if each is not None]
        for each in reported:
            self._observe_sums(each, layers)
        if reported:
            self._compared_graph |= new
        elif new:
            # The first graph without sketches is no sign of a change; the next pass shows it.
            expected, self._compared_graph = self._compared_graph, False
            self.unverified = "" if expected else NEW_GRAPH
            self._sketch_until = self._passes + (1 if expected else PASSES_OF_GRAPH)

    def _observe_sums(self, sums: Tensor, layers: Sequence[Collection[str]]) -> None:
        """What the layers on one device reported."""
        for line, (eps, names) in enumerate(zip(sums[:, 0].tolist(), layers, strict=True)):
            for place, name in enumerate(names) if eps in TYPES else ():
                dtype = _coarsest(self._parameters[name].dtype, TYPES[eps])
                self._coarse |= torch.finfo(dtype).eps >= COARSE_EPS
                total, squares = sums[line, 1 + 2 * place : 3 + 2 * place]
                self._sums[name] = _Sums(total, squares, dtype, fresh=True, sketched=True)

    def _reduced(self, whole: Factor | Tensor, device: torch.device) -> Tensor:
        """What is compared of Σ_i G_i or of a gradient: a matrix times a vector, else itself."""
        if len(whole.shape) != 2:
            total = whole if isinstance(whole, Tensor) else whole.total()
            return total.to(accumulation_dtype(total))
        if not isinstance(whole, Tensor):
            return whole.total_times(self._direction(whole.shape[1], device))
        whole = whole.to(accumulation_dtype(whole))
        return whole @ self._direction(whole.shape[1], device).to(whole.dtype)

    def _direction(self, width: int, device: torch.device) -> Tensor:
        """A random vector of mean square 1, no entry of which is small or large."""
        key = width, device
        if key not in self._directions:
            generator = torch.Generator().manual_seed(width)
            signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
            vector = signs * (torch.rand(width, generator=generator) + 0.5).double()
            scale = vector.square().mean().clamp_min(1e-30).rsqrt()
            self._directions[key] = (vector * scale).to(device, torch.float32)
        return self._directions[key]

    def differing(self, by_samples: bool = False) -> list[str]:
        """When a backward pass has ended: names of the parameters whose contributions do not add up
        to the gradient; none where the pass was not compared.

        Args:
            by_samples: each pass's gradient is multiplied by its share of the step's samples.
        """
        self.running = False
        sums, self._sums = self._sums, {}
        self.left_over = [name for name, each in sums.items()
                          if not each.fresh and not is_remote(self._parameters[name].device)]
        compared: dict[str, tuple[Tensor, Tensor]] = {}
        for name, each in sums.items():
            parameter = self._parameters[name]
            grad = parameter.grad
            gone = grad is None and bool(parameter._post_accumulate_grad_hooks)
            if not each.fresh or not parameter.requires_grad or gone:
                continue
            seen = torch.zeros_like(each.total)
            if grad is not None:
                grad = grad.to_dense()
                seen = (sketch(grad, self.vectors(parameter)) if each.sketched
                        else self._reduced(grad, grad.device))
            compared[name] = each.total.reshape(seen.shape).to(seen), seen
        if not compared:
            return []
        share = _common_factor(compared.values()) if by_samples else 1.0
        numbers = [[_norm(share * total - seen), self._gradient_norm(name, seen, sums[name]),
                    share**2 * sums[name].squares] for name, (total, seen) in compared.items()]
        found = dict(zip(compared, _on_host(numbers), strict=True))
        # Values that are not finite are compared with nothing.
        scales = {name: math.sqrt(row[2]) for name, row in found.items() if row[2] >= 0.0}
        largest: dict[str, float] = {}
        for name, scale in scales.items():
            for owner in (name.rpartition(".")[0], ALL):
                largest[owner] = max(largest.get(owner, 0.0), scale if scale < math.inf else 0.0)
        wrong = []
        for name, (difference, norm, _) in found.items():
            parameter, dtype = self._parameters[name], sums[name].dtype
            # What is zero but for rounding, as a key's bias in attention, is compared with the
            # other parameters, those of its layer above all.
            others = 0.1 * largest.get(name.rpartition(".")[0], 0.0) + 0.01 * largest.get(ALL, 0.0)
            rounding = OF_SAMPLES * (scales.get(name, math.nan) + others)
            allowed = _trusted(dtype, parameter) * (rounding + OF_GRADIENT * norm)
            if difference > allowed + _underflow(dtype, parameter):
                wrong.append(name)
        self._suspect = bool(wrong)
        self.in_graph = [name for name in wrong if sums[name].sketched]
        return wrong

    def _gradient_norm(self, name: str, seen: Tensor, sums: _Sums) -> Tensor:
        grad = self._parameters[name].grad if sums.sketched else None
        return _norm(seen if grad is None else grad.to_dense())

    def describe(self, wrong: Sequence[str], called: bool) -> str:
        """The error's text; called: the model's forward was."""
        hooked = [name for name in wrong if _has_hooks(self._parameters[name])]
        causes = [HOOKED.format(listed=", ".join(hooked))] if hooked else []
        if self.in_graph and not causes:
            causes += [IN_GRAPH, CAUSES]
        elif not called:
            causes.append(NOT_CALLED)
        return DIFFERS.format(listed=", ".join(wrong), causes=". ".join(causes) or CAUSES)


def _matrix_shape(whole: Factor | Tensor) -> tuple[int, int]:
    shape = whole.shape
    return (shape[0] if len(shape) else 1), math.prod(shape[1:])


def sketch(whole: Factor | Tensor, vectors: Mapping[int, Tensor]) -> Tensor:
    """uᵀ M v, a number, of M = Σ_i G_i or a gradient, as a matrix.

    vectors: {length: vector}, of which u and v are those of M's lengths.
    """
    rows, columns = _matrix_shape(whole)
    if len(whole.shape) == 2 and not isinstance(whole, Tensor):
        reduced = whole.total_times(vectors[columns])
    else:
        total = whole if isinstance(whole, Tensor) else whole.total()
        total = total.to(accumulation_dtype(total)).reshape(rows, columns)
        reduced = total @ vectors[columns].to(total.dtype)
    return reduced.flatten() @ vectors[rows].to(reduced.dtype)


def squares(factors: Mapping[str, Factor], n_samples: int | None = None) -> dict[str, Tensor]:
    """{name: Σ_i ‖G_i‖²}, of n_samples where these are a part of them."""
    norms = {name: factor.sq_norms() for name, factor in factors.items()}
    if n_samples is None:
        return {name: each.sum() for name, each in norms.items()}
    return {name: each.mean() * n_samples for name, each in norms.items()}


def _coarsest(*dtypes: torch.dtype) -> torch.dtype:
    floating = [each for each in dtypes if each.is_floating_point]
    return max(floating, key=lambda each: torch.finfo(each).eps)


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values)


def _on_host(rows: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Numbers, for which an accelerator is waited for once."""
    device = rows[0][0].device
    flat = torch.stack([value.to(device).double() for row in rows for value in row])
    return flat.view(len(rows), -1).tolist()


def _common_factor(pairs: Collection[tuple[Tensor, Tensor]]) -> float:
    """c, of gradients that are c times the sums: the median over the large ones."""
    rows = _on_host([[(total * seen).sum(), total.square().sum()] for total, seen in pairs])
    least = 0.01 * max(square for _, square in rows)
    factors = sorted(product / square for product, square in rows if square >= max(least, 1e-300))
    return factors[len(factors) // 2] if factors else 1.0


def _trusted(dtype: torch.dtype, like: Tensor) -> float:
    eps = torch.finfo(dtype).eps
    if eps <= torch.finfo(torch.float64).eps:
        return 1e-8
    return max(eps, LEAST_EPS.get(like.device.type, LEAST_EPS_ELSEWHERE))


def _underflow(dtype: torch.dtype, parameter: Tensor) -> float:
    """What rounding to the type's smallest numbers comes to: float16 loses small gradients."""
    finfo = torch.finfo(dtype)
    return finfo.tiny * finfo.eps * math.sqrt(max(1, parameter.numel()))


def _is_empty(grad: Tensor | None) -> bool:
    """Whether it is zero; not looked at where that would wait for an accelerator."""
    if grad is None or grad.is_sparse or is_remote(grad.device):
        return grad is None
    return not bool(torch.count_nonzero(grad))


def _has_hooks(parameter: Tensor) -> bool:
    """Whether somebody else's hook may change its gradient."""
    hooks = [*(parameter._backward_hooks or {}).values(),
             *(parameter._post_accumulate_grad_hooks or {}).values()]
    return not all(isinstance(hook, functools.partial)
                   and hook.func.__module__.startswith("adabatch.") for hook in hooks)


def is_distributed() -> bool:
    """Whether several processes may share the gradients, whose sums are not compared then."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def unseen_uses(
    loss: Tensor, parameters: Mapping[str, Tensor], leaves: Iterable[Tensor] = ()
) -> list[str]:
    """Names of the parameters that the loss reaches without passing a tap: a tied weight applied in
    the loss function, an L2 penalty inside the loss. The norms would lack them.

    Walks the graph from the loss down to the taps, also after backward. Uses below a tap are found
    while the model runs, not here.

    Args:
        loss: the scalar that was differentiated.
        leaves: what taps report to. A tap is recognised by its edge to one of them, not by its
            name, which is that of an in-place operation where a layer's output is a view.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> unseen_uses(weight.square().sum(), {"weight": weight})
        ['weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    reports = {id(leaf) for leaf in leaves}
    found: set[str] = set()
    seen: set[Node] = set()
    stack: list[Node | None] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        below = [function for function, _ in node.next_functions]
        compiled = node.name().split("::")[-1] == COMPILED
        if compiled or any(_reaches(each, reports) for each in below):
            continue
        name = names.get(_variable_id(node))
        if name is not None:
            found.add(name)
        stack.extend(below)
    return [name for name in parameters if name in found]


def _variable_id(node: Node) -> int:
    return id(getattr(node, "variable", None))


def _reaches(function: Node | None, leaves: Collection[int]) -> bool:
    """Whether an edge leads to one of the leaves, at once or through the selection of a line."""
    if function is None:
        return False
    nodes = (function, *(below for below, _ in function.next_functions))
    return any(node is not None and _variable_id(node) in leaves for node in nodes)


def check_uses_seen(
    loss: Tensor, parameters: Mapping[str, Tensor], leaves: Iterable[Tensor] = ()
) -> None:
    """Raise a RuntimeError listing the parameters that the loss reaches without passing a tap."""
    unseen = unseen_uses(loss, parameters, leaves)
    if unseen:
        raise RuntimeError(
            "the loss uses these parameters outside the model's layers, where no tap sees them: "
            f"{', '.join(unseen)}. For a tied weight: apply it inside the model's forward. For a "
            "penalty on the weights: use the optimizer's weight_decay, or add its gradient after "
            "backward()"
        )
