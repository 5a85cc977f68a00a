"""Name what a picture shows with an exported ONNX file alone: no torch, no timm, no cadapt.

Everything that is needed besides the weights, the class names and how to prepare a picture, is read from the file's own
metadata. Needs onnxruntime, numpy and Pillow: the smallest thing one would run where the model is put to use.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def resize_shorter_side(picture: Image.Image, side: int, interpolation: str) -> Image.Image:
    """Return the picture scaled so that its shorter side is ``side`` pixels."""
    shorter = min(picture.size)
    size = (side * picture.width // shorter, side * picture.height // shorter)
    return picture.resize(size, Image.Resampling[interpolation.upper()])


def prepare_picture(path: Path, preprocessing: Mapping[str, Any], *, normalised_inside: bool) -> np.ndarray:
    """Read a picture as the model wants it: float32 ``[1, 3, height, width]``.

    Args:
        path: the picture.
        preprocessing: ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct`` from the file's metadata.
        normalised_inside: the graph subtracts the mean and divides by the deviation itself.

    Raises:
        OSError: no readable picture.
    """
    _, height, width = preprocessing["input_size"]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    side = math.floor(min(height, width) / preprocessing["crop_pct"])
    picture = resize_shorter_side(picture, side, preprocessing["interpolation"])
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    if not normalised_inside:
        pixels = (pixels - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return pixels.transpose(2, 0, 1)[np.newaxis]


def to_probabilities(scores: np.ndarray, *, softmax_inside: bool) -> np.ndarray:
    """Return the softmax of ``[classes]`` scores, or the scores themselves if the graph has taken it already."""
    if softmax_inside:
        return scores
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def predict(model: Path, picture: Path) -> list[tuple[str, float]]:
    """Return every class with its probability, the likeliest first."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(texts[key]) for key in ("classes", "preprocessing", "normalize", "softmax")}
    image = prepare_picture(picture, metadata["preprocessing"], normalised_inside=metadata["normalize"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: image})
    probabilities = to_probabilities(scores[0], softmax_inside=metadata["softmax"])
    pairs = zip(metadata["classes"], probabilities.tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[1], reverse=True)


def main() -> None:
    """Parse the command line and print the likeliest classes, one per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file that `cadapt export --onnx` wrote")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--top", type=int, default=3, help="how many classes to print")
    arguments = parser.parse_args()
    for name, probability in predict(arguments.model, arguments.picture)[: arguments.top]:
        print(f"{name}\t{probability:.4f}")


if __name__ == "__main__":
    main()
