import numpy as np
import pytest
import torch
from torch.nn import functional

from cadapt.data.mixup import Mixing, mix_batch
from cadapt.errors import UsageError

IMAGES = torch.arange(6 * 3 * 8 * 8, dtype=torch.float32).reshape(6, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BOTH = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0)


def mixed(mixing=BOTH, images=IMAGES, labels=LABELS, **place):
    return mix_batch(images, labels, mixing, 3, **{"seed": 0, "epoch": 0, "step": 0, **place})


@pytest.mark.parametrize("mixing", [Mixing(mixup_alpha=0.5), Mixing(cutmix_alpha=1.0), BOTH])
def test_the_same_place_mixes_alike_and_others_differ(mixing):
    torch.random.manual_seed(0)
    first = mixed(mixing)
    np.random.rand(5)
    torch.rand(5)
    again = mixed(mixing)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for place in ({"step": 1}, {"epoch": 1}, {"seed": 1}):
        assert not torch.equal(first[1], mixed(mixing, **place)[1])


def test_mixup_is_the_formula():
    images, targets = mixed(Mixing(mixup_alpha=1.0))
    share = targets[0, 0]  # picture 0 (class 0) with picture 5 (class 2)
    assert 0 < share < 1
    assert torch.allclose(images, IMAGES * share + IMAGES.flip(0) * (1 - share), rtol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(6))


def test_nothing_given_or_drawn_elsewhere_changes():
    before, state = IMAGES.clone(), np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    mixed()
    assert torch.equal(IMAGES, before)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_last_of_an_odd_batch_stays():
    images, targets = mixed(Mixing(mixup_alpha=1.0), IMAGES[:5], LABELS[:5])
    assert torch.equal(images[4], IMAGES[4])
    assert torch.equal(targets[4], functional.one_hot(LABELS[4], 3).float())
    assert not torch.equal(images[0], IMAGES[0])
    assert targets.shape == (5, 3)


def test_a_single_picture():
    images, targets = mixed(images=IMAGES[:1], labels=LABELS[:1])
    assert torch.equal(images, IMAGES[:1])
    assert targets.tolist() == [[1.0, 0.0, 0.0]]


def test_off_means_unchanged():
    assert not Mixing().active
    images, targets = mixed(Mixing())
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets, functional.one_hot(LABELS, 3).float())


@pytest.mark.parametrize("wrong", [{"mixup_alpha": -1}, {"cutmix_alpha": -0.1}])
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Mixing(**wrong)
