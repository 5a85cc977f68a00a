"""Opens what a user names as data, checks all of it, and splits it: the way from a command's argument to pictures.

A source is a folder with one subfolder per class, a folder with such folders in ``train/`` and ``val/`` (or ``valid/``,
``validation/``) and ``test/``, or a data set behind one of timm's readers (``wds/FOLDER``, ``hfds/NAME``,
``torch/NAME``, each perhaps with ``@ROOT`` and ``#SPLIT`` after it). Training never looks at ``test/`` unless told to:
a figure on pictures that the best epoch was chosen by is too good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cadapt.data.beside import CHECKED_AHEAD, CheckBeside
from cadapt.data.classes import match_classes
from cadapt.data.folder import Images, ImageSet, find_images, listed, require_folder, visible_folders
from cadapt.data.images import Progress
from cadapt.data.readable import readable_parts
from cadapt.data.readers import (
    HELD_OUT_SPLITS,
    PREFIXES,
    TEST_SPLITS,
    TRAIN_SPLITS,
    VALIDATION_SPLITS,
    find_split,
    open_reader,
    parse_reader,
)
from cadapt.data.split import few_shot, sha256_of_samples, split_images
from cadapt.errors import RefusedError, UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What to train on: ``val`` is None where nothing was held out; ``record`` is JSON-able and goes into the file.

    ``note`` is a line for the user where the split may not be the expected one. ``check`` is the check of the pictures
    where it still goes on: whoever trains on them looks at it and closes it.
    """

    train: Images
    val: Images | None
    classes: tuple[str, ...]
    record: Mapping[str, Any]
    note: str | None = None
    check: CheckBeside | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """What to evaluate on, under the data's own class names."""

    images: Images
    classes: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One split as it was found: ``kind`` is "folder" or a reader's prefix, ``part`` the split's name if it has one.

    ``test`` is the test part beside a training part, which is not opened.
    """

    images: Images
    kind: str
    name: str
    part: str | None
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder as it was listed: its subfolders, and those of each of train, val, … that are parts of a source."""

    path: Path
    subfolders: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]


def open_training_data(
    source: str,
    *,
    val_split: float = 0.1,
    shots: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 0,
    on_progress: Progress | None = None,
    val: str | None = None,
    beside: bool = False,
) -> TrainingData:
    """Open a source to train on, decode every picture once, and hold some out.

    Args:
        source: a folder, or a reader's data set; see the module.
        val_split: the share of each class to hold out where the source has no val part; 0 holds out nothing.
        shots: train on so many pictures of each class (of those not held out); None is all.
        seed: of the split and the choice.
        skip_bad: leave unreadable pictures out, and record their names.
        workers: threads that decode.
        on_progress: called with how many pictures are decoded and how many there are.
        val: another source to validate on.
        beside: of a source of more than a few hundred pictures, leave the check going on beside the training, in the
            ``check`` of what is returned; not with ``skip_bad``, where the split has to know what can be read.

    Raises:
        UsageError: there is no such source, or no such share or number of shots.
        RefusedError: classes that differ between the parts, a class without pictures, or one class only.
        UnreadableImages: pictures that cannot be decoded, unless ``skip_bad``.
        CadaptError: a reader's package is missing, or its data set cannot be opened.
    """
    if not 0 <= val_split < 1:
        raise UsageError(f"validation split: got {val_split}, expected 0 up to 1", hint="--val-split 0.1")
    train_part, held_part = _training_parts(source, val)
    parts = [train_part] if held_part is None else [train_part, _held_like(train_part, held_part)]
    found = [part.images for part in parts]
    beside = beside and not skip_bad and sum(len(images) for images in found) > CHECKED_AHEAD
    readable, skipped = (found, []) if beside else readable_parts(found, skip_bad, workers, on_progress)
    splits, short_classes = _chosen(readable, val_split, shots, seed)
    record = _record(train_part, splits, skipped) | {
        "parts": {name: part.part for name, part in zip(("train", "val"), parts, strict=False)},
        "val_source": None if val is None or held_part is None else held_part.name,
        "val_split": val_split if held_part is None else None,
        "left_alone": train_part.test,
        "seed": seed,
        "shots": shots,
        "short_classes": short_classes,
    }
    train = splits["train"]
    note = _about_test(source, train_part.test, val_split) if held_part is None and train_part.test else None
    check = CheckBeside(found, workers) if beside else None  # last, so that nothing fails while it runs
    return TrainingData(
        train=train, val=splits.get("val"), classes=train.classes, record=record, note=note, check=check
    )


def _about_test(source: str, test: str, val_split: float) -> str:
    chosen = f"{val_split:.0%} of the training part is held out" if val_split else "nothing is held out"
    there = f"{source.rstrip('/')}{'#' if parse_reader(source) else '/'}{test}"
    return (
        f"no val part beside {test}: {chosen}, and {test} is left alone (to choose the best epoch by it: --val {there})"
    )


def open_evaluation_data(
    source: str,
    *,
    skip_bad: bool = False,
    workers: int = 0,
    on_progress: Progress | None = None,
    parts: Sequence[str] = ("test", *HELD_OUT_SPLITS),
) -> EvaluationData:
    """Open a source to evaluate on: the first of some parts that it has, else all of a folder of classes.

    The record's ``part`` says which was used. Classes are the data's own, in its own order; see
    :func:`~cadapt.data.classes.match_classes`.

    Raises:
        UsageError: there is no such source, or it has nothing but a training part.
        RefusedError: a class without pictures.
        UnreadableImages: pictures that cannot be decoded, unless ``skip_bad``.
        CadaptError: a reader's package is missing, or its data set cannot be opened.
    """
    part = _held_out_part(source, tuple(parts))
    (images,), skipped = readable_parts([part.images], skip_bad, workers, on_progress)
    record = _record(part, {"evaluation": images}, skipped) | {"part": part.part}
    return EvaluationData(images=images, classes=images.classes, record=record)


def _chosen(
    parts: Sequence[Images], val_split: float, shots: int | None, seed: int
) -> tuple[dict[str, Images], dict[str, int]]:
    """Hold out what is not held out yet, and take few of the rest; return the splits and the classes short of shots."""
    splits = dict(zip(("train", "val"), parts, strict=False))
    if len(parts) == 1 and val_split > 0:
        splits["train"], splits["val"] = split_images(parts[0], val_split, seed)
        if len(splits["val"]) == 0:
            raise RefusedError("no class has two images, so none can be held out", hint="--val-split 0")
    if shots is None:
        return splits, {}
    few = few_shot(splits["train"], shots, seed)
    return {**splits, "train": few.images}, few.short_classes


def _training_parts(source: str, val: str | None) -> tuple[_Part, _Part | None]:
    held = _held_out_part(val, HELD_OUT_SPLITS) if val is not None else None
    reader = parse_reader(source)
    if reader is not None:
        split = find_split(reader, TRAIN_SPLITS)
        if split is None:
            raise UsageError(f"no split 'train' in {source}", hint=f"name one: {source}#SPLIT")
        # a split that is named is the whole source
        other, test = (
            None if reader.split else find_split(reader, names) for names in (VALIDATION_SPLITS, TEST_SPLITS)
        )
        train = replace(_reader_part(source, split), test=test)
        return train, held if held is not None or other is None else _reader_part(source, other)
    folder = _list_folder(source)
    parts = folder.parts
    if "train" not in parts:
        if parts and set(folder.subfolders) <= set(HELD_OUT_SPLITS):
            only = " and ".join(parts)
            raise UsageError(f"no train/ in '{folder.path}', only {only}", hint="give the folder of one part")
        return _folder_part(folder, None), held
    other, test = (next(filter(parts.__contains__, names), None) for names in (VALIDATION_SPLITS, TEST_SPLITS))
    train = replace(_folder_part(folder, "train"), test=test)
    return train, held if held is not None or other is None else _folder_part(folder, other, minimum_classes=1)


def _held_out_part(source: str, order: Sequence[str]) -> _Part:
    reader = parse_reader(source)
    if reader is not None:
        split = find_split(reader, order)
        if split is None:
            raise UsageError(f"no split {' or '.join(HELD_OUT_SPLITS)} in {source}", hint=f"name one: {source}#SPLIT")
        return _reader_part(source, split)
    folder = _list_folder(source)
    part = next((name for name in order if name in folder.parts), None)
    if part is None and "train" in folder.parts:
        raise UsageError(
            f"'{folder.path}' has train/ but none of {', '.join(HELD_OUT_SPLITS)}",
            hint=f"to use that: {folder.path / 'train'}",
        )
    return _folder_part(folder, part, minimum_classes=1)


def _list_folder(source: str) -> _Folder:
    prefix = source.partition("/")[0].lower()
    if prefix in ("tfds", "hfids") and not Path(source).exists():
        raise UsageError(f"no reader '{prefix}/'", hint=f"known readers: {', '.join(f'{name}/' for name in PREFIXES)}")
    path = require_folder(source)
    subfolders = tuple(visible_folders(path))
    below = {name: tuple(visible_folders(path / name)) for name in ("train", *HELD_OUT_SPLITS) if name in subfolders}
    parts = {name: classes for name, classes in below.items() if classes}  # else it is a class of that name
    return _Folder(path=path, subfolders=subfolders, parts=parts)


def _folder_part(folder: _Folder, part: str | None, *, minimum_classes: int = 2) -> _Part:
    path, classes = (folder.path, folder.subfolders) if part is None else (folder.path / part, folder.parts[part])
    images = find_images(path, minimum_classes=minimum_classes, subfolders=classes)
    return _Part(images=images, kind="folder", name=folder.path.resolve().name, part=part)


def _reader_part(source: str, split: str) -> _Part:
    reader = parse_reader(source)
    assert reader is not None  # noqa: S101  (callers have parsed it)
    name = Path(reader.name).name if reader.prefix == "wds" else reader.name
    return _Part(images=open_reader(reader, split), kind=reader.prefix, name=name, part=split)


def _held_like(train: _Part, held: _Part) -> _Part:
    """Return the held-out part under the training part's labels, or refuse classes that differ.

    Folders must have the same classes. Readers declare theirs, so a part may lack pictures of some, but not have
    pictures of classes that cannot be learnt.
    """
    match = match_classes(train.images.classes, held.images.classes)
    unknown = list(match.unknown_to_model)
    missing = list(match.missing_in_data)
    if not (isinstance(train.images, ImageSet) and isinstance(held.images, ImageSet)):
        taught = {train.images.classes[label] for label in set(train.images.labels)}
        unknown = sorted({held.images.classes[label] for label in set(held.images.labels)} - taught)
        missing = []
    differences = [f"not in training: {listed(unknown)}"] if unknown else []
    differences += [f"not in validation: {listed(missing)}"] if missing else []
    if differences:
        raise RefusedError(
            f"classes differ between training and validation of '{train.name}': {'; '.join(differences)}",
            hint="give both parts the same class folders",
        )
    return replace(held, images=held.images.relabel(match.index_map, train.images.classes))


def _record(part: _Part, splits: Mapping[str, Images], skipped: Sequence[str]) -> dict[str, Any]:
    """Return what a run's record keeps of its data: names and hashes, no path of this machine."""
    return {
        "kind": part.kind,
        "name": part.name,
        "classes": len(part.images.classes),
        "images": {name: len(images) for name, images in splits.items()},
        "images_per_class": {
            name: {"min": min(counts.values(), default=0), "max": max(counts.values(), default=0)}
            for name, counts in ((name, Counter(images.labels)) for name, images in splits.items())
        },
        "sha256": {name: sha256_of_samples(images) for name, images in splits.items()},
        "skipped": list(skipped),
    }
