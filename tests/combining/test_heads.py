"""Joined heads: rows, means, names that collide, and what cannot be joined."""

from __future__ import annotations

import copy

import pytest
import torch

import cadapt
from cadapt.adapters import Refusal
from cadapt.combining import Settings, combine
from cadapt.combining.heads import JoinedHead, join_heads
from cadapt.errors import RefusedError
from tests.combining.cases import make_base, make_task, pictures
from tests.models import make_model

BASE = make_base()


def test_equal_classes_in_another_order_are_averaged_by_name() -> None:
    one, two = (make_task(BASE, "linear", names, task=number) for number, names in enumerate(("abc", "cab")))
    found = combine({"one": one, "two": two}, "average", Settings(weights=(3.0, 1.0)))
    assert found.classes == ("a", "b", "c")
    with torch.no_grad():
        wanted = 0.75 * one(pictures()) + 0.25 * two(pictures())[:, [1, 2, 0]]
        torch.testing.assert_close(found(pictures()), wanted, rtol=0, atol=1e-5)


def test_names_that_collide_are_told_apart() -> None:
    one, two = make_task(BASE, "linear", ("cat", "dog"), task=1), make_task(BASE, "linear", ("dog", "owl"), task=2)
    found = combine({"pets": one, "wild": two}, "average")
    assert found.classes == ("cat", "pets/dog", "wild/dog", "owl")
    with torch.no_grad():
        wanted = torch.cat([one(pictures()), two(pictures())], dim=1)
        torch.testing.assert_close(found(pictures()), wanted, rtol=0, atol=1e-5)


def joined(*models: cadapt.AdaptedModel) -> JoinedHead | Refusal:
    names = ("one", "two", "three")
    return join_heads(dict(zip(names, models, strict=False)), (1 / len(models),) * len(models))


def test_heads_that_differ_before_their_classifiers_are_refused() -> None:
    plain = make_task(BASE, "linear", "ab", task=1)
    normed = make_task(BASE, "linear", "cd", task=2, head_norm=True)
    dropping = make_task(BASE, "linear", "cd", task=2, head_dropout=0.2)
    for other, said in ((normed, "a norm"), (dropping, "a dropout of 0.2")):
        found = joined(plain, other)
        assert isinstance(found, Refusal) and said in found.reason
    apart = joined(make_task(BASE, "linear", "ab", task=1, head_norm=True), normed)
    assert isinstance(apart, Refusal) and "norms that were trained apart" in apart.reason
    with pytest.raises(RefusedError, match="no head for all classes"):
        combine({"one": plain, "two": normed})


def test_equal_norms_and_dropouts_stay() -> None:
    one, two = (make_task(BASE, "linear", names, task=1, head_norm=True, head_dropout=0.2) for names in ("ab", "cd"))
    two.get_submodule("adapters.head.norm").load_state_dict(one.get_submodule("adapters.head.norm").state_dict())
    found = combine({"one": one, "two": two}, "linear", Settings(weights=(1.0, 0.0)))
    assert found.plan.head is not None and (found.plan.head.norm, found.plan.head.dropout) == (True, 0.2)
    with torch.no_grad():
        torch.testing.assert_close(found(pictures())[:, :2], one(pictures()), rtol=0, atol=1e-5)


def test_a_head_that_began_as_the_bases_is_joined() -> None:
    one = cadapt.insert(BASE, scheme="linear", img_size=32).eval()
    assert one.plan.head is not None and one.plan.head.init == "base"
    one.classes = tuple(f"class {number}" for number in range(one.plan.head.num_classes))
    found = combine(
        {"one": one, "two": make_task(BASE, "linear", "ab", task=2)}, "linear", Settings(weights=(1.0, 0.0))
    )
    with torch.no_grad():
        torch.testing.assert_close(found(pictures())[:, : len(one.classes)], one(pictures()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trait", ["hard-swish", "tokens"])
def test_heads_of_other_families(trait: str) -> None:
    """Features that a conv makes behind the pooling, and those of a vision transformer."""
    base = make_model(trait)
    tasks = {}
    for number, name in enumerate(("one", "two")):
        task = cadapt.insert(base, scheme="bias", num_classes=2, seed=number).eval()
        task.classes = (f"{name} a", f"{name} b")
        tasks[name] = task
    with torch.no_grad():
        for task in tasks.values():
            for parameter in task.adapters.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.randn(2, *task.preprocessing.input_size)
        found = combine(tasks, "linear", Settings(weights=(0.0, 1.0)))
        own = tasks["two"](x)
        torch.testing.assert_close(found(x)[:, 2:], own, rtol=0, atol=1e-5 * float(own.abs().max()))


def test_a_classifier_of_another_kind_is_refused() -> None:
    one = make_task(BASE, "linear", "ab", task=1)
    strange = copy.deepcopy(one)
    strange.set_submodule("adapters.head.classifier", torch.nn.Sequential(torch.nn.Linear(1, 1)))
    found = joined(one, strange)
    assert isinstance(found, Refusal) and "no plain linear layer" in found.reason
