"""The merged model as a whole: equal to the adapted one, of its own identity, and the argument left alone."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.adapted import disabled
from cadapt.adapters import get_scheme
from cadapt.errors import CadaptError, UsageError
from cadapt.library import from_bundle, to_bundle
from cadapt.merging import exact, merge
from cadapt.surgery import operate
from tests.merging.cases import CLASSES, linear, toy, trained
from tests.models import make_images, surveyed

BASES = ["plain", "depth-wise", "dense", "straight", "reused", "overwriting", "layer-scaled"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("scheme", "kernel"), [("conv-par", None), ("conv-seq", 1)])
def test_merged_equals_adapted_in_fp64(base: str, scheme: str, kernel: int | None) -> None:
    if base == "layer-scaled" and kernel:
        kernel = None  # its strided 2×2 convs take no 1×1 beside them
    model = linear(base, scheme, kernel=kernel).double()
    merged, report = merge(model, dtype=torch.float64)
    images = make_images(base, batch=3, seed=9).double()
    with torch.no_grad():
        wanted, got = model(images), merged(images)
    scale = float(wanted.abs().max())
    assert float((wanted - got).abs().max()) <= 1e-10 * max(scale, 1.0)
    assert report.verified
    assert report.end_to_end.agreement == 1.0
    assert report.end_to_end.logit_effect >= 0.1 * report.end_to_end.logit_scale
    assert all(row.reason or row.status == "exact" for row in report.sites)


@pytest.mark.parametrize(
    ("base", "scheme"),
    [("straight", "conv-par"), ("overwriting", "res-seq"), ("straight", "linear"), ("plain", "full")],
)
def test_the_argument_is_left_as_it_was(base: str, scheme: str) -> None:
    model = trained(base, scheme).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    plan, modes = model.plan, [module.training for module in model.modules()]
    merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.plan is plan
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_merged_model_is_an_ordinary_one() -> None:
    model = linear("plain")
    model.classes = ("a", "b", "c", "d", "e")
    merged, report = merge(model)
    assert not merged.training
    assert merged.classes == model.classes
    assert merged.plan.insertions == ()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    images = make_images("plain")
    twin = copy.deepcopy(merged)
    assert torch.equal(twin(images), merged(images))
    assert report.parameters_after == sum(parameter.numel() for parameter in merged.parameters())
    assert report.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    assert report.macs_after < report.macs_before
    assert report.macs_before - report.macs_after == sum(row.macs_before - row.macs_after for row in report.sites)
    shrunk = sum(row.parameters_before - row.parameters_after for row in report.sites)
    assert report.parameters_before - report.parameters_after == shrunk


def test_what_stays_fits_in_an_adapter_file_on_the_same_base() -> None:
    model = trained("straight", "conv-par")
    merged, report = merge(model)
    assert report.count("simplified") == report.total
    assert merged.plan.base == model.plan.base
    loaded = from_bundle(to_bundle(merged), surveyed("straight")[0])
    images = make_images("straight")
    with torch.no_grad():
        assert torch.equal(loaded(images), merged(images))


def test_a_base_that_took_adapters_up_has_an_identity_of_its_own() -> None:
    model = linear("depth-wise")
    merged, report = merge(model)
    assert 0 < report.merged < report.total
    assert len(merged.plan.insertions) == report.total - report.merged
    assert merged.plan.base.sha256 != model.plan.base.sha256
    assert merged.plan.base.source == "given"


def test_a_new_bias_goes_into_the_batch_norm_or_is_said_to_stay() -> None:
    merged, report = merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm=True)))
    (row,) = report.sites
    assert "running mean of 'blocks.0.norm'" in row.note
    assert merged.get_submodule("blocks.0.conv").bias is None
    assert row.parameters_after == 0

    merged, report = merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1, bias=False))))
    (row,) = report.sites
    assert "has a bias now" in row.note
    assert merged.get_submodule("blocks.0.conv").bias is not None
    assert row.parameters_after == 8


def test_two_adapters_at_one_place_fold_in_order_and_never_around_one_that_stays() -> None:
    backbone, sites = toy(nn.Conv2d(8, 8, 3, padding=1))
    first = linear((backbone, sites), "conv-par").plan
    second = linear((backbone, sites), "conv-seq", kernel=1).plan.insertions
    crooked = trained((backbone, sites), "conv-par").plan.insertions

    def row_statuses(insertions: Any) -> list[str]:
        model = operate(backbone, replace(first, insertions=insertions), sites)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.normal_(std=0.3)
        _, report = merge(model)
        assert report.verified
        return [row.status for row in report.sites]

    assert row_statuses((*first.insertions, *second)) == ["exact", "exact"]
    assert row_statuses((*second, *first.insertions)) == ["exact", "exact"]
    assert row_statuses((*crooked, *second)) == ["simplified", "simplified"]
    assert row_statuses((*second, *crooked)) == ["exact", "simplified"]


def test_other_dtypes_and_given_images() -> None:
    model = linear("straight")
    images = make_images("straight", batch=3)
    merged, report = merge(model, dtype=torch.bfloat16, images=images)
    assert report.dtype == "bfloat16"
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert (report.end_to_end.images, report.end_to_end.random_images) == (3, False)
    assert report.end_to_end.max_abs_error_fp64 <= 1e-10 < report.end_to_end.max_abs_error


def test_nothing_inserted_is_said_so() -> None:
    merged, report = merge(trained("straight", "linear"))
    assert report.total == 0
    assert "only the head" in report.summary
    _, report = merge(trained("straight", "full"))
    assert "already one model" in report.summary
    with torch.no_grad():
        assert merged(make_images("straight")).shape == (2, CLASSES)


def test_misuse_is_one_line() -> None:
    model = linear("straight")
    with pytest.raises(UsageError, match="floating type"):
        merge(model, dtype=torch.int8)
    with pytest.raises(UsageError, match="expected \\[B, 3, H, W\\]"):
        merge(model, images=torch.zeros(3, 64, 64))
    with disabled(model), pytest.raises(CadaptError, match="switched off"):
        merge(model)
    with pytest.raises(CadaptError, match="meta"):
        merge(copy.deepcopy(model).to("meta"))


def test_a_model_that_is_wrong_as_a_whole_is_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(merged: nn.Module, graph: Any, paths: Any) -> dict[str, str]:
        with torch.no_grad():
            merged.get_submodule("blocks.0.conv").weight.mul_(1.01)
        return {}

    monkeypatch.setattr(exact, "move_biases", spoil)
    with pytest.raises(CadaptError, match="is not delivered") as caught:
        merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1))))
    assert "\n" not in caught.value.message


def test_a_scheme_without_a_rule_keeps_its_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from cadapt.adapters import Refusal
    from cadapt.merging import folding
    from cadapt.merging import sites as sites_module

    def no_rule(*arguments: Any) -> Refusal:
        return Refusal(reason="this scheme has no rule for merging")

    ruleless = replace(get_scheme("conv-par"), merge=no_rule, simplify=None)
    for module in (folding, sites_module):
        monkeypatch.setattr(module, "get_scheme", lambda name: ruleless)
    _, report = merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1))))
    assert [row.status for row in report.sites] == ["kept"]
