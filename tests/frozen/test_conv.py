"""Convolutions that keep no input: gradients as torch's, in its memory formats and under its autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadapt.frozen.functions import conv
from cadapt.frozen.functions.conv import conv2d_through, frozen_conv2d
from tests.frozen.comparing import FORMATS, SINGLE, assert_same, kept, map_of, whole

# kernel, stride, padding, dilation, groups
GEOMETRIES = [(1, 1, 0, 1, 1), (1, 2, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (3, 1, 2, 2, 8), (5, 1, 2, 1, 4)]


def layer(geometry: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, tuple]:
    kernel, stride, padding, dilation, groups = geometry
    weight = torch.randn(16, 8 // groups, kernel, kernel, dtype=dtype)
    settings = ((stride, stride), (padding, padding), (dilation, dilation), groups)
    return weight, torch.randn(16, dtype=dtype), settings


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_go_through(geometry: tuple[int, ...], format: torch.memory_format) -> None:
    weight, bias, settings = layer(geometry)
    bias.requires_grad_()
    assert_same(
        lambda x, b: frozen_conv2d(x, weight, b, *settings),
        lambda x, b: F.conv2d(x, weight, b, *settings),
        (map_of(3, 8, 7, 6, format=format), bias),
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weight_gradients_come_of_the_recomputed_input(geometry: tuple[int, ...], format: torch.memory_format) -> None:
    weight, bias, settings = layer(geometry)
    assert_same(
        lambda x, w, b: conv2d_through(F.silu(x), x, F.silu, w, b, *settings),
        lambda x, w, b: F.conv2d(F.silu(x), w, b, *settings),
        (map_of(3, 8, 7, 6, format=format), weight.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [2, 17])
def test_pointwise_convs_in_single_precision(batch: int, format: torch.memory_format) -> None:
    """Those that oneDNN is asked for by name, on one thread."""
    weight, bias, settings = layer((1, 1, 0, 1, 1), torch.float32)
    x = map_of(batch, 8, 3, 2, dtype=torch.float32, format=format)
    assert conv._is_pointwise(x, weight, settings) == torch.backends.mkldnn.is_available()
    assert_same(
        lambda x, w, b: conv2d_through(F.silu(x), x, F.silu, w, b, *settings),
        lambda x, w, b: F.conv2d(F.silu(x), w, b, *settings),
        (x, weight.requires_grad_(), bias.requires_grad_()),
        SINGLE,
    )


def test_expanded_gradients_and_strided_inputs() -> None:
    weight, _, settings = layer((1, 1, 0, 1, 1), torch.float32)
    base = torch.randn(2, 8, 7, 12).requires_grad_()
    for x in (base[..., ::2], base.transpose(2, 3), base[:, :, :1, :1]):
        mine, other = (
            torch.autograd.grad(function(x, weight, None, *settings).mean(), base, retain_graph=True)[0]
            for function in (frozen_conv2d, F.conv2d)
        )
        assert torch.allclose(mine, other, atol=1e-7)


@pytest.mark.parametrize("geometry", GEOMETRIES[:3])
def test_autocast_casts_as_for_torchs_own(geometry: tuple[int, ...]) -> None:
    weight, bias, settings = layer(geometry, torch.float32)
    inputs = (map_of(3, 8, 7, 6, dtype=torch.float32), weight.requires_grad_(), bias.requires_grad_())
    assert_same(
        lambda x, w, b: conv2d_through(x * 2, x, lambda item: item * 2, w, b, *settings),
        lambda x, w, b: F.conv2d(x * 2, w, b, *settings),
        inputs,
        tolerance=4e-3,
        autocast=True,
    )
    half = weight.detach().bfloat16()
    assert_same(
        lambda x, b: frozen_conv2d(x, half, b, *settings),
        lambda x, b: F.conv2d(x, half, b, *settings),
        (inputs[0], inputs[2]),
        tolerance=4e-3,
        autocast=True,
    )


def test_keeps_the_weight_and_no_input() -> None:
    weight, bias, settings = layer((3, 1, 1, 1, 1))
    x = map_of(3, 8, 7, 6)
    y = F.silu(x)
    single = torch.float64
    assert kept(lambda: frozen_conv2d(y, weight, bias.requires_grad_(), *settings)) == [((16, 8, 3, 3), single)]
    weight.requires_grad_()
    assert kept(lambda: conv2d_through(y, x, F.silu, weight, bias, *settings)) == [
        ((3, 8, 7, 6), single),
        ((16, 8, 3, 3), single),
    ]
    assert not kept(lambda: frozen_conv2d(y.detach(), weight.detach(), None, *settings))


def test_the_source_is_kept_once_for_two() -> None:
    """An activation and the conv behind it save the same memory."""
    weight, _, settings = layer((1, 1, 0, 1, 1))
    x = map_of(2, 8, 4, 4) * 1
    places = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: places.append(tensor.untyped_storage().data_ptr()) or tensor, lambda tensor: tensor
    ):
        conv2d_through(F.silu(x), x, F.silu, weight.requires_grad_(), None, *settings)
    assert places.count(x.untyped_storage().data_ptr()) == 2
    assert len(set(places)) == 2


def test_gradcheck() -> None:
    weight, bias, settings = layer((3, 2, 1, 1, 2))
    weight, x = weight.requires_grad_(), map_of(2, 8, 4, 3)
    assert torch.autograd.gradcheck(
        lambda x, w, b: conv2d_through(x * x, x, lambda item: item * item, w, b, *settings),
        (x, weight, bias.requires_grad_()),
    )


@pytest.mark.parametrize("geometry", GEOMETRIES[:3:2])
def test_compiled(geometry: tuple[int, ...]) -> None:
    weight, bias, settings = layer(geometry)
    assert_same(
        whole(lambda x, w, b: conv2d_through(frozen_conv2d(x, eye, None, *first), x, torch.clone, w, b, *settings)),
        lambda x, w, b: F.conv2d(x, w, b, *settings),
        (map_of(3, 8, 7, 6), weight.requires_grad_(), bias.requires_grad_()),
    )


eye = torch.eye(8, dtype=torch.float64).view(8, 8, 1, 1)
first = ((1, 1), (0, 0), (1, 1), 1)


def test_on_meta() -> None:
    weight, bias, settings = (item.to("meta") if isinstance(item, Tensor) else item for item in layer(GEOMETRIES[3]))
    x = torch.empty(3, 8, 7, 6, device="meta", dtype=torch.float64, requires_grad=True)
    y = conv2d_through(x * 2, x, lambda item: item * 2, weight.requires_grad_(), bias, *settings)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
