"""The names of all schemes, for help texts: the registry itself imports torch, which help must not wait for."""

from __future__ import annotations

# by family, as the README lists them; a test holds that they are the registry's
SCHEME_NAMES = (
    "linear",
    "bias",
    "norm",
    "full",
    "conv-par",
    "conv-seq",
    "res-par",
    "res-seq",
    "stage-par",
    "all-conv-par",
    "convpass",
    "convpass-attn",
    "consolidator",
    "iconformer",
    "residual-par",
    "residual-seq",
    "lora",
    "tinytl",
    "ssf",
    "vpt",
)
LISTED = ", ".join(SCHEME_NAMES)
