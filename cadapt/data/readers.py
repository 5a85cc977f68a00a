"""Opens data sets behind timm's readers (``wds/``, ``hfds/``, ``torch/``) as pictures to be read in any order.

timm finds the data set and its splits; the pictures themselves are decoded by :mod:`cadapt.data.images`, because timm's
readers replace or drop what they cannot decode. :mod:`cadapt.data.source` calls this for sources that are no folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cadapt.data.encoded import DecodedPicture, EncodedPicture, Picture
from cadapt.data.folder import require_folder
from cadapt.data.images import UnreadableImage, check_bytes, decode_image, read_file, to_rgb
from cadapt.data.shards import index_shards, shard_fetchers
from cadapt.errors import CadaptError, RefusedError, UsageError, close_matches

PREFIXES = ("wds", "hfds", "torch")
TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("val", "valid", "validation")
TEST_SPLITS = ("test",)
HELD_OUT_SPLITS = (*VALIDATION_SPLITS, *TEST_SPLITS)
_EXTRAS = {"wds": "webdataset", "hfds": "datasets"}


@dataclass(frozen=True, kw_only=True)
class ReaderSource:
    """A source's parts: ``prefix/name``, then perhaps ``@root``, then perhaps ``#split``."""

    prefix: str
    name: str
    root: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class ReaderImages:
    """Pictures behind one of timm's readers: for each a function that returns its file's bytes, or it decoded."""

    fetchers: tuple[Callable[[], bytes | Image.Image], ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read one picture as upright 8-bit RGB. Raises: UnreadableImage."""
        found = self._fetch(index)
        return to_rgb(found) if isinstance(found, Image.Image) else decode_image(found, self.names[index])

    def open(self, index: int) -> Picture:
        """Open one picture, to be decoded in whole or in part. Raises: UnreadableImage."""
        found = self._fetch(index)
        if isinstance(found, Image.Image):
            return DecodedPicture(to_rgb(found))
        return EncodedPicture(found, self.names[index])

    def check(self, index: int) -> None:
        """Decode one picture only to see whether it can be. Raises: UnreadableImage."""
        found = self._fetch(index)
        if isinstance(found, bytes):
            check_bytes(found, self.names[index])

    def select(self, indices: Sequence[int]) -> ReaderImages:
        """Return those pictures alone, in that order, with the same classes."""
        return replace(
            self,
            fetchers=tuple(self.fetchers[index] for index in indices),
            names=tuple(self.names[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
        )

    def relabel(self, mapping: Mapping[int, int], classes: Sequence[str]) -> ReaderImages:
        """Return the pictures whose label ``mapping`` knows, under their new labels and class names."""
        kept = self.select([index for index, label in enumerate(self.labels) if label in mapping])
        return replace(kept, labels=tuple(mapping[label] for label in kept.labels), classes=tuple(classes))

    def _fetch(self, index: int) -> bytes | Image.Image:
        try:
            return self.fetchers[index]()
        except OSError as error:
            raise UnreadableImage(self.names[index], (error.strerror or str(error)).lower()) from error


def parse_reader(source: str) -> ReaderSource | None:
    """Return a source's parts if it has a reader's prefix; ``./wds/…`` is the folder of that name."""
    prefix, slash, rest = source.partition("/")
    if not slash or prefix.lower() not in PREFIXES:
        return None
    rest, _, split = rest.partition("#")
    name, _, root = rest.partition("@")
    return ReaderSource(prefix=prefix.lower(), name=name, root=root or None, split=split or None)


def absolute_source(source: str) -> str:
    """Return a source under a name that means the same from any folder: its paths are made absolute.

    >>> absolute_source("hfds/owner/pets#train")
    'hfds/owner/pets#train'
    """
    reader = parse_reader(source)
    if reader is None:
        return _absolute(source)
    name = _absolute(reader.name) if reader.prefix == "wds" else reader.name
    root = "" if reader.root is None else f"@{_absolute(reader.root)}"
    return f"{reader.prefix}/{name}{root}" + (f"#{reader.split}" if reader.split else "")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def find_split(source: ReaderSource, wanted: Sequence[str]) -> str | None:
    """Return the first of the wanted splits that the data set has, or the one the source names.

    Raises:
        CadaptError: the reader's package is missing, or the data set cannot be opened.
    """
    if source.split is not None:
        return source.split
    if source.prefix == "torch":  # torchvision's sets have these two
        return next((split for split in wanted if split in ("train", "test")), None)
    known = _shard_splits(source) if source.prefix == "wds" else _hub_splits(source)
    return next((split for split in wanted if split in known), None)


def open_reader(source: ReaderSource, split: str) -> ReaderImages:
    """Open one split of a data set.

    Class names are the reader's where it knows them, else the labels' numbers.

    Raises:
        UsageError: there is no such data set or split.
        CadaptError: the reader's package is missing, or the data set cannot be opened.
        RefusedError: its samples are damaged or lack labels.
    """
    require_extra(source.prefix)
    open_split = {"wds": _open_shards, "hfds": _open_hub, "torch": _open_torch}[source.prefix]
    images = open_split(source, split)
    if len(images) == 0:
        raise RefusedError(f"no images in split '{split}' of {source.prefix}/{source.name}")
    return images


def require_extra(prefix: str) -> None:
    """Check that the package a reader needs is there.

    Raises:
        CadaptError: it is not; the hint is the command that installs it.
    """
    package = _EXTRAS.get(prefix)
    if package is not None and importlib.util.find_spec(package) is None:
        raise CadaptError(f"reading {prefix}/ needs the package '{package}'", hint=f"pip install 'cadapt[{prefix}]'")


def _create(source: ReaderSource, **settings: Any) -> Any:
    from timm.data import create_dataset

    name = f"{source.prefix}/{source.name}"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some readers print there what belongs to no pipe
            return create_dataset(name, **settings)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CadaptError(f"cannot open {name}: {type(error).__name__}: {reason}") from error


def _shard_splits(source: ReaderSource) -> dict[str, str]:
    """Return what timm calls each split: its name in ``_info.json``, else its shards by the words in their names."""
    folder = require_folder(source.name)
    for file in (folder / "_info.json", folder / "info.json"):
        if file.is_file():
            try:
                return {str(split): str(split) for split in json.loads(file.read_text())["splits"]}
            except (ValueError, KeyError, TypeError) as error:
                raise RefusedError(f"damaged data set description '{file}': {error!r}") from error
    shards = sorted(path.name for path in folder.glob("*.tar"))
    if not shards:
        raise UsageError(f"no shards (*.tar) in '{folder}'")
    words = {shard: set(shard[: -len(".tar")].replace("_", "-").replace(".", "-").split("-")) for shard in shards}
    splits = {}
    for split in (*TRAIN_SPLITS, *HELD_OUT_SPLITS):
        members = [shard for shard in shards if split in words[shard]]
        if members:
            splits[split] = "::".join(members)
    return splits or {"train": "::".join(shards)}


def _open_shards(source: ReaderSource, split: str) -> ReaderImages:
    names = _shard_splits(source)
    if split not in names and ".tar" not in split:
        raise UsageError(f"no split '{split}' in wds/{source.name}", hint=close_matches(split, names))
    folder = require_folder(source.name)
    reader = _create(source, root=str(folder), split=names.get(split, split)).reader
    info = reader.split_info
    samples = index_shards([str(folder / name) for name in info.filenames], info.alt_label)
    if info.num_samples and info.num_samples != len(samples):
        raise RefusedError(
            f"split '{split}' of wds/{source.name} has {len(samples)} samples, its description says {info.num_samples}"
        )
    labels = tuple(sample.label for sample in samples)
    return ReaderImages(
        fetchers=shard_fetchers(samples),
        names=tuple(sample.name for sample in samples),
        labels=labels,
        classes=_class_names(reader.class_to_idx, labels),
    )


def _hub_splits(source: ReaderSource) -> Sequence[str]:
    require_extra("hfds")
    import datasets  # type: ignore[import-not-found,unused-ignore]

    try:
        splits: Sequence[str] = datasets.get_dataset_split_names(source.name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CadaptError(f"cannot open hfds/{source.name}: {type(error).__name__}: {reason}") from error
    return splits


def _open_hub(source: ReaderSource, split: str) -> ReaderImages:
    reader = _create(source, root=source.root, split=split).reader
    found = list(reader.dataset[reader.label_key])
    classes: tuple[str, ...]
    if found and isinstance(found[0], str):
        classes = tuple(sorted(set(found)))
        positions = {name: index for index, name in enumerate(classes)}
        labels = tuple(positions[name] for name in found)
    else:
        labels = tuple(int(label) for label in found)
        classes = _class_names(reader.class_to_idx, labels)
    return ReaderImages(
        fetchers=tuple(partial(_hub_bytes, reader, index) for index in range(len(labels))),
        names=_numbered(split, len(labels)),
        labels=labels,
        classes=classes,
    )


def _hub_bytes(reader: Any, index: int) -> bytes:
    with reader[index][0] as file:
        data: bytes = file.read()
        return data


def _open_torch(source: ReaderSource, split: str) -> ReaderImages:
    root = source.root or str(_torch_folder())
    # torchvision takes what is there already, and downloads the rest.
    dataset = _create(source, root=root, split=split, download=True)
    labels = tuple(int(label) for label in getattr(dataset, "targets", ()))
    if len(labels) != len(dataset):
        raise UsageError(f"torch/{source.name} does not list its labels, which training needs")
    files = getattr(dataset, "samples", None)
    return ReaderImages(
        fetchers=tuple(
            partial(read_file, files[index][0]) if files else partial(_torch_picture, dataset, index)
            for index in range(len(labels))
        ),
        names=_numbered(split, len(labels)),
        labels=labels,
        classes=_class_names({name: index for index, name in enumerate(getattr(dataset, "classes", ()))}, labels),
    )


def _torch_folder() -> Path:
    import torch

    return Path(torch.hub.get_dir()).parent / "datasets"


def _torch_picture(dataset: Any, index: int) -> Image.Image:
    picture: Image.Image = dataset[index][0]
    return picture


def _numbered(split: str, count: int) -> tuple[str, ...]:
    return tuple(f"{split}/{index:07d}" for index in range(count))


def _class_names(positions: Mapping[Any, int] | None, labels: Sequence[int]) -> tuple[str, ...]:
    # ImageNet's classes have several names each.
    positions = {", ".join(name) if isinstance(name, tuple) else str(name): i for name, i in (positions or {}).items()}
    if positions and max(positions.values()) >= max(labels, default=0):
        named = {index: name for name, index in positions.items()}
        return tuple(named.get(index, str(index)) for index in range(max(named) + 1))
    return tuple(str(index) for index in range(max(labels, default=-1) + 1))
