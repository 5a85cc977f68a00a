"""The pictures of a merge: those it is judged on, and those that kernels are fitted on.

A figure on pictures that something was fitted to is too good, so the two never overlap: where one folder is given, it
is split by a seed, class by class. Copies of a file are not known for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cadapt.data import (
    ClassMatch,
    EvaluationData,
    Images,
    ImageSet,
    evaluation_batches,
    match_classes,
    open_evaluation_data,
    split_images,
)
from cadapt.data.folder import find_unlabelled, visible_folders
from cadapt.data.readable import readable_parts
from cadapt.data.readers import HELD_OUT_SPLITS, TRAIN_SPLITS, find_split, open_reader, parse_reader
from cadapt.data.seeding import derive_seed, permutation
from cadapt.errors import RefusedError, UsageError
from cadapt.jobs.task import Progress
from cadapt.preprocessing import Preprocessing

# of decoded pictures, for as many as this they are kept from the first pass on
_KEPT_BYTES = 2**29
_FIT_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PictureBatches:
    """Batches that can be gone through several times: pictures ``[B, C, H, W]``, normalised, and labels ``[B]``."""

    images: Images
    preprocessing: Preprocessing
    batch_size: int = _FIT_BATCH
    workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kept", [])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every picture once, in order; they are decoded once where half a gigabyte holds them."""
        kept: list[tuple[Tensor, Tensor]] = vars(self)["_kept"]
        if kept:
            yield from kept
            return
        channels, height, width = self.preprocessing.input_size
        keeping = 4 * len(self.images) * channels * height * width <= _KEPT_BYTES
        seen = []
        for batch in evaluation_batches(
            self.images, self.preprocessing, self.batch_size, self.workers, pin_memory=False
        ):
            if keeping:
                # the loader may write into its memory again
                seen.append((batch[0].clone(), batch[1].clone()))
            yield batch
        if not kept:
            kept.extend(seen)


@dataclass(frozen=True, kw_only=True)
class FitPictures:
    """What kernels are fitted on and what the frontier is judged on, with a sentence that says how they were chosen."""

    fitted: Images
    judged: Images
    note: str


def open_judged(
    source: str,
    classes: tuple[str, ...],
    *,
    skip_bad: bool,
    workers: int,
    on_progress: Progress | None,
    tell: Callable[[str], None] | None = None,
) -> Images:
    """Open what a merge is judged on, its classes matched with the model's by name.

    Something is chosen on it, so of a whole data set it is the validation part; ``test`` only where there is none.
    Pictures of classes that the model does not know are left out, and ``tell`` is called with a line on that.

    Raises:
        UsageError: there is no such source.
        RefusedError: none of its classes is the model's, or pictures are unreadable.
    """
    data = open_evaluation_data(
        source,
        skip_bad=skip_bad,
        workers=max(1, workers),
        on_progress=on_progress,
        parts=HELD_OUT_SPLITS,
    )
    match = match_classes(classes, data.classes)
    if not match.index_map:
        raise RefusedError(
            f"none of the data's classes ({', '.join(data.classes[:3])} …) is the model's ({', '.join(classes[:3])} …)",
            hint="name the folders as the model's classes, which cadapt inspect FILE lists",
        )
    images = data.images.relabel(match.index_map, classes)
    if tell is not None:
        for line in _describe(data, match, len(data.images) - len(images)):
            tell(line)
    return images


def _describe(data: EvaluationData, match: ClassMatch, dropped: int) -> Iterator[str]:
    """Which part of the data is judged on, and what of it is not."""
    part = data.record.get("part")
    if part == "test":
        yield "judged on the part 'test', since there is no 'val': what is chosen on it is not tested by it any more"
    elif part:
        yield f"judged on the part '{part}'"
    if match.unknown_to_model:
        names = ", ".join(match.unknown_to_model[:5])
        yield f"unknown to the model, {dropped} pictures left out: {names}"
    if match.missing_in_data:
        yield f"no pictures of: {', '.join(match.missing_in_data[:5])}"


def choose_fitted(
    images: Images,
    fit_data: str | None,
    *,
    count: int,
    seed: int,
    skip_bad: bool = False,
    workers: int = 0,
    on_progress: Progress | None = None,
) -> FitPictures:
    """Choose what kernels are fitted on.

    Args:
        images: what the merge is judged on.
        fit_data: another source of pictures, whose classes do not matter; None takes half of each class of ``images``.
        count: the most pictures to fit on.
        seed: of the split and of the choice.
        skip_bad: leave out what cannot be decoded.
        workers: threads that decode.
        on_progress: called with how many pictures are decoded and how many there are.

    Raises:
        UsageError: there is no such source, too few pictures to split, or none but those that are judged on.
        RefusedError: it has unreadable ones.
    """
    if fit_data is None:
        pool, judged = split_images(images, 0.5, seed)
        if len(judged) == 0:
            raise UsageError(
                f"{len(images)} pictures cannot be split into some to fit on and some to judge on",
                hint="give others to fit on: --fit-data DIR, or fold exactly or not at all: --no-fit",
            )
        chosen = _choose(pool, count, seed)
        note = (
            f"kernels are fitted on {len(chosen)} of the {len(pool)} pictures of one half of --data (seed {seed}); the "
            f"frontier is judged on the other half, {len(judged)} pictures"
        )
        return FitPictures(fitted=chosen, judged=judged, note=note)
    pool = _open_unlabelled(fit_data)
    others = _without(pool, images)
    if len(others) == 0:
        raise UsageError(
            "--fit-data has no pictures but those of --data, which the merge is judged on",
            hint="leave --fit-data out: half of --data is fitted on, the other half judged on",
        )
    (chosen,), _ = readable_parts([_choose(others, count, seed)], skip_bad, max(1, workers), on_progress)
    left_out = f" ({len(pool) - len(others)} that --data has too are left out)" if len(others) < len(pool) else ""
    note = (
        f"kernels are fitted on {len(chosen)} of the {len(pool)} pictures of --fit-data{left_out}, seed {seed}; the "
        f"frontier is judged on all {len(images)} pictures of --data"
    )
    return FitPictures(fitted=chosen, judged=images, note=note)


def _choose(images: Images, count: int, seed: int) -> Images:
    """So many pictures, in an order drawn by the seed, so that a part of them is like the whole."""
    return images.select(permutation(len(images), derive_seed("fit", seed))[:count])


def _open_unlabelled(source: str) -> Images:
    reader = parse_reader(source)
    if reader is None:
        # of a whole data set its training part: the others are there to judge on
        folder = Path(source).expanduser()
        has_train = folder.is_dir() and "train" in visible_folders(folder)
        return find_unlabelled(folder / "train" if has_train else folder)
    split = find_split(reader, TRAIN_SPLITS)
    if split is None:
        raise UsageError(f"no split {' or '.join(TRAIN_SPLITS)} in {source}", hint=f"name one: {source}#SPLIT")
    images = open_reader(reader, split)
    return images.relabel(dict.fromkeys(set(images.labels), -1), (reader.name,))


def _without(images: Images, judged: Images) -> Images:
    """Those pictures that are not judged on, as far as their files tell."""
    if not (isinstance(images, ImageSet) and isinstance(judged, ImageSet)):
        return images
    # by what a link leads to: a folder or a picture may be one
    taken = {(judged.root / name).resolve() for name in judged.names}
    return images.select(
        [index for index, name in enumerate(images.names) if (images.root / name).resolve() not in taken]
    )
