"""Carry a per-channel factor and offset back through a program, into the weights of the layers before it.

For z = W x + b, s ⊙ z + t is (s ⊙ W) x + (s ⊙ b + t): a layer takes both up exactly. A sum passes s to each of its
terms and t to one of them, so a factor behind the place where an adapter joins reaches the adapter's last layer, too.
What rearranges channels passes them on along the channels' new place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.program import Program, is_plain_layer, readers, sizes


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """s ⊙ z + t along one dimension; s and t are nodes of vectors ``[C]``, t may be missing."""

    scale: fx.Node
    shift: fx.Node | None
    dim: int


def can_absorb(program: Program, node: Any, dim: int, *, learned: bool) -> bool:
    """Whether what made a tensor can take up a factor and an offset along one of its dimensions.

    Args:
        program: the program.
        node: the tensor; nothing but the product with that factor may read it.
        dim: the dimension, from 0.
        learned: whether the factor trains. A frozen layer must not take such a one up: its gradient would need that of
            the whole weight.
    """
    if not isinstance(node, fx.Node) or len(readers(node)) != 1 or not node.meta["moving"] or node.kwargs:
        return False
    if node.target in (F.conv2d, F.linear) and not is_plain_layer(node):
        return False
    if node.target is F.conv2d:
        return dim == 1 and _takes(program, node.args[1], learned)
    if node.target is F.linear:
        return dim == len(sizes(node)) - 1 and _takes(program, node.args[1], learned)
    if node.target is torch.add:
        terms = node.args
        same = all(sizes(term) == sizes(node) for term in terms)
        return (
            same and terms[0] is not terms[1] and all(can_absorb(program, term, dim, learned=learned) for term in terms)
        )
    before = _source_dim(node, dim)
    return before is not None and can_absorb(program, node.args[0], before, learned=learned)


def absorb(program: Program, node: fx.Node, scaling: Scaling) -> None:
    """Make a tensor that :func:`can_absorb` the product and sum; whoever reads it then gets the scaled one."""
    if node.target in (F.conv2d, F.linear):
        _scale_layer(program, node, scaling)
    elif node.target is torch.add:
        first, second = node.args
        assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
        # the frozen layer takes the offset, where it is computed once
        if not program.is_constant(_weight_of(first)) and program.is_constant(_weight_of(second)):
            first, second = second, first
        absorb(program, first, scaling)
        absorb(program, second, Scaling(scale=scaling.scale, shift=None, dim=scaling.dim))
    else:
        before = _source_dim(node, scaling.dim)
        assert before is not None and isinstance(node.args[0], fx.Node)
        absorb(program, node.args[0], Scaling(scale=scaling.scale, shift=scaling.shift, dim=before))


def _takes(program: Program, weight: Any, learned: bool) -> bool:
    if not isinstance(weight, fx.Node) or weight.meta["moving"]:
        return False
    return weight.meta["live"] or (not learned and program.is_constant(weight))


def _weight_of(node: fx.Node) -> Any:
    while node.target not in (F.conv2d, F.linear) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.args[1] if len(node.args) > 1 else None


def _scale_layer(program: Program, node: fx.Node, scaling: Scaling) -> None:
    weight: Any = node.args[1]
    bias: Any = node.args[2]
    rank = len(sizes(weight))
    weight = multiply(program, weight, scaling.scale, rank, before=node)
    if isinstance(bias, fx.Node):
        bias = multiply(program, bias, scaling.scale, 1, before=node)
    if scaling.shift is not None:
        shift = scaling.shift
        bias = shift if bias is None else combine(program, torch.add, bias, shift, before=node)
    node.args = (node.args[0], weight, bias, *node.args[3:])
    program.note(node, node)


def multiply(program: Program, tensor: fx.Node, scale: fx.Node, rank: int, *, before: fx.Node) -> fx.Node:
    """Scale a tensor of a rank along its first dimension by a vector."""
    if rank > 1:
        shape = (-1, *(1,) * (rank - 1))
        if program.is_constant(scale):
            scale = program.hold(program.exact(scale).reshape(shape))
        else:
            scale = program.emit(before, torch.reshape, scale, shape)
    return combine(program, torch.mul, tensor, scale, before=before)


def combine(program: Program, function: Any, first: fx.Node, second: fx.Node, *, before: fx.Node) -> fx.Node:
    """Compute a function of two tensors: now and in fp64 where both are constant, else in each step."""
    if program.is_constant(first) and program.is_constant(second):
        return program.hold(function(program.exact(first), program.exact(second)))
    return program.emit(before, function, first, second, like=first)


def _source_dim(node: fx.Node, dim: int) -> int | None:
    """Where the channels of a rearranged tensor lie in what it was made from; None where they are mixed with others."""
    rank = len(sizes(node))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not node.args or not sizes(node.args[0]) or node.kwargs:
        return None
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        found = [int(item) % rank for item in order if isinstance(item, int)]
        return found[dim] if len(found) == rank else None
    if name == "transpose" and len(node.args) == 3:
        pair = [int(item) % rank for item in node.args[1:] if isinstance(item, int)]
        swapped = {pair[0]: pair[1], pair[1]: pair[0]} if len(pair) == 2 else None
        return None if swapped is None else swapped.get(dim, dim)
    if name == "flatten" and len(node.args) == 2 and isinstance(node.args[1], int):
        # the dimensions from the second on become one
        return dim if dim < node.args[1] else None
    return dim if name == "contiguous" else None
