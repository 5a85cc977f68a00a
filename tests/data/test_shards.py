import io
import json
import tarfile
from pathlib import Path

import pytest

from cadapt.data.images import decode_image
from cadapt.data.shards import index_shards, read_shard
from cadapt.errors import RefusedError
from tests.data.pictures import picture


def encoded(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(first: int, count: int) -> dict[str, bytes]:
    """Return files of samples whose labels are their numbers modulo 2."""
    files = {}
    for number in range(first, first + count):
        files[f"{number:04d}.cls"] = str(number % 2).encode()
        files[f"{number:04d}.png"] = encoded(number)
    return files


def test_every_sample_is_found_and_read(tmp_path):
    one = write_shard(tmp_path / "a-0.tar", labelled(0, 3))
    two = write_shard(tmp_path / "a-1.tar", labelled(3, 2))
    samples = index_shards([str(one), str(two)])
    assert [sample.name for sample in samples] == [
        "a-0.tar/0000",
        "a-0.tar/0001",
        "a-0.tar/0002",
        "a-1.tar/0003",
        "a-1.tar/0004",
    ]
    assert [sample.label for sample in samples] == [0, 1, 0, 1, 0]
    for number, sample in enumerate(samples):
        assert read_shard(sample) == encoded(number)
        assert decode_image(read_shard(sample), sample.name).tobytes() == picture(number).tobytes()


def test_labels_from_json_and_folders_in_names(tmp_path):
    files = {"x/1.b.json": b"", "x/1.json": json.dumps({"kind": 3}).encode(), "x/1.jpg": encoded(1, "JPEG")}
    samples = index_shards([str(write_shard(tmp_path / "a.tar", files))], "kind")
    assert [(sample.name, sample.label) for sample in samples] == [("a.tar/x/1", 3)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.cls": b"0"}, "has no picture: got cls, expected jpg"),
        ({"1.png": b"x"}, "has no label: expected a .cls file"),
        ({"1.png": b"x", "1.cls": b"cat"}, "has no label"),
        ({"1.png": b"x", "1.cls": b"-1"}, "has no label"),
    ],
)
def test_incomplete_samples(tmp_path, files, message):
    with pytest.raises(RefusedError, match=message):
        index_shards([str(write_shard(tmp_path / "a.tar", files))])


def test_shards_that_cannot_be_read(tmp_path):
    with pytest.raises(RefusedError, match="no shard"):
        index_shards(["https://example.org/a.tar"])
    text = tmp_path / "text.tar"
    text.write_text("no archive" * 100)
    with pytest.raises(RefusedError, match="cannot read shard"):
        index_shards([str(text)])
    packed = write_shard(tmp_path / "a.tar.gz", labelled(0, 1), "w:gz")
    with pytest.raises(RefusedError, match="cannot read shard"):
        index_shards([str(packed)])
    whole = write_shard(tmp_path / "b.tar", labelled(0, 30))
    whole.write_bytes(whole.read_bytes()[:20000])
    with pytest.raises(RefusedError, match="cannot read shard"):
        index_shards([str(whole)])
