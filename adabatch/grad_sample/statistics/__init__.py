"""Statistics: what is measured of the per-sample gradients. One file each; see `Statistic`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from adabatch.grad_sample.statistics.inner_products import InnerProducts
from adabatch.grad_sample.statistics.preconditioned import PreconditionedTrace
from adabatch.grad_sample.statistics.second_moment import SecondMoment
from adabatch.interfaces import Statistic

__all__ = ["InnerProducts", "PreconditionedTrace", "SecondMoment", "statistics_of"]

BY_NAME: dict[str, Callable[[], Statistic]] = {
    "inner_products": InnerProducts, "second_moment": SecondMoment,
}


def statistics_of(given: Collection[Statistic | str]) -> tuple[Statistic, ...]:
    """What is measured besides the squared norms, given by name or as objects.

    Raises:
        ValueError: an unknown name, or two of one name.
        TypeError: not a Statistic.

    Example:
        >>> [each.name for each in statistics_of(["inner_products"])]
        ['inner_products']
    """
    if isinstance(given, (str, Mapping)) or not isinstance(given, Collection):
        raise TypeError(f"statistics must be a list of statistics or their names, got {given!r}")
    found: dict[str, Statistic] = {}
    for each in given:
        if isinstance(each, str):
            if each not in BY_NAME:
                raise ValueError(
                    f"statistics by name are {sorted(BY_NAME)}, got {each!r}: pass one of your own "
                    "as an object, in estimator=adabatch.PerSample(statistics=[...])")
            each = BY_NAME[each]()
        if not isinstance(each, Statistic):
            raise TypeError(f"a statistic must be an adabatch.interfaces.Statistic, got {each!r}")
        if not isinstance(getattr(each, "name", None), str):
            raise TypeError(f"{type(each).__name__} must have a class attribute `name`, a text")
        if each.name in found or each.name == "sq_norms":
            raise ValueError(f"the statistic {each.name!r} is given twice or always measured")
        found[each.name] = each
    return tuple(found.values())
