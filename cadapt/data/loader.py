"""Feeds training and evaluation: batches of tensors whose order and augmentation depend on nothing but named numbers.

The sample order is a pure function of (seed, epoch), each sample's augmentation of (seed, epoch, index). So any number
of workers, and a run taken up again in the middle of an epoch, see the same batches bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from cadapt.data.augment import DEFAULT_PRESET, Transform, evaluation_transform, training_transform
from cadapt.data.folder import Images
from cadapt.data.seeding import derive_seed, permutation
from cadapt.data.workers import Batch, BatchSource, Key, Samples
from cadapt.errors import UsageError
from cadapt.preprocessing import Preprocessing


class TrainLoader:
    """Shuffled, augmented batches, the same ones for the same seed and epoch.

    A last batch of a single sample is left out of its epoch (a BatchNorm in train mode cannot use it); the next epoch's
    order leaves out another. Where there is only one batch, it is always given, whole.

    Args:
        images: what to train on.
        preprocessing: the backbone's input.
        augmentation: a preset's name (see :data:`cadapt.data.augment.PRESETS`), or a transform of RGB pictures.
        batch_size: samples in a batch.
        seed: of order and augmentation.
        workers: processes that read and augment; 0 does it in this one. They live until :meth:`close`.
        drop_last: leave out a smaller last batch of any size.
        pin_memory: None pins where there is a CUDA device.

    Raises:
        UsageError: no images, or a batch size or number of workers that cannot be.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        augmentation: str | Transform = DEFAULT_PRESET,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool | None = None,
    ) -> None:
        _check(images, batch_size, workers)
        if isinstance(augmentation, str):
            augmentation = training_transform(augmentation, preprocessing)
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self._source = BatchSource(Samples(images, augmentation, seed), workers, persistent=True, pin_memory=pin_memory)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        full, rest = divmod(len(self.images), self.batch_size)
        kept = rest > 0 and not self.drop_last and rest != 1
        return max(full + kept, 1)

    def order(self, epoch: int) -> list[int]:
        """Return the indices of all samples in the order the epoch takes them."""
        return permutation(len(self.images), derive_seed("order", self.seed, epoch))

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's batches from ``start_step`` on: images ``[B, C, H, W]`` float32, labels ``[B]`` int64.

        One pass at a time: beginning another ends the one before.

        Raises:
            UsageError: the epoch has no such step.
            UnreadableImage: a picture could not be read.
            CadaptError: a worker process died.
        """
        steps = self.steps_per_epoch
        if not 0 <= start_step <= steps:
            raise UsageError(f"epoch {epoch} has {steps} steps, got start step {start_step}")
        order = self.order(epoch)
        size = self.batch_size
        keys = [_keys(epoch, order[step * size : (step + 1) * size]) for step in range(start_step, steps)]
        return self._source.batches(keys)

    def close(self) -> None:
        """End the workers now, and not when the loader is no longer referred to; a later pass begins new ones."""
        self._source.close()


def evaluation_batches(
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    *,
    pin_memory: bool | None = None,
) -> Iterator[Batch]:
    """Yield every picture once, in order, preprocessed as the model wants it; the last batch may be smaller.

    Returns:
        An iterator over images ``[B, C, H, W]`` float32 and labels ``[B]`` int64.

    Raises:
        UsageError: no images, or a batch size or number of workers that cannot be.
        UnreadableImage: a picture could not be read.
        CadaptError: a worker process died.
    """
    _check(images, batch_size, workers)
    count = len(images)
    samples = Samples(images, evaluation_transform(preprocessing), None)
    batches = [_keys(0, range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    source = BatchSource(samples, min(workers, len(batches)), persistent=False, pin_memory=pin_memory)
    return source.batches(batches)


def _keys(epoch: int, indices: list[int] | range) -> list[Key]:
    return [(epoch, index) for index in indices]


def _check(images: Images, batch_size: int, workers: int) -> None:
    if len(images) == 0:
        raise UsageError("no images to load")
    if batch_size < 1:
        raise UsageError(f"batch size: got {batch_size}, expected 1 or more", hint="--batch-size 64")
    if workers < 0:
        raise UsageError(f"workers: got {workers}, expected 0 or more", hint="--workers 0 reads in the main process")
