"""One adapter: the rule's algebra against independent convolutions, the refusals, and wrong rules that are caught."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cadapt.adapted import AdaptedModel
from cadapt.adapters import MergedLayer, get_scheme
from cadapt.merging import SiteMerge, folding, merge
from cadapt.merging import sites as sites_module
from cadapt.merging.sites import BOUND_FP64
from cadapt.planning import plan_insertions
from cadapt.surgery import operate
from tests.merging.cases import ConvBlock, TiedNet, linear, same_padded, toy, traced, trained
from tests.models import TinyNet, enliven

EXACT = {
    "plain": (lambda: nn.Conv2d(8, 8, 3, padding=1), {}),
    "no bias": (lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False), {}),
    "wide": (lambda: nn.Conv2d(8, 12, 5, padding=2), {}),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2), {}),
    "strided": (lambda: nn.Conv2d(8, 8, 3, padding=1, stride=2), {}),
    "strided and dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, stride=2, dilation=2), {}),
    "oblong": (lambda: nn.Conv2d(8, 8, (1, 5), padding=(0, 2)), {}),
    "same-padded": (lambda: same_padded(kernel_size=3), {}),
    "same-padded, strided": (lambda: same_padded(kernel_size=3, stride=2), {}),
    "padding='same'": (lambda: nn.Conv2d(8, 8, 3, padding="same"), {}),
    "smaller kernel": (lambda: nn.Conv2d(8, 8, 5, padding=2, stride=2), {"kernel": 3}),
    "one by one": (lambda: nn.Conv2d(8, 8, 3, padding=1, stride=2), {"kernel": 1}),
    "regular conv type": (lambda: nn.Conv2d(8, 8, 3, padding=1), {"conv_type": "regular"}),
    "linear conv type": (lambda: nn.Conv2d(8, 8, 3, padding=1), {"conv_type": "linear"}),
    "fixed scale": (lambda: nn.Conv2d(8, 8, 3, padding=1), {"alpha": "fixed", "alpha_init": 0.5}),
    "gamma 1": (lambda: nn.Conv2d(8, 8, 3, padding=1), {"gamma": 1}),
}


def the_row(model: AdaptedModel) -> SiteMerge:
    _, report = merge(model)
    assert report.verified
    (row,) = report.sites
    return row


def adapter_of(model: AdaptedModel) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("__conv"))


@pytest.mark.parametrize("case", EXACT)
def test_a_linear_adapter_beside_a_conv_folds_exactly(case: str) -> None:
    conv, settings = EXACT[case]
    row = the_row(linear(toy(conv()), **settings))
    assert row.status == "exact"
    assert row.reason == ""
    assert row.error_fp64 is not None and row.error_fp64 <= BOUND_FP64
    assert row.error_fp32 is not None and row.error_fp32 <= 1e-5
    assert row.effect is not None and row.effect > 0.1
    assert row.relative_update is not None and row.relative_update > 0.01
    assert row.macs_before > 0 == row.macs_after


@pytest.mark.parametrize("case", ["plain", "no bias", "strided"])
def test_a_linear_one_by_one_adapter_behind_a_conv_folds_exactly(case: str) -> None:
    row = the_row(linear(toy(EXACT[case][0]()), "conv-seq", kernel=1))
    assert row.status == "exact"
    assert row.effect is not None and row.effect > 0.1


def test_the_folded_kernel_is_the_adapters_answer_to_impulses() -> None:
    model = linear(toy(nn.Conv2d(8, 8, 3, padding=1)), gamma=2)
    merged, _ = merge(model, dtype=torch.float64)
    adapter = adapter_of(model).double()
    old: Any = model.get_submodule("blocks.0.conv")
    new: Any = merged.get_submodule("blocks.0.conv")

    # an independent way to Δ's kernel: one impulse for each channel, through the two convs written out
    impulses = torch.zeros(8, 8, 5, 5, dtype=torch.float64)
    impulses[torch.arange(8), torch.arange(8), 2, 2] = 1.0
    with torch.no_grad():
        middle = functional.conv2d(impulses, adapter.depthwise.weight, padding=1, groups=4)
        answer = adapter.alpha * functional.conv2d(middle, adapter.pointwise.weight)
        constant = adapter.alpha.flatten() * (
            adapter.pointwise.weight[:, :, 0, 0] @ adapter.depthwise.bias + adapter.pointwise.bias
        )
    kernel = answer[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)
    assert torch.allclose(new.weight, old.weight.double() + kernel, rtol=0, atol=1e-14)
    assert torch.allclose(new.bias, old.bias.double() + constant, rtol=0, atol=1e-14)


def test_a_grouped_conv_takes_up_only_what_stays_within_its_groups() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    dense = the_row(linear(toy(conv), gamma=1))
    assert dense.status == "simplified"
    # 8 · 8 · 9 for one without groups, 8 · 4 · 9 + 8 · 9 + 8 · 8 for conv and adapter
    assert "2 groups, the sum would have none and cost 1.36 times" in dense.reason

    model = linear(toy(conv), gamma=1)
    with torch.no_grad():
        adapter = adapter_of(model)
        adapter.pointwise.weight[:4, 4:] = 0
        adapter.pointwise.weight[4:, :4] = 0
    fitting = the_row(model)
    assert fitting.status == "exact"
    assert fitting.effect is not None and fitting.effect > 0.1


@pytest.mark.parametrize(
    ("base", "scheme", "settings", "words"),
    [
        ("windowed", "conv-par", {}, "not one conv"),
        ("reused", "conv-par", {}, "called 2 times"),
        ("plain", "conv-seq", {}, "zero padding"),
        ("plain", "res-par", {}, "not one conv"),
        ("plain", "conv-par", {"activation": "relu"}, "ReLU"),
        ("depth-wise", "conv-par", {"activation": "silu"}, "SiLU"),
    ],
)
def test_what_does_not_fold_says_why_and_is_simplified(base: str, scheme: str, settings: Any, words: str) -> None:
    merged, report = merge(trained(base, scheme, **{"activation": "identity", **settings}))
    rows = [row for row in report.sites if words in row.reason]
    assert rows
    for row in rows:
        assert row.status == "simplified"
        assert row.parameters_after < row.parameters_before
        assert row.error_fp64 is not None and row.error_fp64 <= BOUND_FP64
    assert not any(name.endswith("alpha") for name, _ in merged.named_parameters())
    assert not report.timm_loadable
    assert "did not fold" in report.timm_reason


def test_an_adapter_without_a_learned_scale_is_kept_as_it_is() -> None:
    row = the_row(trained(toy(nn.Conv2d(8, 8, 3, padding=1)), "conv-par", alpha="fixed"))
    assert row.status == "kept"
    assert "ReLU" in row.reason
    assert row.error_fp64 is None
    assert (row.parameters_after, row.macs_after) == (row.parameters_before, row.macs_before)


def test_tied_weights_are_not_merged() -> None:
    _, report = merge(linear(traced(TiedNet())))
    assert [row.status for row in report.sites] == ["simplified", "simplified"]
    assert all("shares its weight" in row.reason for row in report.sites)


@pytest.mark.parametrize(
    "conv",
    [
        # its one tap falls between the two of the conv
        nn.Conv2d(8, 8, 2, padding=1, dilation=2),
        # where "same" puts a smaller kernel depends on the size's parity
        same_padded(kernel_size=3, stride=2),
    ],
)
def test_a_smaller_kernel_that_is_off_the_conv_s_centre_is_caught(conv: nn.Conv2d) -> None:
    merged, report = merge(linear(traced(TinyNet(ConvBlock(conv))), kernel=1))
    (row,) = report.sites
    assert row.status == "refused"
    assert "relative error" in row.reason
    assert row.error_fp64 is not None and row.error_fp64 > 1e-3
    assert len(merged.plan.insertions) == 1
    assert report.end_to_end.max_abs_error_fp64 <= 1e-12


def _wrong_sign(*arguments: Any) -> Any:
    outcome = get_scheme("conv-par").merge(*arguments)
    layer: Any = arguments[3]
    return replace(outcome, weight=2 * layer.weight.detach() - outcome.weight)


def _slightly_off(*arguments: Any) -> Any:
    outcome = get_scheme("conv-par").merge(*arguments)
    return replace(outcome, weight=outcome.weight * (1 + 1e-9))


def _not_a_number(*arguments: Any) -> Any:
    outcome = get_scheme("conv-par").merge(*arguments)
    return replace(outcome, bias=outcome.bias * float("nan"))


@pytest.mark.parametrize("rule", [_wrong_sign, _slightly_off, _not_a_number])
def test_a_wrong_rule_is_caught_and_not_delivered(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear(toy(nn.Conv2d(8, 8, 3, padding=1)))
    wrong = replace(get_scheme("conv-par"), merge=rule)
    monkeypatch.setattr(folding, "get_scheme", lambda name: wrong)
    merged, report = merge(model)
    (row,) = report.sites
    assert row.status == "refused"
    assert "fails its check" in row.reason
    assert report.merged == 0
    assert torch.equal(merged.get_submodule("blocks.0.conv").weight, model.get_submodule("blocks.0.conv").weight)
    assert report.end_to_end.max_abs_error == 0.0
    assert report.to_json()["sites"][0]["status"] == "refused"


def test_a_merged_weight_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_shape(*arguments: Any) -> MergedLayer:
        return MergedLayer(weight=torch.zeros(8, 8, 5, 5), bias=None)

    wrong = replace(get_scheme("conv-par"), merge=other_shape)
    monkeypatch.setattr(folding, "get_scheme", lambda name: wrong)
    row = the_row(linear(toy(nn.Conv2d(8, 8, 3, padding=1))))
    assert row.status == "simplified"
    assert "another architecture" in row.reason


def test_a_wrong_simplification_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_scale(adapter: nn.Module, config: Any) -> Any:
        simpler, new = get_scheme("conv-par").simplify(adapter, config)  # type: ignore[misc]
        with torch.no_grad():
            simpler.pointwise.weight.mul_(1.001)
        return simpler, new

    wrong = replace(get_scheme("conv-par"), simplify=lose_scale)
    monkeypatch.setattr(sites_module, "get_scheme", lambda name: wrong)
    row = the_row(trained(toy(nn.Conv2d(8, 8, 3, padding=1)), "conv-par"))
    assert row.status == "refused"
    assert "simpler form fails" in row.reason


def test_a_smaller_kernel_beside_an_even_one_folds_on_the_grids_both_give() -> None:
    # a grid one larger has 32 outputs of the one and 33 of the other: no base adds them up
    row = the_row(linear(toy(nn.Conv2d(8, 8, 2, stride=2)), kernel=1))
    assert row.status == "exact" and row.effect is not None and row.effect > 0.1


def test_figures_by_a_layer_of_zeros_are_none() -> None:
    model = trained(toy(nn.Conv2d(8, 8, 3, padding=1, bias=False)), "lora")
    with torch.no_grad():
        model.get_parameter("blocks.0.conv.weight").zero_()
    _, report = merge(model)
    row = next(row for row in report.sites if row.site == "blocks.0.conv")
    assert row.status == "exact" and row.effect is None and row.relative_update is None


def test_an_update_in_groups_folds_into_a_conv_that_an_adapter_before_it_left_fewer() -> None:
    backbone, sites = toy(nn.Conv2d(8, 8, 3, padding=1, groups=2))
    model = operate(backbone, plan_insertions(backbone, "residual-par+lora", surveyed=sites), sites).eval()
    enliven(model.adapters)
    _, report = merge(model, dense=True)
    assert report.verified and {row.status for row in report.sites} == {"exact"}


def test_an_untrained_adapter_folds_and_the_note_says_it_does_nothing() -> None:
    model = linear(toy(nn.Conv2d(8, 8, 3, padding=1)))
    with torch.no_grad():
        adapter_of(model).pointwise.weight.zero_()
        adapter_of(model).pointwise.bias.zero_()
    row = the_row(model)
    assert row.status == "exact"
    assert row.effect == 0.0
    assert "does nothing" in row.note
