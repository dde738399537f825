"""Controllers: from a step's moments and loss to the batch size they wish for. One class a file, all behind propose(moments, *, loss, lr)."""

from adabatch.controllers.cabs import CABS
from adabatch.controllers.online_selection import OnlineSelection
from adabatch.controllers.scheduled import Scheduled
from adabatch.controllers.seesaw import Seesaw

__all__ = ["CABS", "OnlineSelection", "Scheduled", "Seesaw"]
