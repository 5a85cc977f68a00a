"""Convpass against its formula, written here with plain functions; its start, its settings and its refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cadapt.adapters import Refusal, get_scheme
from cadapt.adapters.convpass import Convpass, fold_scale
from cadapt.errors import CadaptError, UsageError
from cadapt.planning import plan_insertions
from cadapt.site import Pair, Site
from tests.graph.helpers import timm_sites
from tests.models import enliven, surveyed

Tensors = Mapping[str, torch.Tensor]


def bypass(
    tokens_BNC: torch.Tensor, tensors: Tensors, *, grid: Pair, prefix: int, s: float = 1.0, stride: int = 1
) -> torch.Tensor:
    """s · W_up(σ(Conv3×3(σ(W_down X)))) of METHODS, section 2, one tap at a time: no conv is called."""

    def sigma(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)

    (height, width), kernel = grid, tensors["conv.weight"]
    hidden = sigma(tokens_BNC @ tensors["down.weight"].T + tensors["down.bias"])
    padded = F.pad(hidden[:, prefix:].unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    convolved = sum(
        padded[:, row : row + height : stride, column : column + width : stride] @ kernel[:, :, row, column].T
        for row in range(3)
        for column in range(3)
    )
    assert isinstance(convolved, torch.Tensor)
    # a prefix token has no neighbours
    alone = hidden[:, :prefix] @ kernel[:, :, 1, 1].T
    hidden = sigma(torch.cat((alone, convolved.flatten(1, 2)), dim=1) + tensors["conv.bias"])
    return s * (hidden @ tensors["up.weight"].T + tensors["up.bias"])


def site(
    layout: str = "NLC", *, grid: Pair = (5, 8), prefix: int = 0, stride: int = 1, channels: Pair = (12, 12)
) -> Site:
    out = (-(-grid[0] // stride), -(-grid[1] // stride))

    def shape(sides: Pair, width: int) -> tuple[int, ...]:
        tokens = (prefix + sides[0] * sides[1], width)
        return {"NLC": tokens, "NHWC": (*sides, width), "NCHW": (width, *sides)}[layout]

    return Site(
        path="blocks.0.attn",
        kind="attention",
        in_shape=shape(grid, channels[0]),
        out_shape=shape(out, channels[1]),
        layout=layout,  # type: ignore[arg-type]
        grid=grid,
        out_grid=out if layout == "NLC" else None,
        stride=(stride, stride),
        prefix_tokens=prefix,
    )


def build(place: Site, **settings: object) -> Convpass:
    scheme = get_scheme("convpass")
    config = scheme.configure(settings)
    assert scheme.fits(place, "bypass", config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = scheme.build(place, "bypass", config)
    assert isinstance(adapter, Convpass)
    return adapter.eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach().double() - theirs.detach().double()).abs().max() / theirs.detach().double().abs().max())


PLACES = [
    *(pytest.param({"prefix": prefix}, {}, id=f"{prefix}-prefix-tokens") for prefix in (0, 1, 2, 5)),
    pytest.param({"prefix": 1}, {"h": 3, "s": 0.1, "conv_init": "xavier"}, id="settings"),
    pytest.param({"layout": "NHWC"}, {}, id="channels-last"),
    pytest.param({"layout": "NCHW"}, {"s": 10}, id="channels-first"),
    pytest.param({"prefix": 2, "stride": 2, "channels": (12, 20)}, {}, id="fewer-tokens"),
    pytest.param({"layout": "NCHW", "stride": 2, "channels": (12, 20)}, {}, id="smaller-map"),
    pytest.param({"layout": "NHWC", "stride": 2, "channels": (12, 20)}, {}, id="smaller-map-channels-last"),
]


@pytest.mark.parametrize(("place", "settings"), PLACES)
def test_it_computes_the_formula(place: dict[str, Any], settings: dict[str, object]) -> None:
    where = site(**place)
    adapter = build(where, **settings)
    enliven(adapter, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *where.in_shape, generator=generator).requires_grad_()
    got = adapter(x)
    assert got.shape == (2, *where.out_shape)
    cotangent = torch.randn(got.shape, generator=generator)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), (x, *tensors))

    # the reference is computed in fp64 from the same values
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in zip(names, tensors, strict=True)}
    x_wide = x.detach().double().requires_grad_()
    tokens = {"NLC": x_wide, "NHWC": x_wide.flatten(1, -2), "NCHW": x_wide.flatten(2).mT}[where.layout]
    delta = bypass(
        tokens, wide, grid=where.grid or (0, 0), prefix=where.prefix_tokens, s=adapter.scale, stride=where.stride[0]
    )
    expected = delta.mT.reshape(got.shape) if where.layout == "NCHW" else delta.reshape(got.shape)
    expected_gradients = torch.autograd.grad((expected * cotangent.double()).sum(), (x_wide, *wide.values()))
    for what, ours, theirs in zip(
        ("output", "x", *names), (got, *gradients), (expected, *expected_gradients), strict=True
    ):
        assert relative(ours, theirs) <= 1e-6, what


@pytest.mark.parametrize("width", [1, 8, 24])
def test_it_starts_as_the_paper_says_and_adds_nothing(width: int) -> None:
    place = site(prefix=1, channels=(12, 20))
    adapter = build(place, h=width)
    x = torch.randn(2, *place.in_shape, generator=torch.Generator().manual_seed(0))
    assert not adapter(x).any()
    assert torch.equal(adapter.conv.weight, F.pad(torch.eye(width)[:, :, None, None], (1, 1, 1, 1)))
    assert 0.5 < adapter.down.weight.abs().max() / (6 / (12 + width)) ** 0.5 <= 1
    assert not any(layer.bias.any() for layer in (adapter.down, adapter.conv, adapter.up))  # type: ignore[union-attr]
    counted = sum(parameter.numel() for parameter in adapter.parameters())
    assert counted == (12 * width + width) + (9 * width**2 + width) + (20 * width + 20)
    xavier = build(place, h=width, conv_init="xavier")
    assert not xavier(x).any()
    assert 0.5 < xavier.conv.weight.abs().max() / (6 / (9 * 2 * width)) ** 0.5 <= 1


def test_folding_s_gives_an_equal_adapter() -> None:
    place, scheme = site(prefix=1), get_scheme("convpass")
    for s in (0.01, 0.3, 100.0):
        adapter, config = build(place, s=s), scheme.configure({"s": s})
        enliven(adapter)
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        folded, folded_config = fold_scale(adapter, config)
        assert isinstance(folded, Convpass) and folded.scale == 1.0 and adapter.scale == s
        x = torch.randn(2, *place.in_shape, generator=torch.Generator().manual_seed(0))
        assert relative(folded(x), adapter(x)) <= 1e-6
        assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())
        assert folded_config == replace(config, s=1.0)
    refusal = scheme.merge(place, "bypass", adapter, None)
    assert isinstance(refusal, Refusal) and "two QuickGELUs" in refusal.reason


# name, and scheme: (2L or L)·[(2h+1)d + 9h² + 2h] for h = 8, summed over Swin's stages
COUNTS = [
    ("vit_base_patch16_224", "convpass", 327_552),
    ("vit_base_patch16_224", "convpass-attn", 163_776),
    ("swin_base_patch4_window7_224", "convpass", 437_504),
    ("swin_base_patch4_window7_224", "convpass-attn", 218_752),
]


@pytest.mark.parametrize(("name", "scheme", "parameters"), COUNTS)
def test_real_models_get_the_parameters_of_the_paper(name: str, scheme: str, parameters: int) -> None:
    method = get_scheme(scheme)
    config = method.configure({})
    counted = 0
    with torch.device("meta"):
        for placement in method.select(timm_sites(name), config):
            assert method.fits(placement.site, placement.form, config) is None
            adapter = method.build(placement.site, placement.form, config)
            counted += sum(parameter.numel() for parameter in adapter.parameters())
    assert counted == parameters


@pytest.mark.parametrize(
    ("scheme", "said"), [("convpass", "attention or MLP branches"), ("convpass-attn", "attention")]
)
def test_a_convnet_has_no_place_for_it(scheme: str, said: str) -> None:
    backbone, sites = surveyed("plain")
    with pytest.raises(CadaptError) as caught:
        plan_insertions(backbone, scheme, surveyed=sites)
    assert f"nothing to adapt under {scheme}: it has no {said}" in caught.value.message


def test_what_does_not_fit_is_told() -> None:
    scheme = get_scheme("convpass")
    config = scheme.configure({})
    reasons = [
        (replace(site(), out_grid=None), "bypass", "lie on no grid"),
        (replace(site(prefix=1), prefix_tokens=2), "bypass", "41 tokens are not 2 prefix tokens and a 5×8 grid"),
        (replace(site("NHWC"), stride=(2, 2)), "bypass", "takes the 5×8 grid to 3×4, where the branch gives 5×8"),
        (site(), "sequential", "not in the form 'sequential'"),
    ]
    for place, form, said in reasons:
        assert said in (scheme.fits(place, form, config) or ""), said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"h": 0}, "h is 0"),
        ({"h": 2000}, "h is 2000"),
        ({"s": 0}, "s is 0"),
        ({"s": "nan"}, "s is nan"),
        ({"s": "inf"}, "s is inf"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"conv_init": "zero"}, "identity | xavier"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_scheme("convpass").configure(settings)
    assert said in caught.value.message
