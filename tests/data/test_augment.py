import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from cadapt.data.augment import PRESETS, evaluation_transform, training_transform
from cadapt.data.encoded import DecodedPicture
from cadapt.data.fused import Normalise, RandomCropFlip
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


@pytest.mark.parametrize("size", [(60, 50), (50, 60), (300, 40), (40, 300), (33, 33)])
def test_crops_are_timms_draw_for_draw(size):
    """Scale 0.2 to 1 and ratio 3/4 to 4/3 are timm's arguments here, and its own code draws the expected box."""
    image = picture(0, size)
    crop = RandomResizedCropAndInterpolation((32, 40), scale=(0.2, 1.0))
    geometry = RandomCropFlip(crop, transforms.RandomHorizontalFlip())
    transform = training_transform("light", SMALL)
    for seed in range(50):
        seed_generators(seed)
        expected = crop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
        seed_generators(seed)
        left, top, width, height = geometry.draw_box(size)
        assert (top, left, height, width) == expected
        seed_generators(seed)
        recorded = Recorded(image)
        transform.write(recorded, torch.empty(32, 40, 3))
        assert recorded.boxes == [(left, top, width, height)]


class Recorded(DecodedPicture):
    """A picture that keeps which parts of it were asked for."""

    def __init__(self, image):
        super().__init__(image)
        self.boxes = []

    def crop(self, box, at_least):
        self.boxes.append(tuple(box))
        return super().crop(box, at_least)


def timms(image, seed, settings, **options):
    """timm's transform, but for the flip, which is drawn from Python's generator; and whether it flipped."""
    parts = create_transform(
        settings.input_size,
        is_training=True,
        separate=True,
        scale=(0.2, 1.0),
        hflip=0.0,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        **{"color_jitter": None, **options},
    )
    seed_generators(seed)
    image = parts[0](image)
    flipped = random.random() < 0.5
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
    return parts[2](parts[1](image)), flipped


def ours(image, seed, settings, preset):
    seed_generators(seed)
    return training_transform(preset, settings)(image)


def levels_apart(images, settings):
    results = [(ours(image, seed, settings, "light"), timms(image, seed, settings)) for seed, image in images]
    assert {flipped for _, (_, flipped) in results} == {True, False}
    return torch.stack([(result - expected).abs() * 255 for result, (expected, _) in results])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest", "random"])
@pytest.mark.parametrize("size", [(60, 50), (200, 160), (20, 30)])
def test_light_is_timms_transform_to_a_level(interpolation, size):
    """Torch's 8-bit resize rounds otherwise than Pillow's, by one level; bicubic clips otherwise at few pixels."""
    settings = Preprocessing(input_size=(3, 32, 40), interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    blurred = [(seed, picture(seed, size).filter(ImageFilter.GaussianBlur(1))) for seed in range(20)]
    difference = levels_apart(blurred, settings)
    assert difference.max() < (2.01 if interpolation in ("bicubic", "random") else 1.01)
    assert (difference > 1.01).float().mean() < 1e-4
    assert (difference > 0.01).float().mean() < 0.2


def test_bicubic_beside_black_and_white_is_pillows_but_for_few_pixels():
    settings = Preprocessing(input_size=(3, 64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    # every edge as steep as can be
    images = [(seed, picture(seed, (30, 40)).resize((90, 120), Image.Resampling.NEAREST)) for seed in range(20)]
    difference = levels_apart(images, settings)
    assert (difference > 1.01).float().mean() < 0.02
    assert difference.mean() < 0.2


def test_strong_draws_as_timm_does():
    """What is drawn after the crop and the flip comes in timm's order: the same operations, the same part erased."""
    image = picture(3, (60, 50)).filter(ImageFilter.GaussianBlur(1))
    erased = 0
    for seed in range(30):
        result = ours(image, seed, SMALL, "strong")
        expected, _ = timms(image, seed, SMALL, auto_augment="rand-m9-n2-mstd0.5", re_prob=0.25, re_mode="pixel")
        # operations such as posterise and equalise turn a level into many, so most pixels must agree, not all
        assert (result - expected).abs().median() < 2 / 255 / 0.225
        noise = expected.abs() > 2.75  # beyond any pixel, so drawn by the eraser
        erased += bool(noise.any())
        assert torch.equal(result[noise], expected[noise])
    assert erased > 2


@pytest.mark.parametrize("exact", [True, False])
def test_normalisation_is_timms(exact):
    levels = torch.arange(256, dtype=torch.uint8).reshape(32, 8, 1).expand(32, 8, 3)
    expected = transforms.Normalize(SMALL.mean, SMALL.std)(levels.permute(2, 0, 1).float().div(255))
    out = torch.empty(32, 8, 3)
    Normalise(8, SMALL.mean, SMALL.std, exact=exact)(levels, out)
    if exact:
        assert torch.equal(out.permute(2, 0, 1), expected)
    assert torch.allclose(out.permute(2, 0, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_writing_into_a_batch_gives_what_a_call_does(preset):
    transform = training_transform(preset, SMALL)
    image = picture(4, (70, 60))
    batch = torch.full((3, 32, 40, 3), torch.nan)
    seed_generators(5)
    transform.write(DecodedPicture(image), batch[1])
    seed_generators(5)
    assert torch.equal(batch[1].permute(2, 0, 1), transform(image))
    assert torch.isnan(batch[[0, 2]]).all()


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
