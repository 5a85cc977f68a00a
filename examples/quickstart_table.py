"""Compare the ways to adapt one backbone to one data set: the linear probe, full fine-tuning and the four schemes.

Each way is one `cadapt insert`, `cadapt train` and `cadapt eval`, called as from the shell with ``--json``, so this
file is also an example of driving cadapt from a program. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = {
    "linear": "linear probe",
    "full": "full fine-tuning",
    "conv-par": "conv-par",
    "conv-seq": "conv-seq",
    "res-par": "res-par",
    "res-seq": "res-seq",
}
"""Scheme, and how the table calls it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what was trained, how much of it, how well it does and how long it took."""

    name: str
    trainable_parameters: int
    top1: float
    file_bytes: int
    seconds: float


def run_cadapt(*arguments: str | Path) -> dict[str, Any]:
    """Run one cadapt command with ``--json`` and return what it printed; its own messages stay on stderr.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    command = ["cadapt", *map(str, arguments), "--json", "-q"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # several run at once: a core each, as the model is tiny
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    record: dict[str, Any] = json.loads(finished.stdout)
    return record


def adapt(scheme: str, arguments: argparse.Namespace) -> Row:
    """Insert, train and evaluate one scheme, leaving its file in the output folder."""
    adapter = arguments.output / f"{scheme}.safetensors"
    size = ("--img-size", str(arguments.img_size))
    started = time.monotonic()
    run_cadapt(
        *("insert", arguments.architecture, "--checkpoint", arguments.checkpoint, *size),
        *("--scheme", scheme, "-o", adapter, "--force"),
    )
    trained = run_cadapt(
        *("train", arguments.data, "-m", adapter, "--epochs", str(arguments.epochs), "--lr", str(arguments.lr)),
        *("--batch-size", "64", "--augment", "none"),
    )
    evaluated = run_cadapt("eval", arguments.data, "-m", adapter)
    return Row(
        name=WAYS[scheme],
        trainable_parameters=trained["trainable_parameters"],
        top1=evaluated["top1"],
        file_bytes=adapter.stat().st_size,
        seconds=time.monotonic() - started,
    )


def format_row(row: Row) -> str:
    """Return the row as one line, in the columns of the table's heading."""
    kilobytes = row.file_bytes / 1000
    return f"{row.name:<18}{row.trainable_parameters:>12,}{row.top1:>10.1%}{kilobytes:>10.0f} kB{row.seconds:>8.0f} s"


def main() -> None:
    """Parse the command line, then print each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/, val/ and test/")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--architecture", default="test_resnet")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many to train at once")
    parser.add_argument("-o", "--output", type=Path, default=Path("compared"), help="folder for the adapter files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"{'':<18}{'trainable':>12}{'top-1':>10}{'file':>13}{'time':>10}", flush=True)
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        for row in pool.map(lambda scheme: adapt(scheme, arguments), WAYS):
            print(format_row(row), flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # cadapt has said on stderr what is wrong
        sys.exit(error.returncode)
