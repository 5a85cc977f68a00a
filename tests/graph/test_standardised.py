"""Baking keeps every bit of a layer's output, and leaves alone what it cannot or need not bake."""

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import fx, nn
from torch.nn.utils.parametrizations import weight_norm

from cadapt.graph.standardised import bake_layer, bake_weights

SHAPE = torch.Size((1, 8, 15, 17))


class InputDependent(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * x.mean())


class Twice(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.conv2d(x, self.weight * 2)


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"groups": 4, "dilation": 2}])
def test_baked_layer_is_bit_equal(kind, settings):
    torch.manual_seed(0)
    layer = kind(8, 12, 3, bias=True, **settings).eval()
    if hasattr(layer, "gain"):
        nn.init.uniform_(layer.gain, 0.5, 2.0)
    plain = bake_layer(layer, SHAPE)
    assert type(plain) in (nn.Conv2d, Conv2dSame)
    for shape in ((3, *SHAPE[1:]), (2, 8, 16, 16)):
        image = torch.randn(shape)
        assert torch.equal(plain(image), layer(image))
    assert not torch.equal(plain.weight, layer.weight)


def test_parametrised_layer_is_baked():
    layer = weight_norm(nn.Conv2d(8, 4, 3))
    plain = bake_layer(layer, SHAPE)
    assert type(plain) is nn.Conv2d
    assert torch.equal(plain.weight, layer.weight)


def test_plain_weights_are_left_alone():
    assert bake_layer(Conv2dSame(8, 4, 3, stride=2), SHAPE) is None


def test_reasons():
    assert bake_layer(InputDependent(8, 4, 3), SHAPE) == "its weight depends on the input"
    assert bake_layer(Twice(8, 4, 3), SHAPE) == "2 convolutions in one layer, expected 1"
    baking = bake_weights(nn.Sequential(InputDependent(3, 4, 3)), torch.ones(2, 3, 8, 8))
    assert baking.skipped == ("0: its weight depends on the input",)


def test_shared_layer_is_baked_at_each_path():
    shared = StdConv2d(3, 3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    image = torch.randn(2, 3, 8, 8)
    wanted = model(image)
    assert bake_weights(model, image).baked == ("0", "2")
    assert model[0] is model[2]
    assert torch.equal(model(image), wanted)


def test_weight_read_by_the_graph_is_not_standardised_twice():
    class OpenConvs(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    model = nn.Sequential(ScaledStdConv2d(3, 4, 3)).eval()
    opened = fx.GraphModule(model, OpenConvs().trace(model))
    image = torch.randn(2, 3, 8, 8)
    wanted = opened(image)
    assert bake_weights(opened, image).baked == ()
    assert torch.equal(opened(image), wanted)
