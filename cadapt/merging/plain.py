"""Layers of a merged model that are not timm's any more: plain ones in place of others, noted to be built again.

A weight-standardised convolution that took an adapter up is a plain one from then on, a grouped one may have fewer
groups, and a layer may have a bias that it had not. The model is otherwise timm's. A checkpoint names these layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from timm.layers import Conv2dSame, DropPath
from torch import nn

from cadapt.errors import RefusedError
from cadapt.site import PaddingMode, Pair

_KINDS: Mapping[str, type[nn.Module]] = {"Conv2d": nn.Conv2d, "Conv2dSame": Conv2dSame, "Linear": nn.Linear}
_LARGEST = 32_768
# what a layer computes with besides its tensors, in torch's and timm's names
_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps", "num_groups"),
    *("negative_slope", "output_size", "ceil_mode", "count_include_pad", "pool_type", "approximate"),
)
_SIZES = ("in_channels", "out_channels", "kernel_size", "stride")
# in eval mode they are the same
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)


@dataclass(frozen=True, kw_only=True)
class PlainLayer:
    """What a plain layer is besides its tensors; a linear layer is nothing more than its ``kind``.

    ``padding`` is torch's word where the layer pads by one; a ``Conv2dSame`` pads by TensorFlow's rule.
    """

    kind: Literal["Conv2d", "Conv2dSame", "Linear"]
    stride: Pair = (1, 1)
    padding: Pair | Literal["same", "valid"] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :func:`read_plain` reads back."""
        return asdict(self)


def describe_plain(layer: nn.Module) -> PlainLayer:
    """The note on a plain layer."""
    parts: Any = layer
    if isinstance(layer, nn.Linear):
        return PlainLayer(kind="Linear")
    return PlainLayer(
        kind="Conv2dSame" if type(layer) is Conv2dSame else "Conv2d",
        stride=parts.stride,
        padding=parts.padding,
        dilation=parts.dilation,
        groups=parts.groups,
        padding_mode=parts.padding_mode,
    )


def build_plain(note: PlainLayer, weight: torch.Tensor, *, bias: bool, path: str) -> nn.Module:
    """A layer as noted, of the size of its weight; its values are still to be loaded.

    Raises:
        RefusedError: the weight is not one of such a layer.
    """
    dimensions = 2 if note.kind == "Linear" else 4
    if not weight.is_floating_point():
        raise RefusedError(f"damaged checkpoint: the weight of '{path:.80}' is of {weight.dtype}, expected floats")
    if weight.dim() != dimensions or not weight.numel() or weight.shape[0] % note.groups:
        raise RefusedError(f"damaged checkpoint: '{path}' is a {note.kind} with a weight {tuple(weight.shape)}")
    outputs, inputs = weight.shape[:2]
    if note.kind == "Linear":
        return nn.Linear(inputs, outputs, bias=bias, dtype=weight.dtype)
    kind: Any = _KINDS[note.kind]
    modes = {} if note.kind == "Conv2dSame" else {"padding_mode": note.padding_mode}
    layer: nn.Module = kind(
        inputs * note.groups,
        outputs,
        tuple(weight.shape[2:]),
        stride=note.stride,
        padding=note.padding,
        dilation=note.dilation,
        groups=note.groups,
        bias=bias,
        dtype=weight.dtype,
        **modes,
    )
    return layer


def read_plain(record: object, path: str) -> PlainLayer:
    """Read the note on one layer from a file that may be damaged or forged.

    Raises:
        RefusedError: a value is of the wrong kind, or larger or smaller than it can be.
    """
    if not isinstance(record, Mapping) or set(record) - set(PlainLayer.__dataclass_fields__):
        raise RefusedError(f"damaged checkpoint: the note on '{path:.80}' is {record!r:.80}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    sound = {
        "kind": isinstance(values.get("kind"), str) and values["kind"] in _KINDS,
        "stride": _is_pair(values.get("stride", (1, 1)), least=1),
        "padding": values.get("padding") in ("same", "valid") or _is_pair(values.get("padding", (0, 0)), least=0),
        "dilation": _is_pair(values.get("dilation", (1, 1)), least=1),
        "groups": _is_size(values.get("groups", 1), least=1),
        "padding_mode": values.get("padding_mode", "zeros") in get_args(PaddingMode),
    }
    wrong = next((name for name, is_sound in sound.items() if not is_sound), None)
    if wrong is None and values.get("padding") == "same" and values.get("stride", (1, 1)) != (1, 1):
        wrong = "stride"  # torch pads by "same" without a stride only
    if wrong is None and values["kind"] == "Conv2dSame" and values.get("padding", (0, 0)) != (0, 0):
        wrong = "padding"  # it pads by itself
    if wrong is not None:
        raise RefusedError(f"damaged checkpoint: {wrong} of '{path:.80}' is {values.get(wrong)!r:.60}")
    return PlainLayer(**values)


def _is_pair(value: object, *, least: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_size(side, least=least) for side in value)


def _is_size(value: object, *, least: int) -> bool:
    return type(value) is int and least <= value <= _LARGEST


def find_exchanged(model: nn.Module, timm_model: nn.Module) -> dict[str, nn.Module]:
    """The plain layers of a model that stand where timm's architecture has another layer of their size, by path.

    Args:
        model: a merged model.
        timm_model: what timm makes of its name, with data or without.
    """
    return {path: ours for path, ours, theirs in _pairs(model, timm_model) if _can_stand_for(ours, theirs)}


def find_unlike(model: nn.Module, timm_model: nn.Module, skipped: Iterable[str] = ()) -> str | None:
    """Where a model is another than timm's architecture in what no exchanged layer mends, or None where it is not.

    Tensors are left to whoever compares them: this is what a layer is besides them, as a norm's ε or an activation.

    Args:
        model: a merged model.
        timm_model: what timm makes of its name, with data or without.
        skipped: paths that are not looked at, nor what is below them.
    """
    heads = tuple(skipped)
    for path, ours, theirs in _pairs(model, timm_model):
        is_head = any(path == head or path.startswith(f"{head}.") for head in heads)
        if is_head or _can_stand_for(ours, theirs):
            continue
        difference = explain_difference(ours, theirs)
        if difference is not None:
            return f"its '{path}' is {difference}"
    return None


def _pairs(model: nn.Module, timm_model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, theirs in timm_model.named_modules(remove_duplicate=False):
        if path and path in modules:
            yield path, modules[path], theirs


def _can_stand_for(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether a plain layer is another than timm's, and a note on it in a file would make it again."""
    if type(ours) not in _KINDS.values() or not isinstance(theirs, nn.Conv2d | nn.Linear):
        return False
    return explain_difference(ours, theirs) is not None and explain_exchange(ours, theirs) is None


def explain_exchange(ours: nn.Module, theirs: nn.Module) -> str | None:
    """Why a plain layer cannot stand where another does, as "its stride is …, expected …", or None where it can."""
    names = ("in_features", "out_features") if isinstance(theirs, nn.Linear) else _SIZES
    for name in names:
        mine, own = getattr(ours, name, None), getattr(theirs, name)
        if mine != own:
            return f"its {name} is {mine}, expected {own}"
    return None


def explain_difference(ours: nn.Module, theirs: nn.Module) -> str | None:
    """In which way a layer is not timm's, as what follows "it is", or None where it is the same but for its tensors."""
    if isinstance(theirs, _NOTHING) and isinstance(ours, _NOTHING):
        return None
    if type(ours) is not type(theirs):
        mine, own = type(ours).__name__, type(theirs).__name__
        if type(ours) in _KINDS.values() and isinstance(theirs, nn.Conv2d | nn.Linear):
            return f"a plain {mine} now, whose weight timm's {own} would compute anew"
        return f"a {mine}, the timm model's a {own}" if _is_leaf(theirs) else None
    for name in _SETTINGS:
        mine, own = _value(ours, name), _value(theirs, name)
        if mine != own and name == "groups":
            return f"a conv of {mine} groups now, the timm model's of {own}"
        if mine != own:
            return f"a {type(ours).__name__} of {name} {mine}, the timm model's of {own}"
    if isinstance(ours, nn.Conv2d | nn.Linear):
        return _explain_bias(ours, theirs)
    return None


def _explain_bias(ours: nn.Module, theirs: nn.Module) -> str | None:
    if (ours.bias is None) == (theirs.bias is None):
        return None
    if theirs.bias is None:
        return "a layer with a bias now, which the timm model's has not"
    return "a layer without a bias, which the timm model's has"


def _is_leaf(layer: nn.Module) -> bool:
    return next(layer.children(), None) is None


def _value(layer: nn.Module, name: str) -> Any:
    value = getattr(layer, name, None)
    return value if isinstance(value, int | float | str | tuple) else None
