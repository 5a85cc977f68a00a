"""Every mergeable scheme × every kind of conv, in random small graphs: merged equals unmerged, and what folds folds.

Hypothesis draws the order of the blocks, their shortcuts, norms and activations, which convs have a bias, and how the
merge is asked for; the kinds of convs of a graph are given, so that each cell of the table is met. The effect of the
adapters is made at least a tenth of the logits first: of adapters that do nothing any merge is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cadapt.adapted import AdaptedModel
from cadapt.merging import merge
from cadapt.planning import plan_insertions
from cadapt.surgery import adapter_path, operate
from tests.merging.cases import traced
from tests.models import TinyNet, enliven

BOUND = 1e-10
EFFECT = 0.1
SIDE = 32

Make = Callable[[bool], nn.Conv2d]


def _conv(kind: Callable[..., nn.Conv2d] = nn.Conv2d, size: Any = 3, **settings: Any) -> Make:
    return lambda bias: kind(8, 8, size, bias=bias, **settings)


# families: the convs of one graph
KINDS: Mapping[str, Mapping[str, Make]] = {
    "plain": {
        "one by one": _conv(size=1),
        "wide": _conv(size=5, padding=2),
        "oblong": _conv(size=(1, 5), padding=(0, 2)),
        "strided": _conv(padding=1, stride=2),
        "dilated": _conv(padding=2, dilation=2),
        "even": _conv(size=2, stride=2),
    },
    "grouped": {
        "two groups": _conv(padding=1, groups=2),
        "depth-wise": _conv(padding=1, groups=8),
        "two groups, one by one": _conv(size=1, groups=2),
        "two groups, strided, dilated": _conv(padding=2, stride=2, dilation=2, groups=2),
    },
    "padded": {
        "reflect": _conv(padding=1, padding_mode="reflect"),
        "replicate, strided": _conv(size=5, padding=2, padding_mode="replicate", stride=2),
        "circular, dilated": _conv(padding=2, dilation=2, padding_mode="circular"),
        "reflect, depth-wise": _conv(padding=1, padding_mode="reflect", groups=8),
        "torch's same, reflect": _conv(size=5, padding="same", padding_mode="reflect"),
    },
    "same": {
        "same": _conv(Conv2dSame),
        "same, strided": _conv(Conv2dSame, stride=2),
        "same, depth-wise, strided": _conv(Conv2dSame, stride=2, groups=8),
        "same, dilated, two groups": _conv(Conv2dSame, dilation=2, groups=2),
    },
    "standardised": {
        "StdConv": _conv(StdConv2d),
        "StdConv, same, strided": _conv(StdConv2dSame, stride=2),
        "StdConv, two groups, one by one": _conv(StdConv2d, 1, groups=2),
        "StdConv, same, dilated": _conv(StdConv2dSame, dilation=2),
    },
    "scaled": {
        "ScaledStdConv": _conv(ScaledStdConv2d),
        "ScaledStdConv, same, strided": _conv(ScaledStdConv2dSame, stride=2),
        "ScaledStdConv, depth-wise": _conv(ScaledStdConv2d, groups=8),
        "weight norm, reflect": lambda bias: weight_norm(_conv(padding=1, padding_mode="reflect")(bias)),
    },
}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "conv-par": {"activation": "identity"},
    "conv-seq": {"activation": "identity", "kernel": 1},
    "lora": {"rank": 2, "alpha": 3.0},
    "consolidator": {"kernels": "all"},
    "residual-par": {},
    "residual-seq": {},
    "all-conv-par": {},
    "ssf": {},
    "bias": {},
    "norm": {},
}
# their adapters stand at convs with a kernel over 1 only
WIDE_ONLY = ("conv-par", "conv-seq", "residual-par", "residual-seq")
NORMS = {"none": nn.Identity, "batch": lambda: nn.BatchNorm2d(8), "group": lambda: nn.GroupNorm(2, 8)}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Block(nn.Module):
    """act(norm(conv(x))), and a shortcut, plain or projected, where the conv keeps the grid or where asked."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module, shortcut: str) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act
        keeps = max(conv.stride) == 1
        self.project = nn.Identity() if keeps and shortcut == "plain" else nn.Conv2d(8, 8, 1, stride=conv.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))) + self.project(x)


@st.composite
def graphs(draw: st.DrawFn, family: str) -> tuple[nn.Module, list[str]]:
    """A small net with one block for each kind of a family, and the kinds in their order."""
    kinds = draw(st.permutations(sorted(KINDS[family])))
    torch.manual_seed(draw(st.integers(0, 99)))
    blocks = [
        Block(
            KINDS[family][kind](draw(st.booleans())),
            NORMS[draw(st.sampled_from(sorted(NORMS)))](),
            ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))](),
            draw(st.sampled_from(["plain", "projected"])),
        )
        for kind in kinds
    ]
    return TinyNet(*blocks), list(kinds)


def _without(model: AdaptedModel, images: torch.Tensor) -> torch.Tensor:
    """The logits with every adapter silenced and every difference zero."""
    deltas = [parameter for name, parameter in model.named_parameters() if name.startswith("adapters.delta.")]
    kept = [delta.clone() for delta in deltas]
    hooks = [
        model.get_submodule(adapter_path(item)).register_forward_hook(lambda module, inputs, output: output * 0)
        for item in model.plan.insertions
    ]
    for delta in deltas:
        delta.zero_()
    logits: torch.Tensor = model(images)
    for delta, value in zip(deltas, kept, strict=True):
        delta.copy_(value)
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
def make_lively(model: AdaptedModel, images: torch.Tensor) -> float:
    """Give the adapters random values, more and more until they change the logits by a tenth; returns by how much."""
    for step in range(20):
        enliven(model.adapters, seed=step, scale=0.1 * 1.3**step)
        logits = model(images)
        effect = float((logits - _without(model, images)).abs().max() / logits.abs().max())
        if effect >= EFFECT:
            break
    return effect


def _kinds_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        path: (type(module), getattr(module, "groups", None))
        for path, module in model.named_modules()
        if not path.startswith("adapters") and path
    }


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
# not shrunk: a graph of fewer blocks says no more, and each attempt trains and merges anew
@hypothesis.settings(
    max_examples=2, deadline=None, database=None, derandomize=True, phases=(hypothesis.Phase.generate,)
)
@hypothesis.given(data=st.data())
def test_merged_equals_unmerged(scheme: str, family: str, data: st.DataObject) -> None:
    net, kinds = data.draw(graphs(family))
    asked = data.draw(st.sampled_from([{"dense": True}, {"dense": True}, {}, {"as_deltas": True}]))
    backbone, sites = traced(net.double(), SIDE)
    plan = plan_insertions(backbone, scheme, SCHEMES[scheme], surveyed=sites)
    model = operate(backbone, plan, sites).eval()
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert make_lively(model, images) >= EFFECT

    merged, report = merge(model, dtype=torch.float64, **asked)

    with torch.no_grad():
        wanted, got = model(images), merged(images)
    assert float((wanted - got).abs().max()) <= BOUND * float(wanted.abs().max())
    assert report.verified
    for row in report.sites:
        assert row.status == "exact" or (row.status in ("kept", "simplified") and row.reason), row
    if "as_deltas" in asked:
        assert _kinds_of(merged) == _kinds_of(model)
    if "dense" not in asked or not model.plan.insertions:
        return
    assert not merged.plan.insertions, [row.reason for row in report.sites if row.reason]
    folded = {row.site for row in report.sites}
    for index, kind in enumerate(kinds):
        met = "one by one" not in kind or scheme not in WIDE_ONLY
        assert (f"blocks.{index}.conv" in folded) == met, (scheme, kind)
