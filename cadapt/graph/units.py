"""Conv units: the functional convolutions of a model, each with the tensor it reads and the one it gives.

A unit is most often one conv. Parallel convs whose results are added or concatenated with no non-linearity between
(re-parameterised branches, mixed kernels) are one linear map, and so one unit; so is a module that holds convs and
could not be traced through. Convs that see no map are no functional convs: those on weights, on or to 1×1 maps
(squeeze-and-excite, a classifier written as a conv), and those inside attention.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.convs import Conv, fit_grid, is_conv, read_conv, widest
from cadapt.graph.flow import between, sources_of
from cadapt.graph.operators import (
    CONCATENATIONS,
    attends,
    function_name,
    is_add,
    is_closed,
    module_of,
    shape_of,
)
from cadapt.graph.residual import Residual
from cadapt.graph.scopes import Scope, plain_path, stack_of
from cadapt.graph.traits import traits_of

# a strided conv leaves one place of a map no larger; from a larger one only a conv over the whole of it does
_SMALLEST_MAP = 3


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One conv unit: ``conv`` is its geometry, that of its widest conv where there are several.

    ``operator`` is the class of the module at ``path`` that does all of it, or the function that joins its convs.
    """

    path: str
    call: int
    conv: Conv
    operator: str
    input: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]


def find_units(
    graph: fx.Graph,
    model: nn.Module,
    scopes: Mapping[str, Scope],
    dominators: Mapping[fx.Node, fx.Node],
    residuals: Sequence[Residual],
) -> list[Unit]:
    """Return the conv units of a graph with recorded shapes and traits, in order; the stem's are among them."""
    attending = attention_scopes(scopes, {residual.add for residual in residuals})
    units: list[Unit] = []
    taken: set[fx.Node] = set()
    # the last of nested sums holds the others
    for node in reversed(graph.nodes):
        if node in taken or attending & stack_of(node).keys():
            continue
        unit = _linear_merge(node, model, scopes, dominators)
        if unit is not None:
            units.append(unit)
            taken.update(unit.nodes)
    for node in graph.nodes:
        if node not in taken and not attending & stack_of(node).keys():
            single = _single(node, model)
            if single is not None:
                units.append(single)
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(units, key=lambda unit: order[unit.output])


def _width(node: fx.Node) -> int:
    conv = traits_of(node).conv
    return max(conv.kernel) if conv else 0


def stem_of(units: Sequence[Unit]) -> str | None:
    """The child of the root that holds the first unit, the stem's, where it holds no more than half of all units."""
    children = [unit.path.partition(".")[0] for unit in units]
    return children[0] if children and 2 * children.count(children[0]) <= len(children) else None


def attention_scopes(scopes: Mapping[str, Scope], closing: Container[fx.Node]) -> set[str]:
    """The keys of the innermost module calls that attend; a block, which holds a residual addition too, is none."""
    found = set()
    for key, scope in scopes.items():
        # a module that was not opened is one node: what it does inside is its own affair
        own = [node for node in scope.nodes if node.op != "call_module" and next(reversed(stack_of(node))) == key]
        if any(traits_of(node).attends for node in own) and not any(node in closing for node in own):
            found.add(key)
    return found


def is_functional(start: fx.Node, end: fx.Node) -> bool:
    """Whether a conv between two tensors works from map to map: not on what was pooled, nor as a classifier does."""
    before, after = shape_of(start), shape_of(end)
    if before is None or after is None or not len(before) == len(after) == 4:
        return False
    if max(before[2:]) > 1:
        return max(after[2:]) > 1 or max(before[2:]) <= _SMALLEST_MAP
    return not _is_pooled(start)


def _is_pooled(node: fx.Node) -> bool:
    """Whether a 1×1 map is a pooled one, and not what strided convs left of a small picture."""
    while len(sources_of(node)) == 1:
        source = sources_of(node)[0]
        before = shape_of(source) or ()
        if len(before) != 4 or max(before[2:]) > 1:
            return traits_of(node).conv is None or len(before) != 4 or max(before[2:]) > _SMALLEST_MAP
        node = source
    return False


def _single(node: fx.Node, model: nn.Module) -> Unit | None:
    module = module_of(node, model)
    sources = sources_of(node)
    if module is None or not sources:
        return None
    if is_conv(module):
        conv = read_conv(module)
    elif is_closed(module) and len(sources) == 1 and (inner := _convs_in(module)):
        conv = _fitted(widest(inner), sources[0], node)
    else:
        return None
    if not conv.is_wide or not is_functional(sources[0], node):
        return None
    return Unit(
        path=str(node.target),
        call=call_of(node),
        conv=conv,
        operator=type(module).__name__,
        input=sources[0],
        output=node,
        nodes=(node,),
    )


def _convs_in(module: nn.Module) -> list[Conv]:
    """The wide convs of a module that was not traced through, those of attention inside it left out."""
    if is_conv(module):
        conv = read_conv(module)
        return [conv] if conv.is_wide else []
    if attends(module):
        return []
    return [conv for child in module.children() for conv in _convs_in(child)]


def _linear_merge(
    end: fx.Node, model: nn.Module, scopes: Mapping[str, Scope], dominators: Mapping[fx.Node, fx.Node]
) -> Unit | None:
    """The unit that a sum or a concatenation of parallel convs closes, if it closes one."""
    concatenates = function_name(end) in CONCATENATIONS
    if end not in dominators or not (is_add(end) or concatenates):
        return None
    start = dominators[end]
    while shape_of(start) is None and start in dominators:  # the chunks of a tensor, which is what is read
        start = dominators[start]
    nodes = between(start, end)
    if not all(_is_linear_map(node, model) for node in nodes) or any(_turns(node) for node in nodes):
        return None
    convs = [conv for node in nodes if (conv := traits_of(node).conv) is not None and conv.is_wide]
    if not convs or not is_functional(start, end) or _leaks(nodes, end):
        return None
    if concatenates and not (_keeps_channels(start, end) or _mixes_all(start, end)):
        return None
    holder = _innermost(nodes)
    if holder and any(traits_of(node).mixes for node in set(scopes[holder].nodes) - set(nodes)):
        holder = None
    main = widest(convs)
    named = max(nodes, key=_width)
    path = plain_path(holder) if holder else str(named.target)
    return Unit(
        path=path,
        call=scopes[holder].call if holder else call_of(named),
        conv=_fitted(main, start, end),
        operator=scopes[holder].kind.__name__ if holder else function_name(end),
        input=start,
        output=end,
        nodes=tuple(nodes),
    )


_LINEAR_FUNCTIONS = CONCATENATIONS | {
    "add", "iadd", "add_", "sub", "mul", "neg", "truediv", "split", "chunk", "getitem", "clone", "contiguous",
    "avg_pool2d", "sum",
}  # fmt: skip
_LINEAR_MODULES = (nn.modules.batchnorm._BatchNorm, nn.Identity, nn.modules.dropout._DropoutNd, nn.AvgPool2d)


def _is_linear_map(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is known to be a linear map of its input, batch norms taken for frozen."""
    traits = traits_of(node)
    if traits.bends or traits.normalises:
        return False
    module = module_of(node, model)
    if module is None:
        return function_name(node) in _LINEAR_FUNCTIONS or shape_of(node) is None
    return traits.conv is not None or isinstance(module, _LINEAR_MODULES) or "DropPath" in type(module).__name__


def _leaks(nodes: Sequence[fx.Node], end: fx.Node) -> bool:
    """Whether something inside a unit is read outside of it as well: then its end is not all that it gives."""
    inside = {*nodes, end}
    users = (user for node in nodes if node is not end for user in node.users)
    return any(user not in inside and shape_of(user) is not None for user in users)


def _turns(node: fx.Node) -> bool:
    """Whether a node leaves the layout of maps: a unit reads and gives channels first."""
    last = function_name(node) in CONCATENATIONS and (*node.args[1:], node.kwargs.get("dim"))[0] in (-1, 3)
    return last or function_name(node) in ("permute", "transpose")


def _keeps_channels(start: fx.Node, end: fx.Node) -> bool:
    before, after = shape_of(start) or (), shape_of(end) or ()
    return before[1] == after[1]


def _mixes_all(start: fx.Node, end: fx.Node) -> bool:
    """Whether each operand of a concatenation comes from a layer of its own."""
    return all(any(traits_of(node).mixes for node in between(start, item)) for item in sources_of(end))


def _innermost(nodes: Iterable[fx.Node]) -> str | None:
    """The key of the innermost module call in which all nodes ran."""
    stacks = [list(stack_of(node)) for node in nodes]
    shared = [key for key in stacks[0] if all(key in keys for keys in stacks)]
    return shared[-1] if shared else None


def _fitted(conv: Conv, start: fx.Node, end: fx.Node) -> Conv:
    """The geometry of a unit of several layers."""
    before, after = shape_of(start) or (), shape_of(end) or ()
    return fit_grid(conv, (before[2], before[3]), (after[2], after[3]))


def call_of(node: fx.Node) -> int:
    """Which call of its module a node is."""
    key = next(reversed(stack_of(node)), "")
    return int(key.rpartition("@")[2]) if "@" in key else 0
