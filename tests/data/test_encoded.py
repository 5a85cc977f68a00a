"""A crop decoded by itself has the pixels of the same crop of the whole, whatever the file."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cadapt.data import turbo
from cadapt.data.encoded import Box, DecodedPicture, EncodedPicture, open_picture
from cadapt.data.images import UnreadableImage, decode_image
from cadapt.data.jpeg import find_frame
from tests.data.pictures import picture

SIZE = (101, 83)
BOXES = [Box(0, 0, 101, 83), Box(3, 5, 40, 30), Box(60, 41, 41, 42), Box(50, 0, 17, 16), Box(0, 15, 101, 1)]


@pytest.fixture(autouse=True, params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    monkeypatch.setattr(turbo, "AVAILABLE", request.param == "simplejpeg")


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    return picture(seed, (size[0] // 16, size[1] // 16)).resize(size, Image.Resampling.BICUBIC)


def full_size_crop(data: bytes, box: Box) -> np.ndarray:
    return EncodedPicture(data, "a").crop(box, (box.width, box.height))


def assert_crops_are_those_of_the_whole(data: bytes) -> None:
    whole = decode_image(data, "a")
    assert EncodedPicture(data, "a").size == whole.size
    for left, top, width, height in BOXES:
        box = Box(left, top, min(width, whole.width - left), min(height, whole.height - top))
        expected = np.asarray(whole)[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(full_size_crop(data, box), expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_jpeg_crops(subsampling, options):
    assert_crops_are_those_of_the_whole(encoded(picture(1, SIZE), quality=90, subsampling=subsampling, **options))


@pytest.mark.parametrize("bottom", range(1, 48))
def test_rows_above_any_cut_are_those_of_the_whole(bottom):
    """Chroma of half the height is interpolated between rows, so a cut must leave the next row of it."""
    data = encoded(picture(2, (24, 48)), quality=95, subsampling="4:2:0")
    expected = np.asarray(decode_image(data, "a"))[:bottom]
    assert np.array_equal(full_size_crop(data, Box(0, 0, 24, bottom)), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpeg_modes(mode):
    assert_crops_are_those_of_the_whole(encoded(picture(3, SIZE).convert(mode), quality=90))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_upright_by_exif(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_crops_are_those_of_the_whole(encoded(picture(4, SIZE), kind, exif=exif))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_notes_may_come_after_the_frame(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(4, SIZE), exif=exif)
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    scan = data.index(b"\xff\xda", end)
    assert_crops_are_those_of_the_whole(data[:start] + data[end:scan] + data[start:end] + data[scan:])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF"])
def test_other_formats(kind):
    assert_crops_are_those_of_the_whole(encoded(picture(5, SIZE), kind))


def test_transparency_lies_on_white():
    image = picture(6, SIZE).convert("RGBA")
    image.putalpha(100)
    assert_crops_are_those_of_the_whole(encoded(image, "PNG"))


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_crops_are_those_of_the_picture_in_draft_mode(scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(7, (640, 512)), exif=exif)
    box = Box(13, 27, 410, 400)
    part = EncodedPicture(data, "a").crop(box, (box.width // scale, box.height // scale))
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (640 // scale, 512 // scale))
    upright = draft.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else draft.copy()
    # the nearest whole pixels, counted from the stored picture's corner
    left, right = (512 - 13, 512 - 423) if orientation == 6 else (13, 423)
    edges = [math.floor(edge / scale + 0.5) for edge in (left, 27, right, 427)]
    if orientation == 6:
        edges[0], edges[2] = (512 // scale - edge for edge in (edges[0], edges[2]))
    assert np.array_equal(part, np.asarray(upright.crop(tuple(edges))))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_large_crops_look_like_reduced_ones(scale):
    """Small cosine transforms are no box filter, but on smooth content within a level or two of one."""
    data = encoded(smooth(7, (640, 512)), quality=95)
    part = EncodedPicture(data, "a").crop(Box(16, 24, 400, 400), (400 // scale, 400 // scale))
    expected = decode_image(data, "a").crop((16, 24, 416, 424)).reduce(scale)
    difference = np.abs(part.astype(int) - np.asarray(expected))
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) <= 6


def test_a_crop_is_never_smaller_than_asked_for():
    data = encoded(smooth(8, (320, 256)))
    for width, height in [(100, 100), (160, 128), (161, 100), (40, 32), (3, 200)]:
        part = EncodedPicture(data, "a").crop(Box(0, 0, 320, 256), (width, height))
        assert part.shape[1] >= width
        assert part.shape[0] >= height


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_wherever_a_crop_lies_it_is_as_large_as_asked_for(scale):
    data = encoded(smooth(8, (160, 160)))
    for edge in range(2 * scale):
        part = EncodedPicture(data, "a").crop(Box(edge, edge, 15 * scale, 16 * scale), (15, 16))
        assert part.shape[:2] == (16, 15)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_missing_end_is_found_by_any_crop(share, options):
    whole = encoded(picture(9, (64, 96)), **options)
    data = whole[: int(len(whole) * share)]
    with pytest.raises(UnreadableImage) as expected:
        decode_image(data, "a.jpg")
    with pytest.raises(UnreadableImage) as caught:
        EncodedPicture(data, "a.jpg").crop(Box(0, 0, 20, 10), (20, 10))
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_damage_inside_shows_what_pillow_shows(place):
    """Bits flipped within the scan: decoders go on as they can, and all three are one library."""
    data = bytearray(encoded(picture(14, SIZE), quality=90))
    start = int(len(data) * place)
    data[start : start + 8] = bytes(byte ^ 0x55 for byte in data[start : start + 8])
    assert_crops_are_those_of_the_whole(bytes(data))


def test_a_header_that_no_decoder_takes_is_refused_in_pillows_words():
    data = bytearray(encoded(picture(15, SIZE)))
    frame = find_frame(bytes(data))
    assert frame is not None
    assert frame.plain
    data[frame.offset + 6] = 0x77  # sampling factors of 7 by 7
    with pytest.raises(UnreadableImage) as expected:
        decode_image(bytes(data), "a.jpg")
    with pytest.raises(UnreadableImage) as caught:
        EncodedPicture(bytes(data), "a.jpg").crop(Box(0, 0, 20, 10), (20, 10))
    assert str(caught.value) == str(expected.value)


def test_the_colour_profile_is_left_alone():
    assert_crops_are_those_of_the_whole(encoded(picture(16, SIZE), icc_profile=b"profile"))


def test_bytes_after_the_end_do_no_harm():
    assert_crops_are_those_of_the_whole(encoded(picture(10, SIZE)) + b"\0\0trailer")


def test_files_that_are_none_are_refused_when_opened(tmp_path):
    with pytest.raises(UnreadableImage, match="not a picture"):
        EncodedPicture(b"text", "a.jpg")
    with pytest.raises(UnreadableImage, match="no such file"):
        open_picture(tmp_path / "a.jpg")


def test_huge_pictures_are_refused_when_opened(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="too large to decode safely"):
        EncodedPicture(encoded(picture(11, SIZE)), "a.jpg")


def test_a_decoded_picture_is_cropped_as_it_is():
    image = picture(12, SIZE).filter(ImageFilter.BLUR)
    part = DecodedPicture(image).crop(Box(3, 5, 40, 30), (1, 1))
    assert np.array_equal(part, np.asarray(image)[5:35, 3:43])


def test_only_whole_baseline_files_have_a_frame_to_cut():
    image = picture(13, SIZE)
    found = find_frame(encoded(image))
    assert found is not None
    assert (found.width, found.height) == SIZE
    assert found.plain
    assert found.rows_for(10) < SIZE[1]
    assert found.rows_for(SIZE[1]) == SIZE[1]
    assert find_frame(encoded(image, progressive=True)) is None
    assert find_frame(encoded(image)[:-2]) is None
    assert find_frame(encoded(image, "PNG")) is None
    assert find_frame(b"\xff\xd8\xff\xd9") is None
    assert find_frame(b"\xff\xd9") is None
