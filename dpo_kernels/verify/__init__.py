"""`dpo verify`: every implementation that runs here, against float64."""

from dpo_kernels.verify.table import main

__all__ = ["main"]
