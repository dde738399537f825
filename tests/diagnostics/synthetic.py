"""A synthetic run: random sizes, losses and moments, with steps that measure nothing and dropped
measurements."""

import math
from dataclasses import astuple

import numpy as np


def steps(count=60, seed=0, every=1):
    """Keyword arguments of Diagnostics.append, one dict a step."""
    rng = np.random.default_rng(seed)
    seen, size, made = 0, 16, []
    for step in range(1, count + 1):
        seen += size
        trace, square = float(rng.gamma(4, 2)), float(rng.gamma(3, 0.2))
        dropped = {7: "non-finite loss", 11: "batch of one", 13: "non-finite loss"}.get(step, "")
        measured = step % every == 0 and not dropped
        following = int(rng.integers(8, 64))
        made.append(
            {
                "step": step,
                "samples_seen": seen,
                "batch_size": size,
                "proposed_batch_size": following + 0.25 if measured else math.nan,
                "next_batch_size": following,
                "lr": 0.1,
                "loss": math.inf if dropped == "non-finite loss" else float(rng.gamma(5, 0.2)),
                "variance_trace": trace if measured else math.nan,
                "grad_sq_norm": square if measured else math.nan,
                "true_grad_sq_norm": square - trace / size if measured else math.nan,
                "seconds": float(rng.uniform(0.01, 0.02)),
                "measured": measured,
                "dropped": dropped,
            }
        )
        size = following
    return made


def fill(history, rows):
    """Appends all rows and returns the history."""
    for row in rows:
        history.append(**row)
    return history


def same_records(some, others):
    """Whether two sequences of records are equal in every field, NaN being equal to NaN."""
    return repr([astuple(record) for record in some]) == repr(
        [astuple(record) for record in others]
    )
