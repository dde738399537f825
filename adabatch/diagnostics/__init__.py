"""What a run measured, step by step: a history to read, save, load, summarise and draw."""

from adabatch.diagnostics.history import Diagnostics
from adabatch.diagnostics.layers import LayerRow, Layers
from adabatch.diagnostics.plots import draw, plot
from adabatch.diagnostics.record import Record

__all__ = ["Diagnostics", "LayerRow", "Layers", "Record", "draw", "plot"]
