"""Fitted merges: kernels in the base's own layers that stand in for adapters which are not linear."""

from cadapt.merging.fitted.fold import fold_fitted
from cadapt.merging.fitted.options import Batches, Fit, Fitted

__all__ = ["Batches", "Fit", "Fitted", "fold_fitted"]
