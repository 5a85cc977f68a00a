"""Lower module calls to the functions they stand for, with every weight a node of its own that the passes can rewrite.

A layer whose class does something else in ``forward``, or that has hooks, stays a call of that module. A layer that is
called with learned differences (:mod:`cadapt.graph.shift`) is lowered with sums for its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import padding as timm_padding
from torch import fx, nn
from torch.nn.utils import parametrize

from cadapt.frozen.activations import find_activation, is_hooked
from cadapt.frozen.functionalising import functionalise
from cadapt.frozen.functions.elementwise import RECOMPUTABLE
from cadapt.frozen.program import Program, sizes
from cadapt.graph.convs import is_conv
from cadapt.graph.operators import function_name
from cadapt.graph.shift import call_shifted
from cadapt.graph.standardised import bake_layer


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """Compute an activation by its name; stands in a program until a pass has chosen what it keeps."""
    return RECOMPUTABLE[name](x)


def affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Compute a frozen batch norm, scale ⊙ x + shift over dimension 1; stands in a program until it is settled."""
    return x * scale[:, None, None] + shift[:, None, None]


def pad_same(x: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: Any) -> torch.Tensor:
    """Pad a map ``[B, C, H, W]`` with zeros as TensorFlow's SAME does; a map that needs none is handed on."""
    sides = timm_padding.pad_same_arg(list(x.shape[-2:]), list(kernel), list(stride), list(dilation))
    return F.pad(x, sides) if any(sides) else x


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call of a layer: its path, and the nodes of the differences that are added to its tensors."""

    node: fx.Node
    path: str
    module: nn.Module
    deltas: Mapping[str, fx.Node]
    x: fx.Node


def lower(program: Program) -> None:
    """Lower every call that is understood, in place."""
    overwriting = functionalise(program)
    for node in list(program.graph.nodes):
        call = _read_call(program, node)
        name = find_activation(program, node)
        if node in overwriting:
            continue
        if name is not None:
            program.replace(node, program.emit(node, activate, node.args[0], name, like=node))
        elif call is not None:
            rule = next((rule for kind, rule in _RULES if _runs_as(call.module, kind)), None)
            if rule is None and is_conv(call.module):
                rule = _lower_computed
            if rule is not None:
                rule(program, call)
        elif node.op in ("call_function", "call_method") and function_name(node) in _FUNCTIONS:
            _FUNCTIONS[function_name(node)](program, node)
    program.clean()


def _read_call(program: Program, node: fx.Node) -> _Call | None:
    arguments: list[Any] = list(node.args)
    deltas: Mapping[str, fx.Node] = {}
    if node.op == "call_module" and len(arguments) == 1 and not node.kwargs:
        path = str(node.target)
    elif node.target is call_shifted and len(arguments) == 3 and not node.kwargs:
        path, deltas = str(arguments[0].target), arguments[1]
    else:
        return None
    module, x = program.root.get_submodule(path), arguments[-1]
    if not isinstance(x, fx.Node) or is_hooked(module):
        return None
    return _Call(node=node, path=path, module=module, deltas=deltas, x=x)


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    same: bool = isinstance(module, kind) and type(module).forward is kind.forward
    return same and not parametrize.is_parametrized(module)


def _tensor(program: Program, call: _Call, name: str) -> fx.Node | None:
    """The node of one of a layer's tensors with its difference, if it has either."""
    delta = call.deltas.get(name)
    if getattr(call.module, name) is None:
        return delta
    with program.graph.inserting_before(call.node):
        own = program.graph.get_attr(f"{call.path}.{name}")
    program.note(own)
    return own if delta is None else program.emit(call.node, torch.add, own, delta, like=own)


def _lower_conv(program: Program, call: _Call) -> None:
    conv: Any = call.module
    padding = _padding(conv)
    if padding is None or conv.padding_mode != "zeros":
        return
    _finish_conv(program, call, call.x, _tensor(program, call, "weight"), padding)


def _lower_same(program: Program, call: _Call) -> None:
    conv: Any = call.module
    padded = program.emit(call.node, pad_same, call.x, conv.kernel_size, conv.stride, conv.dilation)
    _finish_conv(program, call, padded, _tensor(program, call, "weight"), (0, 0))


def _lower_computed(program: Program, call: _Call) -> None:
    """A conv that computes its weight: what it convolves with, once, where none of it trains."""
    if any(parameter.requires_grad for parameter in call.module.parameters()) or set(call.deltas) - {"bias"}:
        return
    was_training = call.module.training
    plain = bake_layer(call.module.eval(), torch.Size(sizes(call.x)))
    call.module.train(was_training)
    if not isinstance(plain, nn.Conv2d):
        return
    weight = program.hold(plain.weight)
    if isinstance(plain, layers.Conv2dSame):
        x = program.emit(call.node, pad_same, call.x, plain.kernel_size, plain.stride, plain.dilation)
        _finish_conv(program, call, x, weight, (0, 0))
    elif (padding := _padding(plain)) is not None:
        _finish_conv(program, call, call.x, weight, padding)


def _finish_conv(program: Program, call: _Call, x: fx.Node, weight: Any, padding: tuple[int, int]) -> None:
    conv: Any = call.module
    bias = _tensor(program, call, "bias")
    done = program.emit(
        call.node, F.conv2d, x, weight, bias, conv.stride, padding, conv.dilation, conv.groups, like=call.node
    )
    program.replace(call.node, done)


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """A conv's padding as numbers, the same on both sides; None where it is not."""
    if not isinstance(conv.padding, str):
        return conv.padding[0], conv.padding[1]
    reach = [rate * (side - 1) for rate, side in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "valid":
        return 0, 0
    return None if any(total % 2 for total in reach) else (reach[0] // 2, reach[1] // 2)


def _lower_linear(program: Program, call: _Call) -> None:
    weight, bias = _tensor(program, call, "weight"), _tensor(program, call, "bias")
    program.replace(call.node, program.emit(call.node, F.linear, call.x, weight, bias, like=call.node))


def _lower_batch_norm(program: Program, call: _Call) -> None:
    """γ (x − μ) / √(σ² + ε) + β as one affine, where statistics and γ are frozen; a learned δ of β joins the shift."""
    norm: Any = call.module
    # by the plan, not by the mode alone, which may be another when the program runs
    mutable = norm.training or program.model.plan.bn_policy == "train" or norm.running_mean is None
    mutable = mutable or norm.weight is None
    own = [item for name, item in norm.named_parameters(recurse=False) if name in ("weight", "bias")]
    if mutable or any(item.requires_grad for item in own) or set(call.deltas) - {"bias"}:
        return
    scale = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.detach().double() - norm.running_mean.double() * scale
    scale_node = program.hold(scale)
    shift_node = program.hold(shift)
    if "bias" in call.deltas:
        shift_node = program.emit(call.node, torch.add, call.deltas["bias"], shift_node, like=shift_node)
    done = program.emit(call.node, affine, call.x, scale_node, shift_node, like=call.node)
    _finish_norm(program, call, done)


def _finish_norm(program: Program, call: _Call, done: fx.Node) -> None:
    """Call what some of timm's norms hold besides: a dropout and an activation behind the affine."""
    for part in ("drop", "act"):
        inner = getattr(call.module, part, None)
        if inner is None or isinstance(inner, nn.Identity):
            continue
        with program.graph.inserting_before(call.node):
            behind = program.graph.call_module(f"{call.path}.{part}", (done,))
        program.note(behind, call.node)
        name = find_activation(program, behind)
        if name is not None:
            activation = program.emit(behind, activate, done, name, like=call.node)
            program.replace(behind, activation)
            behind = activation
        done = behind
    program.replace(call.node, done)


def _lower_layer_norm(program: Program, call: _Call) -> None:
    norm: Any = call.module
    if getattr(norm, "_fast_norm", False):
        return
    x, node = call.x, call.node
    weight, bias = _tensor(program, call, "weight"), _tensor(program, call, "bias")
    on_maps = isinstance(norm, layers.LayerNorm2d)
    if on_maps:
        x = program.emit(node, torch.permute, x, (0, 2, 3, 1))
    done = program.emit(node, F.layer_norm, x, tuple(norm.normalized_shape), weight, bias, norm.eps)
    if on_maps:
        done = program.emit(node, torch.permute, done, (0, 3, 1, 2), like=node)
    done.meta.setdefault("tensor_meta", node.meta.get("tensor_meta"))
    program.replace(node, done)


def _lower_group_norm(program: Program, call: _Call) -> None:
    norm: Any = call.module
    if getattr(norm, "fast_norm", False):
        return
    weight, bias = _tensor(program, call, "weight"), _tensor(program, call, "bias")
    done = program.emit(call.node, F.group_norm, call.x, norm.num_groups, weight, bias, norm.eps, like=call.node)
    _finish_norm(program, call, done)


def _drop_identity(program: Program, call: _Call) -> None:
    program.replace(call.node, call.x)


def _drop_dropout(program: Program, call: _Call) -> None:
    module: Any = call.module
    rate = module.drop_prob if isinstance(module, layers.DropPath) else module.p
    if not rate:
        program.replace(call.node, call.x)


def _lower_pool(program: Program, call: _Call) -> None:
    pool: Any = call.module
    if isinstance(pool, nn.MaxPool2d):
        if pool.return_indices:
            return
        settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        done = program.emit(call.node, F.max_pool2d, call.x, *settings, like=call.node)
    else:
        if pool.divisor_override is not None:
            return
        settings = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
        done = program.emit(call.node, F.avg_pool2d, call.x, *settings, like=call.node)
    program.replace(call.node, done)


_RULES: tuple[tuple[type[nn.Module], Callable[[Program, _Call], None]], ...] = (
    (nn.Conv2d, _lower_conv),
    (layers.Conv2dSame, _lower_same),
    (nn.Linear, _lower_linear),
    (nn.BatchNorm2d, _lower_batch_norm),
    (layers.BatchNormAct2d, _lower_batch_norm),
    (nn.LayerNorm, _lower_layer_norm),
    (layers.LayerNorm, _lower_layer_norm),
    (layers.LayerNorm2d, _lower_layer_norm),
    (nn.GroupNorm, _lower_group_norm),
    (layers.GroupNorm, _lower_group_norm),
    (layers.GroupNorm1, _lower_group_norm),
    (layers.GroupNormAct, _lower_group_norm),
    (nn.MaxPool2d, _lower_pool),
    (nn.AvgPool2d, _lower_pool),
    (nn.Identity, _drop_identity),
    (nn.Dropout, _drop_dropout),
    (nn.Dropout2d, _drop_dropout),
    (layers.DropPath, _drop_dropout),
)

# of functions: the names of their arguments behind the tensor, with the defaults
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "conv2d": {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "linear": {"weight": None, "bias": None},
    "layer_norm": {"normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5},
    "group_norm": {"num_groups": None, "weight": None, "bias": None, "eps": 1e-5},
}
_PAIRS = ("stride", "padding", "dilation")
_TARGETS: Mapping[str, Callable[..., Any]] = {
    "conv2d": F.conv2d,
    "linear": F.linear,
    "layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
}


def _lower_function(program: Program, node: fx.Node) -> None:
    """Write a function's arguments by position, pairs as pairs."""
    name = function_name(node)
    known = _ARGUMENTS[name]
    if set(node.kwargs) - set(known) or isinstance(node.kwargs.get("padding"), str):
        return
    given = dict(zip(known, node.args[1:], strict=False))
    settings: dict[str, Any] = {**known, **given, **node.kwargs}
    for key in _PAIRS:
        if isinstance(settings.get(key), int):
            settings[key] = (settings[key],) * 2
    if isinstance(settings.get("padding"), str):
        return
    node.target, node.kwargs = _TARGETS[name], {}
    node.args = (node.args[0], *settings.values())


_FUNCTIONS = dict.fromkeys(_ARGUMENTS, _lower_function)
