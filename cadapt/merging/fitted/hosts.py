"""Where a kernel can go that stands in for an adapter: the base's layers whose output reaches its joint linearly.

From the value that Δ is added to, the graph is walked backwards through sums, frozen batch norms, layer scales and what
does nothing in eval mode, to the convolutions and linear layers there. One ReLU may stand between as well: behind it,
Δ can only be stood in for where the unit is on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, LayerScale, LayerScale2d
from torch import fx, nn

from cadapt.adapted import AdaptedModel
from cadapt.graph.operators import ADDS, shape_of
from cadapt.graph.standardised import bake_layer
from cadapt.plan import Insertion
from cadapt.surgery import adapter_path

_PLAIN = (nn.Conv2d, Conv2dSame, nn.Linear)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
_MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A layer that could take a kernel up: what its output is multiplied with, channel by channel, up to the joint.

    ``node`` calls it, ``scale`` is ``[C_out]`` in fp64, ``axes`` the permutations, last first, that lead from the
    joint's layout back to the layer's; an empty one flattens a grid, channels last, to tokens.
    """

    path: str
    node: fx.Node
    scale: torch.Tensor
    axes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Where an adapter joins a model's graph, and the layers that could do without it.

    ``delta`` calls the adapter, ``output`` is what Δ is added to and ``total`` the sum. ``before`` is the value in
    front of the ReLU that stands between the hosts and ``output``, where one does.
    """

    insertion: Insertion
    delta: fx.Node
    output: fx.Node
    total: fx.Node
    hosts: tuple[Host, ...]
    before: fx.Node | None = None

    @property
    def path(self) -> str:
        """The adapter's path from the root."""
        return adapter_path(self.insertion)


def find_joints(model: AdaptedModel, *, computed: bool = True) -> tuple[Joint, ...]:
    """Where each adapter of a model joins, in the plan's order; adapters without a host are among them.

    Args:
        model: in eval mode, its shapes recorded in the graph.
        computed: whether a layer that computes its weight may be made a plain one, to be a host.
    """
    targets = {str(node.target): node for node in model.graph.nodes if node.op == "call_module"}
    uses = _count_uses(model)
    joints = []
    for insertion in model.plan.insertions:
        delta = targets[adapter_path(insertion)]
        total = next(iter(delta.users))
        output = next(node for node in total.all_input_nodes if node is not delta)
        walk = _Walk(model, uses, computed=computed)
        walk.back(output, expected={total, delta}, scale=None, axes=())
        joints.append(
            Joint(
                insertion=insertion,
                delta=delta,
                output=output,
                total=total,
                hosts=_alike(walk.hosts),
                before=walk.before,
            )
        )
    return tuple(joints)


def _count_uses(model: AdaptedModel) -> dict[int, int]:
    """How often each of the model's tensors is read, by identity: calls of its layer, and reads of its own."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[int, int] = {}
    for node in model.graph.nodes:
        read: Iterable[torch.Tensor] = ()
        if node.op == "call_module":
            read = modules[str(node.target)].parameters()
        elif node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(modules[owner], leaf)
            if isinstance(value, torch.Tensor):
                read = (value,)
            elif isinstance(value, nn.Module):
                read = value.parameters()
        for tensor in read:
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


def _alike(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts that one regression can serve: dense ones of one layout together, else the nearest by itself."""
    if not hosts:
        return ()
    dense = [host for host in hosts if _groups(host) == 1]
    if not dense:
        return (hosts[0],)
    return tuple(host for host in dense if host.axes == dense[0].axes and _is_map(host) == _is_map(dense[0]))


def _groups(host: Host) -> int:
    return int(getattr(host.node.meta["host"], "groups", 1))


def _is_map(host: Host) -> bool:
    return isinstance(host.node.meta["host"], nn.Conv2d)


class _Walk:
    """One walk back from a joint; ``hosts`` are in the order of their distance, nearest first."""

    def __init__(self, model: AdaptedModel, uses: dict[int, int], *, computed: bool) -> None:
        self.model, self.uses, self.computed = model, uses, computed
        self.hosts: list[Host] = []
        self.before: fx.Node | None = None

    def back(
        self, node: fx.Node, expected: set[fx.Node], scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]
    ) -> None:
        """Go on at a node whose value only the ``expected`` ones may read: a change of it reaches nothing else."""
        if set(node.users) - expected:
            return
        if node.op == "call_module":
            self._back_module(node, scale, axes)
        elif node.target in ADDS and len(node.all_input_nodes) == 2:
            for item in node.all_input_nodes:
                self.back(item, {node}, scale, axes)
        elif node.target in _MULTIPLICATIONS:
            self._back_product(node, scale, axes)
        elif node.target in ("permute", torch.permute):
            self._back_permuted(node, scale, axes)
        elif node.target in ("reshape", "view", torch.reshape):
            self._back_laid_out(node, scale, axes)
        elif node.target in (torch.relu, torch.nn.functional.relu):
            self._back_activation(node, scale, axes)

    def _back_module(self, node: fx.Node, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]) -> None:
        module: Any = self.model.get_submodule(str(node.target))
        source = node.all_input_nodes[0]
        if type(module) in _PASSING:
            self.back(source, {node}, scale, axes)
        elif type(module) is nn.ReLU:
            self._back_activation(node, scale, axes)
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_var is not None:
            self._back_norm(node, module, scale, axes)
        elif type(module) in (LayerScale, LayerScale2d):
            self.back(source, {node}, _times(scale, module.gamma), axes)
        else:
            self._try_host(node, module, scale, axes)

    def _back_norm(
        self, node: fx.Node, norm: Any, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]
    ) -> None:
        behind = getattr(norm, "act", None)
        if behind is not None and not isinstance(behind, nn.Identity):
            return
        factor = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.detach().double()
        self.back(node.all_input_nodes[0], {node}, _times(scale, factor), axes)

    def _back_activation(self, node: fx.Node, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]) -> None:
        if self.before is not None or self.hosts or scale is not None or axes:
            return
        self.before = node.all_input_nodes[0]
        self.back(self.before, {node}, None, ())
        if not self.hosts:
            self.before = None

    def _back_product(self, node: fx.Node, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]) -> None:
        factors = [(item, _constant(item, self.model)) for item in node.all_input_nodes]
        constants = [value for _, value in factors if value is not None]
        moving = [item for item, value in factors if value is None]
        shape = shape_of(node)
        if len(constants) != 1 or len(moving) != 1 or shape is None:
            return
        if max(constants[0].shape, default=1) == constants[0].numel() and constants[0].numel() in shape:
            self.back(moving[0], {node}, _times(scale, constants[0].flatten()), axes)

    def _back_permuted(self, node: fx.Node, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]) -> None:
        order: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        if all(isinstance(item, int) for item in order):
            inverse = tuple(sorted(range(len(order)), key=lambda index: int(order[index])))
            self.back(node.all_input_nodes[0], {node}, scale, (*axes, inverse))

    def _back_laid_out(self, node: fx.Node, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]) -> None:
        """Tokens that were laid out on their grid, channels last."""
        source = node.all_input_nodes[0]
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None or (len(before), len(after)) != (3, 4):
            return
        if (before[0], before[-1]) == (after[0], after[-1]):
            self.back(source, {node}, scale, (*axes, ()))

    def _try_host(
        self, node: fx.Node, module: nn.Module, scale: torch.Tensor | None, axes: tuple[tuple[int, ...], ...]
    ) -> None:
        plain = _plain(module, node) if self.computed else module
        if type(plain) not in _PLAIN or any(self.uses[id(item)] > 1 for item in module.parameters()):
            return
        layer: Any = plain
        ones = torch.ones(layer.weight.shape[0], dtype=torch.float64)
        node.meta["host"] = plain
        self.hosts.append(Host(path=str(node.target), node=node, scale=_times(scale, ones), axes=axes))


def _plain(module: nn.Module, node: fx.Node) -> nn.Module:
    """The module itself, or the plain convolution that computes what it does with the weight it computes."""
    shape = shape_of(node.all_input_nodes[0])
    if not isinstance(module, nn.Conv2d) or type(module) in _PLAIN or shape is None:
        return module
    baked = bake_layer(module, torch.Size(shape))
    return baked if isinstance(baked, nn.Module) else module


def _times(scale: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
    factor = factor.detach().double().cpu()
    return factor if scale is None else scale * factor


def _constant(node: fx.Node, model: nn.Module) -> torch.Tensor | None:
    """The value of a node that depends on the model's own tensors alone: one, or a view of one."""
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        value = getattr(model.get_submodule(owner), leaf)
        return value if isinstance(value, torch.Tensor) else None
    if node.op == "call_method" and node.target in ("view", "reshape", "unsqueeze") and len(node.all_input_nodes) == 1:
        source = _constant(node.all_input_nodes[0], model)
        return None if source is None else getattr(source, str(node.target))(*node.args[1:])
    return None
