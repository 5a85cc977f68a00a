"""Where the Conv-Adapter schemes go, what they refuse and why, and which layers take no merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.adapters import Refusal, get_scheme
from cadapt.plan import Form
from cadapt.site import Site
from tests.adapters.test_conv_adapter import build, conv_site
from tests.adapters.test_conv_tokens import token_site


@pytest.mark.parametrize(
    ("change", "form", "said"),
    [
        ({"grid": None, "out_grid": None}, "parallel", "no grid"),
        ({"out_grid": None}, "sequential", "no grid"),
        ({"grid": (6, 8)}, "parallel", "input's 55 tokens are not 1 prefix tokens and a 6×8 grid"),
        ({"out_shape": (54, 12)}, "parallel", "output's 54 tokens are not 1 prefix tokens and a 6×9 grid"),
        ({"out_shape": (54, 12)}, "sequential", "output's 54 tokens"),
        ({"out_grid": (3, 4), "out_shape": (13, 12)}, "parallel", "takes its 6×9 grid to 6×9, not to 3×4"),
        ({"out_grid": (12, 18), "out_shape": (217, 12)}, "parallel", "not to 12×18"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(change: dict[str, Any], form: Form, said: str) -> None:
    scheme = get_scheme("res-par")
    reason = scheme.fits(replace(token_site(), **change), form, scheme.configure({}))
    assert reason is not None and said in reason
    assert "\n" not in reason


def test_an_even_kernel_is_refused_where_there_is_none() -> None:
    scheme = get_scheme("res-par")
    for form in ("parallel", "sequential"):
        reason = scheme.fits(token_site(), form, scheme.configure({"kernel": 4}))
        assert reason is not None and "K=4 cannot keep the grid" in reason


def sites_of_all_kinds() -> dict[str, Site]:
    conv = conv_site()
    return {
        "conv": conv,
        "downsample": replace(conv, path="down", kind="downsample", kernel=(2, 2), stride=(2, 2)),
        "windowed": replace(token_site(kernel=7), path="attn.windowed", kind="attention"),
        "global": replace(token_site(), path="attn.global", kind="attention"),
        "gridless": replace(token_site(), path="attn.gridless", kind="attention", grid=None, out_grid=None),
        "pooling": replace(token_site(prefix=0), path="pool"),
        "vectors": Site(path="fc", kind="block", in_shape=(8,), out_shape=(8,), layout="NC"),
    }


@pytest.mark.parametrize(
    ("scheme", "names", "expected"),
    [
        ("conv-par", None, ["conv", "downsample", "windowed", "global"]),
        ("conv-seq", None, ["conv", "downsample", "windowed", "global"]),
        ("res-par", None, ["downsample", "pooling"]),
        ("conv-seq", ["downsample"], ["downsample"]),
        ("res-seq", ["downsample"], []),
        ("res-seq", ["downsample", "vectors"], []),
        ("conv-par", ["gridless", "pooling"], []),
    ],
)
def test_where_each_scheme_goes(scheme: str, names: list[str] | None, expected: list[str]) -> None:
    sites = sites_of_all_kinds()
    method = get_scheme(scheme)
    placed = method.select([sites[name] for name in names or sites], method.configure({}))
    assert [item.site for item in placed] == [sites[name] for name in expected]
    # the schemes that go to convs join those between stages in parallel
    forms = {item.form for item in placed if item.site.kind == "downsample"}
    assert forms <= {"sequential" if scheme == "res-seq" else "parallel"}


class Branches(nn.Module):
    """A unit of two parallel convs, as re-parameterised nets train them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) + self.narrow(x)


class Routed(nn.Module):
    """A conv whose kernel is computed from the input."""


@pytest.mark.parametrize(
    ("layer", "said"),
    [(Branches(), "the Branches is 2 convs side by side"), (Routed(), "the Routed is no plain conv")],
)
def test_a_unit_is_not_merged_and_named(layer: nn.Module, said: str) -> None:
    method = get_scheme("conv-par")
    site = replace(conv_site(), operator=type(layer).__name__)
    adapter = build(site, gamma=2, activation="identity")
    outcome = method.merge(site, "parallel", adapter, layer)
    assert isinstance(outcome, Refusal)
    assert said in outcome.reason


def test_a_token_block_is_not_merged() -> None:
    site = token_site(activation="identity")
    adapter = build(site, gamma=2)
    outcome = get_scheme("res-par").merge(site, "parallel", adapter, nn.Identity())
    assert isinstance(outcome, Refusal)
    assert "not one conv" in outcome.reason
