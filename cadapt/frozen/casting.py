"""Keep frozen weights in the dtype they are multiplied in, cast once and not each step; compute constants once."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.linear import frozen_linear
from cadapt.frozen.program import Program
from cadapt.frozen.stretches import Stretch

_LAYERS = (F.conv2d, F.linear, frozen_conv2d, frozen_linear)


def cast_frozen_weights(program: Program, dtype: torch.dtype) -> None:
    """Hold each frozen weight and bias that a layer of the autocast list reads in a half precision.

    A stretch is handed the weights of its layers: those that only such layers read there are held likewise.
    """
    for node in list(program.graph.nodes):
        module = program.module(node)
        if node.target in _LAYERS:
            places = {place for place in (1, 2) if place < len(node.args)}
        elif isinstance(module, Stretch):
            places = _weight_places(module)
        else:
            continue
        node.args = tuple(
            _cast(program, item, dtype) if place in places else item for place, item in enumerate(node.args)
        )


def _weight_places(stretch: Stretch) -> set[int]:
    """Which of a stretch's arguments only layers read there, and stretches within, as weights and biases."""

    def reads_weight(reader: fx.Node, node: fx.Node) -> bool:
        places = {place for place, item in enumerate(reader.args) if item is node}
        inner = stretch.body.get_submodule(str(reader.target)) if reader.op == "call_module" else None
        if isinstance(inner, Stretch):
            return places <= _weight_places(inner)
        return reader.target in _LAYERS and places <= {1, 2}

    return {place for place, node in enumerate(stretch.inputs) if all(map(reads_weight, node.users, repeat(node)))}


def _cast(program: Program, item: Any, dtype: torch.dtype) -> Any:
    if not isinstance(item, fx.Node) or not program.is_constant(item):
        return item
    return program.hold(program.value(item).detach().to(dtype))


def evaluate_constants(program: Program) -> None:
    """Compute once what depends on frozen tensors alone: reshaped scales, tables of relative positions."""
    for node in list(program.graph.nodes):
        if node.op in ("get_attr", "placeholder", "output") or not program.is_constant(node):
            continue
        if all(program.is_constant(user) for user in node.users):
            continue  # part of a larger one
        program.replace(node, program.hold(program.value(node).detach().clone()))
    program.clean()
