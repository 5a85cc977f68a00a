"""Folding the fixed scale of an adapter into its last map, once training is over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def with_scale_folded(adapter: nn.Module) -> Any:
    """Fold s into the map ``up``: s·(W z + b) = (s·W) z + s·b. Returns an equal adapter whose ``scale`` is 1.

    The argument is left as it was. Computed in fp64 and rounded once.
    """
    folded: Any = copy.deepcopy(adapter)
    for tensor in folded.up.parameters():
        tensor.copy_((tensor.double() * folded.scale).to(tensor.dtype))
    folded.scale = 1.0
    return folded
