"""Plans and operations: globs, refusals that mend themselves, heads, independence of what is left out."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from cadapt.adapted import ADAPTERS, disabled
from cadapt.adapters import SCHEMES
from cadapt.backbone import Backbone, describe_model
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.planning import Survey, fitting_schemes, plan_insertions, survey, with_head
from cadapt.surgery import adapter_name, operate
from tests.models import PlainBlock, ReusedNet, TinyNet, make_images, surveyed


@pytest.fixture
def plain() -> tuple[Backbone, Survey]:
    return surveyed("plain")


def test_an_unknown_scheme_gets_close_matches(plain: tuple[Backbone, Survey]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_insertions(plain[0], "conv-pra", surveyed=plain[1])
    assert caught.value.message == "unknown scheme 'conv-pra'"
    assert "conv-par" in str(caught.value.hint)


def test_an_unknown_setting_gets_a_close_match(plain: tuple[Backbone, Survey]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_insertions(plain[0], "conv-par", {"gama": 4}, surveyed=plain[1])
    assert caught.value.message == "conv-par has no setting 'gama'"
    assert caught.value.hint == "did you mean gamma?"


def test_a_setting_for_a_scheme_that_has_none(plain: tuple[Backbone, Survey]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_insertions(plain[0], "linear", {"gamma": 4}, surveyed=plain[1])
    assert caught.value.hint == "it has none"


def test_a_gamma_that_does_not_divide_names_the_site_and_what_would() -> None:
    backbone, sites = surveyed("layer-scaled")
    with pytest.raises(UsageError) as caught:
        plan_insertions(backbone, "conv-par", {"gamma": 7}, surveyed=sites)
    # 24 // 7 = 3, 32 // 7 = 4 and 48 // 7 = 6 divide their channels, 64 // 7 = 9 does not
    first = next(site for site in sites.sites if site.kind == "conv" and site.in_channels == 64)
    assert caught.value.message.startswith(
        f"cannot put conv-par at '{first.path}': 64 channels do not divide by γ=7; here γ can be 1, 2, 4, 8"
    )
    assert "--gamma" in str(caught.value.hint)
    assert f"--exclude '{first.path}'" in str(caught.value.hint)
    # the hint holds: without those sites the plan is made
    plan = plan_insertions(backbone, "conv-par", {"gamma": 7}, exclude=("stages.3.blocks.*",), surveyed=sites)
    assert {item.site.in_channels for item in plan.insertions} == {24, 32, 48}


def test_globs_choose_sites(plain: tuple[Backbone, Survey]) -> None:
    backbone, sites = plain

    def paths(**globs: tuple[str, ...]) -> list[str]:
        plan = plan_insertions(backbone, "conv-par", surveyed=sites, **globs)  # type: ignore[arg-type]
        return [item.site.path for item in plan.insertions]

    every = paths()
    assert paths(include=("layer1.*",)) == [path for path in every if path.startswith("layer1.")]
    assert paths(exclude=("layer1.*",)) == [path for path in every if not path.startswith("layer1.")]
    assert paths(include=("layer1.*", "layer4.*"), exclude=("layer4.*",)) == paths(include=("layer1.*",))
    plan = plan_insertions(backbone, "conv-par", {"gamma": 2}, include=("layer1.*",), surveyed=sites)
    assert plan.settings == {"gamma": 2, "include": ["layer1.*"]}


@pytest.mark.parametrize("globs", [{"include": ("layre1.*",)}, {"exclude": ("layre1.*",)}])
def test_a_glob_that_matches_nothing_is_refused(
    plain: tuple[Backbone, Survey], globs: dict[str, tuple[str, ...]]
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_insertions(plain[0], "conv-par", surveyed=plain[1], **globs)  # type: ignore[arg-type]
    assert caught.value.message == "no site matches 'layre1.*'"
    assert "layer1.0" in str(caught.value.hint)


def test_globs_that_leave_nothing_are_refused(plain: tuple[Backbone, Survey]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_insertions(plain[0], "conv-par", include=("layer1.*",), exclude=("layer*",), surveyed=plain[1])
    assert "leave no site" in caught.value.message


@pytest.mark.parametrize("scheme", ["conv-par", "conv-seq", "res-par", "res-seq"])
def test_a_net_that_is_all_stem_is_refused_with_what_fits(scheme: str) -> None:
    backbone = describe_model(TinyNet().eval())
    sites = survey(backbone)
    with pytest.raises(CadaptError) as caught:
        plan_insertions(backbone, scheme, surveyed=sites)
    assert caught.value.exit_code == 1
    assert f"nothing to adapt under {scheme}: it has no" in caught.value.message
    assert "conv" in caught.value.message
    reasons = fitting_schemes(sites)
    fitting = [name for name, reason in reasons.items() if reason is None]
    assert {"linear", "full"} <= set(fitting)
    assert str(caught.value.hint) == f"schemes that fit it: {', '.join(fitting)}"


def test_fitting_schemes_are_those_that_plan() -> None:
    for trait in ("plain", "dense", "windowed", "tokens"):
        backbone, sites = surveyed(trait)
        for scheme, reason in fitting_schemes(sites).items():
            assert scheme in SCHEMES
            if reason is None:
                plan_insertions(backbone, scheme, surveyed=sites)
            else:
                with pytest.raises(CadaptError):
                    plan_insertions(backbone, scheme, surveyed=sites)


def test_the_default_gamma_fits_odd_channels() -> None:
    backbone = describe_model(TinyNet(PlainBlock(30), channels=30).eval(), 32)
    plan = plan_insertions(backbone, "conv-par")
    assert plan.insertions[0].config["gamma"] is None
    assert operate(backbone, plan)(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_a_plan_of_another_architecture_is_refused(plain: tuple[Backbone, Survey]) -> None:
    plan = plan_insertions(plain[0], "conv-par", surveyed=plain[1])
    other, sites = surveyed("grouped")
    with pytest.raises(RefusedError) as caught:
        operate(other, plan, sites)
    assert "no conv site 'layer1.0.conv1'" in caught.value.message


def test_a_site_that_differs_is_refused_with_both_values(plain: tuple[Backbone, Survey]) -> None:
    plan = plan_insertions(plain[0], "conv-par", surveyed=plain[1])
    first = plan.insertions[0]
    changed = replace(first, site=replace(first.site, kernel=(5, 5)))
    with pytest.raises(RefusedError) as caught:
        operate(plain[0], replace(plan, insertions=(changed,)), plain[1])
    assert "kernel (3, 3), expected (5, 5)" in caught.value.message


def test_a_new_head_stands_beside_the_old_one(plain: tuple[Backbone, Survey]) -> None:
    backbone, sites = plain
    plan = with_head(plan_insertions(backbone, "linear", surveyed=sites), backbone, 5)
    model = operate(backbone, plan, sites)
    images = make_images("plain")
    assert model(images).shape == (2, 5)
    assert torch.equal(model.fc.weight, backbone.model.fc.weight)
    assert not model.fc.weight.requires_grad
    assert set(model.trained_tensors()) == {f"{ADAPTERS}.head.classifier.{name}" for name in ("weight", "bias")}
    with disabled(model):
        assert torch.equal(model(images), backbone.model(images))
        with disabled(model):
            pass
        assert model(images).shape == (2, 7), "leaving an inner switch switched the outer one on"
    assert model(images).shape == (2, 5)


def test_a_head_may_start_as_the_bases_own(plain: tuple[Backbone, Survey]) -> None:
    backbone, sites = plain
    plan = with_head(plan_insertions(backbone, "linear", surveyed=sites), backbone, None)
    model, images = operate(backbone, plan, sites), make_images("plain")
    assert torch.equal(model(images), backbone.model(images))
    with torch.no_grad():
        model.adapters.head.classifier.weight.add_(1.0)
    assert not torch.equal(model(images), backbone.model(images))
    with disabled(model):
        assert torch.equal(model(images), backbone.model(images))


def test_a_head_may_have_a_norm_and_a_dropout(plain: tuple[Backbone, Survey]) -> None:
    backbone, sites = plain
    plan = with_head(plan_insertions(backbone, "linear", surveyed=sites), backbone, 5, norm=True, dropout=0.5)
    head = operate(backbone, plan, sites).adapters.head
    assert [type(layer) for layer in head] == [nn.LayerNorm, nn.Dropout, nn.Linear]
    assert head[2].in_features == backbone.model.num_features


def test_a_model_without_a_classifier_gets_no_head() -> None:
    class Headless(TinyNet):
        get_classifier = None  # type: ignore[assignment]

    backbone = describe_model(Headless(PlainBlock(8)).eval(), 32)
    with pytest.raises(CadaptError) as caught:
        with_head(plan_insertions(backbone, "linear"), backbone, 5)
    assert "no classifier" in caught.value.message


def test_adapters_of_a_shared_module_are_apart() -> None:
    backbone = describe_model(ReusedNet().eval(), 32)
    model = operate(backbone, plan_insertions(backbone, "res-par"))
    assert [name for name, _ in model.adapters.res_par.named_children()] == ["blocks__0", "blocks__0__call1"]


def test_names_of_adapters_do_not_collide() -> None:
    for trait in ("plain", "windowed", "layer-scaled", "reused"):
        for scheme in SCHEMES:
            backbone, sites = surveyed(trait)
            if fitting_schemes(sites)[scheme] is None:
                names = [
                    adapter_name(item.site) for item in plan_insertions(backbone, scheme, surveyed=sites).insertions
                ]
                assert len(names) == len(set(names))


def test_full_fine_tuning_can_be_switched_off_after_training(plain: tuple[Backbone, Survey]) -> None:
    backbone, sites = plain
    model, images = operate(backbone, plan_insertions(backbone, "full", surveyed=sites), sites), make_images("plain")
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.1)
    model(images)
    model.eval()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), disabled(model):
        assert torch.equal(model(images), backbone.model(images))
        raise ZeroDivisionError
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_adapters_follow_the_bases_dtype(plain: tuple[Backbone, Survey]) -> None:
    backbone = describe_model(copy.deepcopy(plain[0].model).double(), 64)
    plan = with_head(plan_insertions(backbone, "conv-par"), backbone, 5)
    model = operate(backbone, plan)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(make_images("plain").double()).dtype == torch.float64


def test_equal_sites_get_different_random_values() -> None:
    backbone, sites = surveyed("overwriting")
    model = operate(backbone, plan_insertions(backbone, "conv-par", surveyed=sites), sites)
    first, second = (adapter.depthwise.weight for adapter in model.adapters.conv_par.children())
    assert first.shape == second.shape
    assert not torch.equal(first, second)
