"""The options of adabatch.wrap from a flat table, for tests that are parametrized over them."""

from dataclasses import fields
from typing import Any

from adabatch import BatchSizeScheduler
from adabatch.config import (
    BatchSizes,
    Coupling,
    CrossRank,
    Every,
    MicroBatch,
    MicroBatches,
    PerSample,
)
from adabatch.controllers import CABS

ESTIMATORS = {"per_sample": PerSample, "micro_batch": MicroBatch, "cross_rank": CrossRank}
FLAT = {"min_batch_size": "minimum", "max_batch_size": "maximum", "every": "k",
        "max_micro_batch_size": "size", "group": "process_group"}


def grouped(**flat: Any) -> dict[str, Any]:
    """Keywords of wrap: fields of one option object gathered into it, others as they are.

    Besides the fields' names: min_batch_size, max_batch_size, every, max_micro_batch_size, group,
    and coupling as a rule's name together with other fields of Coupling.
    """
    flat = {FLAT.get(name, name): value for name, value in flat.items()}
    kind = ESTIMATORS[flat.pop("estimator", "per_sample")]
    places = {"batch_sizes": BatchSizes, "coupling": Coupling, "micro_batches": MicroBatches,
              "estimator": kind, "measure": Every}
    result = {}
    for keyword, options in places.items():
        names = [field.name for field in fields(options)]
        given = {name: flat.pop(name) for name in names if name in flat}
        if given and keyword == "coupling" and keyword in flat:
            given["rule"] = flat.pop(keyword)
        if given or (keyword == "estimator" and kind is not PerSample):
            result[keyword] = options(**given)
    return result | flat


def make_scheduler(optimizer, loader, estimator=None, controller=None, **flat: Any):
    """A BatchSizeScheduler from flat options, as `grouped` takes them; a default bound of 16."""
    if "effective_lr" in flat:
        effective_lr = flat.pop("effective_lr")
        if controller is None and flat.get("coupling") != "seesaw":
            controller = CABS()
        if controller is not None:
            controller.effective_lr = effective_lr
    return BatchSizeScheduler(optimizer, loader, estimator, controller, **grouped(**flat))
