"""Fold frozen batch norms, layer scales and an adapter's α into the layers before them.

- A frozen batch norm is y = s ⊙ z + t with s = γ / √(σ² + ε), t = β − μ s (Ioffe and Szegedy, arXiv 1502.03167,
  with the statistics of evaluation). It goes into the conv that made z, and s into an adapter that joined in between.
- A frozen layer scale γ ⊙ z (Touvron et al., arXiv 2103.17239, section 2) goes into the last layer of its branch.
- Conv-Adapter's α ⊙ PW(h) (arXiv 2208.07463, equation 2) becomes (α ⊙ W) h + α ⊙ b: a product of small tensors that is
  differentiated, so that neither gradient needs the map that PW gives.

Where z is read by another besides, or its maker cannot take the factor up, the factor stays where it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.lowering import affine
from cadapt.frozen.program import Program, sizes
from cadapt.frozen.scaling import Scaling, absorb, can_absorb


def fold_learned_scales(program: Program) -> None:
    """Fold α, and any other learned per-channel factor, into the learned layer before it."""
    for node in program.nodes(torch.mul):
        for factor, product in (node.args, node.args[::-1]):
            dim = _channel_dim(factor, product)
            source = _uncast(factor)
            if dim is not None and _is_parametric(source) and can_absorb(program, product, dim, learned=True):
                vector = program.emit(program.head, torch.flatten, program.hoist(source))
                _fold(program, node, product, Scaling(scale=vector, shift=None, dim=dim))
                break


def fold_frozen_scales(program: Program) -> None:
    """Fold frozen factors, a layer scale or an adapter's fixed number, into the layers before them."""
    for node in program.nodes(torch.mul):
        for factor, product in (node.args, node.args[::-1]):
            found = _frozen_factor(program, factor, product)
            if found is not None and can_absorb(program, product, found[1], learned=False):
                vector = program.hold(found[0])
                _fold(program, node, product, Scaling(scale=vector, shift=None, dim=found[1]))
                break


def fold_norms(program: Program) -> None:
    """Fold frozen batch norms into the convs before them."""
    for node in program.nodes(affine):
        product, scale, shift = node.args
        if can_absorb(program, product, 1, learned=False):
            assert isinstance(scale, fx.Node) and isinstance(shift, fx.Node)
            _fold(program, node, product, Scaling(scale=program.hoist(scale), shift=program.hoist(shift), dim=1))


def _fold(program: Program, node: fx.Node, product: Any, scaling: Scaling) -> None:
    absorb(program, product, scaling)
    program.replace(node, product)


def _uncast(node: Any) -> Any:
    """A parameter before it was cast to what it multiplies: a product of weights has the weights' own dtype."""
    casts = isinstance(node, fx.Node) and node.op == "call_method" and node.target == "to"
    return node.args[0] if casts else node


def _is_parametric(node: Any) -> bool:
    """Whether a node is computed from parameters alone, some of which train."""
    return isinstance(node, fx.Node) and node.meta["live"] and not node.meta["moving"]


def _frozen_factor(program: Program, factor: Any, product: Any) -> tuple[torch.Tensor, int] | None:
    """A frozen factor as a vector in fp64, and the dimension of the product along which it lies."""
    width_dim = _layer_dim(product)
    if width_dim is not None and (isinstance(factor, int | float) or _is_single(program, factor)):
        number = None if isinstance(factor, fx.Node) else torch.tensor([factor], dtype=torch.float64)
        value = program.exact(factor).flatten() if number is None else number
        device = next(program.model.parameters()).device
        return value.to(device).expand(sizes(product)[width_dim]), width_dim
    dim = _channel_dim(factor, product)
    if dim is None or not program.is_constant(factor):
        return None
    return program.exact(factor).flatten(), dim


def _is_single(program: Program, factor: Any) -> bool:
    return program.is_constant(factor) and all(side == 1 for side in sizes(factor))


def _layer_dim(node: Any) -> int | None:
    """The dimension of the channels that a layer gives."""
    if not isinstance(node, fx.Node) or node.target not in (F.conv2d, F.linear):
        return None
    return 1 if node.target is F.conv2d else len(sizes(node)) - 1


def _channel_dim(factor: Any, product: Any) -> int | None:
    """Along which dimension of a product a factor is a vector; None where it is not one."""
    shape, whole = sizes(_uncast(factor)), sizes(product)
    if not shape or not whole or len(shape) > len(whole):
        return None
    shape = (1,) * (len(whole) - len(shape)) + shape
    wide = [index for index, side in enumerate(shape) if side != 1]
    if len(wide) != 1 or shape[wide[0]] != whole[wide[0]]:
        return None
    return wide[0]
