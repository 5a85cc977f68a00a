"""Merging: folding trained adapters back into the base where that is exact, and proving it.

``sites`` decides and checks one adapter, ``differences`` adds what was learned to the base's own tensors, ``assemble``
builds the merged model, ``whole`` compares it end to end, ``bias`` keeps the base's architecture where a bias appeared,
``checkpoint`` writes timm's own keys, ``report`` holds the figures. A further kind of merge is a further status that
``sites`` gives.
"""

from cadapt.merging.assemble import merge
from cadapt.merging.checkpoint import timm_state_dict
from cadapt.merging.report import EndToEnd, MergeReport, SiteMerge

__all__ = ["EndToEnd", "MergeReport", "SiteMerge", "merge", "timm_state_dict"]
