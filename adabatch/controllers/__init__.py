"""Controllers: from a step's moments and loss to the batch size they propose."""

from adabatch.controllers.adadamp import AdaDamp, GeoDamp, PadaDamp
from adabatch.controllers.adascale import AdaScale
from adabatch.controllers.annealed import Annealed
from adabatch.controllers.base import Controller
from adabatch.controllers.cabs import CABS
from adabatch.controllers.combinators import AtLeast, AtMost, Average, Confident, Monotone, Warmup
from adabatch.controllers.goodput import Goodput
from adabatch.controllers.gradient_diversity import GradientDiversity
from adabatch.controllers.noise_scale import NoiseScale
from adabatch.controllers.norm_test import InnerProductTest, NormTest
from adabatch.controllers.online_selection import OnlineSelection
from adabatch.controllers.scheduled import Scheduled
from adabatch.controllers.seesaw import Seesaw

__all__ = [
    "CABS", "AdaDamp", "AdaScale", "Annealed", "AtLeast", "AtMost", "Average", "Confident",
    "Controller", "GeoDamp", "Goodput", "GradientDiversity", "InnerProductTest", "Monotone",
    "NoiseScale", "NormTest", "OnlineSelection", "PadaDamp", "Scheduled", "Seesaw", "Warmup",
]
