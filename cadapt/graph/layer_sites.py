"""The picture itself, and every single layer with weights: what prompts, scales and shifts adapt.

Unlike a block or a functional conv, a layer is a site wherever it stands: in the stem, inside attention, in front of
the classifier. Only the dimension of its channels matters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from cadapt.graph.anatomy import Anatomy, Located
from cadapt.graph.conv_sites import number_reads, owner_of
from cadapt.graph.flow import sources_of
from cadapt.graph.operators import MIXERS, shape_of
from cadapt.site import Layout, Site

_CHANNELS_LAST: dict[int, Layout] = {2: "NC", 3: "NLC", 4: "NHWC"}
_CHANNELS_IN_FRONT: dict[int, Layout] = {2: "NC", 4: "NCHW"}


def input_sites(anatomy: Anatomy) -> Iterable[Located]:
    """The batch of pictures that the model is given."""
    given = next(node for node in anatomy.order if node.op == "placeholder")
    shape = shape_of(given)
    if shape is not None and len(shape) == 4:
        site = Site(path="", kind="input", in_shape=shape[1:], out_shape=shape[1:], grid=(shape[2], shape[3]))
        yield Located(site=site, input=given, output=given)


def layer_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Every call of a convolution, a linear layer or a norm with an affine, on something that depends on the input."""
    for scope in anatomy.scopes.values():
        module = anatomy.model.get_submodule(scope.path)
        crossing = anatomy.crossings.find(scope.nodes) if _is_layer(module) else None
        if crossing is not None and crossing[1].meta["from_input"]:
            yield from _layer_site(scope.path, scope.call, module, *crossing)
    for node, read in number_reads(anatomy).items():
        path = owner_of(node, anatomy.model)
        if path is not None and sources_of(node):
            yield from _layer_site(path, read, anatomy.model.get_submodule(path), sources_of(node)[0], node)


def _layer_site(path: str, call: int, module: nn.Module, start: fx.Node, end: fx.Node) -> Iterable[Located]:
    before, after = shape_of(start), shape_of(end)
    layout = _layout_of(module, after or ())
    if layout is None or before is None or after is None or len(before) != len(after):
        return
    site = Site(
        path=path,
        kind="layer",
        in_shape=before[1:],
        out_shape=after[1:],
        layout=layout,
        operator=type(module).__name__,
        call=call,
    )
    yield Located(site=site, input=start, output=end)


def _is_layer(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return False
    return isinstance(module, MIXERS) or "norm" in type(module).__name__.lower()


def _layout_of(module: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    """Where a layer's channels are, by its type; None where its output has them elsewhere."""
    in_front = isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
    in_front = in_front or "2d" in type(module).__name__.lower()
    layout = _CHANNELS_IN_FRONT.get(len(shape)) if in_front else _CHANNELS_LAST.get(len(shape))
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if layout is None or shape[1 if in_front else -1] != len(weight):
        return None
    return layout
