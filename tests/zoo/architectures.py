"""What the tests hold to be true of real architectures, written down by hand from timm's sources and the paper.

Nothing here is read from cadapt's site finder: which convolutions and blocks count, and the backbone's non-linearity,
are the independent side of the comparison.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEMES = ("conv-par", "conv-seq", "res-par", "res-seq")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One timm model: where its functional convs (or window attentions), blocks and stage-joining convs are.

    ``convs``, ``blocks`` and ``downsamples`` are patterns that a module's whole path matches; an empty one matches
    none. ``activations`` maps patterns of a path's beginning to the non-linearity there. ``attention`` says that what
    ``convs`` matches are Swin blocks, whose window attention is adapted. ``route`` lists the schemes that the whole
    path from insertion to ONNX is tried with.
    """

    name: str
    convs: str
    blocks: str = ""
    downsamples: str = ""
    activations: tuple[tuple[str, str], ...] = (("", "relu"),)
    attention: bool = False
    side: int = 224
    route: tuple[str, ...] = SCHEMES

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that fit: models without residual blocks have no ``res-`` ones."""
        return SCHEMES if self.blocks else SCHEMES[:2]

    def activation(self, path: str) -> str:
        """The backbone's own non-linearity around a module."""
        return next(name for start, name in self.activations if re.match(start, path))


_RESNET = r"layer\d\.\d+"
_STAGES = r"stages\.\d\.blocks\.\d+"
_MOBILE = r"blocks\.\d\.\d"
_REGNET = r"s\d\.b\d+"
_SWIN = r"layers\.\d\.blocks\.\d"

ARCHITECTURES = {
    item.name: item
    for item in (
        Architecture(name="resnet18", convs=rf"{_RESNET}\.conv[12]", blocks=_RESNET),
        Architecture(name="resnet50", convs=rf"{_RESNET}\.conv2", blocks=_RESNET, route=("res-seq",)),
        Architecture(name="mobilenetv3_large_100", convs=rf"{_MOBILE}\.conv_dw", blocks=r"blocks\.[0-5]\.\d",
                     activations=((r"blocks\.[0-2]\.", "relu"), ("", "hard_swish"))),
        Architecture(name="convnext_tiny", convs=rf"{_STAGES}\.conv_dw", blocks=_STAGES,
                     downsamples=r"stages\.[123]\.downsample\.1", activations=(("", "gelu"),), route=("conv-par",)),
        Architecture(name="efficientnet_b0", convs=rf"{_MOBILE}\.conv_dw", blocks=_MOBILE,
                     activations=(("", "silu"),)),
        Architecture(name="resnetv2_50x1_bit", convs=rf"{_STAGES}\.conv2", blocks=_STAGES, route=("res-par",)),
        Architecture(name="regnety_004", convs=rf"{_REGNET}\.conv2\.conv", blocks=_REGNET),
        Architecture(name="vgg16_bn", convs=r"features\.(?!0$)\d+", route=("conv-par",)),
        Architecture(name="tf_efficientnet_b0", convs=rf"{_MOBILE}\.conv_dw", blocks=_MOBILE,
                     activations=(("", "silu"),)),
        Architecture(name="swin_tiny_patch4_window7_224", convs=_SWIN, blocks=_SWIN, attention=True,
                     activations=(("", "gelu"),), route=("conv-par",)),
        Architecture(name="densenet121", convs=r"features\.denseblock\d\.denselayer\d+\.conv2", route=("conv-seq",)),
        Architecture(name="resnext50_32x4d", convs=rf"{_RESNET}\.conv2", blocks=_RESNET, route=("conv-seq",)),
        Architecture(name="resnet50_clip", convs=r"stages\.\d\.\d\.conv2_kxk\.conv", blocks=r"stages\.\d\.\d",
                     route=("conv-par",)),
        Architecture(name="dm_nfnet_f0", convs=r"stages\.\d\.\d\.conv2b?", blocks=r"stages\.\d\.\d",
                     activations=(("", "gelu"),), side=192, route=("conv-par",)),
        Architecture(name="regnety_040", convs=rf"{_REGNET}\.conv2\.conv", blocks=_REGNET, route=("res-seq",)),
    )
}  # fmt: skip
LIGHT = ("resnet18", "mobilenetv3_large_100", "efficientnet_b0", "regnety_004", "tf_efficientnet_b0")
HEAVY = tuple(name for name in ARCHITECTURES if name not in LIGHT)


def sample(turn: int) -> tuple[tuple[str, str], ...]:
    """One light and one heavy model with a scheme each: the ``turn`` of a rotation through all of them."""
    light, heavy = ARCHITECTURES[LIGHT[turn % len(LIGHT)]], ARCHITECTURES[HEAVY[turn % len(HEAVY)]]
    # the schemes move on when the models have been through
    return (
        (light.name, light.route[turn // len(LIGHT) % len(light.route)]),
        (heavy.name, heavy.schemes[turn // len(HEAVY) % len(heavy.schemes)]),
    )
