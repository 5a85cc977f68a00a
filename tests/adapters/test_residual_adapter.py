"""Residual adapters against their formula, pixel by pixel; where they go, what they cost, and how they fold."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters import get_scheme
from cadapt.backbone import Backbone, describe_model
from cadapt.errors import CadaptError
from cadapt.merging import merge
from cadapt.plan import Form, Plan
from cadapt.planning import Survey, plan_insertions, survey
from cadapt.site import Site
from cadapt.surgery import operate
from tests.adapters.places import assert_near, conv_site
from tests.merging.cases import same_padded, toy, trained
from tests.models import enliven, surveyed

CONVS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "wider": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "valid": lambda: nn.Conv2d(8, 8, 3),
    "valid, strided": lambda: nn.Conv2d(8, 8, 5, stride=2),
    "half-padded": lambda: nn.Conv2d(8, 8, 7, padding=2, stride=3),
    "over-padded": lambda: nn.Conv2d(8, 8, 3, padding=3),
    "patches": lambda: nn.Conv2d(8, 12, 2, stride=2),
    "large patches": lambda: nn.Conv2d(8, 12, 4, stride=4),
    "even": lambda: nn.Conv2d(8, 8, 4, padding=1, stride=2),
    "even, dilated": lambda: nn.Conv2d(8, 8, 2, padding=1, dilation=2),
    "oblong": lambda: nn.Conv2d(8, 8, (1, 7), padding=(0, 3)),
    "one by one": lambda: nn.Conv2d(8, 12, 1, stride=2),
    "padding='same'": lambda: nn.Conv2d(8, 8, 5, padding="same"),
    "same": lambda: same_padded(kernel_size=3),
    "same, strided": lambda: same_padded(kernel_size=3, stride=2),
    "same, long stride": lambda: same_padded(kernel_size=2, stride=3),
    "same, dilated": lambda: same_padded(kernel_size=5, stride=2, dilation=2),
}


def build(site: Site, form: Form = "parallel", scheme: str = "residual-par") -> nn.Module:
    method = get_scheme(scheme)
    config = method.configure({})
    assert method.fits(site, form, config) is None
    adapter = method.build(site, form, config)
    enliven(adapter, scale=0.5)
    return adapter


def pixels(size: int, out_size: int, conv: nn.Conv2d, axis: int) -> list[int]:
    """Which pixel of the input lies under the centre tap for each output, possibly one of the padding."""
    kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
    if isinstance(conv, Conv2dSame) or conv.padding == "same":
        before = max((out_size - 1) * stride + dilation * (kernel - 1) + 1 - size, 0) // 2
    else:
        before = int(conv.padding[axis])
    return [index * stride + dilation * ((kernel - 1) // 2) - before for index in range(out_size)]


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: nn.Conv2d) -> torch.Tensor:
    """A times the pixel of x that each output's centre tap meets, one output at a time."""
    with torch.no_grad():
        height, width = conv(x).shape[2:]
    rows = pixels(x.shape[2], height, conv, 0)
    columns = pixels(x.shape[3], width, conv, 1)
    result = []
    for row in rows:
        line = []
        for column in columns:
            inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
            pixel = x[:, :, row, column] if inside else torch.zeros_like(x[:, :, 0, 0])
            line.append(pixel @ weight[:, :, 0, 0].T + (0 if bias is None else bias))
        result.append(torch.stack(line, dim=2))
    return torch.stack(result, dim=2)


@pytest.mark.parametrize("side", [12, 13])
@pytest.mark.parametrize("scheme", ["residual-par", "all-conv-par"])
@pytest.mark.parametrize("case", CONVS)
def test_it_computes_the_formula(case: str, scheme: str, side: int) -> None:
    conv = CONVS[case]()
    adapter: Any = build(conv_site(conv, side), scheme=scheme)
    x = torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = adapter.pointwise.bias
    assert (bias is not None) == (scheme == "all-conv-par")
    got, wanted = adapter(x), reference(x, adapter.pointwise.weight, bias, conv)
    assert_near(got, wanted)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    inputs = [x, *adapter.parameters()]
    for one, other in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(wanted, inputs, cotangent), strict=True
    ):
        assert_near(one, other)


@pytest.mark.parametrize("case", ["plain", "strided", "dilated", "patches", "even", "one by one"])
def test_output_i_reads_pixel_i_times_the_stride(case: str) -> None:
    conv = CONVS[case]()
    stride = conv.stride[0]
    adapter: Any = build(conv_site(conv, 12))
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    wanted = torch.einsum("oc,bchw->bohw", adapter.pointwise.weight[:, :, 0, 0], x[:, :, ::stride, ::stride])
    assert_near(adapter(x), wanted)


def test_channels_last_and_behind_a_conv() -> None:
    site = conv_site(CONVS["strided"]())
    x = torch.randn(2, 8, 13, 13, generator=torch.Generator().manual_seed(0))
    first: Any = build(site)
    last: Any = build(replace(site, layout="NHWC", in_shape=(13, 13, 8), out_shape=(7, 7, 12)))
    last.load_state_dict(first.state_dict())
    assert_near(last(x.movedim(1, -1)), first(x).movedim(1, -1))

    behind: Any = build(site, "sequential", "residual-seq")
    hidden = torch.randn(2, 12, 7, 7, generator=torch.Generator().manual_seed(1))
    assert_near(behind(hidden), torch.einsum("oc,bchw->bohw", behind.pointwise.weight[:, :, 0, 0], hidden))
    assert sum(parameter.numel() for parameter in behind.parameters()) == 12 * 12


@pytest.mark.parametrize("scheme", ["residual-par", "residual-seq"])
def test_the_adapted_model_joins_before_the_norm(scheme: str) -> None:
    backbone, sites = toy(nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False), norm=True)
    model = operate(backbone, plan_insertions(backbone, scheme, surveyed=sites), sites).eval()
    enliven(model.adapters, scale=0.5)
    (weight,) = model.adapters.parameters()
    base: Any = backbone.model
    block = base.blocks[0]
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = base.stem(images)
        h = block.conv(x)
        read = x[:, :, ::2, ::2] if scheme == "residual-par" else h
        y = F.relu(block.norm(h + torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], read)))
        wanted = base.fc((y + block.project(x)).mean((2, 3)))
        assert_near(model(images), wanted)
        assert float((wanted - base(images)).abs().max()) > 0.01


@functools.cache
def meta_base(name: str) -> tuple[Backbone, Survey]:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    backbone = describe_model(model, 224)
    return backbone, survey(backbone)


def count(name: str, scheme: str) -> tuple[int, int]:
    """How many sites a scheme has on a base, and parameters."""
    backbone, sites = meta_base(name)
    plan = plan_insertions(backbone, scheme, surveyed=sites)
    model = operate(backbone, plan, sites)
    return len(plan.insertions), sum(parameter.numel() for parameter in model.adapters.parameters())


def convs_behind_the_stem(name: str) -> list[nn.Conv2d]:
    model = meta_base(name)[0].model
    convs = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    # BiT's classifier is a conv as well
    return [module for path, module in convs if path not in ("conv1", "stem.conv", "stem.0", "head.fc")]


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50x1_bit"])
def test_parameters_on_resnet50_are_those_of_the_formula(name: str) -> None:
    convs = convs_behind_the_stem(name)
    wide = sum(conv.in_channels * conv.out_channels for conv in convs if conv.kernel_size[0] > 1)
    every = sum((conv.in_channels + 1) * conv.out_channels for conv in convs)
    assert wide == 3 * 64**2 + 4 * 128**2 + 6 * 256**2 + 3 * 512**2
    assert count(name, "residual-par") == count(name, "residual-seq") == (16, wide)
    assert count(name, "all-conv-par") == (52, every)


def test_convs_between_stages_are_adapted_and_linear_layers_are_not() -> None:
    sizes = [(conv.in_channels, conv.out_channels) for conv in convs_behind_the_stem("convnext_tiny")]
    assert count("convnext_tiny", "residual-par") == (21, sum(before * after for before, after in sizes))
    assert count("convnext_tiny", "residual-seq") == (21, sum(after * after for _, after in sizes))
    assert count("convnext_tiny", "all-conv-par") == (21, sum((before + 1) * after for before, after in sizes))


def test_attention_is_no_conv() -> None:
    for scheme in ("residual-par", "residual-seq", "all-conv-par"):
        for trait in ("windowed", "tokens"):
            backbone, sites = surveyed(trait)
            with pytest.raises(CadaptError, match="nothing to adapt"):
                plan_insertions(backbone, scheme, surveyed=sites)


def test_a_grid_that_the_kernel_does_not_give_is_refused() -> None:
    site = conv_site(CONVS["plain"](), out_shape=(8, 6, 6))
    reason = get_scheme("residual-par").fits(site, "parallel", get_scheme("residual-par").configure({}))
    assert reason == "a 3×3 kernel with stride 1×1 takes its 13×13 grid to 13×13, not to 6×6"


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("scheme", ["residual-par", "residual-seq", "all-conv-par"])
def test_it_folds_into_the_conv_exactly(case: str, scheme: str) -> None:
    conv = CONVS[case]()
    form: Form = "sequential" if scheme == "residual-seq" else "parallel"
    adapter: Any = build(conv_site(conv), form, scheme).double()
    outcome: Any = get_scheme(scheme).merge(conv_site(conv), form, adapter, conv)
    conv = conv.double()
    for side in (12, 13, 16):
        x = torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
        with torch.no_grad():
            hidden = conv(x)
            delta = adapter(hidden if scheme == "residual-seq" else x)
            old = conv.weight, conv.bias
            conv.weight, conv.bias = nn.Parameter(outcome.weight), nn.Parameter(outcome.bias)
            got = conv(x)
            conv.weight, conv.bias = old
        assert_near(got, hidden + delta, 1e-12)
        assert float(delta.abs().max()) > 0.1 * float(hidden.abs().max())


@pytest.mark.parametrize("scheme", ["residual-par", "residual-seq", "all-conv-par"])
def test_a_whole_model_merges_to_its_own_architecture(scheme: str) -> None:
    model = trained("plain", scheme)
    merged, report = merge(model)
    assert report.verified and report.merged == report.total > 0
    assert report.timm_loadable
    assert report.parameters_after == report.parameters_before - sum(row.parameters_before for row in report.sites)
    assert report.end_to_end.logit_effect > 1e-3 * report.end_to_end.logit_scale
    assert report.end_to_end.max_abs_error_fp64 <= 1e-10 * report.end_to_end.logit_effect
    assert not merged.plan.insertions


@pytest.mark.parametrize(
    ("base", "scheme", "words"),
    [
        ("grouped", "residual-par", "groups, the sum would have"),
        ("depth-wise", "residual-seq", "times the multiply"),
        ("mixed-kernels", "residual-par", "convs"),
        ("re-parameterised", "residual-seq", "conv"),
        ("reused", "residual-par", "called 2 times"),
    ],
)
def test_what_does_not_fold_says_why_and_stays(base: str, scheme: str, words: str) -> None:
    _, report = merge(trained(base, scheme))
    kept = [row for row in report.sites if words in row.reason]
    assert kept
    assert all(row.status == "kept" for row in kept)
    assert not [row for row in report.sites if row.status == "refused"]


def test_the_plan_of_every_tiny_base_lists_convs_only() -> None:
    backbone, sites = surveyed("same-padded")
    plan = plan_insertions(backbone, "all-conv-par", surveyed=sites)
    assert isinstance(plan, Plan)
    for item in plan.insertions:
        assert isinstance(backbone.model.get_submodule(item.site.path), nn.Conv2d)
