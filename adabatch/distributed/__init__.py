"""Many processes: one global batch, one measurement, one decision.

`adabatch.wrap` finds the process group itself.
"""
