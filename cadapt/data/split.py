"""Chooses pictures for training and validation, and few of them per class, from nothing but names, labels and a seed.

Each picture's place is decided by a hash of the seed and its own name, class by class. So the choice does not depend on
the disk's order or the machine, and a picture that is added or lost moves few others. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cadapt.data.folder import Images
from cadapt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The pictures chosen, and the classes that had fewer than asked for, with how many they had."""

    images: Images
    short_classes: dict[str, int]


def split_images(images: Images, fraction: float, seed: int = 0) -> tuple[Images, Images]:
    """Split into training and validation pictures, ``fraction`` of each class (rounded) going to the latter.

    A class of two or more has at least one picture on either side; the only picture of a class is trained on.

    Raises:
        UsageError: the fraction is not between 0 and 1 (both excluded).
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"validation split: got {fraction}, expected a fraction between 0 and 1", hint="--val-split 0.1"
        )
    validation: set[int] = set()
    for ranked in _ranked_by_class(images, f"split:{seed}"):
        count = min(max(round(len(ranked) * fraction), 1), len(ranked) - 1)
        validation.update(ranked[:count])
    indices = range(len(images))
    train = [index for index in indices if index not in validation]
    return images.select(train), images.select(sorted(validation))


def few_shot(images: Images, shots: int, seed: int = 0) -> FewShot:
    """Choose ``shots`` pictures of each class; fewer shots of the same seed are a subset of more.

    A class that has fewer gives what it has and is reported, not refused: long-tailed data has such classes, and the
    run's record then says which they were.

    Raises:
        UsageError: ``shots`` is below 1.
    """
    if shots < 1:
        raise UsageError(f"shots: got {shots}, expected at least 1 image per class")
    chosen = sorted(index for ranked in _ranked_by_class(images, f"shots:{seed}") for index in ranked[:shots])
    counts = Counter(images.labels)
    short = {name: counts[label] for label, name in enumerate(images.classes) if counts[label] < shots}
    return FewShot(images=images.select(chosen), short_classes=short)


def sha256_of_samples(images: Images) -> str:
    """Return the SHA-256 over the sorted lines "name, tab, class name": the same for the same choice of pictures."""
    classes = images.classes
    lines = sorted(f"{name}\t{classes[label]}\n" for name, label in zip(images.names, images.labels, strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _ranked_by_class(images: Images, salt: str) -> list[Sequence[int]]:
    members: list[list[tuple[bytes, str, int]]] = [[] for _ in images.classes]
    for index, (name, label) in enumerate(zip(images.names, images.labels, strict=True)):
        key = hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()
        members[label].append((key, name, index))
    return [[index for _, _, index in sorted(ranked)] for ranked in members if ranked]
