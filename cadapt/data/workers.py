"""Runs torch's DataLoader so that a run can be stopped and taken up again: the processes behind both kinds of loader.

A worker gets whole batches of (epoch, index) keys and seeds the generators for each sample, so what it returns does not
depend on which worker it is or on what it did before. The run's own signal handlers are never run in a worker.
"""

from __future__ import annotations

import signal
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from cadapt.data.augment import Transform
from cadapt.data.folder import Images
from cadapt.data.fused import FusedTransform
from cadapt.data.images import UnreadableImage
from cadapt.data.memory import BatchMemory
from cadapt.data.processes import leave_signals_to_parent, outlive_once, signals_held_back
from cadapt.data.seeding import derive_seed, preserved_generators, seed_generators
from cadapt.errors import CadaptError

Key = tuple[int, int]
Batch = tuple[torch.Tensor, torch.Tensor]


class Samples:
    """What a worker holds: the pictures, their transform, and the seed of what is random in it.

    Args:
        seed: None when nothing in the transform is random, as in evaluation.
    """

    def __init__(self, images: Images, transform: Transform, seed: int | None) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.labels = images.labels
        self._memory = BatchMemory()

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        """Return one picture's tensor ``[C, H, W]`` and label, leaving the generators seeded for it."""
        image = self.images.read(key[1])
        self._seed(key)
        return self.transform(image), self.labels[key[1]]

    def __getitems__(self, keys: Sequence[Key]) -> Batch | UnreadableImage:
        """Return a batch, or the error of the first picture that cannot be read.

        As a value the error arrives whole; raised, it would arrive as the text of a worker's traceback.
        """
        with preserved_generators():
            try:
                if isinstance(self.transform, FusedTransform):
                    return self._written(keys, self.transform)
                images, labels = default_collate([self[key] for key in keys])
            except UnreadableImage as error:
                return error
        return images, labels

    def _written(self, keys: Sequence[Key], transform: FusedTransform) -> Batch:
        """Let each picture be written to its place in the batch's own memory."""
        channels, height, width = transform.shape
        batch = self._memory.take((len(keys), height, width, channels))
        for place, key in zip(batch, keys, strict=True):
            picture = self.images.open(key[1])
            self._seed(key)
            transform.write(picture, place)
        return batch.permute(0, 3, 1, 2), torch.tensor([self.labels[index] for _, index in keys])

    def _seed(self, key: Key) -> None:
        if self.seed is not None:
            seed_generators(derive_seed("sample", self.seed, *key))


class KeySampler:
    """Hands the DataLoader the batches of keys it was last given: persistent workers learn the epoch by them."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        """Start over on the batches given last."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Return how many batches that is."""
        return len(self.batches)


class BatchSource:
    """Turns lists of keys into batches, in this process or in workers.

    Args:
        workers: processes; 0 reads in this one.
        persistent: keep the workers between calls of :meth:`batches`, until :meth:`close` or the end of this object.
        pin_memory: None pins where there is a CUDA device.
    """

    def __init__(self, samples: Samples, workers: int, *, persistent: bool, pin_memory: bool | None) -> None:
        self._samples = samples
        self._workers = workers
        self._persistent = persistent and workers > 0
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._sampler = KeySampler()
        self._loader: DataLoader[Any] | None = None
        self._turn = 0
        self._running: list[Any] = []
        # Left to the garbage collector, the workers' queues may go before the message that ends the workers, and a
        # run stopped by an exception would wait 5 seconds for each. The finalizer keeps them together until then.
        weakref.finalize(self, _shut_down, self._running)

    def batches(self, keys: list[list[Key]]) -> Iterator[Batch]:
        """Yield a batch for each list of keys: ``[B, C, H, W]`` float32 and ``[B]`` int64.

        Raises:
            UnreadableImage: a picture could not be read.
            CadaptError: a worker process died.
            RuntimeError: a later call of this method took the workers over.
        """
        self._turn += 1
        turn = self._turn
        batches = self._begin(keys)
        for _ in keys:
            if turn != self._turn:
                raise RuntimeError("these batches were given up when a later pass over the same loader began")
            yield self._take(batches)
        if not self._persistent:
            self.close()

    def close(self) -> None:
        """End the workers, if there are any; the next pass begins new ones."""
        self._loader = None
        _shut_down(self._running)

    def _begin(self, keys: list[list[Key]]) -> Iterator[Any]:
        self._sampler.batches = keys
        with signals_held_back(), _without_torch_advice():
            if self._loader is None:
                self._loader = self._make_loader()
            batches: Iterator[Any] = iter(self._loader)
        if batches not in self._running:
            _shut_down(self._running)
            self._running.append(batches)
        return batches

    def _take(self, batches: Iterator[Any]) -> Batch:
        try:
            batch = _next_batch(batches)
            if isinstance(batch, UnreadableImage):
                raise batch  # noqa: TRY301  (a value until here, see Samples)
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        return batch[0], batch[1]

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._samples,  # type: ignore[arg-type]  # torch asks for its own class, and uses only __getitems__
            batch_sampler=self._sampler,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_prepare_worker,
            persistent_workers=self._persistent,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else each pass would draw from the process' own
        )


def _shut_down(running: list[Any]) -> None:
    while running:
        # torch offers no public way to end workers at a given moment; reading in this process has none to end.
        end = getattr(running.pop(), "_shutdown_workers", None)
        if end is not None:
            end()


def _next_batch(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CadaptError(
            f"a loading worker died: {str(error).splitlines()[0]}",
            hint="it may have been out of memory, or of shared memory: try fewer --workers, or --workers 0",
        ) from error


@contextmanager
def _without_torch_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        # The user's number of workers stands, on however few cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        # Python 3.12 warns of every fork beside threads; torch's workers are made for that.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(_worker: int) -> None:
    leave_signals_to_parent()
    signal.signal(signal.SIGTERM, outlive_once)
