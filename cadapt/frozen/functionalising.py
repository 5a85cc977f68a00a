"""Write in-place operations as plain ones, where no other name of the same memory is read afterwards.

The passes reason about values; which may share memory is decided anew at the end, in
:mod:`cadapt.frozen.overwriting`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from cadapt.frozen.program import Program, sizes
from cadapt.graph.operators import may_alias, may_mutate_input, mutates_input

_PLAIN_OPERATORS: Mapping[Any, Callable[..., Any]] = {
    operator.iadd: torch.add,
    operator.imul: torch.mul,
    operator.isub: torch.sub,
    operator.add: torch.add,
    operator.mul: torch.mul,
    "add": torch.add,
    "add_": torch.add,
    "mul": torch.mul,
    "mul_": torch.mul,
}


def functionalise(program: Program) -> set[fx.Node]:
    """Write sums and products in one way, and not in place; return the nodes that must go on overwriting."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    mutating = [node for node in program.graph.nodes if node.args and mutates_input(node, program.root)]
    overwriting = {node for node in mutating if not _may_forget(program, node, order)}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
            continue
        plain = _PLAIN_OPERATORS.get(node.target)
        if plain is None or node in overwriting or not sizes(node):
            continue
        if sizes(node.args[0]):
            node.op, node.target = "call_function", plain
        elif sizes(node.args[1]) and plain in (torch.add, torch.mul):  # a number first, which torch's own do not take
            node.op, node.target, node.args = "call_function", plain, node.args[::-1]
    if not overwriting:
        for node in program.nodes(torch.clone):  # a copy made to be safe from what is no longer overwritten
            if not any(may_mutate_input(user, program.root) for user in node.all_input_nodes[0].users):
                program.replace(node, node.all_input_nodes[0])
    return overwriting


def _may_forget(program: Program, node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether nobody but through an in-place node itself reads what it overwrote, under whatever name."""
    names, stack = set(), [node.args[0]]
    while stack:
        name = stack.pop()
        if not isinstance(name, fx.Node) or name in names or name is node:
            continue
        names.add(name)
        stack += [user for user in name.users if user is not node and may_alias(user, program.root)]
        if may_alias(name, program.root):
            stack += name.all_input_nodes[:1]
    readers = {user for name in names for user in name.users}
    return all(order[reader] <= order[node] for reader in readers)
