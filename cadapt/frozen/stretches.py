"""A stretch of a program as one call, which keeps what it reads and computes the rest again in backward.

Sublinear memory by recomputation is Chen et al., arXiv 1604.06174; which stretches are worth it is decided in
:mod:`cadapt.frozen.segments` and :mod:`cadapt.frozen.expansions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from cadapt.frozen.functions.recompute import recompute
from cadapt.frozen.program import DRAWING, OWN, Program
from cadapt.graph.operators import function_name, shape_of


class Stretch(nn.Module):
    """Part of a program as a module: takes what it reads from outside, tensors first, and returns its last result."""

    def __init__(self, body: fx.GraphModule, parameters: Sequence[nn.Parameter], *, draws: bool) -> None:
        super().__init__()
        # in a tuple, so that neither is a child: both belong to the program's root already
        self._parts = (body, tuple(parameters))
        self.draws = draws

    @property
    def body(self) -> fx.GraphModule:
        """What is computed, as a module."""
        return self._parts[0]

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes inside that stand for what the stretch is handed, in order."""
        return [node for node in self.body.graph.nodes if node.op == "placeholder"]

    def forward(self, *inputs: Any) -> Any:
        """Compute the stretch."""
        body, parameters = self._parts
        tensors = tuple(item for item in inputs if isinstance(item, torch.Tensor))
        settings = inputs[len(tensors) :]

        runs = 0

        def run(*given: torch.Tensor) -> Any:
            if torch.compiler.is_compiling():  # a compiler repeats operations only, not what they leave behind
                return body(*given, *settings)
            nonlocal runs
            runs += 1
            # a batch norm that trains counts a batch once: the second run moves copies of its statistics
            copies = {name: item.clone() for name, item in body.named_buffers()} if runs > 1 else {}
            return functional_call(body, copies, (*given, *settings)) if copies else body(*given, *settings)

        return recompute(run, tensors, parameters, self.draws)


def computed_inside(program: Program, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What a stretch computes again: all that depends on the picture, and modules that are read to be called."""
    return {node for node in nodes if node.meta["moving"] or _is_module(program, node)}


def enclose(program: Program, nodes: Sequence[fx.Node]) -> None:
    """Put one call in the place of some nodes, of which only the last is read by others.

    What they read that does not depend on the picture, weights and products of weights, is handed in.
    """
    inside = computed_inside(program, nodes)
    end = nodes[-1]
    tensors, settings = _read_from_outside(nodes, inside)
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in (*tensors, *settings)}
    for node in nodes:
        if node in inside:
            values[node] = graph.node_copy(node, lambda item: values[item])
    graph.output(values[end])
    called = [node for node in inside if node.op in ("call_module", "get_attr")]
    modules = [program.root.get_submodule(str(node.target)) for node in called]
    parameters = [item for module in modules for item in module.parameters() if item.requires_grad]
    number = sum(isinstance(child, Stretch) for child in program.own.children())
    body = fx.GraphModule(program.root, graph, f"Stretch{number}")
    program.own.add_module(
        f"stretch{number}", Stretch(body, parameters, draws=any(_may_draw(program, node) for node in inside))
    )
    with program.graph.inserting_after(end):
        call = program.graph.call_module(f"{OWN}.stretch{number}", (*tensors, *settings))
    program.note(call, end)
    end.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    for node in reversed(nodes):
        if node in inside:
            program.graph.erase_node(node)


def _is_module(program: Program, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(program.value(node), nn.Module)


def _may_draw(program: Program, node: fx.Node) -> bool:
    """Whether a node may draw random numbers: a module that was not lowered, or a function that has it in its name."""
    name, module = function_name(node), program.module(node)
    if isinstance(module, Stretch):
        return module.draws
    if node.target is F.scaled_dot_product_attention:
        return len(node.args) > 4 or node.kwargs.get("dropout_p") not in (None, 0, 0.0)
    return node.op == "call_module" or any(part in name for part in DRAWING)


def _read_from_outside(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What some nodes read that they do not compute: tensors, parameters among them, and all else."""
    read = dict.fromkeys(source for node in nodes if node in inside for source in node.all_input_nodes)
    outer = [node for node in read if node not in inside]
    tensors = [node for node in outer if shape_of(node) is not None]  # a number in a tensor may train, too
    return tensors, [node for node in outer if node not in tensors]
