"""Conflicts against formulas written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cadapt.combining.conflicts import compare_places, compare_vectors
from cadapt.combining.vectors import task_vector
from tests.combining.cases import make_base, make_task


def vector(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def test_a_pair() -> None:
    one, two = vector(0, a=(40, 50), b=(7,)), vector(1, a=(40, 50), b=(7,))
    (found,) = compare_vectors({"one": one, "two": two}, 0.2)
    a, b = (np.concatenate([item.numpy().ravel() for item in v.values()]) for v in (one, two))
    assert found.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12)
    assert found.norm_ratio == pytest.approx(np.sqrt((b @ b) / (a @ a)), rel=1e-12)
    assert found.cancelled == pytest.approx(1 - np.abs(a + b).sum() / (np.abs(a) + np.abs(b)).sum(), abs=1e-12)
    larger = [np.abs(v) >= np.sort(np.abs(v))[-round(0.2 * v.size)] for v in (a, b)]
    both = larger[0] & larger[1]
    assert both.sum() > 50
    assert found.sign_conflict == pytest.approx(np.mean(np.sign(a[both]) != np.sign(b[both])), abs=1e-12)


def test_independent_vectors_are_where_the_report_says() -> None:
    (found,) = compare_vectors({"one": vector(0, a=(400, 500)), "two": vector(1, a=(400, 500))}, 0.2)
    assert found.cosine == pytest.approx(0, abs=0.01)
    assert found.sign_conflict == pytest.approx(0.5, abs=0.03)
    assert found.cancelled == pytest.approx(0.29, abs=0.01)


def test_equal_and_opposite_vectors() -> None:
    one = vector(0, a=(30, 30))
    equal, opposite = one, {"a": -2 * one["a"]}
    same, against, _ = compare_vectors({"one": one, "equal": equal, "opposite": opposite}, 0.2)
    assert (same.cosine, same.sign_conflict, same.cancelled) == pytest.approx((1, 0, 0), abs=1e-12)
    assert (against.cosine, against.sign_conflict, against.norm_ratio) == pytest.approx((-1, 1, 2), abs=1e-12)
    assert against.cancelled == pytest.approx(2 / 3, abs=1e-12)


def test_vectors_of_different_places_do_not_meet() -> None:
    (found,) = compare_vectors({"one": vector(0, a=(9,)), "two": vector(1, b=(9,))}, 0.5)
    assert (found.cosine, found.sign_conflict, found.cancelled) == (0, None, 0)


def test_a_weight_turns_and_stretches_a_whole_vector() -> None:
    for scheme in ("conv-par", "lora"):
        found = task_vector(make_task(make_base(), scheme, "ab", task=1))
        (pair,) = compare_vectors({"one": found.times(-2.0).entries, "two": found.entries}, 0.2)
        assert (pair.cosine, pair.sign_conflict, pair.norm_ratio) == pytest.approx((-1, 1, 0.5), abs=1e-12)
        assert pair.cancelled == pytest.approx(2 / 3, abs=1e-12)


def test_a_zero_vector_has_no_figures() -> None:
    (found,) = compare_vectors({"one": vector(0, a=(9,)), "two": {"a": torch.zeros(9, dtype=torch.float64)}}, 0.5)
    assert (found.cosine, found.sign_conflict, found.cancelled, found.norm_ratio) == (None, None, None, None)


def test_places_name_layers_and_adapters_with_their_schemes() -> None:
    base = make_base()
    found = {
        "folded": make_task(base, "lora", "ab", task=1),
        "other": make_task(base, "consolidator", "cd", task=2),
        "bias": make_task(base, "bias", "ef", task=3),
    }
    vectors = {name: task_vector(model) for name, model in found.items()}
    rows = compare_places(vectors, 0.2, {name: model.plan.scheme for name, model in found.items()})
    shared = next(row for row in rows if row.schemes == ("lora", "consolidator", "bias"))
    assert shared.kind == "folded" and len(shared.pairs) == 3 and min(shared.norms) > 0
    assert shared.cosine == pytest.approx(np.mean([pair.cosine for pair in shared.pairs]))
    lora_only = next(row for row in rows if row.place == "layer1.0.conv1")
    assert lora_only.schemes[0] == "lora"


def test_adapters_that_do_not_fold_are_places_of_their_own() -> None:
    base = make_base()
    found = {name: make_task(base, "conv-par", name, task=number) for number, name in enumerate(("ab", "cd"))}
    vectors = {name: task_vector(model) for name, model in found.items()}
    rows = compare_places(vectors, 0.2, dict.fromkeys(found, "conv-par"))
    assert [row.place for row in rows] == [item.site.name for item in found["ab"].plan.insertions]
    assert {(row.kind, row.schemes) for row in rows} == {("adapter", ("conv-par", "conv-par"))}
