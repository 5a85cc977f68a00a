"""Each method against a few lines of numpy that know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadapt.combining.dare import drop, merge_dare
from cadapt.combining.linear import add, average
from cadapt.combining.methods import METHODS, get_method
from cadapt.combining.settings import Settings
from cadapt.combining.ties import merge_ties, trim
from cadapt.errors import UsageError

SHAPES = {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (6, 5)}


def vectors(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def flat(vector: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([vector[name].numpy().ravel() for name in SHAPES])


def ties_by_the_paper(taus: np.ndarray, weights: np.ndarray, density: float, scale: float) -> np.ndarray:
    """Algorithm 1, one entry after the other; weights as if a task stood there several times."""
    trimmed = taus.copy()
    for tau in trimmed:
        order = np.argsort(-np.abs(tau))
        tau[order[max(1, round(density * tau.size)) :]] = 0
    merged = np.zeros(taus.shape[1])
    for entry in range(taus.shape[1]):
        values = trimmed[:, entry]
        sign = np.sign(np.sum(weights * values))
        chosen = [(w, v) for w, v in zip(weights, values, strict=True) if v != 0 and w != 0 and np.sign(v) == sign]
        if chosen:
            merged[entry] = scale * sum(w * v for w, v in chosen) / sum(w for w, _ in chosen)
    return merged


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.0)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties(weights: tuple[float, ...], density: float) -> None:
    given_vectors = vectors(3)
    found = merge_ties(given_vectors, Settings(weights=weights, density=density, scale=0.7))
    wanted = ties_by_the_paper(np.stack([flat(v) for v in given_vectors]), np.array(weights), density, 0.7)
    assert np.count_nonzero(wanted) > 5
    np.testing.assert_allclose(flat(found), wanted, rtol=0, atol=1e-14)


def test_ties_keeps_the_entries_that_are_larger_in_the_whole_vector() -> None:
    vector = {"small": torch.full((10,), 0.1, dtype=torch.float64), "large": torch.arange(1.0, 11.0).double()}
    kept = trim(vector, 0.25)
    assert int(kept["small"].count_nonzero()) == 0
    assert kept["large"].tolist() == [0, 0, 0, 0, 0, 6, 7, 8, 9, 10]


def test_ties_without_conflict_at_density_1_is_the_mean() -> None:
    positive = [{name: value.abs() for name, value in vector.items()} for vector in vectors(3)]
    ties = merge_ties(positive, Settings(weights=(1.0,) * 3, density=1.0))
    mean = average(positive, Settings(weights=(1.0,) * 3))
    for name in SHAPES:
        torch.testing.assert_close(ties[name], mean[name], rtol=0, atol=1e-15)


def test_ties_of_a_vector_and_its_opposite_is_nothing() -> None:
    (vector,) = vectors(1)
    opposite = {name: -value for name, value in vector.items()}
    found = merge_ties([vector, opposite], Settings(weights=(1.0, 1.0), density=1.0))
    assert all(bool((value == 0).all()) for value in found.values())


def test_linear_and_average() -> None:
    one, two = vectors(2)
    weights = Settings(weights=(0.3, -2.0))
    np.testing.assert_allclose(flat(add([one, two], weights)), 0.3 * flat(one) - 2 * flat(two), atol=1e-15)
    np.testing.assert_allclose(flat(average([one, two], weights)), (0.3 * flat(one) - 2 * flat(two)) / 2.3, atol=1e-15)


def test_dare_keeps_a_share_and_the_mean() -> None:
    vector = {"w": torch.full((200, 500), 2.0, dtype=torch.float64)}
    kept = drop(vector, 0.2, seed=0)["w"]
    assert set(kept.unique().tolist()) == {0.0, 10.0}
    # five standard deviations of 100,000 draws
    assert abs(float((kept != 0).double().mean()) - 0.2) < 5 * (0.2 * 0.8 / 1e5) ** 0.5


def test_dare_adds_what_is_left_with_weights() -> None:
    one, two = vectors(2)
    found = merge_dare([one, two], Settings(weights=(0.5, 3.0), density=0.4, seed=7))
    wanted = 0.5 * flat(drop(one, 0.4, 7)) + 3 * flat(drop(two, 0.4, 7))
    np.testing.assert_allclose(flat(found), wanted, atol=1e-15)
    kept = [flat(drop(vector, 0.4, 7)) != 0 for vector in (one, two)]
    assert 0 < kept[0].sum() < kept[0].size
    assert (kept[0] != kept[1]).any(), "each task's entries are drawn for themselves"
    assert (flat(drop(one, 0.4, 8)) != flat(drop(one, 0.4, 7))).any()


def test_dare_at_density_1_is_the_sum() -> None:
    given_vectors = vectors(2)
    weights = Settings(weights=(1.0, 1.0), density=1.0)
    np.testing.assert_array_equal(flat(merge_dare(given_vectors, weights)), flat(add(given_vectors, weights)))


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    weights=st.tuples(*[st.floats(0.1, 2)] * 3),
    density=st.sampled_from((0.1, 0.3, 1.0)),
)
def test_the_order_of_the_tasks_makes_no_difference(
    method: str, seed: int, weights: tuple[float, float, float], density: float
) -> None:
    one, two, three = vectors(3, seed)
    run = get_method(method).run
    found = run([one, two, three], Settings(weights=weights, density=density))
    other = run([three, one, two], Settings(weights=(weights[2], *weights[:2]), density=density))
    np.testing.assert_allclose(flat(found), flat(other), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_vector_lacks_is_zero(method: str) -> None:
    one, two = vectors(2)
    del two["b.weight"]
    padded = {**two, "b.weight": torch.zeros(SHAPES["b.weight"], dtype=torch.float64)}
    options = Settings(weights=(1.0, 1.0), density=1.0)
    run = get_method(method).run
    np.testing.assert_allclose(flat(run([one, two], options)), flat(run([one, padded], options)), atol=1e-15)


def test_settings_out_of_range() -> None:
    for values in (
        {"weights": (0.0, 0.0)},
        {"weights": (float("nan"), 1.0)},
        {"weights": (1.0,), "density": 0.0},
        {"weights": (1.0,), "density": 1.5},
        {"weights": (1.0,), "scale": float("inf")},
        {"weights": (1.0,), "seed": -1},
    ):
        with pytest.raises(UsageError):
            Settings(**values)
    with pytest.raises(UsageError, match="unknown method 'tie'"):
        get_method("tie")
