"""What every scheme keeps on every tiny base: identity at insertion, an untouched base, and only planned changes."""

import copy

import pytest
import torch

from cadapt.adapted import ADAPTERS, disabled
from cadapt.errors import CadaptError
from cadapt.planning import fitting_schemes
from tests.contract.cases import ALL_CASES, adapt, planned, starts_as_identity, state_bytes, step, train_mode
from tests.models import enliven, make_images, surveyed

FITTING = [pytest.param(*case, id="-".join(case)) for case in ALL_CASES if not isinstance(planned(*case), CadaptError)]
REFUSED = [pytest.param(*case, id="-".join(case)) for case in ALL_CASES if isinstance(planned(*case), CadaptError)]


@pytest.mark.parametrize(("trait", "scheme"), REFUSED)
def test_a_refusal_says_why_and_what_fits(trait: str, scheme: str) -> None:
    refusal = planned(trait, scheme)
    assert isinstance(refusal, CadaptError)
    reasons = fitting_schemes(surveyed(trait)[1])
    assert reasons[scheme]
    assert "\n" not in refusal.message
    assert scheme in refusal.message
    assert refusal.hint


@pytest.mark.parametrize(("trait", "scheme"), FITTING)
def test_insertion_changes_nothing(trait: str, scheme: str) -> None:
    base = surveyed(trait)[0].model
    before, images = state_bytes(base), make_images(trait)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    attributes = {name: sorted(vars(module)) for name, module in base.named_modules()}
    backbone, _, model = adapt(trait, scheme)

    assert state_bytes(base) == before
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert {name: sorted(vars(module)) for name, module in base.named_modules()} == attributes
    assert not any(module.training for module in (*base.modules(), *model.modules()))

    after = state_bytes(model)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(f"{ADAPTERS}.") for name in after.keys() - before.keys())
    loaded = model.load_state_dict(base.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith(f"{ADAPTERS}.") for name in loaded.missing_keys)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    new = {name for name, _ in model.named_parameters() if name.startswith(f"{ADAPTERS}.")}
    assert trainable == new | set(model.plan.trainable)

    with torch.no_grad():
        expected = backbone.model(images)
        if starts_as_identity(scheme):
            assert torch.equal(model(images), expected)
            twin = train_mode(copy.deepcopy(base), scheme)
            torch.manual_seed(0)
            trained = model.train()(images)
            torch.manual_seed(0)
            assert torch.equal(trained, twin(images))
        else:
            assert torch.isfinite(model(images)).all()
        with disabled(model.eval()):
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize(("trait", "scheme"), FITTING)
def test_training_moves_only_what_is_planned(trait: str, scheme: str) -> None:
    backbone, _, model = adapt(trait, scheme, classes=5)
    images = make_images(trait)
    enliven(model.adapters)
    model.train()
    before = state_bytes(model)
    planned_names = set(model.trained_tensors())
    gradients = step(model, images)
    after = state_bytes(model)

    # a trainable parameter without a gradient would stop distributed training
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    moved = {name for name in after if after[name] != before[name]}
    assert moved <= planned_names
    assert f"{ADAPTERS}.head.classifier.weight" in moved
    groups = {name.split(".")[1] for name in planned_names if name.startswith(f"{ADAPTERS}.")}
    assert groups == {name.split(".")[1] for name in moved if name.startswith(f"{ADAPTERS}.")}

    model.eval()
    with torch.no_grad():
        assert model(images).shape == (2, 5)
        trained = model(images)
        with disabled(model):
            assert torch.equal(model(images), backbone.model(images))
        assert torch.equal(model(images), trained)
