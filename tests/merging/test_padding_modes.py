"""Convs that pad by other than zeros: adapters beside them pad alike and fold; old files that did not are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cadapt.adapters import get_scheme
from cadapt.adapters.conv_reach import pads_by_mode
from cadapt.errors import RefusedError
from cadapt.merging import merge
from cadapt.plan import Plan
from cadapt.planning import plan_insertions
from cadapt.site import Site
from cadapt.surgery import operate
from tests.adapters.places import assert_near, conv_site
from tests.merging.cases import linear, toy, trained
from tests.models import enliven

MODES = ["reflect", "replicate", "circular"]


def conv(mode: str = "reflect", size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, size, padding=size // 2, padding_mode=mode, **settings)


@pytest.mark.parametrize("mode", [*MODES, "zeros"])
def test_the_finder_notes_what_a_conv_pads_with(mode: str) -> None:
    site = next(item for item in toy(conv(mode))[1].sites if item.path == "blocks.0.conv")
    assert site.padding_mode == mode
    assert Site.from_json(site.to_json()) == site


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_pads_as_its_conv_does(mode: str) -> None:
    method = get_scheme("conv-par")
    # its own kernel is smaller, which reaches over the edge all the same
    adapter: Any = method.build(conv_site(conv(mode, 5)), "parallel", method.configure({"kernel": 3, "gamma": 1}))
    enliven(adapter, scale=0.3)
    x = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))
    depth, point = adapter.depthwise, adapter.pointwise
    padded = functional.pad(x, (1, 1, 1, 1), mode=mode)
    hidden = functional.conv2d(padded, depth.weight, depth.bias, groups=8).relu()
    wanted = adapter.alpha * functional.conv2d(hidden, point.weight, point.bias)
    assert_near(adapter(x), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_smaller_kernel_folds_too(mode: str, kernel: int) -> None:
    _, report = merge(linear(toy(conv(mode, 5, stride=2)), kernel=kernel))
    assert [row.status for row in report.sites] == ["exact"] and report.verified


@pytest.mark.parametrize("scheme", ["residual-par", "consolidator"])
def test_where_the_centre_tap_meets_padding_it_meets_the_conv_s_own(scheme: str) -> None:
    wide = nn.Conv2d(8, 8, 3, padding=3, padding_mode="reflect")
    site = conv_site(wide)
    method = get_scheme(scheme)
    adapter: Any = method.build(
        site, "parallel", method.configure({"kernels": "all"} if scheme != "residual-par" else {})
    )
    enliven(adapter, scale=0.5)
    outcome: Any = method.merge(site, "parallel", adapter.double(), wide.double())
    x = torch.randn(2, 8, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = functional.pad(x, (3, 3, 3, 3), mode="reflect")
    assert_near(functional.conv2d(padded, outcome.weight, outcome.bias), wide(x) + adapter(x), 1e-12)


def as_before(plan: Plan) -> Plan:
    """What a file from before holds: no padding mode, which is zeros."""
    records = [
        {key: value for key, value in item.site.to_json().items() if key != "padding_mode"} for item in plan.insertions
    ]
    sites = [Site.from_json(record) for record in records]
    return replace(
        plan, insertions=tuple(replace(item, site=site) for item, site in zip(plan.insertions, sites, strict=True))
    )


@pytest.mark.parametrize("scheme", ["conv-par", "lora"])
def test_a_file_whose_adapter_padded_by_zeros_is_refused_with_what_to_do(scheme: str) -> None:
    backbone, sites = toy(conv())
    older = as_before(plan_insertions(backbone, scheme, surveyed=sites))
    with pytest.raises(RefusedError, match="padding_mode reflect, expected zeros") as caught:
        operate(backbone, older, sites)
    assert caught.value.hint is not None and "train again" in caught.value.hint


@pytest.mark.parametrize("scheme", ["residual-par", "residual-seq", "conv-seq", "consolidator", "ssf"])
def test_a_file_from_before_is_read_where_its_adapter_pads_nothing(scheme: str) -> None:
    backbone, sites = toy(conv())
    plan = plan_insertions(backbone, scheme, surveyed=sites)
    now, then = operate(backbone, plan, sites).eval(), operate(backbone, as_before(plan), sites).eval()
    assert then.plan == plan
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for model in (now, then):
        enliven(model.adapters, scale=0.2)
    with torch.no_grad():
        assert torch.equal(now(images), then(images))


@pytest.mark.parametrize("scheme", ["lora", "all-conv-par"])
def test_a_one_by_one_conv_that_pads_nothing_folds_whatever_its_mode(scheme: str) -> None:
    layer = nn.Conv2d(8, 8, 1, padding="same", padding_mode="reflect")
    _, report = merge(trained(toy(layer), scheme))
    assert report.verified and {row.status for row in report.sites} == {"exact"}


@pytest.mark.parametrize("scheme", ["residual-par", "consolidator"])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_a_centre_tap_meets_padding_only_where_the_margin_is_wide(scheme: str, padding: int) -> None:
    method = get_scheme(scheme)
    site = conv_site(nn.Conv2d(8, 8, 3, padding=padding, padding_mode="reflect"))
    assert pads_by_mode(method.build(site, "parallel", method.configure({}))) == (padding > 1)


def test_a_file_from_before_is_read_beside_convs_that_pad_by_zeros() -> None:
    model = trained(toy(conv("zeros")), "residual-par")
    record = {key: value for key, value in model.plan.insertions[0].site.to_json().items() if key != "padding_mode"}
    assert Site.from_json(record) == model.plan.insertions[0].site


@pytest.mark.parametrize("value", ["mirror", 1, ["reflect"]])
def test_a_forged_mode_is_refused(value: Any) -> None:
    with pytest.raises(RefusedError, match="padding_mode of a Site"):
        Site.from_json({**conv_site(conv()).to_json(), "padding_mode": value})


def test_a_map_too_small_to_be_padded_by_itself_is_said_so() -> None:
    site = conv_site(conv(size=3), side=3)
    method = get_scheme("conv-par")
    reason = method.fits(site, "parallel", method.configure({"kernel": 7}))
    assert reason == "its 3×3 grid is too small to be padded by 3×3 in the mode 'reflect'"
    assert method.fits(site, "parallel", method.configure({"kernel": 5})) is None
