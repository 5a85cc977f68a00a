"""Keep frozen weights in the dtype they are multiplied in, cast once and not each step; compute constants once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.linear import frozen_linear
from cadapt.frozen.program import Program


def cast_frozen_weights(program: Program, dtype: torch.dtype) -> None:
    """Hold each frozen weight and bias that only layers of the autocast list read in a half precision."""
    for node in program.nodes(F.conv2d, F.linear, frozen_conv2d, frozen_linear):
        arguments = list(node.args)
        for place in (1, 2):
            item = arguments[place] if place < len(arguments) else None
            if isinstance(item, fx.Node) and program.is_constant(item):
                arguments[place] = program.hold(program.value(item).detach().to(dtype))
        node.args = tuple(arguments)


def evaluate_constants(program: Program) -> None:
    """Compute once what depends on frozen tensors alone: reshaped scales, tables of relative positions."""
    for node in list(program.graph.nodes):
        if node.op in ("get_attr", "placeholder", "output") or not program.is_constant(node):
            continue
        if all(program.is_constant(user) for user in node.users):
            continue  # part of a larger one
        program.replace(node, program.hold(program.value(node).detach().clone()))
    program.clean()
