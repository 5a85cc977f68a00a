"""Fitted merges of whole models: what can be expressed is found, what cannot is told, the frontier is what it says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.errors import UsageError
from cadapt.merging import merge
from cadapt.merging.fitted import Batches, Fit, fold_fitted
from cadapt.merging.report import SiteMerge
from cadapt.surgery import adapter_path
from cadapt.tolerance import parse_tolerance
from tests.merging.cases import CLASSES, linear, toy, trained
from tests.models import make_images


def pictures(base: str, number: int = 48, seed: int = 0, labels: torch.Tensor | None = None) -> Batches:
    images = make_images(base, batch=number, seed=seed)
    known = torch.full((number,), -1) if labels is None else labels
    return [(images[part : part + 16], known[part : part + 16]) for part in range(0, number, 16)]


def fit_on(base: str, tolerance: str = "disagreement=0%", **settings: int) -> Fit:
    return Fit(batches=pictures(base), judged=pictures(base, 32, 9), tolerance=parse_tolerance(tolerance), **settings)


def kept_rows(model: AdaptedModel) -> tuple[SiteMerge, ...]:
    """Rows as if no adapter had folded exactly."""
    found = []
    for insertion in model.plan.insertions:
        count = sum(item.numel() for item in model.get_submodule(adapter_path(insertion)).parameters())
        found.append(
            SiteMerge(
                site=insertion.site.name,
                kind=insertion.site.kind,
                scheme=insertion.scheme,
                form=insertion.form,
                status="kept",
                reason="it is kept",
                parameters_before=count,
                parameters_after=count,
                macs_before=0,
                macs_after=0,
            )  # fmt: skip
        )
    return tuple(found)


@pytest.mark.parametrize("base", ["plain", "norm-free", "weight-standardised", "overwriting", "straight"])
def test_adapters_that_are_linear_are_found_whole(base: str) -> None:
    model = linear(base).double().eval()
    found = fold_fitted(model, kept_rows(model), fit_on(base, "disagreement=100%"))
    last = found.frontier[-1]
    assert last.folded == len(model.plan.insertions)
    # where maps are small, so few pictures do not tell all weights; a conv of groups cannot hold what mixes them
    plenty = [
        row.r2 or 0.0
        for row, insertion in zip(found.rows, model.plan.insertions, strict=True)
        if 36 * insertion.site.out_shape[1] * insertion.site.out_shape[2] > 40 * insertion.site.in_channels
        and insertion.site.groups == 1
    ]
    assert plenty
    assert min(plenty) > 0.999
    if len(plenty) == len(found.rows):
        assert last.logit_error <= 2e-3
    assert found.model.plan.insertions == ()
    images = make_images(base, batch=32, seed=9).double()
    with torch.no_grad():
        wanted = model(images)
        error = float((found.model(images) - wanted).abs().max())
    assert error == pytest.approx(last.max_logit_error, abs=1e-3 * float(wanted.abs().max()))


def test_what_is_not_linear_is_told() -> None:
    model = trained("plain", "conv-par")
    merged, report = merge(model, fit=fit_on("plain", "disagreement=0%"))
    assert report.tolerance == "disagreement=0%"
    assert report.tolerance_met
    chosen = [point for point in report.frontier if point.chosen]
    assert len(chosen) == 1
    assert chosen[0].agreement == 1.0
    assert len(merged.plan.insertions) == report.total - chosen[0].folded
    assert report.gone == chosen[0].folded
    assert all(row.r2 is not None and row.r2 < 0.999 for row in report.sites)
    assert all(row.reason for row in report.sites)
    assert sorted(row.step or 0 for row in report.sites) == list(range(1, report.total + 1))
    assert all(0 < (row.linear_share or 0) <= 1 for row in report.sites)


def test_the_chosen_point_is_what_is_delivered() -> None:
    model = trained("plain", "conv-par").eval()
    merged, report = merge(model, fit=fit_on("plain", "disagreement=100%"))
    allowed = replace(fit_on("plain"), tolerance=parse_tolerance("disagreement=0%"))
    assert report.frontier[-1].chosen
    assert merged.plan.insertions == ()
    images = torch.cat([images for images, _ in allowed.judged])
    with torch.no_grad():
        difference = merged(images) - model(images)
        same = (merged(images).argmax(1) == model(images).argmax(1)).double().mean()
    assert float(difference.abs().max()) == pytest.approx(report.frontier[-1].max_logit_error, rel=1e-3)
    assert float(same) == pytest.approx(report.frontier[-1].agreement)
    assert report.macs_after == report.frontier[-1].macs
    assert report.parameters_after == report.frontier[-1].parameters
    shrunk = sum(row.parameters_before - row.parameters_after for row in report.sites)
    assert report.parameters_before - report.parameters_after == shrunk
    # of the model that is delivered, and not of the exact folds before it
    assert report.end_to_end.max_abs_error_fp64 == pytest.approx(report.end_to_end.max_abs_error, rel=1e-2)
    assert report.summary.endswith(f"{report.total} fitted")
    assert report.timm_loadable


def test_the_model_is_left_as_it_was() -> None:
    model = trained("plain", "res-par")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model, fit=fit_on("plain", "disagreement=100%", finetune_epochs=1))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_labels_are_judged_by_top1() -> None:
    model = trained("plain", "conv-par").eval()
    images = make_images("plain", batch=32, seed=9)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:8] = (labels[:8] + 1) % CLASSES
    fit = replace(fit_on("plain", "top1=100%"), judged=pictures("plain", 32, 9, labels))
    _, report = merge(model, fit=fit)
    assert report.frontier[0].top1 == 0.75


def test_an_adapter_that_does_nothing_is_dropped() -> None:
    model = trained("plain", "conv-par").eval()
    silent = model.plan.insertions[2]
    with torch.no_grad():
        for parameter in model.get_submodule(adapter_path(silent)).pointwise.parameters():
            parameter.zero_()
    merged, report = merge(model, fit=fit_on("plain", "logit=1e-6"))
    row = report.sites[2]
    assert (row.status, row.step, row.relative_size) == ("dropped", 1, 0.0)
    assert len(merged.plan.insertions) == report.total - 1


def test_deltas_change_only_the_bases_own_tensors() -> None:
    model = trained("weight-standardised", "conv-par").double().eval()
    found = fold_fitted(model, kept_rows(model), fit_on("weight-standardised", "disagreement=100%"), as_deltas=True)
    assert not any(row.hosts for row in found.rows)
    assert {point.action for point in found.frontier[1:]} == {"dropped"}
    plain = trained("plain", "conv-par").double().eval()
    merged = fold_fitted(plain, kept_rows(plain), fit_on("plain", "disagreement=100%"), as_deltas=True).model
    assert torch.equal(
        merged.get_submodule("layer1.0.bn1").running_mean, plain.get_submodule("layer1.0.bn1").running_mean
    )
    assert merged.get_submodule("layer1.0.conv1").bias is not None


def test_refining_comes_nearer_to_the_unmerged_model() -> None:
    model = trained("plain", "res-par").eval()
    _, report = merge(model, fit=fit_on("plain", "logit=1e-6", finetune_epochs=4))
    refined = [point for point in report.frontier if point.refined]
    assert refined
    plain = {point.folded: point.logit_error for point in report.frontier if not point.refined}
    assert all(point.logit_error < plain[point.folded] for point in refined)


def test_what_cannot_be_judged_is_one_line() -> None:
    model = trained(toy(nn.Conv2d(8, 8, 3, padding=1)), "conv-par")
    fit = fit_on("overwriting")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"batches": [(images[:3], labels[:3]) for images, labels in pictures("overwriting", 16)]}, "3 pictures"),
        ({"judged": []}, "no pictures to judge on"),
        ({"tolerance": parse_tolerance("top1=1%")}, "needs labels"),
        ({"batches": [torch.zeros(8, 3, 64, 64)]}, "expected pictures and labels"),
    ]
    for changed, message in wrong:
        with pytest.raises(UsageError, match=message):
            merge(model, fit=replace(fit, **changed))
    for changed, message in [({"tolerance": "top1=1%"}, "Tolerance"), ({"judged": iter([])}, "several times")]:
        with pytest.raises(UsageError, match=message):
            replace(fit, **changed)
    with pytest.raises(UsageError, match="0 pictures to fit on"):
        merge(model, fit=replace(fit_on("overwriting"), batches=[]))


def test_a_model_without_adapters_has_one_point() -> None:
    _, report = merge(linear("plain"), fit=fit_on("plain"))
    assert [point.folded for point in report.frontier] == [0]
    assert report.frontier[0].chosen
