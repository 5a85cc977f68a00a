import os

import pytest
from PIL import Image

from cadapt.data.folder import find_images, listed
from cadapt.data.images import UnreadableImage
from cadapt.data.source import _training_parts
from cadapt.errors import RefusedError, UsageError
from tests.data.pictures import make_classes, picture


def test_classes_and_samples_are_sorted_and_nested_files_found(tmp_path):
    make_classes(tmp_path, {"b": 2, "a": 1})
    (tmp_path / "b" / "deep" / "er").mkdir(parents=True)
    picture(9).save(tmp_path / "b" / "deep" / "er" / "X.JPEG")
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "README").write_text("beside the classes")
    images = find_images(tmp_path)
    assert images.classes == ("a", "b")
    assert images.samples == (("a/000.png", 0), ("b/000.png", 1), ("b/001.png", 1), ("b/deep/er/X.JPEG", 1))
    assert images.labels == (0, 1, 1, 1)
    assert len(images) == 4
    assert images.read(3).size == (12, 10)


@pytest.mark.parametrize(
    "suffix", [".jpg", ".jpeg", ".JPG", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"]
)
def test_extensions(tmp_path, suffix):
    make_classes(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / f"new{suffix}").touch()
    assert f"a/new{suffix}" in find_images(tmp_path).names


def test_hidden_files_and_folders_are_ignored(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1, ".hidden": 1})
    (tmp_path / "a" / "._000.png").write_text("left by an archive")
    (tmp_path / "a" / ".thumbnails").mkdir()
    picture(0).save(tmp_path / "a" / ".thumbnails" / "000.png")
    assert find_images(tmp_path).names == ("a/000.png", "b/000.png")


def test_links_are_followed_and_loops_refused(tmp_path):
    make_classes(tmp_path / "data", {"a": 1, "b": 1})
    make_classes(tmp_path / "elsewhere", {"more": 2})
    (tmp_path / "data" / "a" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere" / "more")
    images = find_images(tmp_path / "data")
    assert images.names == ("a/000.png", "a/linked/000.png", "a/linked/001.png", "b/000.png", "c/000.png", "c/001.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
    with pytest.raises(RefusedError, match="leads back"):
        find_images(tmp_path / "data")


def test_missing_folder_names_its_siblings(tmp_path):
    make_classes(tmp_path / "pictures", {"a": 1, "b": 1})
    with pytest.raises(UsageError, match="no folder") as caught:
        find_images(tmp_path / "picturse")
    assert caught.value.hint == "did you mean pictures?"


def test_a_file_is_no_folder(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="is a file"):
        find_images(tmp_path / "a.png")


def test_images_without_class_folders(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="no class subfolders .* 1 images directly in it"):
        find_images(tmp_path)


def test_empty_classes_are_named(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 0, "c": 0})
    with pytest.raises(RefusedError, match="no images in 2 of 3 class folders of .*: b, c"):
        find_images(tmp_path)


def test_no_images_at_all(tmp_path):
    make_classes(tmp_path, {"a": 0, "b": 0})
    with pytest.raises(RefusedError, match="no images in"):
        find_images(tmp_path)


def test_one_class_only(tmp_path):
    make_classes(tmp_path, {"a": 2})
    with pytest.raises(RefusedError, match="one class only in .*: 'a'"):
        find_images(tmp_path)
    assert find_images(tmp_path, minimum_classes=1).classes == ("a",)


def test_select_and_relabel(tmp_path):
    images = find_images(make_classes(tmp_path, {"a": 1, "b": 2, "c": 1}))
    assert images.select([3, 0]).samples == (("c/000.png", 2), ("a/000.png", 0))
    moved = images.relabel({1: 0, 2: 5}, ["b", "q", "r", "s", "t", "c"])
    assert moved.samples == (("b/000.png", 0), ("b/001.png", 0), ("c/000.png", 5))


def test_a_dangling_link_is_found_and_unreadable(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    images = find_images(tmp_path)
    with pytest.raises(UnreadableImage, match="no such file"):
        images.read(images.names.index("a/gone.png"))


def test_names_that_are_no_text(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1})
    Image.new("L", (2, 2)).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "x.png").rename(tmp_path / "a" / "\udcff.png")  # the byte 0xff, which is no UTF-8
    images = find_images(tmp_path)
    assert images.read(1).size == (2, 2)


def test_listed_stops_at_twenty():
    names = [str(number) for number in range(25)]
    assert listed(names).endswith("19, … and 5 more")
    assert listed(names[:20]) == ", ".join(names[:20])


def test_no_folder_is_listed_twice_and_no_file_looked_at(tmp_path, monkeypatch):
    for part in ("train", "val"):
        make_classes(tmp_path / part, {"a": 2, "b": 2})
    scandir, stat, listed_folders, looked_at = os.scandir, os.stat, [], []

    def list_folder(path):
        listed_folders.append(str(path))
        return scandir(path)

    def look_at(path, *arguments, **settings):
        looked_at.append(str(path))
        return stat(path, *arguments, **settings)

    monkeypatch.setattr("os.scandir", list_folder)
    monkeypatch.setattr("os.stat", look_at)
    train, held = _training_parts(str(tmp_path), None)
    assert held is not None
    assert train.images.names == held.images.names == ("a/000.png", "a/001.png", "b/000.png", "b/001.png")
    folders = [tmp_path, *(tmp_path / part / name for part in ("train", "val") for name in ("", "a", "b"))]
    assert sorted(listed_folders) == sorted(map(str, folders))
    assert not [path for path in looked_at if path.endswith(".png")]
