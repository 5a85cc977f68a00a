"""Write scikit-learn's 1,797 handwritten digits as PNG files, one folder per class: the quickstart's data set.

The pictures come inside the scikit-learn package (8x8 pixels of 17 grey levels), so nothing is fetched. They are
enlarged to 32x32 with smooth edges, and split the same way every time, with the same share of every digit: pictures to
train on, pictures to choose the best epoch by, and pictures that nothing was chosen by, for the figure one reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

PICTURE_SIDE = 32
"""Side of a written picture in pixels."""

GREY_LEVELS = 16
"""The brightest value in scikit-learn's pictures."""


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Return the ``[8, 8]`` picture as white on black, enlarged; bright ink on dark paper as scikit-learn stores it."""
    grey = Image.fromarray((pixels * (255 / GREY_LEVELS)).round().astype(np.uint8))
    return grey.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)


def write_split(folder: Path, indices: np.ndarray, pictures: np.ndarray, labels: np.ndarray) -> None:
    """Write the chosen pictures as ``folder/<digit>/<index in scikit-learn's order>.png``.

    Pictures of an earlier run are removed first, so that another seed leaves none in two splits.
    """
    for stale in folder.glob("[0-9]/[0-9][0-9][0-9][0-9].png"):
        stale.unlink()
    for index in sorted(indices.tolist()):
        path = folder / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(pictures[index]).save(path)


def split(indices: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part indices in two, the second with this share of every class."""
    kept, taken = train_test_split(indices, test_size=share, random_state=seed, stratify=labels[indices])
    return kept, taken


def main() -> None:
    """Parse the command line, write the three splits, and print the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="gets train/<digit>/, val/<digit>/ and test/<digit>/")
    parser.add_argument("--val-share", type=float, default=0.1, help="share of every class to choose the epoch by")
    parser.add_argument("--test-share", type=float, default=0.2, help="share of every class for the reported figure")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    digits = load_digits()
    rest, test = split(np.arange(len(digits.target)), digits.target, arguments.test_share, arguments.seed)
    train, val = split(rest, digits.target, arguments.val_share / (1 - arguments.test_share), arguments.seed)
    for name, indices in {"train": train, "val": val, "test": test}.items():
        write_split(arguments.output / name, indices, digits.images, digits.target)
    print(arguments.output)


if __name__ == "__main__":
    main()
