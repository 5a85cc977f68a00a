"""Let a sum or an activation overwrite what only it reads, so that no new memory is asked for.

Only what was made by an operation that keeps nothing of its own result may be overwritten: a convolution, an affine, a
sum. Results of other operations may be views, or kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.elementwise import affine as lean_affine
from cadapt.frozen.lowering import affine
from cadapt.frozen.program import Program, readers, sizes

_CONVS = (F.conv2d, frozen_conv2d)
FRESH = (*_CONVS, lean_affine, affine, torch.add)
"""What gives a tensor of its own, and keeps nothing of it."""


def may_overwrite(program: Program, node: Any) -> bool:
    """Whether the one that reads a tensor may compute into its memory."""
    return isinstance(node, fx.Node) and node.target in FRESH and len(readers(node)) == 1 and node.meta["moving"]


def add_into(sink: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sum, in the memory of ``sink`` where it has the sum's dtype and shape."""
    fits = torch.promote_types(sink.dtype, other.dtype) == sink.dtype and sink.shape == other.shape
    if fits and not (sink.is_leaf and sink.requires_grad):
        return sink.add_(other)
    return sink + other


def overwrite_sums(program: Program) -> None:
    """Compute a sum into the convolution's result that only it reads."""
    for node in program.nodes(torch.add):
        if len(node.args) != 2 or node.kwargs:
            continue
        for sink, other in (node.args, node.args[::-1]):
            whole = sizes(sink) == sizes(other) == sizes(node) != ()
            is_conv = isinstance(sink, fx.Node) and sink.target in _CONVS
            if whole and sink is not other and is_conv and may_overwrite(program, sink):
                node.target, node.args = add_into, (sink, other)
                break
