"""The arguments of every schedule: one fixed set for state and loader tests, and strategies, sound
and unsound, for the comparison with bs-scheduler."""

from hypothesis import strategies as st

small_factor = st.floats(0.3, 3.0, allow_nan=False)
small_int = st.integers(1, 12)
several_ints = st.lists(st.integers(1, 30), min_size=1, max_size=4)


class TableOfFactors:
    """epoch -> factor, from a list that repeats; an object, so that its attributes are state."""

    def __init__(self, factors):
        self.factors = factors

    def __call__(self, epoch):
        return self.factors[epoch % len(self.factors)]

    def __repr__(self):
        return f"TableOfFactors({self.factors})"


tables = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=5).map(TableOfFactors)

FIXED = {
    "LambdaBS": {"bs_lambda": TableOfFactors([1.0, 1.5, 0.7, 2.0])},
    "MultiplicativeBS": {"bs_lambda": TableOfFactors([1.0, 1.5, 0.7])},
    "StepBS": {"step_size": 3, "gamma": 1.5},
    "MultiStepBS": {"milestones": [2, 5, 5, 9], "gamma": 1.5},
    "ConstantBS": {"factor": 3.0, "milestone": 6},
    "LinearBS": {"start_factor": 5.0, "milestone": 8},
    "ExponentialBS": {"gamma": 1.13},
    "PolynomialBS": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingBS": {"total_iters": 5, "max_batch_size": 90},
    "IncreaseBSOnPlateau": {"patience": 1, "cooldown": 2, "factor": 1.5},
    "CyclicBS": {"step_size_down": 3, "step_size_up": 4, "mode": "triangular2"},
    "CosineAnnealingBSWithWarmRestarts": {"t_0": 3, "factor": 2, "max_batch_size": 80},
    "OneCycleBS": {"total_steps": 12, "max_batch_size": 120, "min_batch_size": 2},
}

SOUND = {
    "LambdaBS": {"bs_lambda": tables},
    "MultiplicativeBS": {"bs_lambda": tables},
    "StepBS": {"step_size": small_int, "gamma": small_factor},
    "MultiStepBS": {"milestones": several_ints, "gamma": small_factor},
    "ConstantBS": {"factor": st.floats(0.01, 30.0), "milestone": small_int},
    "LinearBS": {"start_factor": small_factor, "end_factor": small_factor, "milestone": small_int},
    "ExponentialBS": {"gamma": st.floats(0.7, 1.6)},
    "PolynomialBS": {"total_iters": st.integers(2, 20), "power": st.floats(-2.0, 4.0)},
    "CosineAnnealingBS": {"total_iters": st.integers(2, 12),
                          "base_batch_size": st.none() | st.integers(1, 60)},
    "IncreaseBSOnPlateau": {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.floats(0.0, 3.0).filter(lambda factor: factor != 1.0),
        "patience": st.integers(0, 4),
        "threshold": st.floats(1e-4, 1.5),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
    },
    "CyclicBS": {
        "base_batch_size": st.none() | st.integers(2, 60),
        "step_size_down": small_int,
        "step_size_up": st.none() | small_int,
        "mode": st.sampled_from(["triangular", "triangular2", "exp_range"]),
        "gamma": st.floats(0.5, 1.1),
        "scale_fn": st.none() | tables,
        "scale_mode": st.sampled_from(["cycle", "iterations"]),
    },
    "CosineAnnealingBSWithWarmRestarts": {"t_0": small_int, "base_batch_size": st.none()
                                          | st.integers(1, 60), "factor": st.integers(1, 3)},
    "OneCycleBS": {
        "total_steps": st.integers(4, 40),
        "decay_percentage": st.floats(0.2, 0.8),
        "base_batch_size": st.none() | st.integers(2, 60),
        "strategy": st.sampled_from(["cos", "linear"]),
    },
}

BOUNDS = {"max_batch_size": st.none() | st.integers(1, 300), "min_batch_size": st.integers(1, 20)}

# Values that at least one argument must refuse; each schedule's arguments are drawn from these and
# from its sound ones.
UNSOUND = st.sampled_from([0, -1, 1, 2.5, -0.5, "two", None, [], [0], [3, "x"], (4, 2), 10**6])
