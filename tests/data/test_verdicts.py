import json
import os
from pathlib import Path

import pytest

from cadapt.data import readable
from cadapt.data.folder import find_images
from cadapt.data.images import UnreadableImage
from cadapt.data.readable import Pictures, readable_parts
from cadapt.data.verdicts import Verdicts
from tests.data.pictures import make_classes, picture, truncate

LONG_AGO_NS = 1_600_000_000_000_000_000


def age(root: Path, changed_ns: int = LONG_AGO_NS) -> None:
    for path in root.rglob("*.png"):
        os.utime(path, ns=(changed_ns, changed_ns))


@pytest.fixture
def folder(tmp_path):
    root = make_classes(tmp_path / "pets", {"cat": 3, "dog": 2})
    age(root)
    return root


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that are decoded for a check."""
    names = []

    def check(self, index):
        names.append(self.names[index])
        real(self, index)

    real = readable.ImageSet.check
    monkeypatch.setattr(readable.ImageSet, "check", check)
    return names


def cache_file(private_cache: Path) -> Path:
    (path,) = (private_cache / "cadapt" / "pictures").iterdir()
    return path


def test_good_files_are_decoded_once(folder, decoded):
    readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 5
    readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 5


def test_a_changed_file_is_decoded_again(folder, decoded):
    readable_parts([find_images(folder)], False, 0, None)
    decoded.clear()
    os.utime(folder / "cat" / "001.png", ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    picture(1, (30, 30)).save(folder / "dog" / "000.png")
    os.utime(folder / "dog" / "000.png", ns=(LONG_AGO_NS, LONG_AGO_NS))
    readable_parts([find_images(folder)], False, 0, None)
    assert decoded == ["cat/001.png", "dog/000.png"]


def test_bad_files_are_judged_each_time(folder, decoded):
    truncate(folder / "cat" / "000.png")
    age(folder)
    for _ in range(2):
        kept, skipped = readable_parts([find_images(folder)], True, 0, None)
        assert (len(kept[0]), skipped) == (4, ["cat/000.png"])
    assert decoded.count("cat/000.png") == 2
    assert len(decoded) == 6


def test_a_file_of_this_moment_is_not_remembered(folder, decoded):
    picture(7).save(folder / "cat" / "new.png")
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert decoded.count("cat/new.png") == 2


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"version": 1}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_memory_is_made_anew(folder, decoded, private_cache, damage):
    readable_parts([find_images(folder)], False, 0, None)
    cache_file(private_cache).write_bytes(damage)
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 10


@pytest.mark.parametrize("entry", [None, 3, [1], ["a", "b"], [1, 2, 3], [1e999, 2]])
def test_damaged_entries_are_no_verdicts(folder, decoded, private_cache, entry):
    readable_parts([find_images(folder)], False, 0, None)
    path = cache_file(private_cache)
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "good": {**record["good"], "cat/000.png": entry}}))
    readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 10


def test_another_judge_or_folder_has_no_say(folder, decoded, private_cache):
    readable_parts([find_images(folder)], False, 0, None)
    path = cache_file(private_cache)
    record = json.loads(path.read_bytes())
    for change in ({"judge": "another"}, {"root": "/elsewhere"}, {"version": 0}):
        path.write_text(json.dumps({**record, **change}))
        decoded.clear()
        readable_parts([find_images(folder)], False, 0, None)
        assert len(decoded) == 5


def test_files_that_are_gone_are_forgotten(folder, private_cache):
    readable_parts([find_images(folder)], False, 0, None)
    (folder / "cat" / "000.png").unlink()
    picture(5).save(folder / "cat" / "other.png")
    age(folder)
    readable_parts([find_images(folder)], False, 0, None)
    good = json.loads(cache_file(private_cache).read_bytes())["good"]
    assert sorted(good) == ["cat/001.png", "cat/002.png", "cat/other.png", "dog/000.png", "dog/001.png"]


def test_the_variable_moves_and_disables_it(folder, decoded, private_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CADAPT_CACHE", str(tmp_path / "elsewhere"))
    readable_parts([find_images(folder)], False, 0, None)
    assert len(list((tmp_path / "elsewhere" / "pictures").iterdir())) == 1
    monkeypatch.setenv("CADAPT_CACHE", "off")
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 15
    assert not list(private_cache.iterdir())


def test_a_cache_that_cannot_be_written_fails_nothing(folder, decoded, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CADAPT_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 10


@pytest.mark.parametrize("put", [lambda path, other: path.symlink_to(other), lambda path, other: os.mkfifo(path)])
def test_what_another_put_in_a_shared_cache_is_not_written_through(folder, decoded, private_cache, tmp_path, put):
    readable_parts([find_images(folder)], False, 0, None)
    path, other = cache_file(private_cache), tmp_path / "other"
    content = path.read_bytes()
    other.write_bytes(content.replace(b'"version": 1', b'"version": 0'))
    path.unlink()
    put(path, other)
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 15
    assert b'"version": 0' in other.read_bytes()


def test_names_that_are_no_text_are_remembered(folder, decoded):
    (folder / "cat" / "000.png").rename(folder / "cat" / "\udcff.png")
    for _ in range(2):
        readable_parts([find_images(folder)], False, 0, None)
    assert len(decoded) == 5


def test_parts_have_one_numbering(tmp_path):
    first, second = (make_classes(tmp_path / name, {"cat": 2, "dog": 1}) for name in ("train", "val"))
    truncate(second / "cat" / "001.png")
    pictures = Pictures([find_images(first), find_images(second)])
    assert len(pictures) == 6
    for index in (0, 2, 3, 5):
        pictures.check(index)
    with pytest.raises(UnreadableImage, match="val/cat/001.png"):
        pictures.check(4)


def test_a_missing_file_has_no_stamp(folder):
    assert Verdicts(folder).stamp("cat/none.png") is None
