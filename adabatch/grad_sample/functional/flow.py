"""Which tensors of a forward pass carry samples, and along which dimension.

What comes from the model's inputs is followed through the operations. Where that shows no
dimension (a compiled function, a NumPy array, a second input that may be a table), a size of N
alone proves nothing: the role stays open until a batch of another size has settled it.

Legend: N samples.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from adabatch._types import Args, Kwargs

Key = tuple[str, int]  # of a role: a layer, operation or input, and the number of its call
UNKNOWN = -1  # computed from samples, along which dimension is not known
FLAT = -2  # samples and what follows them in one first dimension, sample after sample

# Factories whose rows are the same in every batch, however many there are.
CONSTANT = frozenset({"arange", "linspace", "logspace", "range", "eye", "tril_indices",
                      "triu_indices", "hann_window"})
# Their other tensors say only which type, device or shape the result has.
LIKE_THE_SECOND = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
# Made for a type or a device, of any shape.
NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"})
# Operations whose tensors of equal rank are combined row by row.
ROW_BY_ROW = frozenset({"add", "sub", "mul", "div", "truediv", "pow", "where", "cat", "concat",
                        "lerp", "maximum", "minimum", "addcmul", "addcdiv",
                        "scaled_dot_product_attention"})
PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "rmatmul", "addmm", "addmv", "baddbmm"})
REDUCTIONS = frozenset({
    "sum", "mean", "prod", "max", "min", "amax", "amin", "argmax", "argmin", "median", "mode",
    "std", "var", "norm", "vector_norm", "logsumexp", "any", "all", "nansum", "nanmean",
    "count_nonzero", "cosine_similarity"})
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"})
STACKING = frozenset({"stack"})


class Roles:
    """What is settled for good on the inputs of layers and operations of which the data flow shows
    nothing: True where their first dimension follows N, False where it does not.

    A size other than N settles a role at once. One of N leaves it open, until a pass of another N
    shows whether it followed; a later coincidence then changes nothing.

    Args:
        settled: what is known already, as from adabatch.check.

    Attributes:
        settled: {role: whether it carries samples}.
        open: {role: size} of the pass that runs.
        pending: those that were open in some pass and are not settled.
        trusts_sizes: a size of N is that of samples, where the flow cannot be followed: through
            the collectives of layers that are split over processes.

    Example:
        >>> roles = Roles()
        >>> roles.begin(8)
        >>> roles.carries(("grid", 0), 8), roles.carries(("compiled", 0), 8)
        (None, None)
        >>> roles.begin(5)
        >>> roles.carries(("grid", 0), 8), roles.carries(("compiled", 0), 5), len(roles.open)
        (False, True, 0)
        >>> roles.begin(8)
        >>> roles.carries(("grid", 0), 8)
        False
    """

    def __init__(self, settled: Mapping[Key, bool] = MappingProxyType({})):
        self.settled, self.trusts_sizes = dict(settled), False
        self._size_when_open: dict[Key, int] = {}
        self._calls: dict[str, int] = {}
        self._n_samples = 0
        self.open: dict[Key, int] = {}
        self.pending: set[Key] = set()

    def state_dict(self) -> list[list[str | int | bool]]:
        """[name, number of the call, size while it was open or -1, whether settled, and how]."""
        keys = dict.fromkeys([*self._size_when_open, *self.settled])
        return [[*key, self._size_when_open.get(key, -1), key in self.settled,
                 self.settled.get(key, False)] for key in keys]

    def load_state_dict(self, state: list[list[str | int | bool]]) -> None:
        """Continue from a state_dict()."""
        for name, number, size, settled, carries in state:
            key = str(name), int(number)
            if int(size) >= 0:
                self._size_when_open[key] = int(size)
            if settled:
                self._settle(key, bool(carries))

    def begin(self, n_samples: int) -> None:
        """A forward pass of N samples begins."""
        self._n_samples = n_samples
        self._calls.clear()
        self.open.clear()

    def next_call(self, name: str) -> Key:
        """The role of a call, numbered within the pass."""
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        return name, number

    def carries(self, key: Key, size: int, opens: bool = True) -> bool | None:
        """Whether an input of that first size carries samples; None where that is not known yet,
        which leaves the role open if the pass depends on it."""
        settled = self.settled.get(key)
        if settled is not None:
            return settled
        if size == self._n_samples == 0:
            return True  # an empty batch: either adds nothing
        if size != self._n_samples:
            return self._settle(key, False)
        if self.trusts_sizes or self._size_when_open.setdefault(key, size) != size:
            return self._settle(key, True)
        if opens:
            self.leave_open(key)
        return None

    def judge(self, key: Key, size: int, n_samples: int) -> bool | None:
        """The same of an input outside of the model's forward pass, where N is known later."""
        self._n_samples = n_samples
        return self.carries(key, size, opens=False)

    def use(self, keys: Iterable[Key]) -> None:
        """Something depends on whether these inputs with N rows carry samples."""
        for key in keys:
            self.carries(key, self._n_samples)

    def settle(self, keys: Iterable[Key]) -> None:
        """These carry samples, as an operation that combines them row by row with samples shows."""
        for key in keys:
            self._settle(key, True)
            self.open.pop(key, None)

    def leave_open(self, key: Key) -> None:
        """The pass that runs depends on what is not known."""
        self.open[key] = self._n_samples
        self.pending.add(key)

    def _settle(self, key: Key, carries: bool) -> bool:
        self.settled[key] = carries
        self.pending.discard(key)
        return carries


@dataclass
class Flow:
    """Of a tensor that comes from samples: the dimension along which they lie, and the roles that
    must carry samples for it to be so."""

    reference: weakref.ref[Tensor]
    dim: int
    roles: frozenset[Key] = frozenset()


@dataclass
class SampleFlow:
    """The flows of one forward pass; `counted` says for errors from where N was read."""

    n_samples: int
    roles: Roles
    reports_to: Collection[int] = ()  # ids of the leaves that taps in compiled graphs report to
    counted: str = ""
    _flows: dict[int, Flow] = field(default_factory=dict)
    _constants: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    _nodes: dict[object, Flow] = field(default_factory=dict)

    def add(self, tensor: Tensor, dim: int, roles: frozenset[Key] = frozenset()) -> None:
        """The tensor carries samples along `dim`, if those roles do."""
        if dim >= max(1, tensor.dim()) or (dim >= 0 and tensor.shape[dim] != self.n_samples):
            dim = UNKNOWN
        flow = self._flows[id(tensor)] = Flow(weakref.ref(tensor), dim, roles)
        if tensor.grad_fn is not None:
            self._nodes[tensor.grad_fn] = flow

    def add_inputs(self, inputs: Sequence[Tensor], counted: Tensor, dim: int) -> None:
        """The inputs of the model, N of which is read from `counted`. Others of N rows carry
        samples if their role does."""
        for index, tensor in enumerate(inputs):
            if tensor is counted:
                self.add(tensor, dim)
            elif tensor.dim():
                key = f"input {index + 1}", 0
                carries = self.roles.carries(key, tensor.shape[0], opens=False)
                if carries is False:
                    self.add_constant(tensor)
                else:
                    self.add(tensor, 0, frozenset() if carries else frozenset((key,)))

    def copy(self, tensor: Tensor, source: Tensor) -> None:
        """The tensor carries what the source does."""
        flow = self.of(source)
        if flow is not None:
            self.add(tensor, flow.dim, flow.roles)

    def add_constant(self, tensor: Tensor) -> None:
        """The tensor is known to carry none."""
        self._constants[id(tensor)] = weakref.ref(tensor)

    def of(self, value: object) -> Flow | None:
        """The tensor's flow; None where it is not known to come from samples."""
        flow = self._flows.get(id(value))
        if flow is not None:
            return flow if flow.reference() is value else None
        if not isinstance(value, Tensor) or value.grad_fn is None:
            return None
        # What an autograd.Function or a compiled graph made is known by its edges.
        for node, _ in value.grad_fn.next_functions:
            flow = self._nodes.get(node)
            if flow is not None:
                self.add(value, flow.dim, flow.roles)
                return self._flows[id(value)]
            if id(getattr(node, "variable", None)) in self.reports_to:
                self.add(value, 0)
                return self._flows[id(value)]
        return None

    def is_constant(self, value: object) -> bool:
        """Whether the tensor is known to carry no samples."""
        reference = self._constants.get(id(value))
        return reference is not None and reference() is value

    def has_rows(self, value: object) -> bool:
        """Whether it is a tensor with N rows."""
        return (isinstance(value, Tensor) and value.dim() > 0
                and value.shape[0] == self.n_samples)

    def follow(
        self, name: str, args: Args, kwargs: Kwargs, values: Sequence[object],
        outputs: Sequence[object],
    ) -> None:
        """Pass on through an operation what its inputs carry; `values` are all of them."""
        if name in LIKE_THE_SECOND or name in NEW:
            values = values[: name in LIKE_THE_SECOND]
        found = [(value, flow) for value in values
                 if isinstance(value, Tensor) and (flow := self.of(value)) is not None]
        if not found:
            tensors = [value for value in values if isinstance(value, Tensor)]
            if all(map(self.is_constant, tensors)) if tensors else name in CONSTANT:
                for output in outputs:
                    if isinstance(output, Tensor):
                        self.add_constant(output)
            return
        if name == "setitem":
            outputs = args[:1]
        for output in outputs:
            if isinstance(output, Tensor):
                self._pass_on(name, args, kwargs, found, output)

    def _pass_on(
        self, name: str, args: Args, kwargs: Kwargs, found: Sequence[tuple[Tensor, Flow]],
        output: Tensor,
    ) -> None:
        """Add the flow of an operation's output."""
        known = [flow for _, flow in found if not flow.roles] or [flow for _, flow in found]
        dims = []
        for tensor, flow in found:
            dim = UNKNOWN
            if flow.dim == FLAT:
                dim = self._after_flat(name, tensor, output)
            elif flow.dim != UNKNOWN:
                dim = dim_after(name, tensor, flow.dim, args, kwargs, output)
                if dim >= 0 and output.shape[dim : dim + 1] != (self.n_samples,):
                    dim = UNKNOWN
            if any(flow is each for each in known):
                dims.append(dim)
        first = next((dim for dim in dims if dim != UNKNOWN), UNKNOWN)
        by_row = name in ROW_BY_ROW or (name in PRODUCTS and first < output.dim() - 2)
        if by_row and first != UNKNOWN and not known[0].roles:
            for tensor, flow in found:  # of the same rank: paired with samples row by row
                if flow.dim == first and tensor.dim() == output.dim():
                    self.roles.settle(flow.roles)
        roles = frozenset().union(*(flow.roles for flow in known))
        self.add(output, first, roles)

    def _after_flat(self, name: str, tensor: Tensor, output: Tensor) -> int:
        if self.has_rows(output) and name in RESHAPES:
            return 0
        return FLAT if output.shape[:1] == tensor.shape[:1] else UNKNOWN


def has_equal_rows(tensor: Tensor) -> bool:
    """Whether all rows are the same, as of a state of zeros: a single one then stands for them."""
    with torch.no_grad():
        return tensor.layout is torch.strided and bool((tensor == tensor[:1]).all())


@functools.lru_cache(1024)
def operation_name(function: object) -> str:
    """"add" of torch.add, Tensor.add_, +, += and aten.add; "" where it has no name."""
    name = getattr(function, "__name__", "").strip("_").partition(".")[0]
    plain = name[1:]
    return plain if name[:1] in ("r", "i") and plain in ROW_BY_ROW else name


def dim_after(
    name: str, tensor: Tensor, dim: int, args: Args, kwargs: Kwargs, output: Tensor
) -> int:
    """The dimension of an operation's output along which the samples of its input lie that has
    them along `dim`; UNKNOWN where that is not clear."""
    rank, after, size = tensor.dim(), output.dim(), tensor.shape[dim]
    if output is tensor:
        return dim
    if name in RESHAPES:
        return _through_reshape(tensor, dim, output)
    if size > 1 and _shares_memory(tensor, output):
        found = [place for place in range(after)
                 if output.shape[place] == size and output.stride(place) == tensor.stride(dim)]
        return found[0] if len(found) == 1 else UNKNOWN
    if name in PRODUCTS:
        factors = args[1:3] if "add" in name else args[::-1] if name == "rmatmul" else args[:2]
        return _through_product(tensor, dim, factors, output)
    if name == "einsum":
        return einsum_dim(tensor, dim, args)
    if name in STACKING:
        place = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        place = place % after if isinstance(place, int) else 0
        return dim + (place <= dim)
    if name == "getitem":
        return _through_index(dim, args[1])
    if after < rank:
        if name not in REDUCTIONS:
            return UNKNOWN
        reduced = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name == "cosine_similarity" or name == "norm":
            reduced = kwargs.get("dim", args[2] if len(args) > 2 else None)
            reduced = 1 if reduced is None and name == "cosine_similarity" else reduced
        places = [reduced] if isinstance(reduced, int) else reduced
        if not isinstance(places, (tuple, list)):
            return UNKNOWN
        places = [place % rank for place in places if isinstance(place, int)]
        return UNKNOWN if dim in places else dim - sum(place < dim for place in places)
    if after > rank:
        others = [each for each in _tensors(args, kwargs) if each.dim() == after]
        return dim + after - rank if others else dim
    return dim


def _shares_memory(first: Tensor, second: Tensor) -> bool:
    plain = first.layout is torch.strided and second.layout is torch.strided
    if not plain or type(first) not in (Tensor, torch.nn.Parameter):
        return False
    return (first._base if first._is_view() else first) is (
        second._base if second._is_view() else second)


def _through_product(tensor: Tensor, dim: int, args: Args, output: Tensor) -> int:
    if len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
        return UNKNOWN
    left, right = args
    from_end = tensor.dim() - dim
    if tensor is not left and tensor is not right:
        return UNKNOWN
    if tensor is left:
        if from_end == 1:
            return UNKNOWN  # summed over
        return output.dim() - from_end + (right.dim() == 1)
    if from_end == 2 or right.dim() == 1:
        return UNKNOWN
    return output.dim() - from_end + (left.dim() == 1 and from_end > 2)


def einsum_dim(tensor: Tensor, dim: int, args: Args) -> int:
    """dim_after of an einsum: the same for all places in which the tensor is an operand."""
    text = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    if "->" not in text or "." in text:
        return UNKNOWN
    inputs, result = text.split("->")
    found = {result.find(labels[dim]) for labels, operand in zip(
        inputs.split(","), operands, strict=True) if operand is tensor}
    return found.pop() if len(found) == 1 else UNKNOWN  # as is -1, of what is summed over


def _through_reshape(tensor: Tensor, dim: int, output: Tensor) -> int:
    before = tensor.shape[:dim].numel()
    for place in range(output.dim()):
        if output.shape[:place].numel() == before and output.shape[place] == tensor.shape[dim]:
            return place
    rows = output.shape[0] if output.dim() else 0
    return FLAT if dim == 0 and rows and rows % tensor.shape[0] == 0 else UNKNOWN


def _through_index(dim: int, index: object) -> int:
    """Of tensor[index], a copy; rows that a tensor picks stay where they are."""
    entries = index if isinstance(index, tuple) else (index,)
    if dim == 0 and isinstance(entries[0], (Tensor, list)):
        return 0
    if any(not (entry is None or isinstance(entry, (int, slice))) for entry in entries[: dim + 1]):
        return UNKNOWN
    if dim == 0 and entries[0] == slice(None):
        return 0
    return UNKNOWN


def _tensors(args: Args, kwargs: Kwargs) -> Collection[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        parts = value if isinstance(value, (list, tuple)) else (value,)
        found += [part for part in parts if isinstance(part, Tensor)]
    return found
