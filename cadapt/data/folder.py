"""Finds the pictures of a folder whose subfolders are the classes, in an order that does not depend on the disk.

What it finds, an :class:`ImageSet`, is one kind of :class:`Images`, the interface all sources of pictures share:
splits, loaders and class matching know nothing else. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from cadapt.data.encoded import Picture, open_picture
from cadapt.data.images import check_image, read_image
from cadapt.errors import RefusedError, UsageError, close_matches

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
SHOWN = 20
# folders listed at once: a network disk answers each one late, but many together
_LISTED_AT_ONCE = 8


class Images(Protocol):
    """Labelled pictures that can be read in any order; two of the same names and labels hold the same pictures."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Each picture's class, as an index into ``classes``."""

    @property
    def names(self) -> tuple[str, ...]:
        """What tells each picture from the others, on any machine: its path within the source, for example."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def read(self, index: int) -> Image.Image:
        """Read one picture as upright 8-bit RGB. Raises: UnreadableImage."""

    def open(self, index: int) -> Picture:
        """Open one picture, to be decoded in whole or in part. Raises: UnreadableImage."""

    def check(self, index: int) -> None:
        """Decode one picture only to see whether it can be. Raises: UnreadableImage."""

    def select(self, indices: Sequence[int]) -> Images:
        """Return those pictures alone, in that order, with the same classes."""

    def relabel(self, mapping: Mapping[int, int], classes: Sequence[str]) -> Images:
        """Return the pictures whose label ``mapping`` knows, under their new labels and class names."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Pictures in files below ``root``: each a relative path (with forward slashes) and a label."""

    root: Path
    samples: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """Each picture's class, as an index into ``classes``."""
        return tuple(label for _, label in self.samples)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Each picture's path below ``root``."""
        return tuple(name for name, _ in self.samples)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.samples)

    def read(self, index: int) -> Image.Image:
        """Read one picture as upright 8-bit RGB. Raises: UnreadableImage."""
        return read_image(self.root / self.samples[index][0])

    def open(self, index: int) -> Picture:
        """Open one picture, to be decoded in whole or in part. Raises: UnreadableImage."""
        return open_picture(self.root / self.samples[index][0])

    def check(self, index: int) -> None:
        """Decode one picture only to see whether it can be. Raises: UnreadableImage."""
        check_image(self.root / self.samples[index][0])

    def select(self, indices: Sequence[int]) -> ImageSet:
        """Return those pictures alone, in that order, with the same classes."""
        return replace(self, samples=tuple(self.samples[index] for index in indices))

    def relabel(self, mapping: Mapping[int, int], classes: Sequence[str]) -> ImageSet:
        """Return the pictures whose label ``mapping`` knows, under their new labels and class names."""
        samples = tuple((name, mapping[label]) for name, label in self.samples if label in mapping)
        return replace(self, samples=samples, classes=tuple(classes))


def find_images(folder: str | Path, *, minimum_classes: int = 2, subfolders: Sequence[str] | None = None) -> ImageSet:
    """Find the pictures in a folder's class subfolders: classes sorted by name, pictures by path.

    Pictures may lie deeper inside a class; links are followed. Hidden files and folders, files that have no picture's
    extension, and files beside the class folders are ignored. Every folder is listed once, and no file is looked at.

    Args:
        minimum_classes: 2 to train; 1 is enough to evaluate.
        subfolders: the names of the class folders, sorted, where the caller has listed them already.

    Raises:
        UsageError: there is no such folder, or it has no class subfolders.
        RefusedError: a class without pictures, fewer classes than needed, or a link that leads back to its own folder.
    """
    root = require_folder(folder)
    classes = tuple(visible_folders(root) if subfolders is None else subfolders)
    if not classes:
        raise _no_classes(root)
    with ThreadPoolExecutor(max_workers=_LISTED_AT_ONCE) as pool:
        found = list(pool.map(partial(_pictures_of_class, str(root)), classes))
    if not any(found):
        raise RefusedError(f"no images in '{root}': looked in {len(classes)} class folders for {_extensions()}")
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise RefusedError(
            f"no images in {len(empty)} of {len(classes)} class folders of '{root}': {listed(empty)}",
            hint="remove the empty folders, or put their images there",
        )
    if len(classes) < minimum_classes:
        raise RefusedError(
            f"one class only in '{root}': '{classes[0]}', expected at least {minimum_classes}",
            hint="give the folder that holds one subfolder for each class",
        )
    samples = tuple((path, label) for label, paths in enumerate(found) for path in paths)
    return ImageSet(root=root, samples=samples, classes=classes)


def find_unlabelled(folder: str | Path) -> ImageSet:
    """Find all pictures in a folder and below it, by path, whatever its subfolders mean: their labels are -1.

    Raises:
        UsageError: there is no such folder.
        RefusedError: there are no pictures in it, or a link in it leads back to a folder above.
    """
    root = require_folder(folder)
    found: list[str] = []
    _collect(str(root), "", (), found)
    if not found:
        raise RefusedError(f"no images in '{root}' or below it: looked for {_extensions()}")
    return ImageSet(root=root, samples=tuple((path, -1) for path in sorted(found)), classes=(root.resolve().name,))


def require_folder(folder: str | Path) -> Path:
    """Return the folder's path if it is there.

    Raises:
        UsageError: it is not (the hint names siblings of a similar name), or it is a file.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"not a folder: '{path}' is a file", hint="give the folder that holds the class folders")
    parent = path.parent
    siblings = visible_folders(parent) if parent.is_dir() else []
    raise UsageError(
        f"no folder '{path}'",
        hint=close_matches(path.name, siblings) if siblings else f"there is nothing in '{parent}'",
    )


def visible_folders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's subfolders, the hidden ones left out."""
    return sorted(entry.name for entry in _entries(str(folder)) if entry.is_dir())


def listed(names: Sequence[str]) -> str:
    """Return the first twenty names in one line, and how many more there are."""
    more = f", … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, in the disk's order, the hidden left out; paths are text here, of which few are made."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise RefusedError(f"cannot list the folder '{folder}': {(error.strerror or str(error)).lower()}") from error


def _pictures_of_class(root: str, name: str) -> list[str]:
    """The sorted paths below ``root`` of the pictures in one of its folders."""
    found: list[str] = []
    _collect(os.path.join(root, name), f"{name}/", (), found)  # noqa: PTH118  (text, as in _entries)
    found.sort()
    return found


def _collect(folder: str, prefix: str, above: tuple[tuple[int, int], ...], found: list[str]) -> None:
    status = os.stat(folder)  # noqa: PTH116
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise RefusedError(f"'{folder}' is a link that leads back to a folder it lies in", hint="remove the link")
    for entry in _entries(folder):
        # asked of the listing itself, but for links
        if entry.is_dir():
            _collect(entry.path, f"{prefix}{entry.name}/", (*above, here), found)
        elif is_picture(entry.name):
            found.append(prefix + entry.name)


def is_picture(name: str) -> bool:
    """Tell by its extension whether a file is meant to be a picture."""
    dot = name.rfind(".")  # names may be millions: this takes a third of os.path.splitext, a tenth of Path.suffix
    return dot > 0 and name[dot:].lower() in EXTENSIONS


def _extensions() -> str:
    return " ".join(sorted(EXTENSIONS))


def _no_classes(root: Path) -> UsageError:
    pictures = sum(is_picture(entry.name) for entry in _entries(str(root)))
    found = f"{pictures} images directly in it" if pictures else "nothing to read in it"
    return UsageError(
        f"no class subfolders in '{root}': {found}",
        hint=f"put each class's images into a folder of its name below '{root}'",
    )
