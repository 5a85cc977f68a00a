"""Blocks: the module calls that hold residual additions, their siblings, and what stands for them in plain models.

A block is the innermost module call that holds a residual addition, nested ones dropped. A sibling is a call without
a shortcut that stands where its neighbours have one: the same place in the same kind of list (the stride-2 items of an
EfficientNet stage). In a model without residual additions a block is the module that recurs (the layers of a DenseNet,
the cells of an Inception), or else the conv with its norm and activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.crossing import Crossings
from cadapt.graph.flow import sources_of
from cadapt.graph.operators import CONCATENATIONS, activation_of, function_name, is_add, is_norm, shape_of
from cadapt.graph.residual import Residual
from cadapt.graph.scopes import Scope, inside_of, stack_of
from cadapt.graph.traits import traits_of
from cadapt.graph.units import Unit

_FEWEST_MIXERS = 2


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: its scope, its input and output nodes, and the residual additions it holds (none for a sibling)."""

    scope: Scope
    input: fx.Node
    output: fx.Node
    operator: str = ""
    residuals: tuple[Residual, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockFinder:
    """Finds the blocks of one graph from what is known of it."""

    model: nn.Module
    scopes: Mapping[str, Scope]
    crossings: Crossings
    residuals: Sequence[Residual]
    units: Sequence[Unit]
    stem: str | None

    def run(self) -> list[Block]:
        """Return the blocks in the order they run."""
        blocks = self._residual_blocks()
        blocks += self._siblings(blocks) if blocks else self._recurring() or self._single_units()
        return sorted(blocks, key=lambda block: self.crossings.order[block.output])

    def _residual_blocks(self) -> list[Block]:
        holders: dict[str, list[Residual]] = {}
        for residual in self.residuals:
            key = self._holder(residual)
            if key is not None:
                holders.setdefault(key, []).append(residual)
        outer = [
            key
            for key in holders
            if not self._in_stem(self.scopes[key]) and not any(inside_of(self.scopes, key, other) for other in holders)
        ]
        blocks = [self._block(self.scopes[key], tuple(holders[key])) for key in outer]
        return [block for block in blocks if block is not None]

    def _holder(self, residual: Residual) -> str | None:
        for key in reversed(stack_of(residual.add)):
            scope = self.scopes[key]
            if set(residual.branch) <= set(scope.nodes) and self.crossings.find(scope.nodes) is not None:
                return key
        return None

    def _block(self, scope: Scope, residuals: tuple[Residual, ...] = ()) -> Block | None:
        crossing = self.crossings.find(scope.nodes)
        if crossing is None:
            return None
        return Block(
            scope=scope,
            input=crossing[0],
            output=crossing[1],
            operator=scope.kind.__name__,
            residuals=residuals,
        )

    def _siblings(self, blocks: Sequence[Block]) -> list[Block]:
        taken = {block.scope.key for block in blocks}
        patterns = {block.scope.pattern for block in blocks if "*" in block.scope.pattern}
        kinds = {(block.scope.kind, block.scope.parent) for block in blocks}
        found = []
        for key, scope in self.scopes.items():
            like = scope.pattern in patterns or (scope.kind, scope.parent) in kinds
            nested = any(inside_of(self.scopes, *pair) for other in taken for pair in ((key, other), (other, key)))
            single = len(scope.nodes) == 1 and traits_of(scope.nodes[0]).conv is not None
            if like and key not in taken and not nested and not single and self._works(scope):
                block = self._block(scope)
                if block is not None and block.input.op != "placeholder" and _rank(block.input) == _rank(block.output):
                    found.append(block)
        return found

    def _in_stem(self, scope: Scope) -> bool:
        return scope.path.partition(".")[0] == self.stem

    def _works(self, scope: Scope) -> bool:
        """Whether a module call mixes places: by a functional conv or by attention."""
        nodes = set(scope.nodes)
        return any(set(unit.nodes) <= nodes for unit in self.units) or any(traits_of(node).attends for node in nodes)

    def _recurring(self) -> list[Block]:
        """The innermost module calls that recur and compute something of their own; branches of one are not series."""
        patterns = Counter(scope.pattern for scope in self.scopes.values())
        kinds = Counter((scope.kind, scope.parent) for scope in self.scopes.values())
        recurring = {
            key: block
            for key, scope in self.scopes.items()
            if max(patterns[scope.pattern], kinds[scope.kind, scope.parent]) > 1
            and not self._in_stem(scope)
            and self._computes(scope)
            and (block := self._block(scope)) is not None
        }
        series = {key: block for key, block in recurring.items() if not self._is_part(block, recurring)}
        holding = {key for key in series if any(inside_of(self.scopes, other, key) for other in series)}
        innermost = [key for key in series if key not in holding]
        return [recurring[key] for key in dict.fromkeys(self._completed(key, recurring) for key in innermost)]

    def _completed(self, key: str, recurring: Mapping[str, Block]) -> str:
        """The recurring call around one that adds layers to it and no conv unit: the whole of which it is the core."""
        parent = self.scopes[key].parent
        if parent is None or parent not in recurring or self._size(parent)[0] != self._size(key)[0]:
            return key
        return parent if self._size(parent)[1] > self._size(key)[1] else key

    def _size(self, key: str) -> tuple[int, int]:
        """How many conv units and how many layers a module call holds."""
        nodes = set(self.scopes[key].nodes)
        units = sum(set(unit.nodes) <= nodes for unit in self.units)
        return units, sum(traits_of(node).mixes for node in nodes)

    def _is_part(self, block: Block, recurring: Mapping[str, Block]) -> bool:
        """Whether a call gives one of several things that a recurring call around it joins.

        A dense layer is none, for the layers behind it read what it gives.
        """
        if block.input in block.scope.nodes:
            return False
        joints = [user for user in block.output.users if function_name(user) in CONCATENATIONS or is_add(user)]
        owners = [next(reversed(stack_of(user)), "") for user in joints]
        around = [key for key in owners if inside_of(self.scopes, block.scope.key, key)]
        return bool(around) and len(around) == len(owners) and any(key in recurring for key in around)

    def _computes(self, scope: Scope) -> bool:
        """Whether a module call holds a functional conv, a second layer, and a non-linearity."""
        nodes = set(scope.nodes)
        mixers = sum(traits_of(node).mixes for node in nodes)
        bends = any(traits_of(node).bends for node in nodes)
        return mixers >= _FEWEST_MIXERS and bends and any(set(unit.nodes) <= nodes for unit in self.units)

    def _single_units(self) -> list[Block]:
        """Each conv unit but the first, the stem, with the norm and activation that follow it in a line."""
        blocks = []
        for unit in self.units[1:]:
            nodes, end = list(unit.nodes), unit.output
            while len(end.users) == 1 and self._completes(user := next(iter(end.users))):
                nodes.append(user)
                end = user
            scope = Scope(path=unit.path, call=unit.call, kind=nn.Module, nodes=tuple(nodes), parent=None)
            blocks.append(Block(scope=scope, input=unit.input, output=end, operator=unit.operator))
        return blocks

    def _completes(self, node: fx.Node) -> bool:
        alone = len(sources_of(node)) == 1
        return alone and (is_norm(node, self.model) or activation_of(node, self.model) is not None)


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())
