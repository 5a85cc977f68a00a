import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadapt.data.folder import ImageSet
from cadapt.data.split import few_shot, sha256_of_samples, split_images
from cadapt.errors import UsageError

COUNTS = st.lists(st.integers(1, 40), min_size=2, max_size=6)
FRACTION = st.floats(0.01, 0.99)
SEED = st.integers(0, 2**32)


def image_set(counts: list[int]) -> ImageSet:
    classes = tuple(f"class{label}" for label in range(len(counts)))
    samples = [(f"class{label}/{index:03d}.png", label) for label, count in enumerate(counts) for index in range(count)]
    return ImageSet(root=Path("nowhere"), samples=tuple(samples), classes=classes)


@settings(max_examples=60, deadline=None)
@given(COUNTS, FRACTION, SEED)
def test_split_is_a_stratified_partition(counts, fraction, seed):
    images = image_set(counts)
    train, val = split_images(images, fraction, seed)
    assert sorted(train.samples + val.samples) == sorted(images.samples)
    assert train.classes == val.classes == images.classes
    for label, count in enumerate(counts):
        held = val.labels.count(label)
        assert train.labels.count(label) >= 1
        assert held >= (count >= 2)
        if 1 <= round(count * fraction) <= count - 1:
            assert held == round(count * fraction)


@settings(max_examples=30, deadline=None)
@given(COUNTS, FRACTION, SEED, st.randoms(use_true_random=False))
def test_split_and_shots_do_not_depend_on_order(counts, fraction, seed, shuffler):
    images = image_set(counts)
    shuffled = images.select(shuffler.sample(range(len(images)), len(images)))
    assert set(split_images(images, fraction, seed)[1].samples) == set(
        split_images(shuffled, fraction, seed)[1].samples
    )
    assert set(few_shot(images, 2, seed).images.names) == set(few_shot(shuffled, 2, seed).images.names)
    assert sha256_of_samples(images) == sha256_of_samples(shuffled)


@settings(max_examples=30, deadline=None)
@given(COUNTS, SEED, st.integers(1, 8))
def test_few_shot_takes_k_or_what_there_is_and_nests(counts, seed, shots):
    images = image_set(counts)
    few = few_shot(images, shots, seed)
    assert [few.images.labels.count(label) for label in range(len(counts))] == [min(shots, n) for n in counts]
    assert few.short_classes == {f"class{label}": n for label, n in enumerate(counts) if n < shots}
    assert set(few.images.names) <= set(few_shot(images, shots + 1, seed).images.names)


def test_seeds_differ_and_the_split_never_changes_between_versions():
    images = image_set([20, 20])
    assert split_images(images, 0.5, 0)[1].samples != split_images(images, 0.5, 1)[1].samples
    # Written down once: a release that splits otherwise would evaluate old runs on what they were trained on.
    assert split_images(image_set([5, 5]), 0.4, 0)[1].names == GOLDEN


GOLDEN = ("class0/002.png", "class0/004.png", "class1/001.png", "class1/002.png")


def test_losing_a_picture_moves_at_most_one_other_per_class():
    images = image_set([50, 50])
    lost = images.select([index for index in range(100) if index != 17])
    before, after = split_images(images, 0.2)[1], split_images(lost, 0.2)[1]
    assert len(set(before.names) ^ set(after.names)) <= 2


def test_the_hash_depends_on_names_and_classes():
    images = image_set([2, 2])
    assert sha256_of_samples(images) != sha256_of_samples(images.select([0, 1, 2]))
    assert sha256_of_samples(images) != sha256_of_samples(images.relabel({0: 0, 1: 1}, ["class0", "other"]))
    assert len(sha256_of_samples(images)) == 64


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_impossible_fractions(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_images(image_set([3, 3]), fraction)


def test_impossible_shots():
    with pytest.raises(UsageError, match="at least 1"):
        few_shot(image_set([3, 3]), 0)


def test_the_process_random_numbers_are_not_used():
    random.seed(1)
    before = random.getstate()
    split_images(image_set([9, 9]), 0.3)
    assert random.getstate() == before
