"""Decodes every picture of a source once, before any work is done on it: all that cannot be read is named at once.

:mod:`cadapt.data.source` calls this between finding pictures and splitting them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cadapt.data.folder import Images, listed
from cadapt.data.images import BadImage, Progress, check_each
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
    starts = [0, *accumulate(len(images) for images in parts)]

    def check(index: int) -> None:
        part = max(number for number in range(len(parts)) if starts[number] <= index)
        parts[part].check(index - starts[part])

    found = check_each(starts[-1], check, workers, on_progress)
    if found and not skip_bad:
        raise UnreadableImages([bad for _, bad in found], starts[-1])
    if not found:
        return list(parts), []
    gone = {index for index, _ in found}
    kept, skipped = [], []
    for start, images in zip(starts, parts, strict=False):
        kept.append(images.select([index for index in range(len(images)) if start + index not in gone]))
        skipped += [images.names[index] for index in range(len(images)) if start + index in gone]
        _require_remaining(images, kept[-1])
    return kept, skipped


def _require_remaining(before: Images, after: Images) -> None:
    emptied = sorted(set(before.labels) - set(after.labels))
    if emptied:
        names = listed([before.classes[label] for label in emptied])
        raise RefusedError(f"no readable image in {len(emptied)} of {len(before.classes)} classes: {names}")
