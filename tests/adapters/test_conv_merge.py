"""Folding convs into convs, on impulses and random maps, against the two convs computed one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cadapt.adapters import Refusal, Regrouped
from cadapt.adapters.conv_merge import add_to_layer, find_plain_conv, fold_behind, fold_beside
from cadapt.site import Site

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def run(conv: nn.Conv2d, outcome: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, outcome.weight, outcome.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("adds_bias", [True, False])
@pytest.mark.parametrize(("wide", "narrow"), [(3, 1), (3, 3), (5, 3), (7, 1)])
def test_a_kernel_beside_a_conv_joins_its_centre(wide: int, narrow: int, adds_bias: bool, has_bias: bool) -> None:
    conv = nn.Conv2d(4, 6, wide, stride=2, padding=wide // 2, bias=has_bias).double()
    kernel, bias = draw(6, 4, narrow, narrow), draw(6) if adds_bias else None
    outcome: Any = fold_beside(conv, kernel, bias)
    assert (outcome.bias is None) == (not has_bias and not adds_bias)
    x = draw(2, 4, 11, 12)
    wanted = conv(x) + F.conv2d(x, kernel, bias, stride=2, padding=narrow // 2)
    torch.testing.assert_close(run(conv, outcome, x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("adds_bias", [True, False])
def test_a_mix_behind_a_conv_joins_its_kernel(adds_bias: bool, has_bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=has_bias).double()
    mix, bias = draw(6, 6), draw(6) if adds_bias else None
    outcome: Any = fold_behind(conv, mix, bias)
    assert (outcome.bias is None) == (not has_bias and not adds_bias)
    x = draw(2, 4, 11, 12)
    hidden = conv(x)
    wanted = hidden + F.conv2d(hidden, mix[:, :, None, None], bias)
    torch.testing.assert_close(run(conv, outcome, x), wanted, rtol=0, atol=1e-12)


def test_groups_take_up_what_stays_within_them() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    kernel = draw(6, 4, 1, 1)
    kernel[:3, 2:] = kernel[3:, :2] = 0
    x = draw(2, 4, 9, 9)
    outcome = fold_beside(conv, kernel, None)
    torch.testing.assert_close(run(conv, outcome, x), conv(x) + F.conv2d(x, kernel), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("kept", [1, 2])
def test_what_leaves_the_groups_is_a_conv_of_as_many_as_hold_it(groups: int, kept: int) -> None:
    if kept == groups:
        return
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups).double()
    # dense within `kept` blocks and nothing between them
    within = torch.block_diag(*(draw(16 // kept, 8 // kept) for _ in range(kept)))
    x = draw(2, 8, 9, 9)
    beside = fold_beside(conv, within[:, :, None, None], None)
    mix = torch.block_diag(*(draw(16 // kept, 16 // kept) for _ in range(kept)))
    behind = fold_behind(conv, mix, None)
    for outcome, wanted in (
        (beside, conv(x) + F.conv2d(x, within[:, :, None, None])),
        (behind, conv(x) + F.conv2d(conv(x), mix[:, :, None, None])),
    ):
        assert isinstance(outcome, Regrouped) and outcome.groups == kept
        merged = outcome.build()
        assert merged.groups == kept and merged.weight.shape == (16, 8 // kept, 3, 3)
        got = F.conv2d(x, merged.weight, merged.bias, conv.stride, conv.padding, conv.dilation, kept)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_kernel_larger_than_the_conv_s_is_refused() -> None:
    outcome: Any = fold_beside(nn.Conv2d(4, 4, 1), draw(4, 4, 3, 3), None)
    assert "(3, 3) kernel is larger than the conv's (1, 1)" in outcome.reason


def test_sums_are_in_fp64_and_leave_the_layer_alone() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    outcome = add_to_layer(layer, torch.full((2, 3), 1e-12, dtype=torch.float64), None)
    assert outcome.weight.dtype == torch.float64
    assert not outcome.weight.requires_grad
    torch.testing.assert_close(outcome.weight - before.double(), torch.full((2, 3), 1e-12, dtype=torch.float64))
    assert outcome.bias is not None and torch.equal(outcome.bias, layer.bias.detach().double())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("layer", "kind", "operator", "words"),
    [
        (None, "conv", "Conv2d", "not one conv"),
        (nn.Conv2d(4, 4, 3), "block", "", "what the block computes is not one conv"),
        (nn.Conv2d(4, 4, 3), "conv", "add", "a add of several convs"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "conv", "Conv2d", "'circular'"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), "conv", "Sequential", "2 convs side by side"),
        (nn.Linear(4, 4), "linear", "Linear", "no plain conv"),
    ],
)
def test_what_is_no_plain_conv_is_refused(layer: nn.Module | None, kind: Any, operator: str, words: str) -> None:
    site = Site(path="a", kind=kind, in_shape=(4, 8, 8), out_shape=(4, 8, 8), operator=operator)
    outcome = find_plain_conv(site, layer)
    assert isinstance(outcome, Refusal) and words in outcome.reason


def test_a_one_by_one_conv_among_the_linear_layers_is_a_plain_conv() -> None:
    conv = nn.Conv2d(4, 4, 1)
    site = Site(path="a", kind="linear", in_shape=(4, 8, 8), out_shape=(4, 8, 8), operator="Conv2d")
    assert find_plain_conv(site, conv) is conv
