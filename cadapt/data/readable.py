"""Decodes every picture of a source once, so that all that cannot be read are named together.

:mod:`cadapt.data.source` calls this between finding pictures and splitting them, and :mod:`cadapt.data.beside` while a
run goes on. What was found whole once, by any run, is not decoded again: see :mod:`cadapt.data.verdicts`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from cadapt.data.folder import Images, ImageSet, listed
from cadapt.data.images import BadImage, Progress, check_each
from cadapt.data.verdicts import Verdicts
from cadapt.errors import RefusedError


class UnreadableImages(RefusedError):
    """Data with files that cannot be decoded: all of them in ``files``, the first twenty in the message."""

    def __init__(self, files: Sequence[BadImage], total: int) -> None:
        lines = [f"{bad.path} ({bad.reason})" for bad in files]
        super().__init__(
            f"{len(files)} of {total} images cannot be read: {listed(lines)}",
            hint="replace or remove them, or leave them out with --skip-bad",
        )
        self.files = tuple(files)
        self.total = total


class Pictures:
    """The pictures of all parts of a source under one numbering, with what is known of their files."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(len(images) for images in parts)]
        self._verdicts = [Verdicts(images.root) if isinstance(images, ImageSet) else None for images in parts]

    def __len__(self) -> int:
        """Return the number of pictures in all parts."""
        return self._starts[-1]

    def check(self, index: int) -> None:
        """Decode one picture, unless its file is known to hold a whole one. Raises: UnreadableImage."""
        number = bisect_right(self._starts, index) - 1
        images, verdicts, index = self._parts[number], self._verdicts[number], index - self._starts[number]
        if verdicts is None:
            images.check(index)
            return
        name = images.names[index]
        stamp = verdicts.stamp(name)
        if not verdicts.is_good(name, stamp):
            images.check(index)
            verdicts.remember(name, stamp)

    def remember(self) -> None:
        """Write down which files held whole pictures."""
        for images, verdicts in zip(self._parts, self._verdicts, strict=True):
            if verdicts is not None:
                verdicts.save(images.names)


def readable_parts(
    parts: Sequence[Images], skip_bad: bool, workers: int, on_progress: Progress | None
) -> tuple[list[Images], list[str]]:
    """Decode every picture of all parts; return the parts without those that cannot be, and their names.

    Args:
        parts: the parts of one source.
        skip_bad: leave out what cannot be decoded.
        workers: threads that decode.
        on_progress: called with how many pictures are decoded and how many there are.

    Raises:
        UnreadableImages: some cannot be, unless ``skip_bad``.
        RefusedError: a class has none left.
    """
    pictures = Pictures(parts)
    try:
        found = check_each(len(pictures), pictures.check, workers, on_progress)
    finally:  # Ctrl-C too: the next time goes on from here
        pictures.remember()
    if found and not skip_bad:
        raise UnreadableImages([bad for _, bad in found], len(pictures))
    if not found:
        return list(parts), []
    gone = {index for index, _ in found}
    kept, skipped, start = [], [], 0
    for images in parts:
        bad = [index for index in range(len(images)) if start + index in gone]
        kept.append(images.select([index for index in range(len(images)) if start + index not in gone]))
        skipped += [images.names[index] for index in bad]
        _require_remaining(images, kept[-1])
        start += len(images)
    return kept, skipped


def _require_remaining(before: Images, after: Images) -> None:
    emptied = sorted(set(before.labels) - set(after.labels))
    if emptied:
        names = listed([before.classes[label] for label in emptied])
        raise RefusedError(f"no readable image in {len(emptied)} of {len(before.classes)} classes: {names}")
