"""adabatch: training that chooses its own batch size."""
