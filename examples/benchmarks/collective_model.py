"""How long a sum over W processes takes, and the share of a training step that is at numbers of
processes that were not measured.

Legend: W processes, L doubles in the vector, α seconds of one hop from process to process, B bytes
per second of one link.

    t(W, L) = α·hops(W) + 2(W − 1)/W · 8L/B

The second term is that of a ring, in which each process sends every byte about twice. The first
depends on the algorithm: a tree (NCCL and MPI have them) has ⌈log₂ W⌉ hops one after another, a
ring 2(W − 1), and a ring is what torch's gloo does. For the vector of a step, of some dozen
doubles, the first term is all that counts.

References:
    Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
    IJHPCA 19(1), 2005 (costs of the algorithms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit

CHECKSUM = 4  # doubles of the vector by which the processes see that they decided alike
Hops = Callable[[int], int]


def tree(world: int) -> int:
    """⌈log₂ W⌉ hops.

    Example:
        >>> [tree(world) for world in (1, 2, 3, 4, 16384)]
        [0, 1, 2, 2, 14]
    """
    return (world - 1).bit_length()


def ring(world: int) -> int:
    """2(W − 1) hops: W − 1 until a number is summed, W − 1 until all have it.

    Example:
        >>> [ring(world) for world in (1, 2, 3, 4, 16384)]
        [0, 2, 4, 6, 32766]
    """
    return 2 * (world - 1)


def two_rings(world: int) -> int:
    """Two all-reduces by rings: within groups of k = ⌈√W⌉ processes, then of those that have the
    same place in each of the ⌈W/k⌉ groups.

    Example:
        >>> [two_rings(world) for world in (4, 16384)]
        [4, 508]
    """
    inner = math.isqrt(max(world - 1, 0)) + 1
    return ring(inner) + ring(-(-world // inner))


HOPS: dict[str, Hops] = {"tree": tree, "ring": ring, "two rings": two_rings}
FITTED = ("tree", "ring")
TOLERANCES = ("ftol", "xtol", "gtol")


def seconds(
    world: int, length: int, *, latency: float, bandwidth: float, hops: Hops = tree
) -> float:
    """t(W, L).

    Example:
        >>> round(seconds(4, 1000, latency=1e-6, bandwidth=1e9) * 1e6, 6)
        14.0
    """
    return latency * hops(world) + 2 * (world - 1) / world * 8 * length / bandwidth


@dataclass(frozen=True)
class Fit:
    """The model's constants as fitted, with standard errors.

    Attributes:
        hops: key of HOPS.
        latency, latency_error: α, seconds.
        bandwidth, bandwidth_error: B, bytes a second; infinite, and its error NaN, where the times
            do not grow with L.
        residuals: measured time / t(W, L) − 1 of each point.
        spread: √(Σ log²(1 + residual)/(points − 2)).
    """

    hops: str
    latency: float
    latency_error: float
    bandwidth: float
    bandwidth_error: float
    residuals: list[float]
    spread: float


def fit(points: Sequence[tuple[int, int, float]], hops: str = "tree") -> Fit:
    """Least squares of log(measured/t) over α and 1/B, both >= 0, by scipy's curve_fit; the error
    of B is that of 1/B by the delta method.

    The errors of times are relative ones, and lopsided: by differences, few slow calls would
    decide, and by differences over the measured time, the fast ones.

    Args:
        points: (W, L, measured seconds), at least three, W > 1.
        hops: key of HOPS.

    Raises:
        ValueError: fewer than three points, or all of the same L and number of hops: then the two
            constants cannot be separated.

    Example:
        >>> points = [(world, length) for world in (2, 3) for length in (8, 4096)]
        >>> made = [(*point, seconds(*point, latency=5e-5, bandwidth=1e9)) for point in points]
        >>> found = fit(made)
        >>> round(found.latency * 1e6, 3), round(found.bandwidth / 1e9, 3)
        (50.0, 1.0)
    """
    if len(points) < 3 or len({(HOPS[hops](world), length) for world, length, _ in points}) < 2:
        raise ValueError(
            "the fit of two constants needs three points that differ in length or number of hops, "
            f"got {len(points)}: {list(points)}"
        )
    worlds, lengths, times = np.array(points, dtype=float).T
    steps = np.array([HOPS[hops](int(world)) for world in worlds], dtype=float)
    traffic = 2 * (worlds - 1) / worlds * 8 * lengths
    # Both constants of order one: the errors come from a numerical Jacobian.
    scales = times.mean() / steps.mean(), times.mean() / traffic.mean()

    def model(_: np.ndarray, hop: float, byte: float) -> np.ndarray:
        return np.log(hop * scales[0] * steps + byte * scales[1] * traffic)

    options = {"p0": (0.5, 0.5), "bounds": (0, np.inf)} | dict.fromkeys(TOLERANCES, 1e-14)
    found, covariance = curve_fit(model, times, np.log(times), **options)
    errors = np.sqrt(np.diag(covariance))
    latency, per_byte = float(found[0] * scales[0]), float(found[1] * scales[1])
    flat = found[1] < 1e-9
    residuals = np.log(times) - model(times, *found)
    return Fit(
        hops=hops,
        latency=latency,
        latency_error=float(errors[0] * scales[0]),
        bandwidth=math.inf if flat else 1 / per_byte,
        bandwidth_error=math.nan if flat else float(errors[1] * scales[1]) / per_byte**2,
        residuals=np.expm1(residuals).tolist(),
        spread=float(np.sqrt(np.square(residuals).sum() / (len(times) - 2))),
    )


def shares(
    worlds: Sequence[int],
    length: int,
    *,
    latency: float,
    bandwidth: float,
    step: float,
    check_every: int,
) -> list[dict]:
    """What the sum takes of a step, at each number of processes, by tree and by ring.

    Args:
        worlds: numbers of processes.
        length: doubles of the vector, the checksum of the decisions among them: it travels at every
            step.
        latency, bandwidth: α, B.
        step: seconds of a training step.
        check_every: for comparison, the checksum as a separate vector, every `check_every` steps.

    Returns:
        for each W {"world", and for each of HOPS {"seconds", "share", "share_apart"}}: of the
        vector as it is, and with the checksum sent apart.

    Example:
        >>> row = shares([1024], 20, latency=5e-6, bandwidth=25e9, step=0.2, check_every=50)[0]
        >>> [f"{row[name]['seconds'] * 1e6:.0f} us, {row[name]['share']:.3%}" for name in HOPS]
        ['50 us, 0.025%', '10230 us, 5.115%', '620 us, 0.310%']
    """
    rows = []
    for world in worlds:
        row: dict = {"world": world}
        for name, hops in HOPS.items():
            link = {"latency": latency, "bandwidth": bandwidth, "hops": hops}
            whole = seconds(world, length, **link)
            check = seconds(world, CHECKSUM, **link)
            apart = seconds(world, length - CHECKSUM, **link) + check / check_every
            row[name] = {"seconds": whole, "share": whole / step, "share_apart": apart / step}
        rows.append(row)
    return rows
