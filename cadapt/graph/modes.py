"""One graph for train and eval mode: what two traces of the same model have in common, and where they part.

A trace bakes in what a forward reads of ``self.training``. Where the two traces differ in nothing but constants (the
flag of a functional dropout, the probability given to an attention), the constant is made to follow the mode of the
module that read it. Where they differ in more, the module at which they part cannot be opened.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from cadapt.graph.operators import names_in
from cadapt.graph.scopes import stack_of


@dataclass(frozen=True, kw_only=True)
class _ModeConstant:
    """An argument that is False or 0 in eval mode and ``in_train`` in train mode."""

    node: fx.Node
    key: int | str
    in_train: bool | float


def reads_training(kind: type) -> bool:
    """Whether a module type's code asks for its mode."""
    return "training" in names_in(kind)


def is_mode(node: fx.Node) -> bool:
    """Whether a node reads the mode of a module."""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def unite_modes(graph: fx.Graph, trained: fx.Graph) -> type | None:
    """Make a trace in eval mode follow the mode, given one in train mode, or say where that is not possible.

    Args:
        graph: the trace in eval mode; changed only where None is returned.
        trained: the trace in train mode.

    Returns:
        None, or the type of the module at which the two traces part.
    """
    constants: list[_ModeConstant] = []
    for ours, theirs in itertools.zip_longest(graph.nodes, trained.nodes):
        if ours is not None and theirs is not None:
            found = _differing(ours, theirs)
            if found is not None:
                constants += found
                continue
        return _parting(ours, theirs)
    for constant in constants:
        _follow_mode(graph, constant)
    return None


def _differing(ours: fx.Node, theirs: fx.Node) -> list[_ModeConstant] | None:
    """The constants in which two calls differ, or None where they differ in more."""
    same = ours.op == theirs.op and ours.target == theirs.target and ours.kwargs.keys() == theirs.kwargs.keys()
    if not same or len(ours.args) != len(theirs.args):
        return None
    found = []
    for key, in_eval, in_train in _arguments(ours, theirs):
        if str(in_eval) == str(in_train):
            continue
        flag = in_eval is False and in_train is True
        number = isinstance(in_train, float) and in_eval == 0 and not isinstance(in_eval, bool | fx.Node)
        if not (flag or number):
            return None
        found.append(_ModeConstant(node=ours, key=key, in_train=in_train))
    return found


def _arguments(ours: fx.Node, theirs: fx.Node) -> Iterator[tuple[int | str, Any, Any]]:
    for index, pair in enumerate(zip(ours.args, theirs.args, strict=True)):
        yield index, *pair
    for name, value in ours.kwargs.items():
        yield name, value, theirs.kwargs[name]


def _follow_mode(graph: fx.Graph, constant: _ModeConstant) -> None:
    node, key = constant.node, constant.key
    owner = next(iter(reversed(stack_of(node).values())), ("", nn.Module))[0]
    with graph.inserting_before(node):
        value = graph.create_node("get_attr", f"{owner}.training" if owner else "training")
        if constant.in_train is not True:
            value = graph.call_function(operator.mul, (constant.in_train, value))
    if isinstance(key, int):
        node.update_arg(key, value)
    else:
        node.update_kwarg(key, value)


def _parting(ours: fx.Node | None, theirs: fx.Node | None) -> type:
    """The container type at which two traces part: the innermost that asks for its mode, else the innermost."""
    stacks = [list(stack_of(node).values()) for node in (ours, theirs) if node is not None]
    kinds = [kind for stack in stacks for _, kind in reversed(stack)]
    return next((kind for kind in kinds if reads_training(kind)), kinds[0] if kinds else nn.Module)
