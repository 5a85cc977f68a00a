"""Merging: folding trained adapters back into the base where that is exact, fitted or not, and proving it.

``sites`` decides and checks one adapter, ``exact`` all of them, ``fitted`` folds what is not linear, ``differences``
adds what was learned to the base's own tensors, ``assemble`` builds the merged model, ``whole`` compares it end to end,
``bias`` keeps the base's architecture where a bias appeared, ``checkpoint`` writes timm's own keys, ``deltas`` an
adapter file, ``report`` holds the figures.
"""

from cadapt.merging.assemble import merge
from cadapt.merging.checkpoint import checkpoint_bytes, checkpoint_facts, timm_state_dict
from cadapt.merging.deltas import to_deltas
from cadapt.merging.fitted import Batches, Fit, Fitted
from cadapt.merging.loading import load_merged
from cadapt.merging.report import (
    EndToEnd,
    FrontierPoint,
    Latency,
    MergeReport,
    ModelLatency,
    OnData,
    SiteMerge,
)

__all__ = [
    "Batches",
    "EndToEnd",
    "Fit",
    "Fitted",
    "FrontierPoint",
    "Latency",
    "MergeReport",
    "ModelLatency",
    "OnData",
    "SiteMerge",
    "checkpoint_bytes",
    "checkpoint_facts",
    "load_merged",
    "merge",
    "timm_state_dict",
    "to_deltas",
]
