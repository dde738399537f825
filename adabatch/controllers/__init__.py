"""Controllers: from a step's moments and loss to the batch size they wish for. One class a file, all behind propose(moments, *, loss, lr)."""

from adabatch.controllers.cabs import CABS

__all__ = ["CABS"]
