"""Controllers: from a step's moments and loss to the batch size they propose."""

from importlib import import_module
from typing import TYPE_CHECKING

from adabatch.controllers.base import Controller
from adabatch.controllers.cabs import CABS
from adabatch.controllers.seesaw import Seesaw

if TYPE_CHECKING:
    from adabatch.controllers.adadamp import AdaDamp, GeoDamp, PadaDamp
    from adabatch.controllers.adascale import AdaScale
    from adabatch.controllers.annealed import Annealed
    from adabatch.controllers.combinators import (AtLeast, AtMost, Average, Confident, Monotone,
                                                  Warmup)
    from adabatch.controllers.goodput import Goodput
    from adabatch.controllers.gradient_diversity import GradientDiversity
    from adabatch.controllers.noise_scale import NoiseScale
    from adabatch.controllers.norm_test import InnerProductTest, NormTest
    from adabatch.controllers.online_selection import OnlineSelection
    from adabatch.controllers.scheduled import Scheduled

__all__ = [
    "CABS", "AdaDamp", "AdaScale", "Annealed", "AtLeast", "AtMost", "Average", "Confident",
    "Controller", "GeoDamp", "Goodput", "GradientDiversity", "InnerProductTest", "Monotone",
    "NoiseScale", "NormTest", "OnlineSelection", "PadaDamp", "Scheduled", "Seesaw", "Warmup",
]
# The files of those that few runs use: imported with the first use of the name.
_FILES = {
    "AdaDamp": "adadamp", "GeoDamp": "adadamp", "PadaDamp": "adadamp", "AdaScale": "adascale",
    "Annealed": "annealed", "AtLeast": "combinators", "AtMost": "combinators",
    "Average": "combinators", "Confident": "combinators", "Monotone": "combinators",
    "Warmup": "combinators", "Goodput": "goodput", "GradientDiversity": "gradient_diversity",
    "NoiseScale": "noise_scale", "InnerProductTest": "norm_test", "NormTest": "norm_test",
    "OnlineSelection": "online_selection", "Scheduled": "scheduled",
}

if not TYPE_CHECKING:
    def __getattr__(name: str) -> object:
        """A controller whose file was not imported yet."""
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return vars(import_module(f"{__name__}.{_FILES[name]}"))[name]


def __dir__() -> list[str]:
    return __all__
