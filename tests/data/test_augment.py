import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import RandomHorizontalFlip

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
    geometry = RandomCropFlip(
        RandomResizedCropAndInterpolation((32, 40), scale=(0.2, 1.0)), RandomHorizontalFlip(p=0.5)
    )
    drawn, flips = training_transform("light", SMALL), 0
    for seed in range(50):
        seed_generators(seed)
        expected = RandomResizedCropAndInterpolation.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
        flips += bool(torch.rand(1) < 0.5)
        seed_generators(seed)
        left, top, width, height = geometry.draw_box(size)
        assert (top, left, height, width) == expected
        seed_generators(seed)
        recorded = Recorded(image)
        drawn.write(recorded, torch.empty(32, 40, 3))
        assert recorded.boxes == [(left, top, width, height)]
    assert 10 < flips < 40


class Recorded(DecodedPicture):
    """A picture that keeps which parts of it were asked for."""

    def __init__(self, image):
        super().__init__(image)
        self.boxes = []

    def crop(self, box, at_least):
        self.boxes.append(tuple(box))
        return super().crop(box, at_least)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest", "random"])
@pytest.mark.parametrize("size", [(60, 50), (200, 160), (20, 30)])
def test_light_is_timms_transform_to_a_level(interpolation, size):
    """Torch's 8-bit resize rounds otherwise than Pillow's, by one level; bicubic clips otherwise at few pixels."""
    settings = Preprocessing(input_size=(3, 32, 40), interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = training_transform("light", settings)
    timms = create_transform(
        (3, 32, 40), True, scale=(0.2, 1.0), color_jitter=None, interpolation=interpolation, mean=0.0, std=1.0
    )
    differences = []
    for seed in range(20):
        image = picture(seed, size).filter(ImageFilter.GaussianBlur(1))
        results = []
        for transform in (ours, timms):
            seed_generators(seed)
            results.append(transform(image) * 255)
        differences.append((results[0] - results[1]).abs())
    difference = torch.stack(differences)
    assert difference.max() < (2.01 if interpolation in ("bicubic", "random") else 1.01)
    assert (difference > 1.01).float().mean() < 1e-4
    assert (difference > 0.01).float().mean() < 0.2


def test_bicubic_beside_black_and_white_is_pillows_but_for_few_pixels():
    settings = Preprocessing(input_size=(3, 64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    geometry = {"scale": (0.2, 1.0), "color_jitter": None, "interpolation": "bicubic"}
    timms = create_transform((3, 64, 64), True, mean=0.0, std=1.0, **geometry)
    differences = []
    for seed in range(20):
        image = picture(seed, (30, 40)).resize((90, 120), Image.Resampling.NEAREST)  # every edge as steep as can be
        results = []
        for transform in (training_transform("light", settings), timms):
            seed_generators(seed)
            results.append(transform(image) * 255)
        differences.append((results[0] - results[1]).abs())
    difference = torch.stack(differences)
    assert (difference > 1.01).float().mean() < 0.02
    assert difference.mean() < 0.2


def test_strong_draws_as_timm_does():
    """Whatever is drawn after the crop comes in timm's order: the same operations, the same part erased."""
    image = picture(3, (60, 50)).filter(ImageFilter.GaussianBlur(1))
    settings = {"scale": (0.2, 1.0), "color_jitter": None, "interpolation": "bicubic", "re_prob": 0.25}
    timms = create_transform(
        (3, 32, 40),
        True,
        auto_augment="rand-m9-n2-mstd0.5",
        re_mode="pixel",
        mean=SMALL.mean,
        std=SMALL.std,
        **settings,
    )
    erased = 0
    for seed in range(30):
        results = []
        for transform in (training_transform("strong", SMALL), timms):
            seed_generators(seed)
            results.append(transform(image))
        # operations such as posterise and equalise turn a level into many, so most pixels must agree, not all
        assert (results[0] - results[1]).abs().median() < 2 / 255 / 0.225
        noise = results[1].abs() > 2.75  # beyond any pixel, so drawn by the eraser
        erased += bool(noise.any())
        assert torch.equal(results[0][noise], results[1][noise])
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
