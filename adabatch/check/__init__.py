"""check: find each layer's layout, and compare with exact per-sample gradients before training."""

from adabatch.check.check import check
from adabatch.check.report import CheckReport, CheckRow

__all__ = ["CheckReport", "CheckRow", "check"]
