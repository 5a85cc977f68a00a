"""Combined models: what must hold whatever the method, and what is refused."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch

import cadapt
from cadapt.adapted import AdaptedModel, disabled
from cadapt.combining import METHODS, Settings, combine
from cadapt.combining.assemble import Tasks, check_tasks, finish, make_combination
from cadapt.combining.vectors import task_vector
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.surgery import adapter_path
from tests.combining.cases import make_base, make_task, pictures

BASE = make_base()
FOLDING = ("lora", "consolidator", "residual-par", "bias", "norm", "lora+bias")
STAYING = ("conv-par", "res-par", "lora+res-seq")


def logits(model: AdaptedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(pictures())


def two(scheme: str, other: str | None = None) -> dict[str, AdaptedModel]:
    return {
        "low": make_task(BASE, scheme, ("a", "b", "c"), task=1),
        "high": make_task(BASE, other or scheme, ("d", "e"), task=2),
    }


@cache
def checked(scheme: str) -> Tasks:
    """Two tasks by one scheme, with their vectors: what costs most, computed once."""
    return check_tasks(two(scheme))


def combined(tasks: Tasks, method: str, weights: tuple[float, ...] = (1.0, 1.0), density: float = 0.2) -> AdaptedModel:
    return finish(tasks, make_combination(tasks, method, Settings(weights=weights, density=density)))


def effect(model: AdaptedModel) -> float:
    """How far a task's logits are from what its head makes of the pristine features."""
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for insertion in bare.plan.insertions:
            adapter = bare.get_submodule(adapter_path(insertion))
            adapter.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        for name, parameter in bare.named_parameters():
            if name.startswith("adapters.delta."):
                parameter.zero_()
        for name, value in bare._pristine.items():
            bare.get_parameter(name).copy_(value) if value.is_floating_point() else None
    return float((logits(bare) - logits(model)).abs().max())


@pytest.mark.parametrize("scheme", [*FOLDING, *STAYING])
def test_weights_1_0_give_a_task_its_own_logits(scheme: str) -> None:
    tasks = checked(scheme)
    low, high = tasks.models.values()
    found = combined(tasks, "linear", (1.0, 0.0))
    assert found.classes == ("a", "b", "c", "d", "e")
    torch.testing.assert_close(logits(found)[:, :3], logits(low), rtol=0, atol=1e-5)
    other = combined(tasks, "linear", (0.0, 1.0))
    torch.testing.assert_close(logits(other)[:, 3:], logits(high), rtol=0, atol=1e-5)
    assert effect(low) > 1e-2
    assert float((logits(other)[:, :3] - logits(low)).abs().max()) > 1e-2


@pytest.mark.parametrize("method", ["average", "ties"])
def test_every_method_keeps_a_task_whose_companion_has_no_weight(method: str) -> None:
    tasks = checked("lora")
    found = combined(tasks, method, (1.0, 0.0), density=1.0)
    torch.testing.assert_close(logits(found)[:, :3], logits(tasks.first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["lora+bias", "conv-par"])
def test_a_file_with_itself_is_itself(scheme: str) -> None:
    task = make_task(BASE, scheme, ("a", "b"), task=1)
    tasks = check_tasks({"one": task, "two": copy.deepcopy(task)})
    for method, weights in (("linear", (0.5, 0.5)), ("average", (1.0, 1.0)), ("ties", (1.0, 1.0))):
        found = combined(tasks, method, weights, density=1.0)
        assert found.classes == ("a", "b")
        torch.testing.assert_close(logits(found), logits(task), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["lora", "conv-par"])
def test_order_does_not_matter(method: str, scheme: str) -> None:
    tasks = checked(scheme)
    turned = Tasks(models=dict(reversed(tasks.models.items())), vectors=dict(reversed(tasks.vectors.items())))
    found, other = combined(tasks, method, (0.7, 0.4)), combined(turned, method, (0.4, 0.7))
    columns = [other.classes.index(name) for name in found.classes]
    torch.testing.assert_close(logits(found), logits(other)[:, columns], rtol=0, atol=1e-5)


def test_schemes_may_differ_where_they_fold() -> None:
    """The sum of differences, against layers that are changed by hand."""
    tasks = two("lora", "consolidator")
    found = combine(tasks, "linear", Settings(weights=(1.0, 1.0)))
    assert found.plan.insertions == ()
    by_hand = copy.deepcopy(tasks["low"])
    # a bias that is new moved into the statistics or the bias of the norm behind
    merged = [cadapt.merge(model, dtype=torch.float64)[0].state_dict() for model in tasks.values()]
    with torch.no_grad():
        for insertion in by_hand.plan.insertions:
            by_hand.get_submodule(adapter_path(insertion)).up.weight.zero_()
        for name, value in BASE.state_dict().items():
            own = value.double()
            by_hand.state_dict()[name].copy_(own + sum(state.get(name, own) - own for state in merged))
    torch.testing.assert_close(logits(found)[:, :3], logits(by_hand), rtol=0, atol=1e-5)


def test_parameters_of_adapters_that_stay_are_the_mean_over_their_first_values() -> None:
    tasks = {
        name: make_task(BASE, "conv-par", "ab", task=number, seed=number) for number, name in enumerate(("one", "two"))
    }
    assert tasks["one"].plan.seed != tasks["two"].plan.seed
    found = combine(tasks, "average")
    for insertion in found.plan.insertions:
        path = adapter_path(insertion)
        states = [task.get_submodule(path).state_dict() for task in tasks.values()]
        for name, value in found.get_submodule(path).state_dict().items():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-6)


def test_an_untrained_adapter_is_no_vector() -> None:
    for scheme in ("lora", "conv-par"):
        task = cadapt.insert(BASE, scheme=scheme, num_classes=2, img_size=32, seed=5)
        assert not any(bool(value.any()) for value in task_vector(task).entries.values()), scheme


def test_full_fine_tuning_combines_with_its_statistics() -> None:
    tasks = checked("full")
    low, high = tasks.models.values()
    found = combined(tasks, "linear", (1.0, 0.0))
    torch.testing.assert_close(logits(found)[:, :3], logits(low), rtol=0, atol=1e-5)
    mean = combined(tasks, "average")
    name = "layer1.0.bn1.running_mean"
    wanted = (low.get_buffer(name) + high.get_buffer(name)) / 2
    torch.testing.assert_close(mean.get_buffer(name), wanted, rtol=0, atol=1e-6)
    assert float((wanted - low.get_buffer(name)).abs().max()) > 1e-2


def test_inputs_stay_and_the_base_shows_when_switched_off() -> None:
    tasks = two("lora+res-par")
    before = {name: {key: value.clone() for key, value in task.state_dict().items()} for name, task in tasks.items()}
    found = combine(tasks, "ties")
    for name, task in tasks.items():
        assert all(torch.equal(value, before[name][key]) for key, value in task.state_dict().items())
    with disabled(found), torch.no_grad():
        assert torch.equal(found(pictures()), BASE(pictures()))


@pytest.mark.parametrize("scheme", ["lora", "conv-par", "full"])
def test_the_file_loads_on_the_base(scheme: str, tmp_path: Path) -> None:
    found = combined(checked(scheme), "ties")
    path = tmp_path / "combined.safetensors"
    cadapt.save(found, path)
    again = cadapt.load(path, BASE)
    assert again.classes == found.classes
    assert again.training_record["combined"]["adapters"] == ["low", "high"]
    assert torch.equal(logits(again), logits(found))


def test_a_combination_combines_again_and_merges() -> None:
    once = combined(checked("lora"), "average")
    merged, report = cadapt.merge(once)
    torch.testing.assert_close(logits(merged), logits(once), rtol=0, atol=1e-5)
    third = make_task(BASE, "bias", ("f", "g"), task=3)
    twice = combine({"once": once, "third": third}, "linear", Settings(weights=(1.0, 0.0)))
    torch.testing.assert_close(logits(twice)[:, :5], logits(once), rtol=0, atol=1e-5)
    assert report.differences == len(once.plan.deltas) > 0


def test_what_is_judged_is_what_is_written() -> None:
    tasks = checked("conv-par")
    judged = make_combination(tasks, "linear", Settings(weights=(0.8, 0.6))).model
    written = combined(tasks, "linear", (0.8, 0.6))
    torch.testing.assert_close(logits(judged), logits(written), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["lora", "conv-par"])
def test_what_cancels_is_refused(scheme: str) -> None:
    task = make_task(BASE, scheme, "ab", task=1)
    tasks = check_tasks({"one": task, "two": copy.deepcopy(task), "three": copy.deepcopy(task)})
    for method in METHODS:
        with pytest.raises(CadaptError, match=f"nothing is left by {method} with weights") as refused:
            combined(tasks, method, (0.1, 0.2, -0.3), density=1.0)
        assert refused.value.exit_code == 1
        combined(tasks, method, (0.1, 0.2, -0.2), density=1.0)


def test_files_that_learned_a_head_only_combine() -> None:
    assert len(combined(checked("linear"), "average").classes) == 5


def test_three_tasks() -> None:
    lora = checked("lora")
    more = make_task(BASE, "bias", ("f", "g"), task=3)
    tasks = Tasks(models={**lora.models, "more": more}, vectors={**lora.vectors, "more": task_vector(more)})
    for method in METHODS:
        assert logits(combined(tasks, method, (1.0, 1.0, 1.0))).shape == (3, 7)


def test_refusals() -> None:
    lora = make_task(BASE, "lora", "ab", task=1)
    foreign = make_task(make_base(seed=1), "lora", "cd", task=2)
    with pytest.raises(RefusedError, match=r"different bases: 'one' .* 'two'") as refused:
        combine({"one": lora, "two": foreign})
    assert refused.value.exit_code == 4
    with pytest.raises(UsageError, match=r"conv-par at '.*' of 'two' does not fold .* 'one' has no equal"):
        combine({"one": lora, "two": make_task(BASE, "conv-par", "cd", task=2)})
    narrow, wide = (make_task(BASE, "conv-par", "ab", task=1, gamma=gamma) for gamma in (4, 8))
    with pytest.raises(UsageError, match="has no equal one there"):
        combine({"one": narrow, "two": wide})
    with pytest.raises(UsageError, match="two or more"):
        combine({"one": lora})
    with pytest.raises(UsageError, match="3 weights for 2 adapters"):
        combine({"one": lora, "two": copy.deepcopy(lora)}, "linear", Settings(weights=(1.0, 1.0, 1.0)))
    nameless = copy.deepcopy(lora)
    nameless.classes = ()
    with pytest.raises(UsageError, match="'two' has no classes"):
        combine({"one": lora, "two": nameless})
    larger = cadapt.insert(BASE, scheme="lora", num_classes=2, img_size=64)
    larger.classes = ("a", "b")
    with pytest.raises(RefusedError, match="prepare pictures differently"):
        combine({"one": lora, "two": larger})
