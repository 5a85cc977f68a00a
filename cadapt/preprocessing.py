"""How a picture becomes the backbone's input: the values timm resolves for a model, carried in the adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from cadapt.errors import RefusedError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Input size (channels, height, width), channel means and deviations of [0, 1] pixels, and the evaluation crop.

    ``crop_pct`` is the share of the resized picture's side that the centre crop keeps; ``interpolation`` and
    ``crop_mode`` are timm's words for them.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Preprocessing:
        """Read it back, checking what an untrusted file may hold.

        Raises:
            RefusedError: a field is missing or of the wrong kind.
        """
        try:
            channels, height, width = (int(size) for size in record["input_size"])
            read = cls(
                input_size=(channels, height, width),
                mean=tuple(float(value) for value in record["mean"]),
                std=tuple(float(value) for value in record["std"]),
                interpolation=str(record["interpolation"]),
                crop_pct=float(record["crop_pct"]),
                crop_mode=str(record["crop_mode"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RefusedError(f"damaged preprocessing record: {error!r}") from error
        return _checked(read)


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_LARGEST_SIDE = 16_384


def _checked(read: Preprocessing) -> Preprocessing:
    channels = read.input_size[0]
    sound = {
        "input_size": all(0 < size <= _LARGEST_SIDE for size in read.input_size),
        "mean": len(read.mean) == channels and all(map(isfinite, read.mean)),
        "std": len(read.std) == channels and all(isfinite(value) and value > 0 for value in read.std),
        "interpolation": read.interpolation in _INTERPOLATIONS,
        "crop_pct": 0 < read.crop_pct <= 2,
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise RefusedError(f"damaged preprocessing record: {name} is {getattr(read, name)!r:.60}")
    return read
