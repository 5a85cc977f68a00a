"""One run of the comparison: a scheme put into a backbone, trained on the digits with one seed, and judged.

``compare_schemes.py`` runs many of these, several at once; a run is a value (:class:`Job`) and its outcome a JSON
object, so that finished ones can be kept in a file. Only cadapt's library is used: this is also an example of it.
"""

from __future__ import annotations

import functools
import hashlib
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from glyph_backbones import BACKBONES, IMAGE_SIZE

import cadapt
from cadapt.data import evaluation_batches, find_images
from cadapt.errors import CadaptError, InterruptedRunError
from cadapt.preprocessing import Preprocessing
from cadapt.train import FitData, TrainConfig

SPLITS = ("train", "val", "test")
HEAD_PREFIX = "adapters.head."
MERGE_PICTURES = 16
"""How many pictures of the test split the merged model is compared with the adapted one on."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run may spend: epochs, pictures per step, AdamW's weight decay, and pictures per split (None: all)."""

    epochs: int = 12
    batch_size: int = 64
    weight_decay: float = 1e-4
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, before it is made.

    ``weights`` is the folder of the backbones' weights, ``weights_sha256`` the hash of the file that is read from it;
    ``merge`` asks to merge the trained model as well.
    """

    backbone: str
    scheme: str
    seed: int
    lr: float
    budget: Budget
    data: Path
    weights: Path
    weights_sha256: str
    settings: Mapping[str, str] = field(default_factory=dict)
    merge: bool = False

    def key(self) -> dict[str, Any]:
        """Return as JSON what the outcome depends on: two jobs of one key are the same run."""
        values = {key: value for key, value in vars(self).items() if key not in ("budget", "data", "weights", "merge")}
        return {**values, "settings": dict(self.settings), **asdict(self.budget)}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A split in memory: images ``[N, 3, H, W]``, labels ``[N]`` int64, and the class names."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def in_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every picture once, in order."""
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


@dataclass(frozen=True, kw_only=True)
class ShuffledBatches:
    """Training batches whose order is a function of (seed, epoch), which is all that ``cadapt.fit`` asks for."""

    pictures: Pictures
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch; the last may be smaller."""
        return -(-len(self.pictures.labels) // self.batch_size)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images ``[B, 3, H, W]`` and labels ``[B]`` of an epoch from ``start_step`` on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.pictures.labels), generator=generator)
        for picked in order.split(self.batch_size)[start_step:]:
            yield self.pictures.images[picked], self.pictures.labels[picked]


@functools.lru_cache(maxsize=8)
def read_split(folder: Path, preprocessing: Preprocessing, limit: int | None) -> Pictures:
    """Read a folder of class folders into memory, as the backbone wants its pictures.

    Args:
        folder: one split.
        preprocessing: the backbone's input.
        limit: about how many pictures to take, spread evenly over the classes; None takes all.
    """
    found = find_images(folder)
    if limit is not None:
        found = found.select(range(0, len(found), max(1, len(found) // limit)))
    images, labels = zip(*evaluation_batches(found, preprocessing, batch_size=256), strict=True)
    return Pictures(images=torch.cat(images), labels=torch.cat(labels), classes=found.classes)


@functools.cache
def hash_code() -> str:
    """Return a hash over cadapt's source files, by which a table can tell that its runs were made by one code."""
    folder = Path(cadapt.__file__).parent
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def run_job(job: Job) -> dict[str, Any]:
    """Make a run and return its record: the job's key, ``status`` and, by status, figures or a reason.

    ``status`` is ``done``, ``unfit`` (the scheme refuses the backbone), ``diverged`` (training ended in numbers that
    are not finite, or was refused) or ``failed`` (anything else, with the traceback).

    Raises:
        InterruptedRunError: stopped by a signal, which is no outcome.
    """
    torch.set_num_threads(1)
    record = {**job.key(), "code": hash_code()}
    try:
        return {**record, **_adapt(job)}
    except InterruptedRunError:
        raise
    except Exception as error:  # noqa: BLE001 - one broken scheme must not end the others; the script exits 1 naming it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {**record, "status": "failed", "reason": reason, "traceback": traceback.format_exc()}


def _adapt(job: Job) -> dict[str, Any]:
    base = BACKBONES[job.backbone].load(job.weights)
    classes = find_images(job.data / "train").classes
    settings = dict(job.settings)
    try:
        model = cadapt.insert(
            base, job.scheme, num_classes=len(classes), img_size=IMAGE_SIZE, seed=job.seed, **settings
        )
    except CadaptError as error:
        return {"status": "unfit", "reason": error.message}
    model.classes = classes
    train, val, test = (read_split(job.data / name, model.preprocessing, job.budget.limit) for name in SPLITS)
    started = time.monotonic()
    try:
        _train(model, train, job)
    except InterruptedRunError:
        raise
    except CadaptError as error:
        return {"status": "diverged", "reason": error.message}
    seconds = time.monotonic() - started
    judged = {name: _judge(model, pictures) for name, pictures in (("val", val), ("test", test))}
    figures = {f"{name}_{key}": value for name, values in judged.items() for key, value in values.items()}
    merged = _merge(model, test) if job.merge else {}
    return {"status": "done", **_sizes(model), **figures, **merged, "train_seconds": round(seconds, 2)}


def _train(model: cadapt.AdaptedModel, pictures: Pictures, job: Job) -> None:
    budget = job.budget
    config = TrainConfig(
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        lr=job.lr,
        weight_decay=budget.weight_decay,
        seed=job.seed,
        device="cpu",
        keep="last",  # choosing an epoch would need the pictures that the learning rate is chosen by
    )
    batches = ShuffledBatches(pictures=pictures, batch_size=budget.batch_size, seed=job.seed)
    cadapt.fit(model, FitData(train=batches, classes=pictures.classes), config)


def _judge(model: cadapt.AdaptedModel, pictures: Pictures) -> dict[str, float]:
    result = cadapt.evaluate(model, pictures.in_batches(256), classes=pictures.classes)
    return {"top1": result.top1, "loss": result.loss}


def _sizes(model: cadapt.AdaptedModel) -> dict[str, int]:
    """Count what the scheme put in and trains; the head, which is every scheme's alike, by itself."""
    trainable = {name: item.numel() for name, item in model.named_parameters() if item.requires_grad}
    head = sum(count for name, count in trainable.items() if name.startswith(HEAD_PREFIX))
    return {
        "adapters": len(model.plan.insertions),
        "base_tensors": len(model.plan.deltas) + len(model.plan.trainable),
        "parameters": sum(trainable.values()) - head,
        "head_parameters": head,
        "base_parameters": model.plan.base.parameters,
    }


def _merge(model: cadapt.AdaptedModel, pictures: Pictures) -> dict[str, int]:
    """Count what folds into the base: adapters, and differences to the base's tensors.

    Raises:
        CadaptError: the merged model computes something else.
    """
    _, report = cadapt.merge(model, images=pictures.images[:MERGE_PICTURES])
    if not report.verified:
        raise CadaptError(f"the merge of {job_name(model)} did not pass its checks: {report.summary}")
    return {
        "merged": report.merged + report.differences,
        "mergeable_of": report.total + len(model.plan.deltas),
    }


def job_name(model: cadapt.AdaptedModel) -> str:
    """Return what a message calls an adapted model."""
    return f"{model.plan.scheme} on {model.plan.base.name}"
