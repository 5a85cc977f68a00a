"""The fitted merge as a whole: measure every adapter, fold them one after another, choose the point to stand at."""

from __future__ import annotations

from cadapt.adapted import AdaptedModel
from cadapt.merging.fitted.options import Fit, Fitted
from cadapt.merging.report import SiteMerge


def fold_fitted(model: AdaptedModel, rows: tuple[SiteMerge, ...], fit: Fit, *, as_deltas: bool = False) -> Fitted:
    """Fold adapters that are not linear into the layers of their sites."""
    raise NotImplementedError
