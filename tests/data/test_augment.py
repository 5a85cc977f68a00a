import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cadapt.data.augment import PRESETS, evaluation_transform, training_transform
from cadapt.data.seeding import seed_generators
from cadapt.errors import UsageError
from cadapt.preprocessing import Preprocessing
from tests.data.pictures import picture

SMALL = Preprocessing(input_size=(3, 32, 40), crop_pct=0.9)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (8, 8), (9, 30), (64, 48)])
def test_every_preset_takes_any_size(preset, size):
    transform = training_transform(preset, SMALL)
    for seed in range(12):
        seed_generators(seed)
        result = transform(picture(seed, size))
        assert result.shape == (3, 32, 40)
        assert result.dtype == torch.float32
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_grey_input(preset):
    transform = training_transform(preset, Preprocessing(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))
    seed_generators(0)
    assert transform(picture(0)).shape == (1, 16, 16)


def test_grey_input_with_colour_statistics():
    transform = evaluation_transform(Preprocessing(input_size=(1, 16, 16), mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)))
    grey = Image.new("RGB", (20, 20), (51, 51, 51))
    assert torch.allclose(transform(grey), torch.full((1, 16, 16), (0.2 - 0.3) / 0.2), atol=1e-6)


def test_grey_pictures_give_equal_channels():
    plain = Preprocessing(input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    seed_generators(1)
    result = training_transform("light", plain)(image)
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_none_is_timm_evaluation():
    image = picture(3, (50, 70))
    expected = create_transform(
        input_size=(3, 32, 40), interpolation="bicubic", mean=SMALL.mean, std=SMALL.std, crop_pct=0.9
    )(image)
    assert torch.equal(training_transform("none", SMALL)(image), expected)
    assert torch.equal(evaluation_transform(SMALL)(image), expected)


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_the_table_of_pixels_is_timms_normalisation_to_the_last_bit(preset, monkeypatch):
    fast = training_transform(preset, SMALL)
    monkeypatch.setattr("cadapt.data.augment._fast", lambda transform, _preprocessing: transform)
    plain = training_transform(preset, SMALL)
    for seed in range(8):
        results = []
        for transform in (fast, plain):
            seed_generators(seed)
            results.append(transform(picture(seed, (60, 50))))
        assert torch.equal(*results)
        assert results[0].is_contiguous()


def test_structured_keeps_place_and_direction():
    image = Image.new("RGB", (80, 20), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 20))
    plain = Preprocessing(input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    result = training_transform("structured", plain)(image)
    assert torch.allclose(result[:, :, 0], torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 16), atol=0.01)
    assert torch.allclose(result[:, :, -1], torch.tensor([[0.0], [0.0], [1.0]]).expand(3, 16), atol=0.01)


def test_light_crops_a_fifth_at_least_and_flips():
    transform = training_transform("light", SMALL)
    text = str(transform)
    assert "scale=(0.2, 1.0)" in text
    assert "RandomHorizontalFlip(p=0.5)" in text
    assert "ColorJitter" not in text


def test_what_the_stronger_presets_add():
    standard, strong = str(training_transform("standard", SMALL)), str(training_transform("strong", SMALL))
    assert "ColorJitter" in standard
    assert "RandAugment(n=2" in standard
    assert "RandomErasing" not in standard
    assert "RandAugment(n=2" in strong
    assert "RandomErasing(p=0.25" in strong


def test_unknown_presets_get_close_matches():
    with pytest.raises(UsageError, match="no augmentation 'ligth'") as caught:
        training_transform("ligth", SMALL)
    assert caught.value.hint == "did you mean light?"


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(UsageError, match="4 channels"):
        evaluation_transform(Preprocessing(input_size=(4, 16, 16)))


@pytest.mark.parametrize("preset", PRESETS)
def test_transforms_travel_to_spawned_workers(preset):
    transform = training_transform(preset, SMALL)
    copy = pickle.loads(pickle.dumps(transform))
    results = []
    for each in (transform, copy):
        seed_generators(4)
        results.append(each(picture(1)))
    assert torch.equal(*results)
