"""Reads single pictures out of the tar shards of a webdataset, by an index made once.

timm's own reader streams shards and drops what it cannot decode with a log line, so neither its order nor its number of
samples can be relied on. Here timm only says which shards a split has; reading by place makes them like any folder.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cadapt.errors import RefusedError

# In the order of preference where a sample has several; timm's reader takes jpg, png and webp.
PICTURE_KEYS = ("jpg", "png", "webp", "jpeg")


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """Where one sample's picture lies: the shard, its first byte and its length in bytes; and what it is called."""

    shard: str
    name: str
    offset: int
    length: int
    label: int


def index_shards(shards: Sequence[str], label_key: str = "") -> list[ShardSample]:
    """List the samples of uncompressed tar files, in the order of shards and of samples within them.

    Args:
        label_key: the field of each sample's ``.json`` with the label; else its ``.cls`` file holds it.

    Raises:
        RefusedError: a shard is not on this machine's disk, is damaged or compressed, or a sample lacks its picture
            or its label.
    """
    samples: list[ShardSample] = []
    for shard in shards:
        if not Path(shard).is_file():
            raise RefusedError(
                f"no shard '{shard}' on this disk", hint="download the shards: remote ones cannot be read"
            )
        try:
            with tarfile.open(shard, "r:") as tar:
                samples.extend(_sample(tar, shard, key, files, label_key) for key, files in _grouped(tar))
        except (tarfile.TarError, OSError) as error:
            raise RefusedError(
                f"cannot read shard '{shard}': {error}", hint="shards must be whole, uncompressed tar files"
            ) from error
    return samples


def read_shard(sample: ShardSample) -> bytes:
    """Return the bytes of a sample's picture."""
    with Path(sample.shard).open("rb") as file:
        file.seek(sample.offset)
        return file.read(sample.length)


def shard_fetchers(samples: Sequence[ShardSample]) -> tuple[Callable[[], bytes], ...]:
    """Return a function for each sample that reads its picture's bytes."""
    return tuple(partial(read_shard, sample) for sample in samples)


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield a sample's name and its files by extension: neighbours that share the name up to the first dot."""
    current, files = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current and files:
            yield current, files
            files = {}
        current = key
        files[extension.lower()] = member
    if files:
        yield current, files


def _sample(
    tar: tarfile.TarFile, shard: str, key: str, files: dict[str, tarfile.TarInfo], label_key: str
) -> ShardSample:
    where = f"sample '{key}' of shard '{shard}'"
    picture = next((files[extension] for extension in PICTURE_KEYS if extension in files), None)
    if picture is None:
        raise RefusedError(
            f"{where} has no picture: got {', '.join(sorted(files))}, expected {' or '.join(PICTURE_KEYS)}"
        )
    label = _label(tar, files, label_key)
    if label is None:
        wanted = f"an integer '{label_key}' in its .json" if label_key else "a .cls file with an integer"
        raise RefusedError(f"{where} has no label: expected {wanted}")
    return ShardSample(
        shard=shard, name=f"{Path(shard).name}/{key}", offset=picture.offset_data, length=picture.size, label=label
    )


def _label(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo], label_key: str) -> int | None:
    member = files.get("json" if label_key else "cls")
    content = tar.extractfile(member) if member is not None else None
    if content is None:
        return None
    text: Any = content.read()
    try:
        label = int(json.loads(text)[label_key] if label_key else text)
    except (ValueError, KeyError, TypeError):
        return None  # the caller says which sample it was
    return label if label >= 0 else None
