"""Choose segments to compute again in backward, keeping what enters each (Chen et al., arXiv 1604.06174).

Segments run between nodes that all paths pass, such as the sums that close residual blocks. What each would keep is
measured on a run without data; then those ends are chosen for which the most that is held at any time is least: what
the segments before keep, and what the one that runs keeps and works with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.autograd.graph import saved_tensors_hooks

from cadapt.frozen.functions.relu import relu_bits, relu_result
from cadapt.frozen.overwriting import FRESH, add_into
from cadapt.frozen.program import Program, sizes
from cadapt.frozen.spans import Span, least_peak
from cadapt.frozen.stretches import computed_inside, enclose
from cadapt.graph.flow import immediate_dominators, mark_flow
from cadapt.graph.operators import may_alias, mutates_input
from cadapt.meta import meta_copy

# maps that backward holds at a time beside what is kept: the gradients of a sum, of its branch and of what it reads
_WORKING_MAPS = 4
_BATCH = 2


def recompute_segments(program: Program, most_macs: float = math.inf) -> None:
    """Recompute where it saves memory.

    Args:
        program: the program, whose operations have been chosen.
        most_macs: multiply–accumulates of a segment for each byte that it would have kept, at most.
    """
    program.measure()
    nodes = list(program.graph.nodes)
    kept = _measure_kept(program, nodes)
    for span in _choose(program, nodes, kept, most_macs):
        enclose(program, nodes[span.first : span.last + 1])
    program.clean()


def _measure_kept(program: Program, nodes: Sequence[fx.Node]) -> list[dict[int, int]]:
    """For each node what running it makes autograd keep: bytes by storage, the model's own tensors left out."""
    twin = meta_copy(program.root).train(program.root.training)
    own = {item.untyped_storage()._cdata for item in (*twin.parameters(), *twin.buffers())}
    module = fx.GraphModule(twin, program.graph)
    program.graph.owning_module = None
    runner = _KeptRecorder(module, own)
    shape = (_BATCH, *program.model.preprocessing.input_size)
    with torch.enable_grad():
        runner.run(torch.empty(shape, device="meta", dtype=program.dtype))
    return [runner.kept.get(node.name, {}) for node in nodes]


class _KeptRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, own: set[int]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept: dict[str, dict[int, int]] = {}
        self._own = own
        self._held: list[torch.Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it keeps."""
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                found[storage._cdata] = storage.nbytes()
                self._held.append(tensor.detach())  # its storage's identity must not be given to another
            return tensor.detach()

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = super().run_node(n)
        self.kept[n.name] = found
        return result


def _choose(program: Program, nodes: Sequence[fx.Node], kept: Sequence[dict[int, int]], most_macs: float) -> list[Span]:
    """The spans to compute again: all that lower the peak, or those that are cheap."""
    cuts = _cuts(program, nodes)
    spans = {
        key: replace(item, is_whole=item.is_whole and item.macs <= most_macs * item.inner_bytes)
        for key, item in _measure_spans(program, nodes, kept, cuts).items()
    }
    return least_peak(len(cuts), spans)


def _measure_spans(
    program: Program, nodes: Sequence[fx.Node], kept: Sequence[dict[int, int]], cuts: Sequence[int]
) -> dict[tuple[int, int], Span]:
    """Every span between two cuts; each is the one that ends a cut earlier, and what follows."""
    ends, overwritten = _last_reads(program, nodes), _overwritten(program, nodes)
    elements = [math.prod(sizes(node)) if node.meta["moving"] else 0 for node in nodes]
    macs = [_macs(node) for node in nodes]
    spans = {}
    for first, start in enumerate(cuts):
        inner: dict[int, int] = {}
        widest, work, earliest, latest = elements[start], 0, math.inf, 0
        for last in range(first + 1, len(cuts)):
            inside = range(cuts[last - 1] + 1, cuts[last] + 1)
            for index in inside:
                inner.update(kept[index])
            widest = max(widest, *(elements[index] for index in inside))
            work += sum(macs[index] for index in inside)
            earliest = min(earliest, *(overwritten[index] for index in inside))
            whole = max([latest, *(ends[index] for index in inside[:-1])]) <= cuts[last]
            latest = max([latest, *(ends[index] for index in inside)])
            spans[first, last] = Span(
                first=start + 1,
                last=cuts[last],
                input_bytes=elements[start] * program.dtype.itemsize,
                inner_bytes=sum(inner.values()),
                working_bytes=_WORKING_MAPS * widest * program.dtype.itemsize,
                macs=work,
                is_whole=whole and earliest > start and bool(inner),
            )
    return spans


def _macs(node: fx.Node) -> int:
    """Multiply–accumulates of a layer, by its shapes; 0 for all else, which is cheap beside them."""
    if node.op != "call_function" or not sizes(node):
        return 0
    weight = next((item for item in node.args if isinstance(item, fx.Node) and not item.meta["moving"]), None)
    shape = sizes(weight)
    return math.prod(sizes(node)) * math.prod(shape[1:]) if len(shape) > 1 else 0


def _last_reads(program: Program, nodes: Sequence[fx.Node]) -> list[int]:
    """For each node the place of the last that reads it, where it would be computed inside a span."""
    place = {node: index for index, node in enumerate(nodes)}
    inside = computed_inside(program, nodes)
    return [max((place[user] for user in node.users), default=0) if node in inside else 0 for node in nodes]


def _cuts(program: Program, nodes: Sequence[fx.Node]) -> list[int]:
    """The places of the nodes, in order, that every path from the picture to the logits passes."""
    place = {node: index for index, node in enumerate(nodes)}
    mark_flow(program.graph)
    dominators = immediate_dominators(program.graph)
    output = nodes[-1].args[0]
    found = []
    node = output if isinstance(output, fx.Node) else None
    while node is not None:
        if sizes(node):  # pieces of a tensor in a tuple would not be seen by autograd
            found.append(place[node])
        node = dominators.get(node)
    return found[::-1]


def _overwritten(program: Program, nodes: Sequence[fx.Node]) -> list[float]:
    """For each node the place of the one whose memory it overwrites; infinite where it overwrites nothing."""
    place = {node: index for index, node in enumerate(nodes)}
    return [place[_memory(program, node)] if _overwrites(program, node) else math.inf for node in nodes]


def _overwrites(program: Program, node: fx.Node) -> bool:
    if not node.all_input_nodes:
        return False
    in_place = node.target in (relu_bits, relu_result, F.relu) and True in node.args[1:]
    return in_place or node.target is add_into or mutates_input(node, program.root)


def _memory(program: Program, node: fx.Node) -> fx.Node:
    """The node that made the memory which a node's first argument lies in, or one before it where that is not known."""
    source = node.all_input_nodes[0]
    while source.all_input_nodes and source.target not in FRESH and may_alias(source, program.root):
        source = source.all_input_nodes[0]
    return source
