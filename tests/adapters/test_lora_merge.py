"""Folding LoRA: into convs and linear layers exactly, else its scale into its own weight."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from cadapt.adapters.lora import fold_scale
from cadapt.merging import merge
from cadapt.site import Site
from tests.adapters.places import assert_near, conv_site, linear_site
from tests.adapters.test_lora import CONVS, METHOD, build
from tests.merging.cases import traced, trained
from tests.models import surveyed


@pytest.mark.parametrize("case", CONVS)
def test_it_folds_into_a_conv_exactly(case: str) -> None:
    conv = CONVS[case]()
    site = conv_site(conv)
    adapter = build(site, rank=2, alpha=3.0, dropout=0.1).double()
    outcome: Any = METHOD.merge(site, "parallel", adapter, conv)
    assert outcome.weight.dtype == torch.float64 and outcome.weight.shape == conv.weight.shape
    assert (outcome.bias is None) == (conv.bias is None)
    conv = conv.double()
    for side in (12, 13):
        x = torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
        with torch.no_grad():
            hidden, delta, own = conv(x), adapter(x), conv.weight
            conv.weight = nn.Parameter(outcome.weight)
            got = conv(x)
            conv.weight = own
        assert_near(got, hidden + delta, 1e-12)
        assert float(delta.abs().max()) > 0.1 * float(hidden.abs().max())


@pytest.mark.parametrize(
    "base", ["plain", "grouped", "depth-wise", "same-padded", "windowed", "tokens", "layer-scaled"]
)
def test_a_whole_model_merges_to_its_own_architecture(base: str) -> None:
    model = trained(base, "lora", alpha=4.0)
    merged, report = merge(model)
    assert report.verified and report.merged == report.total > 0
    # the very keys and shapes of the base: no bias has appeared, no adapter is left
    shapes = {name: tensor.shape for name, tensor in merged.state_dict().items() if not name.startswith("adapters.")}
    assert shapes == {name: tensor.shape for name, tensor in surveyed(base)[0].model.state_dict().items()}
    assert report.macs_after < report.macs_before
    assert all(row.error_fp64 is not None and row.error_fp64 <= 1e-12 for row in report.sites)
    assert all(row.effect is not None and row.effect > 1e-3 for row in report.sites)
    assert report.end_to_end.max_abs_error_fp64 <= 1e-10 * report.end_to_end.logit_effect
    assert not merged.plan.insertions


def test_a_merged_timm_model_is_one_that_timm_loads() -> None:
    assert merge(trained("tokens", "lora"))[1].timm_loadable


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("mixed-kernels", "convs"),
        ("re-parameterised", "conv"),
        ("reused", "called 2 times"),
    ],
)
def test_what_does_not_fold_says_why_and_loses_its_scale(base: str, words: str) -> None:
    _, report = merge(trained(base, "lora", alpha=4.0))
    rows = [row for row in report.sites if words in row.reason]
    assert rows
    assert all(row.status == "simplified" for row in rows)
    assert not [row for row in report.sites if row.status == "refused"]


def test_a_weight_that_is_read_without_a_call_is_not_merged() -> None:
    swin = SwinTransformerV2(img_size=64, num_classes=5, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)
    model = trained(traced(swin), "lora")
    _, report = merge(model)
    rows = {row.site.rpartition(".")[2]: row for row in report.sites}
    assert rows["qkv"].status == "kept" and "without calling it" in rows["qkv"].reason
    assert {name for name, row in rows.items() if row.status == "exact"} == {"proj", "fc1", "fc2"}


def test_a_subclass_of_a_linear_layer_is_not_merged() -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight / 2, self.bias)

    outcome: Any = METHOD.merge(linear_site("NC"), "parallel", build(linear_site("NC")), Halved(12, 20))
    assert "Halved" in outcome.reason


@pytest.mark.parametrize("place", [linear_site("NLC"), conv_site(nn.Conv2d(8, 8, 3, padding=1))])
def test_folding_the_scale_gives_an_equal_adapter(place: Site) -> None:
    config = METHOD.configure({"rank": 2, "alpha": 3.0, "dropout": 0.2})
    adapter = build(place, rank=2, alpha=3.0, dropout=0.2).double()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    folded: Any
    folded, new = fold_scale(adapter, config)
    assert (new.alpha, new.dropout, new.rank) == (None, 0.0, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    x = torch.randn(2, *place.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_near(folded(x), adapter(x), 1e-12)
    rebuilt = METHOD.build(place, "parallel", new).double()
    rebuilt.load_state_dict(folded.state_dict())
    assert torch.equal(rebuilt(x), folded(x))
