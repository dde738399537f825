"""How long a step takes at a batch size: a model of few parameters, fitted to the times of past steps.

Legend: B samples in a step, R replicas (processes) that share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

SMALLEST = 1e-12  # seconds; below any step, keeps logarithms finite
START_GAMMA = 2.0


@dataclass(frozen=True)
class StepTime:
    """seconds(B) = ((a + b·B/R)^γ + c^γ)^(1/γ): computing and network overlap in part; γ = 1 not at all, γ = 10 nearly wholly. With R = 1, a + b·B.

    At a fixed R the published network term a' + b'·(R − 2) is one number, c.

    Args:
        per_step, per_sample: a, b, in seconds.
        network: c, in seconds.
        gamma: γ in [1, 10].
        replicas: R.

    Example:
        >>> StepTime(0.5, 0.25).seconds(2)
        1.0
    """

    per_step: float
    per_sample: float
    network: float = 0.0
    gamma: float = 1.0
    replicas: int = 1

    def seconds(self, batch_size: float) -> float:
        """Of one step at this size."""
        compute = self.per_step + self.per_sample * batch_size / self.replicas
        if not self.network:
            return compute
        larger = max(compute, self.network, SMALLEST)
        return larger * ((compute / larger) ** self.gamma + (self.network / larger) ** self.gamma) ** (1 / self.gamma)


def fit_step_time(sizes: Sequence[float], seconds: Sequence[float], counts: Sequence[float], replicas: int = 1) -> StepTime:
    """Minimise Σ n_j (log seconds(B_j) − log s_j)² by L-BFGS-B over the logarithms of the parameters.

    Args:
        sizes: B_j, in samples, at least two different ones.
        seconds: s_j, the typical time of a step at each.
        counts: n_j, how many steps each stands for.
        replicas: R.

    Raises:
        ValueError: fewer than two sizes.

    Example:
        >>> fitted = fit_step_time([16, 64, 256], [1.16, 1.64, 3.56], [1, 1, 1])
        >>> round(fitted.per_step, 4), round(fitted.per_sample, 4)
        (1.0, 0.01)
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"the time of a step needs at least two batch sizes to be fitted, got {sorted(set(sizes))}")
    size, logs, weights = np.asarray(sizes, float) / replicas, np.log(np.maximum(seconds, SMALLEST)), np.asarray(counts, float)
    weights = weights / weights.sum()
    shortest = math.exp(logs.min())
    start = [math.log(shortest / 2), math.log(shortest / (2 * size.min()))]
    bounds = [(math.log(SMALLEST), None), (math.log(SMALLEST), None)]
    if replicas > 1:
        start += [math.log(shortest / 2), START_GAMMA]
        bounds += [(math.log(SMALLEST), None), (1.0, 10.0)]

    def error(parameters: np.ndarray) -> float:
        compute = np.logaddexp(parameters[0], parameters[1] + np.log(size))
        total = compute if replicas == 1 else np.logaddexp(parameters[3] * compute, parameters[3] * parameters[2]) / parameters[3]
        return float(weights @ (total - logs) ** 2)

    found = minimize(error, start, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-10}).x
    network = {"network": math.exp(found[2]), "gamma": float(found[3])} if replicas > 1 else {}
    return StepTime(math.exp(found[0]), math.exp(found[1]), replicas=replicas, **network)
