"""Statistics: what is measured of the per-sample gradients."""
