import io
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cadapt.data.images import BadImage, UnreadableImage, check_each, check_image, check_images, read_image
from cadapt.errors import RefusedError
from tests.data.pictures import picture, truncate

GREY_16 = np.array([[0, 1, 128, 129], [255, 256, 257, 4096], [32767, 32768, 65278, 65535]], dtype=np.uint16)
# round(v / 257), computed apart from the code
GREY_8 = np.rint(GREY_16 / 257.0).astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def as_opened(path: Path) -> tuple[str, dict]:
    with Image.open(path) as image:
        return image.mode, dict(getattr(image, "tag_v2", {}))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path):
    image = picture(0)
    assert np.array_equal(pixels(saved(image, tmp_path / "a.png")), np.asarray(image))
    assert np.array_equal(pixels(saved(image, tmp_path / "a.bmp")), np.asarray(image))
    assert np.array_equal(pixels(saved(image, tmp_path / "a.ppm")), np.asarray(image))
    assert np.array_equal(pixels(saved(image, tmp_path / "a.webp", lossless=True)), np.asarray(image))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    path = saved(Image.fromarray(GREY_16), tmp_path / name)
    assert np.array_equal(pixels(path), np.repeat(GREY_8[..., None], 3, axis=2))


def test_big_endian_16_bit_grey(tmp_path):
    height, width = GREY_16.shape
    image = Image.frombytes("I;16B", (width, height), GREY_16.astype(">u2").tobytes())
    path = saved(image, tmp_path / "a.tif")
    assert as_opened(path)[0] == "I;16B"
    assert np.array_equal(pixels(path)[..., 0], GREY_8)


def test_white_is_zero_16_bit_tiff(tmp_path):
    path = saved(Image.fromarray(GREY_16), tmp_path / "a.tif", tiffinfo={262: 0})
    assert as_opened(path)[1][262] == 0
    assert np.array_equal(pixels(path)[..., 0], 255 - GREY_8)


def test_32_bit_integers_within_16_bits_are_scaled_and_others_refused(tmp_path):
    fits = saved(Image.fromarray(GREY_16.astype(np.int32)), tmp_path / "fits.tif")
    assert np.array_equal(pixels(fits)[..., 0], GREY_8)
    beyond = saved(Image.fromarray(GREY_16.astype(np.int32) * 2), tmp_path / "beyond.tif")
    with pytest.raises(UnreadableImage, match="grey values 0 to 131070 are beyond 0 to 65535"):
        read_image(beyond)


def test_floating_point_is_refused(tmp_path):
    path = saved(Image.fromarray(GREY_16.astype(np.float32)), tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="floating-point pixels"):
        read_image(path)


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    path = saved(Image.fromarray(GREY_16), tmp_path / "a.png", transparency=4096)
    expected = GREY_8.copy()
    expected[1, 3] = 255
    assert np.array_equal(pixels(path)[..., 0], expected)


def test_one_bit(tmp_path):
    bits = np.array([[True, False], [False, True]])
    expected = np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(pixels(saved(Image.fromarray(bits), tmp_path / "a.png")), expected)


def test_cmyk_jpeg(tmp_path):
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    colours = [(255, 255, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0)]
    for number, (ink, colour) in enumerate(zip(inks, colours, strict=True)):
        path = saved(Image.new("CMYK", (16, 16), ink), tmp_path / f"{number}.jpg", quality=100)
        assert as_opened(path)[0] == "CMYK"
        assert np.abs(pixels(path).astype(int) - colour).max() <= 2


def test_palette(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    for name in ("a.png", "a.gif", "a.bmp"):
        assert pixels(saved(image, tmp_path / name)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    one = saved(image, tmp_path / "one.png", transparency=1)
    assert pixels(one).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    shades = saved(image, tmp_path / "shades.png", transparency=bytes([255, 0, 51]))
    # 51 of 255 is a fifth: 70/5 + 255·4/5
    assert np.abs(pixels(shades).astype(int) - [[[10, 20, 30], [255, 255, 255], [218, 220, 222]]]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(tmp_path, mode):
    grey = (100,) * (3 if mode == "RGBA" else 1)
    image = Image.new(mode, (3, 1))
    image.putdata([(*grey, 255), (*grey, 0), (*grey, 51)])
    values = pixels(saved(image, tmp_path / "a.png")).astype(int)
    assert np.abs(values - [[[100] * 3, [255] * 3, [224] * 3]]).max() <= 1


def test_rgb_with_a_transparent_colour_lies_on_white(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    path = saved(image, tmp_path / "a.png", transparency=(4, 5, 6))
    assert pixels(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    image = picture(1, (9, 6)).resize((72, 48), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(pixels(path), np.asarray(upright))
    assert read_image(path).size == ((48, 72) if orientation >= 5 else (72, 48))


def test_16_bit_orientation_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(GREY_16), tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(path)[..., 0], np.rot90(GREY_8, -1))


def test_damaged_exif_does_not_spoil_whole_pixels(tmp_path):
    path = saved(picture(1), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert read_image(path).size == (12, 10)


def test_text_is_not_a_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    with pytest.raises(UnreadableImage, match="not a picture in one of the formats JPEG, PNG") as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert isinstance(caught.value, RefusedError)
    assert "\n" not in str(caught.value)


def test_postscript_is_never_run(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match="not a picture"):
        read_image(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_truncated_files(tmp_path, suffix, share):
    path = saved(picture(2, (64, 48)), tmp_path / f"a.{suffix}")
    truncate(path, share)
    with pytest.raises(UnreadableImage):
        read_image(path)
    with pytest.raises(UnreadableImage):
        check_image(path)


def test_truncated_progressive_jpeg(tmp_path):
    path = saved(picture(2, (64, 48)), tmp_path / "a.jpg", progressive=True)
    truncate(path, 0.8)
    for read in (read_image, check_image):
        with pytest.raises(UnreadableImage, match="truncated"):
            read(path)


def test_decompression_bombs_name_their_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    warned = saved(Image.new("1", (40, 30)), tmp_path / "warned.png")
    raised = saved(Image.new("1", (100, 30)), tmp_path / "raised.png")
    fine = saved(Image.new("1", (40, 25)), tmp_path / "fine.png")
    with pytest.raises(UnreadableImage, match="too large to decode safely: .*1200 pixels"):
        read_image(warned)
    with pytest.raises(UnreadableImage, match="too large to decode safely: .*3000 pixels"):
        read_image(raised)
    assert read_image(fine).size == (40, 25)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "empty.png": "empty",
        "folder.png": "a folder",
        "broken.png": "no such file",
        "missing.png": "no such file",
        "pipe.png": "not a regular file",
    }.items():
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)


def test_permission_denied(tmp_path, monkeypatch):
    path = saved(picture(0), tmp_path / "a.png")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: let the call say what it would to others

        def refuse(*_arguments, **_options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UnreadableImage, match="permission denied"):
        read_image(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_exhausted_machines_are_not_blamed_on_the_picture(tmp_path, monkeypatch):
    path = saved(picture(0), tmp_path / "a.png")

    def refuse(*_arguments, **_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(path)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "truncated")))
    assert (error.path, error.reason, error.exit_code) == ("a.png", "truncated", 4)
    assert error.hint


@pytest.mark.parametrize("workers", [0, 3])
def test_check_images_finds_all_in_order(tmp_path, workers):
    paths = [saved(picture(index, (64, 48)), tmp_path / f"{index}.jpg") for index in range(70)]
    for index in (3, 50):
        truncate(paths[index], 0.7)
    paths[10].write_text("text")
    calls = []
    bad = check_images(paths, workers, lambda done, total: calls.append((done, total)))
    assert [entry.path for entry in bad] == [str(paths[index]) for index in (3, 10, 50)]
    assert isinstance(bad[0], BadImage)
    assert calls == [(64, 70), (70, 70)]


def test_check_stops_at_other_errors():
    def check(index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check_each(10, check, workers=2)


def test_many_threads_read_the_same(tmp_path):
    path = saved(picture(5, (64, 48)), tmp_path / "a.jpg")
    expected = pixels(path)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(found, expected) for found in pool.map(pixels, [path] * 64))


def test_a_file_cut_anywhere_is_read_whole_or_not_at_all(tmp_path):
    buffer = io.BytesIO()
    image = picture(7, (20, 16))
    image.save(buffer, "JPEG")
    whole = buffer.getvalue()
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    expected = pixels(path)
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            found = pixels(path)
        except UnreadableImage:
            continue
        assert np.array_equal(found, expected), length
