"""Convs that pad by other than zeros: adapters beside them pad alike and fold; old files that did not are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cadapt.adapters import get_scheme
from cadapt.errors import RefusedError
from cadapt.merging import merge
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


def test_a_file_whose_adapter_padded_by_zeros_is_refused_with_what_to_do() -> None:
    backbone, sites = toy(conv())
    plan = plan_insertions(backbone, "residual-par", surveyed=sites)
    insertion = plan.insertions[0]
    # what a file from before holds: no padding mode, which is zeros
    record = {key: value for key, value in insertion.site.to_json().items() if key != "padding_mode"}
    older = replace(plan, insertions=(replace(insertion, site=Site.from_json(record)),))
    with pytest.raises(RefusedError, match="padding_mode reflect, expected zeros") as caught:
        operate(backbone, older, sites)
    assert caught.value.hint is not None and "train again" in caught.value.hint


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
