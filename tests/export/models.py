"""Tiny models for the export tests, traced as adapted models are: their forward is code that torch.fx generated."""

from functools import partial

import timm
from timm.layers import GroupNormAct, StdConv2d
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.models.resnetv2 import ResNetV2
from torch import fx, nn

from cadapt.preprocessing import Preprocessing

SIZE = 64
PREPROCESSING = Preprocessing(input_size=(3, SIZE, SIZE), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = tuple(f"class {index}" for index in range(5))


class ConvLeaves(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (*get_notrace_modules(), nn.Conv2d)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    tracer = ConvLeaves()
    return fx.GraphModule(model, tracer.trace(model.eval()))


def make_bit() -> nn.Module:
    """BiT's stem (zero pad before a max-pool) and weight-standardised convolutions, in four small blocks."""
    return ResNetV2(
        layers=(1, 1, 1, 1),
        channels=(16, 32, 32, 32),
        stem_chs=16,
        num_classes=len(CLASSES),
        stem_type="fixed",
        conv_layer=StdConv2d,
        norm_layer=partial(GroupNormAct, num_groups=4),
    )


def make_timm(name: str, **settings: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=len(CLASSES), **settings)
