"""How a run trains: the settings of :func:`cadapt.train.fit`, checked when they are made.

The record goes into the run folder and the adapter file, so it has JSON in and out, and it imports no torch because
the command line reads its defaults to print the help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal

from cadapt.errors import RefusedError, UsageError, close_matches

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Memory = Literal["plain", "fast", "low", "min"]
MEMORIES: tuple[Memory, ...] = ("plain", "fast", "low", "min")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
KEEPS = ("best", "last")

# A resumed run may change these. ``save_every_seconds`` and ``keep`` leave every number as it is; another device,
# compilation or memory setting computes the same in another rounding, and the engine says so in a Notice.
FREE_AT_RESUME = frozenset({"device", "compile", "memory", "save_every_seconds", "keep"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run; the defaults are the Conv-Adapter recipe (AdamW, cosine, 100 epochs, batch 64).

    Args:
        epochs: passes over the training images.
        batch_size: images per forward pass; one optimizer step takes ``batch_size * accumulate``.
        lr: the highest learning rate; ``min_lr`` is that of the very last step.
        weight_decay: AdamW's, on matrices and kernels only: never on biases, norms and per-channel scales.
        warmup_epochs: linear warm-up. One that would take more than a quarter of the run is cut to a tenth of it.
        clip_grad: largest gradient norm, or None.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        mixup: alpha of mixup's beta distribution; ``cutmix`` likewise. With both, half of the steps use each.
        ema: decay of the moving average of the trainable tensors, or None. It warms up (timm's ``ModelEmaV3``), and
            validation and the saved weights are then the average's.
        precision: ``auto`` is bf16 on a GPU that has it, and fp32 elsewhere. A resumed run keeps what it began in.
        channels_last: memory format of model and images; a matter of speed.
        device: ``auto`` is cuda, else mps, else cpu; or one of these, also with an index (cuda:1).
        accumulate: batches per optimizer step, as if they were one large batch (but for batch statistics).
        seed: of the whole run: each step's randomness comes from (seed, epoch, step) alone.
        compile: run the model through ``torch.compile``.
        memory: what is kept for backward: ``plain`` leaves it to autograd; ``fast``, ``low`` and ``min`` are those of
            :func:`cadapt.frozen.prepare`. It is for whoever hands ``fit`` its ``prepare_forward``, as ``cadapt train``
            does; the numbers differ by rounding only.
        keep: which weights the model holds at the end.
        log_every_steps: optimizer steps per line of ``metrics.jsonl``.
        save_every_seconds: time between saves within an epoch; 0 saves after each step.

    Raises:
        UsageError: a value makes no sense.

    >>> TrainConfig(epochs=5).lr
    0.001
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    min_lr: float = 1e-6
    warmup_epochs: int = 10
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    precision: Precision = "auto"
    channels_last: bool = True
    device: str = "auto"
    accumulate: int = 1
    seed: int = 0
    compile: bool = False
    memory: Memory = "low"
    keep: Literal["best", "last"] = "best"
    log_every_steps: int = 20
    save_every_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, (expected, accepts) in _RULES.items():
            value = getattr(self, name)
            if not accepts(value):
                raise UsageError(f"training setting {name} is {value!r}, expected {expected}")
        if self.min_lr > self.lr:
            raise UsageError(
                f"training setting min_lr is {self.min_lr:g}, expected at most lr, {self.lr:g}",
                hint=f"take an lr above {self.min_lr:g}",
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TrainConfig:
        """Read the settings back from a run's record.

        Raises:
            RefusedError: a setting is unknown here, or has a value that makes no sense.
        """
        names = [item.name for item in fields(cls)]
        for name in record:
            if name not in names:
                raise RefusedError(f"unknown training setting {name!r}", hint=close_matches(str(name), names))
        try:
            return cls(**record)
        except UsageError as error:
            raise RefusedError(f"damaged training record: {error.message}") from error


def _integer(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number of at least {least}", lambda value: type(value) is int and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _number(expected: str, accepts: Callable[[float], bool]) -> tuple[str, Callable[[Any], bool]]:
    return expected, lambda value: _is_number(value) and accepts(value)


def _optional(rule: tuple[str, Callable[[Any], bool]]) -> tuple[str, Callable[[Any], bool]]:
    expected, accepts = rule
    return f"{expected}, or none", lambda value: value is None or accepts(value)


def _one_of(names: tuple[str, ...]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(names)}", lambda value: value in names


_POSITIVE = _number("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)
_FLAG: tuple[str, Callable[[Any], bool]] = ("true or false", lambda value: isinstance(value, bool))

_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": _integer(1),
    "batch_size": _integer(1),
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "min_lr": _NOT_NEGATIVE,
    "warmup_epochs": _integer(0),
    "clip_grad": _optional(_POSITIVE),
    "label_smoothing": _number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "ema": _optional(_number("a number above 0 and below 1", lambda value: 0 < value < 1)),
    "precision": _one_of(PRECISIONS),
    "channels_last": _FLAG,
    "device": ("a device's name, such as auto, cpu or cuda:0", lambda value: isinstance(value, str) and value != ""),
    "accumulate": _integer(1),
    "seed": _integer(0),
    "compile": _FLAG,
    "memory": _one_of(MEMORIES),
    "keep": _one_of(KEEPS),
    "log_every_steps": _integer(1),
    "save_every_seconds": _NOT_NEGATIVE,
}
