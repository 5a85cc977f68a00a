"""What every scheme keeps whatever the base, each on the first tiny base it fits: copies, files, seeds, compilers."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel, disabled
from cadapt.adapters import SCHEMES
from cadapt.backbone import describe_model
from cadapt.errors import CadaptError
from cadapt.plan import Plan
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.surgery import operate
from tests.contract.cases import adapt, first_fitting, starts_as_identity
from tests.models import enliven, make_images, randomise, surveyed

_SMALL = ("reused", "overwriting", "windowed", "tokens")
_USUAL = ("plain", "windowed", "tokens")

every_scheme = pytest.mark.parametrize("scheme", list(SCHEMES))


def lively(trait: str, scheme: str) -> AdaptedModel:
    """An adapted model with a head, whose adapters do something."""
    model = adapt(trait, scheme, classes=5)[2]
    enliven(model.adapters)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(images)
    return result


@every_scheme
def test_a_copy_is_equal_and_independent(scheme: str) -> None:
    trait = first_fitting(scheme, _USUAL)
    model, images = lively(trait, scheme), make_images(trait)
    before = run(model, images)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.5)
    assert not torch.equal(run(twin, images), before)
    assert torch.equal(run(model, images), before)
    with disabled(twin):
        assert torch.equal(run(model, images), before), "switching a copy off switched the original off"


@every_scheme
def test_it_moves_to_double_precision(scheme: str) -> None:
    trait = first_fitting(scheme, _USUAL)
    model, images = lively(trait, scheme), make_images(trait)
    single = run(model, images)
    model.to(torch.float64)
    double = run(model, images.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4 * float(single.abs().max()))
    base = copy.deepcopy(surveyed(trait)[0].model).double()
    with disabled(model):
        assert torch.equal(run(model, images.double()), run(base, images.double()))


@every_scheme
def test_state_and_plan_make_the_model_again(scheme: str) -> None:
    trait = first_fitting(scheme, _USUAL)
    backbone, sites = surveyed(trait)
    model, images = lively(trait, scheme), make_images(trait)
    text = json.dumps(model.plan.to_json())
    plan = Plan.from_json(json.loads(text))
    assert json.dumps(plan.to_json()) == text
    again = operate(backbone, plan, sites)
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(again.eval(), images), run(model, images))

    # the trained tensors alone are enough: that is what the file holds
    other = operate(backbone, plan, survey(backbone))
    rest = other.load_state_dict(model.trained_tensors(), strict=False)
    assert not rest.unexpected_keys
    assert torch.equal(run(other.eval(), images), run(model, images))


@every_scheme
def test_a_seed_settles_every_adapter_by_itself(scheme: str) -> None:
    trait = first_fitting(scheme, _USUAL)
    backbone, sites = surveyed(trait)
    plan = with_head(plan_insertions(backbone, scheme, seed=3, surveyed=sites), backbone, 5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = dict(operate(backbone, plan, sites).adapters.named_parameters())
    assert torch.equal(torch.get_rng_state(), state), "inserting drew from the caller's random numbers"
    torch.manual_seed(1)
    second = dict(operate(backbone, plan, sites).adapters.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)

    fewer = dict(operate(backbone, replace(plan, insertions=plan.insertions[1:]), sites).adapters.named_parameters())
    assert all(torch.equal(first[name], tensor) for name, tensor in fewer.items())
    if plan.insertions:
        assert fewer.keys() < first.keys()
    other = replace(plan, seed=4, head=None if plan.head is None else replace(plan.head, seed=4))
    third = dict(operate(backbone, other, sites).adapters.named_parameters())
    assert any(not torch.equal(first[name], third[name]) for name in first)


def _with_drop_path(scheme: str) -> AdaptedModel:
    """The scheme on the first of some bases that drop paths."""
    for make in (
        lambda: timm.create_model("test_resnet", num_classes=7, drop_path_rate=0.5),
        lambda: SwinTransformer(
            img_size=64, num_classes=7, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, drop_path_rate=0.5
        ),
        lambda: timm.create_model("test_vit", num_classes=7, drop_path_rate=0.5, img_size=64),
    ):
        backbone = describe_model(randomise(make()).eval(), 64)
        try:
            return operate(backbone, plan_insertions(backbone, scheme))
        except CadaptError as refusal:
            assert refusal.hint
    raise AssertionError(f"{scheme} fits none of the bases that drop paths")


@every_scheme
def test_drop_path_lives_in_train_mode_only(scheme: str) -> None:
    model, images = _with_drop_path(scheme), make_images("plain", batch=8)
    images = images[..., :64, :64]

    def outputs() -> list[torch.Tensor]:
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            results.append(run(model, images))
        return results

    first, second = outputs()
    assert torch.equal(first, second)
    model.train()
    first, second = outputs()
    assert not torch.equal(first, second)


@every_scheme
def test_frozen_batch_norms_keep_still(scheme: str) -> None:
    trait = first_fitting(scheme, ("plain", "same-padded"))
    model, images = lively(trait, scheme), make_images(trait)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith(f"{ADAPTERS}.")
    }
    before = {name: module.running_mean.clone() for name, module in norms.items() if module.running_mean is not None}
    assert model.train() is model
    run(model, images)
    frozen = SCHEMES[scheme].bn_policy == "frozen"
    for name, mean in before.items():
        assert norms[name].training is not frozen
        assert torch.equal(norms[name].running_mean, mean) is frozen  # type: ignore[arg-type]
    model.eval()
    with disabled(model):
        assert torch.equal(run(model, images), run(surveyed(trait)[0].model, images))


@every_scheme
def test_it_compiles(scheme: str) -> None:
    trait = first_fitting(scheme, _SMALL)
    model, images = lively(trait, scheme), make_images(trait)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, images), run(model, images), rtol=0, atol=0)
    with disabled(model):
        torch.testing.assert_close(run(compiled, images), run(model, images), rtol=0, atol=0)


@every_scheme
def test_it_exports(scheme: str) -> None:
    trait = first_fitting(scheme, _SMALL)
    model, images = lively(trait, scheme), make_images(trait)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(run(program.module(), images), run(model, images), rtol=1e-6, atol=1e-6)


@every_scheme
def test_the_effect_is_real(scheme: str) -> None:
    trait = first_fitting(scheme, _USUAL)
    _, _, model = adapt(trait, scheme)
    images = make_images(trait)
    before = run(model, images)
    if not list(model.adapters.parameters()):
        return
    enliven(model.adapters)
    assert (run(model, images) - before).abs().max() > 1e-3 * before.abs().max()


@every_scheme
def test_zero_initialisation_is_the_default(scheme: str) -> None:
    config = SCHEMES[scheme].configure({})
    if hasattr(config, "init"):
        assert starts_as_identity(scheme), f"{scheme} starts by changing what the base computes"
