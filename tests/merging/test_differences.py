"""Learned differences and consolidators merged into the base: equal in fp64, timm's architecture, the base's cost."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import cadapt
from cadapt.adapted import AdaptedModel
from cadapt.costing import cost
from cadapt.merging import MergeReport, merge, timm_state_dict
from cadapt.report.merge import summary_lines
from tests.merging.cases import CLASSES, ConvBlock, linear, traced, trained
from tests.models import TinyNet, enliven, make_images, randomise

SCHEMES: dict[str, dict[str, Any]] = {
    "bias": {},
    "norm": {},
    "consolidator": {},
    "consolidator+bias+norm": {},
    "conv-par+norm": {"activation": "identity"},
}
LOADABLE = ["plain", "tokens", "layer-scaled", "depth-wise"]
OTHERS = ["grouped", "same-padded", "windowed", "dense", "re-parameterised", "class-token", "pooled", "second-input"]


def merged_in_fp64(base: str, scheme: str, **settings: Any) -> tuple[AdaptedModel, AdaptedModel, MergeReport]:
    model = trained(base, scheme, **settings).double()
    merged, report = merge(model, dtype=torch.float64)
    return model, merged, report


def require_equal(model: nn.Module, merged: nn.Module, base: str, bound: float = 1e-10) -> None:
    images = make_images(base, batch=3, seed=9).double()
    with torch.no_grad():
        wanted, got = model(images), merged(images)
    assert float((wanted - got).abs().max()) <= bound * max(float(wanted.abs().max()), 1.0)


# the second-input base has no 1×1 convs in its blocks
CASES = [(scheme, base) for scheme in SCHEMES for base in (*LOADABLE, *OTHERS)
         if not ("consolidator" in scheme and base == "second-input")]  # fmt: skip


@pytest.mark.parametrize(("scheme", "base"), CASES)
def test_merged_equals_adapted_in_fp64(scheme: str, base: str) -> None:
    model, merged, report = merged_in_fp64(base, scheme, **SCHEMES[scheme])
    require_equal(model, merged, base)
    assert report.verified
    assert report.differences == len(model.plan.deltas)
    assert merged.plan.deltas == ()
    assert merged.plan.base.sha256 != model.plan.base.sha256
    # what was trained is seen in the logits, so that the comparison proves something
    assert report.end_to_end.logit_effect > 1e-2 * report.end_to_end.logit_scale
    if report.differences:
        assert f"{report.differences} of the base's tensors" in report.summary
        assert any("change them by" in line for line in summary_lines(report))
    if scheme != "conv-par+norm":
        assert report.merged == report.total


@pytest.mark.parametrize("base", LOADABLE)
@pytest.mark.parametrize("scheme", ["bias", "norm", "consolidator", "consolidator+bias+norm"])
def test_the_merged_model_is_timm_s_at_the_base_s_cost(scheme: str, base: str) -> None:
    model, merged, report = merged_in_fp64(base, scheme)
    assert report.timm_loadable, report.timm_reason
    names = {"plain": "test_resnet", "tokens": "test_vit", "layer-scaled": "test_convnext"}
    fresh = timm.create_model(names.get(base, "test_efficientnet"), num_classes=CLASSES).eval().double()
    fresh.load_state_dict(timm_state_dict(merged), strict=True)
    require_equal(model, fresh, base)
    plain = cost(fresh.float(), model.preprocessing.input_size, training=False)
    assert report.macs_after == plain.macs
    # the base's own classifier stays in the merged model beside the task's, unused
    classifier = merged.get_submodule(model.plan.head.path)  # type: ignore[union-attr]
    unused = sum(item.numel() for item in classifier.parameters())
    assert report.parameters_after - unused == plain.parameters
    assert not any(name.startswith("adapters.") and "head" not in name for name, _ in merged.named_parameters())


def test_new_biases_go_into_batch_norms_and_the_summary_says_so() -> None:
    _, merged, report = merged_in_fp64("plain", "bias")
    convs = [module for module in merged.modules() if isinstance(module, nn.Conv2d)]
    assert convs and all(conv.bias is None for conv in convs)
    assert f"{len(convs)} of them new biases that went into batch norms" in report.summary


def test_a_new_bias_that_no_norm_takes_stays_and_the_summary_says_so() -> None:
    base = traced(TinyNet(ConvBlock(nn.Conv2d(8, 8, 3, padding=1, bias=False))))
    model = trained(base, "bias").double()
    merged, report = merge(model, dtype=torch.float64)
    require_equal(model, merged, "plain")
    assert merged.get_submodule("blocks.0.conv").bias is not None
    assert "1 of them biases that the base had not" in report.summary
    assert not report.timm_loadable


def test_a_conv_that_gets_a_difference_and_an_adapter_moves_both_into_its_norm() -> None:
    base = traced(TinyNet(ConvBlock(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm=True)))
    model = linear(base, "conv-par+bias+norm").double()
    merged, report = merge(model, dtype=torch.float64)
    require_equal(model, merged, "plain")
    assert merged.get_submodule("blocks.0.conv").bias is None
    (row,) = report.sites
    assert row.status == "exact" and "running mean of 'blocks.0.norm'" in row.note


def test_an_untrained_bias_that_the_base_had_not_is_not_added() -> None:
    backbone, _ = traced(TinyNet(ConvBlock(nn.Conv2d(8, 8, 3, padding=1, bias=False))))
    merged, report = merge(cadapt.insert(backbone.model, "bias", img_size=64))
    assert merged.get_submodule("blocks.0.conv").bias is None
    assert report.end_to_end.logit_effect == 0.0


def test_adapters_that_stay_work_on_the_changed_base() -> None:
    model, merged, report = merged_in_fp64("plain", "conv-par+norm")  # with its ReLU
    require_equal(model, merged, "plain")
    assert report.count("simplified") == report.total > 0
    assert "take their differences up" in report.summary
    assert not report.timm_loadable


def test_full_is_one_model_already_and_loads_into_timm() -> None:
    model = trained("plain", "full")
    enliven(model.layer2, scale=0.05)
    merged, report = merge(model)
    assert "already one model" in report.summary
    assert report.timm_loadable and report.differences == 0
    fresh = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    fresh.load_state_dict(timm_state_dict(merged), strict=True)
    images = make_images("plain")
    with torch.no_grad():
        assert torch.allclose(fresh(images), model.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shuffle", "groups"), [(False, "32,16"), (True, "32,16"), (False, "8,8")])
def test_several_branches_fold_whatever_their_form(shuffle: bool, groups: str) -> None:
    for stored in (False, True):
        model, merged, report = merged_in_fp64(
            "tokens", "consolidator", groups=groups, shuffle=shuffle, drop_path=0.5, stored=stored
        )
        assert report.merged == report.total == 24
        require_equal(model, merged, "tokens", 1e-12)


def test_consolidators_that_do_not_fold_say_why() -> None:
    model, merged, report = merged_in_fp64("reused", "consolidator", groups="2,1")
    assert report.merged < report.total
    assert all("called 2 times" in row.reason for row in report.sites if row.status != "exact")
    # two nested branches are one still
    assert report.count("simplified") == report.total - report.merged
    require_equal(model, merged, "reused")


@pytest.mark.parametrize("base", ["weight-standardised", "norm-free"])
def test_consolidators_fold_into_convs_that_standardise_their_weights(base: str) -> None:
    model, merged, report = merged_in_fp64(base, "consolidator", groups="2,1")
    assert report.merged == report.total > 0
    assert any("plain conv now" in row.note for row in report.sites)
    require_equal(model, merged, base)


@pytest.mark.parametrize("name", ["swinv2_cr_tiny_ns_224", "swinv2_tiny_window8_256", "beit_base_patch16_224"])
def test_a_layer_whose_weight_is_read_and_not_called_is_refused(name: str) -> None:
    small: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    if name.startswith("beit"):
        small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    if name.startswith("swinv2_tiny"):
        small["window_size"] = 4
    model = timm.create_model(name, img_size=64, num_classes=CLASSES, **small)
    base = traced(model)
    adapted = trained(base, "consolidator").double()
    merged, report = merge(adapted, dtype=torch.float64)
    require_equal(adapted, merged, "plain")
    rows = {row.site: row for row in report.sites}
    read = [row for site, row in rows.items() if site.endswith("qkv")]
    if name.startswith("swinv2_cr"):
        assert all(row.status == "exact" for row in read)
    else:
        assert read and all("reads the layer's weight without calling it" in row.reason for row in read)
    assert all(row.status == "exact" for site, row in rows.items() if not site.endswith("qkv"))


def test_a_vit_without_qkv_bias_says_that_it_has_one_now() -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=CLASSES, qkv_bias=False)
    adapted = trained(traced(randomise(model)), "consolidator").double()
    merged, report = merge(adapted, dtype=torch.float64)
    require_equal(adapted, merged, "plain")
    row = next(row for row in report.sites if row.site.endswith("qkv"))
    assert row.status == "exact" and "has a bias now" in row.note
