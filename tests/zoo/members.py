"""The families of the scheme × family table, by a model each or two, at the smallest pictures that keep their shape.

``light`` members are tiny networks of the same classes, for the tests of every day. Models that take them get paths
dropped in train mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cadapt.adapters import SCHEMES

SUMS = ("consolidator+bias+norm", "conv-par+norm")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A timm model of a family: how it is made, and the side of its pictures in pixels."""

    family: str
    model: str
    side: int = 64
    light: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model's name, and whether it is a light one of its kind."""
        return f"{self.model} (light)" if self.light and not self.model.startswith("test_") else self.model


_DROPS = {"drop_path_rate": 0.1}
_SQUARE = {"img_size": 64, **_DROPS}
_SWIN = {"img_size": 64, "window_size": 4, **_DROPS}
# two stages: shifted windows, and the merging of patches between them
_SMALL_SWIN = {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)}

MEMBERS = {
    item.title: item
    for item in (
        Member(family="ResNet", model="resnet18", arguments=_DROPS),
        Member(family="ResNet", model="resnet50", arguments=_DROPS),
        Member(family="ResNet", model="test_resnet", light=True, arguments=_DROPS),
        Member(family="BiT", model="resnetv2_50x1_bit", arguments=_DROPS),
        Member(family="ConvNeXt", model="convnext_atto", arguments=_DROPS),
        Member(family="ConvNeXt", model="test_convnext", light=True, arguments=_DROPS),
        Member(family="EfficientNet", model="tf_efficientnet_b0", arguments=_DROPS),
        Member(family="EfficientNet", model="test_efficientnet", light=True, arguments=_DROPS),
        Member(family="RegNet", model="regnety_002", arguments=_DROPS),
        Member(family="DenseNet", model="densenet121", arguments={"drop_rate": 0.1}),
        Member(
            family="DenseNet",
            model="densenet121",
            light=True,
            arguments={"block_config": (2, 2, 2, 2), "growth_rate": 16, "drop_rate": 0.1},
        ),
        Member(family="ViT with cls", model="vit_tiny_patch16_224", arguments=_SQUARE),
        Member(family="ViT with cls", model="test_vit", light=True, arguments=_SQUARE),
        Member(family="ViT with registers", model="vit_small_patch14_reg4_dinov2", side=56,
               arguments={"img_size": 56, "depth": 4, **_DROPS}),
        Member(family="ViT with registers", model="vit_little_patch16_reg4_gap_256", arguments=_SQUARE),
        Member(family="ViT with registers", model="test_vit2", light=True, arguments=_SQUARE),
        Member(family="DeiT distilled", model="deit_tiny_distilled_patch16_224", arguments=_SQUARE),
        Member(family="DeiT distilled", model="deit_tiny_distilled_patch16_224", light=True,
               arguments={"depth": 2, "embed_dim": 48, **_SQUARE}),
        Member(family="Swin", model="swin_tiny_patch4_window7_224", arguments=_SWIN),
        Member(family="Swin", model="swin_tiny_patch4_window7_224", light=True, arguments={**_SWIN, **_SMALL_SWIN}),
        Member(family="Swin-v2", model="swinv2_tiny_window8_256", arguments=_SWIN),
        Member(family="Swin-v2", model="swinv2_tiny_window8_256", light=True, arguments={**_SWIN, **_SMALL_SWIN}),
        Member(family="MaxViT", model="maxvit_pico_rw_256", arguments=_SQUARE),
        Member(family="MaxViT", model="test_maxvit", light=True, arguments=_SQUARE),
        Member(family="EfficientFormer", model="efficientformer_l1", side=224, arguments=_DROPS),
        Member(family="MobileViT", model="mobilevit_xxs", arguments=_DROPS),
        Member(family="CAFormer", model="caformer_s18", arguments=_DROPS),
    )
}  # fmt: skip


def scheme_names() -> tuple[str, ...]:
    """All schemes there are, and the sums whose parts there are."""
    return (*SCHEMES, *(name for name in SUMS if all(part in SCHEMES for part in name.split("+"))))


_CONVS_ALONE = ("ResNet", "BiT", "ConvNeXt", "EfficientNet", "RegNet", "DenseNet")
_TOKENS_ALONE = ("ViT with cls", "ViT with registers", "DeiT distilled", "Swin", "Swin-v2")
# MobileViT's tokens are folded into the batch, by their place in a patch, and lie on no grid there
_NO_GRIDS = (*_CONVS_ALONE, "MobileViT")
_REFUSING: Mapping[str, tuple[str, ...]] = {
    "convpass": _NO_GRIDS,
    "convpass-attn": _NO_GRIDS,
    "residual-par": _TOKENS_ALONE,
    "residual-seq": _TOKENS_ALONE,
    "all-conv-par": _TOKENS_ALONE,
}


def may_refuse(title: str, scheme: str) -> bool:
    """Whether a family has nothing that a scheme, or one of a sum, could adapt: told by hand."""
    return any(MEMBERS[title].family in _REFUSING.get(part, ()) for part in scheme.split("+"))
