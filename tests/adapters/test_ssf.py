"""SSF against its formula on every layout, its merge into each kind of layer, and its count on ViT-B/16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm import layers
from timm.models.metaformer import LayerNorm2dNoBias
from torch import nn

from cadapt.adapters import MergedLayer, Refusal, get_scheme
from cadapt.adapters.ssf import ScaleShift
from cadapt.backbone import describe_model
from cadapt.merging import merge
from cadapt.planning import plan_insertions, survey
from cadapt.site import Layout, Site
from tests.merging.cases import trained
from tests.models import enliven, randomise

SCHEME = get_scheme("ssf")
SHAPES: dict[Layout, tuple[int, ...]] = {"NCHW": (6, 5, 7), "NHWC": (5, 7, 6), "NLC": (9, 6), "NC": (6,)}


def layer_site(layout: Layout = "NCHW", shape: tuple[int, ...] | None = None) -> Site:
    shape = shape or SHAPES[layout]
    return Site(path="layer", kind="layer", in_shape=shape, out_shape=shape, layout=layout)


def build(site: Site, *, lively: bool = True, **settings: object) -> ScaleShift:
    config = SCHEME.configure(settings)
    assert SCHEME.fits(site, "sequential", config) is None
    adapter = SCHEME.build(site, "sequential", config)
    if lively:
        enliven(adapter, scale=0.3)
    assert isinstance(adapter, ScaleShift)
    return adapter


def reference(h: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What joins h so that each channel is γ·h + β, one channel after the other."""
    axis = 1 if layout == "NCHW" else h.dim() - 1
    channels = [scale[index] * part + shift[index] - part for index, part in enumerate(h.split(1, dim=axis))]
    return torch.cat(channels, dim=axis)


@pytest.mark.parametrize("layout", list(SHAPES))
def test_it_computes_the_formula(layout: Layout) -> None:
    site = layer_site(layout)
    adapter = build(site)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, *site.out_shape, generator=generator, requires_grad=True)
    got = adapter(h)
    cotangent = torch.randn(got.shape, generator=generator)
    gradients = torch.autograd.grad((got * cotangent).sum(), (h, adapter.scale, adapter.shift))

    wide = [item.detach().double().requires_grad_() for item in (h, adapter.scale, adapter.shift)]
    expected = reference(*wide, layout)
    wanted = torch.autograd.grad((expected * cotangent.double()).sum(), wide)
    for ours, theirs in zip((got, *gradients), (expected, *wanted), strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * scale)


def test_it_starts_as_identity_or_as_in_the_paper() -> None:
    adapter = build(layer_site(), lively=False)
    h = torch.randn(2, *SHAPES["NCHW"])
    assert torch.equal(adapter(h), torch.zeros_like(h))
    torch.manual_seed(0)
    paper = build(layer_site("NC", (20_000,)), lively=False, init="paper")
    for tensor, mean in ((paper.scale, 1.0), (paper.shift, 0.0)):
        assert float(tensor.detach().mean()) == pytest.approx(mean, abs=1e-3)
        assert float(tensor.detach().std()) == pytest.approx(0.02, abs=1e-3)


def count(name: str, size: int = 224) -> int:
    with torch.device("meta"):
        backbone = describe_model(timm.create_model(name).eval(), size)
    plan = plan_insertions(backbone, "ssf")
    total = 0
    for item in plan.insertions:
        with torch.device("meta"):
            adapter = SCHEME.build(item.site, item.form, SCHEME.configure(item.config))
        total += sum(parameter.numel() for parameter in adapter.parameters())
    return total


def test_parameters_of_a_vit() -> None:
    # the patches, per block two norms, qkv, proj, fc1, fc2, and the last norm
    assert (
        count("vit_base_patch16_224") == 2 * (768 + 12 * (768 + 3 * 768 + 768 + 768 + 4 * 768 + 768) + 768) == 205_824
    )


def test_parameters_of_a_resnet() -> None:
    # each conv and each batch norm: two to a conv's channels
    bottlenecks = sum(n * (w + w + 4 * w) + 4 * w for n, w in ((3, 64), (4, 128), (6, 256), (3, 512)))
    assert count("resnet50") == 2 * 2 * (64 + bottlenecks)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_all_of_a_model_folds(name: str) -> None:
    trait = {"test_resnet": "plain", "test_vit": "tokens", "test_convnext": "layer-scaled"}[name]
    model = trained(trait, "ssf")
    merged, report = merge(model, dtype=torch.float64)
    assert (report.merged, report.total) == (len(model.plan.insertions), len(model.plan.insertions))
    assert merged.plan.insertions == ()
    assert report.verified
    assert all(row.error_fp64 is not None and row.error_fp64 <= 1e-12 for row in report.sites)
    assert min(row.effect or 0 for row in report.sites) > 0.01

    size = model.preprocessing.input_size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        wanted, got = copy.deepcopy(model).double().eval()(images), merged(images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def lively(layer: nn.Module) -> nn.Module:
    return randomise(layer.double()).eval()


NORMED = {"NCHW": (12, 5, 7), "NHWC": (5, 7, 12), "NLC": (9, 12), "NC": (12,)}
TAKING: list[tuple[nn.Module, Layout, tuple[int, ...]]] = [
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), "NCHW", (8, 6, 9)),
    (nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"), "NCHW", (8, 6, 9)),
    (layers.Conv2dSame(8, 12, 3, stride=2), "NCHW", (8, 6, 9)),
    (nn.Linear(8, 12, bias=False), "NLC", (9, 8)),
    (nn.Linear(8, 12), "NHWC", (5, 7, 8)),
    (nn.BatchNorm2d(12), "NCHW", NORMED["NCHW"]),
    (layers.BatchNormAct2d(12, apply_act=False), "NCHW", NORMED["NCHW"]),
    (nn.LayerNorm(12), "NLC", NORMED["NLC"]),
    (nn.LayerNorm(12), "NC", NORMED["NC"]),
    (layers.LayerNorm(12), "NHWC", NORMED["NHWC"]),
    (layers.LayerNorm2d(12), "NCHW", NORMED["NCHW"]),
    (nn.GroupNorm(4, 12), "NCHW", NORMED["NCHW"]),
    (layers.GroupNorm1(12), "NCHW", NORMED["NCHW"]),
    (layers.GroupNormAct(12, 4, apply_act=False), "NCHW", NORMED["NCHW"]),
]


@pytest.mark.parametrize(("layer", "layout", "shape"), TAKING, ids=lambda item: type(item).__name__)
def test_a_layer_takes_scale_and_shift_up(layer: nn.Module, layout: Layout, shape: tuple[int, ...]) -> None:
    layer = lively(layer)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        h = layer(x)
    adapter = build(layer_site(layout, tuple(h.shape[1:]))).double()
    outcome = SCHEME.merge(layer_site(layout, tuple(h.shape[1:])), "sequential", adapter, layer)
    assert isinstance(outcome, MergedLayer)
    assert outcome.weight.dtype == torch.float64
    merged: Any = copy.deepcopy(layer)
    merged.weight, merged.bias = nn.Parameter(outcome.weight), nn.Parameter(outcome.bias)
    with torch.no_grad():
        wanted = h + reference(h, adapter.scale, adapter.shift, layout)
        torch.testing.assert_close(merged(x), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


class Doubling(nn.LayerNorm):
    """A norm that does more behind its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


REFUSING: list[tuple[nn.Module | None, str]] = [
    (layers.StdConv2d(8, 8, 3), "weight of a StdConv2d is computed at run time"),
    (layers.ScaledStdConv2dSame(8, 8, 3), "weight of a ScaledStdConv2dSame is computed at run time"),
    (layers.BatchNormAct2d(8), "ReLU inside the BatchNormAct2d stands between its weight and this scale"),
    (layers.GroupNormAct(8, 4), "ReLU inside the GroupNormAct"),
    (LayerNorm2dNoBias(8), "the LayerNorm2dNoBias has no bias that could take the shift up"),
    (Doubling(8), "Doubling is no plain"),
    (layers.RmsNorm(8), "RmsNorm is no plain convolution, linear layer or norm"),
    (layers.EvoNorm2dS0(8, group_size=4), "EvoNorm2dS0 is no plain"),
    (None, "is no plain"),
]


@pytest.mark.parametrize(("layer", "said"), REFUSING, ids=lambda item: type(item).__name__)
def test_what_does_more_is_refused(layer: nn.Module | None, said: str) -> None:
    outcome = SCHEME.merge(layer_site(), "sequential", build(layer_site()), layer)
    assert isinstance(outcome, Refusal)
    assert said in outcome.reason


def test_it_keeps_half_precision() -> None:
    adapter = build(layer_site())
    h = torch.randn(2, *SHAPES["NCHW"], generator=torch.Generator().manual_seed(0))
    half = adapter(h.bfloat16())
    assert half.dtype == torch.bfloat16
    expected = adapter(h)
    assert (half.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_convs_and_their_norms_both_fold_on_a_wide_picture() -> None:
    backbone = describe_model(randomise(timm.create_model("test_resnet", num_classes=7)).eval(), 64)
    backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, input_size=(3, 48, 80)))
    model = trained((backbone, survey(backbone)), "ssf")
    merged, report = merge(model, dtype=torch.float64)
    assert report.merged == report.total
    # the convs have no bias in the base: what β gave them went on into the norms behind them
    assert report.timm_loadable, report.timm_reason
    x = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double().eval()(x)
        torch.testing.assert_close(merged(x), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
