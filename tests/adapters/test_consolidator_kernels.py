"""Consolidator beside convs with a kernel over 1, where it is asked for: what it reads, and that it folds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters import MergedLayer, get_scheme
from cadapt.adapters.consolidator import pack_branches
from cadapt.merging import merge
from cadapt.planning import plan_insertions
from cadapt.site import Site
from cadapt.surgery import operate
from tests.adapters.places import assert_near, conv_site
from tests.models import enliven, surveyed

METHOD = get_scheme("consolidator")


def build(site: Site, **settings: Any) -> Any:
    adapter = METHOD.build(site, "parallel", METHOD.configure(settings))
    enliven(adapter, scale=0.5)
    return adapter


CONVS = {
    "padded": lambda: nn.Conv2d(12, 24, 3, padding=1),
    "cropped, strided": lambda: nn.Conv2d(12, 24, 5, stride=2),
    "reflect, dilated": lambda: nn.Conv2d(12, 24, 3, padding=3, dilation=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(12, 24, 3, padding=1, groups=6),
    "depth-wise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "same, strided": lambda: Conv2dSame(12, 24, 3, stride=2),
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_beside_a_larger_kernel_it_reads_the_centre_tap_and_folds_into_it(case: str, stored: bool) -> None:
    conv = CONVS[case]()
    site = conv_site(conv)
    conv = conv.double()
    adapter = build(site, kernels="all", stored=stored).double()
    outcome = METHOD.merge(site, "parallel", adapter, conv)
    assert isinstance(outcome, MergedLayer), case
    assert outcome.weight.shape == conv.weight.shape
    for side in (12, 13):
        x = torch.randn(2, 12, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            wanted = conv(x) + adapter(x)
            own = conv.weight, conv.bias
            conv.weight, conv.bias = nn.Parameter(outcome.weight), nn.Parameter(outcome.bias)
            assert_near(conv(x), wanted, 1e-13)
            conv.weight, conv.bias = own


def test_larger_kernels_are_taken_only_where_asked() -> None:
    backbone, sites = surveyed("grouped")
    paths = {
        kernels: {item.site.path for item in plan.insertions}
        for kernels in ("one", "all")
        for plan in [plan_insertions(backbone, "consolidator", {"kernels": kernels}, surveyed=sites)]
    }
    default = plan_insertions(backbone, "consolidator", surveyed=sites)
    assert {item.site.path for item in default.insertions} == paths["one"] < paths["all"]
    model = operate(backbone, plan_insertions(backbone, "consolidator", {"kernels": "all"}, surveyed=sites), sites)
    enliven(model.adapters, scale=0.3)
    report = merge(model)[1]
    # its groups are multiples of the convs' own
    assert report.merged == report.total and report.verified
    folded, config = pack_branches(
        build(conv_site(CONVS["grouped"]()), kernels="all", groups=(12, 6)),
        METHOD.configure({"kernels": "all", "groups": "12,6"}),
    )
    assert folded.geometry is not None and config.groups == (6,)
