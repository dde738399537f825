"""All processes must be set up alike and decide alike: what differs is found at once, and raised on every one of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from adabatch.distributed.group import Ranks

SHOWN = 200  # characters of a value in an error
CHECKSUM = 4  # numbers that a checksum adds to a vector


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare facts over all processes.

    Only checksums go round; values do where these differ.

    Raises:
        ValueError: on every process the same, naming what differs, the values and the ranks.
    """
    sums = ranks.gather({name: zlib.crc32(value.encode()) for name, value in facts.items()})
    differing = sorted({name for each in sums for name in each if any(other.get(name) != each[name] for other in sums)})
    if not differing:
        return
    values = ranks.gather({name: facts.get(name, "nothing") for name in differing})
    problems = "\n".join(f"  - {name}: {_by_rank(ranks, [each[name] for each in values])}" for name in differing)
    raise ValueError(f"the {ranks.world_size} processes are set up differently; give each the same:\n{problems}")


def facts_of_model(model: nn.Module) -> str:
    """Names, shapes, dtypes and requires_grad of all parameters, one a line.

    Example:
        >>> facts_of_model(nn.Linear(2, 1, bias=False))
        'weight (1, 2) float32'
    """
    lines = []
    for name, parameter in model.named_parameters():
        frozen = "" if parameter.requires_grad else " frozen"
        lines.append(f"{name} {tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}{frozen}")
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as text that is the same in every process: numbers and names as they are, objects by their type and plain attributes.

    Example:
        >>> plain(0.5), plain(nn.ReLU), plain([1, None])
        ('0.5', 'ReLU', '[1, None]')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        values = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return f"[{', '.join(plain(each) for each in values)}]"
    names = getattr(value, "arguments", ())
    if isinstance(names, tuple) and names:
        return f"{type(value).__name__}({', '.join(f'{name}={plain(getattr(value, name, None))}' for name in names)})"
    return getattr(value, "__name__", type(value).__name__)


def checksum(decision: Any) -> list[float]:
    """CHECKSUM numbers for a vector that is added up over the processes, from which `agree` tells whether all decided alike.

    Two halves h of a CRC, each with its square: Σh² = (Σh)²/W only if all h are equal. 16 bits each, so that the sums are exact in float64 for millions of
    processes.
    """
    code = zlib.crc32(repr(decision).encode())
    return [float(part) for half in (code >> 16, code & 0xFFFF) for part in (half, half * half)]


def agree(sums: Sequence[float], world_size: int) -> bool:
    """Whether all processes put the same checksum in.

    Example:
        >>> same = [2 * value for value in checksum((16, 3))]
        >>> other = [one + two for one, two in zip(checksum((16, 3)), checksum((17, 3)))]
        >>> agree(same, 2), agree(other, 2)
        (True, False)
    """
    return all(sums[at] ** 2 == world_size * sums[at + 1] for at in range(0, CHECKSUM, 2))


def raise_divergence(ranks: Ranks, decision: Mapping[str, Any]) -> None:
    """Raise on every process, with what differs and on which ranks.

    Raises:
        RuntimeError: always.
    """
    decisions = ranks.gather({name: plain(value) for name, value in decision.items()})
    listed = [name for name in decision if len({each[name] for each in decisions}) > 1]
    lines = "\n".join(f"  - {name}: {_by_rank(ranks, [each[name] for each in decisions])}" for name in listed)
    raise RuntimeError(
        f"the processes have decided differently, although all were given the same numbers:\n{lines}\nA controller, a schedule or a training loop that uses a "
        "clock, a random number or numbers of its own process makes them differ: let it use those of scheduler.diagnostics, which are the same everywhere"
    )


def _by_rank(ranks: Ranks, values: Sequence[str]) -> str:
    """'a on ranks 0, 2; b on rank 1', long values by their first line that differs."""
    shown = _first_difference(values)
    ranks_of_value: dict[str, list[int]] = {}
    for rank, value in zip(ranks.ranks, shown, strict=True):
        ranks_of_value.setdefault(value, []).append(rank)
    parts = [f"{value[:SHOWN]} on rank{'s' * (len(where) > 1)} {', '.join(map(str, where))}" for value, where in ranks_of_value.items()]
    return "; ".join(parts)


def _first_difference(values: Sequence[str]) -> list[str]:
    lines = [value.split("\n") for value in values]
    if max(map(len, lines)) == 1:
        return list(values)
    at: Callable[[list[str], int], str] = lambda own, place: own[place] if place < len(own) else "nothing"  # noqa: E731
    place = next(place for place in range(max(map(len, lines))) if len({at(own, place) for own in lines}) > 1)
    return [at(own, place) for own in lines]
