"""How long until ``cadapt train`` has taken its first step on a large folder: ``python -m tests.benchmarks.start``.

Each pair of runs is two fresh processes, one after the other: the program itself, up to the line it writes after its
first optimizer step, and ``import torch, timm`` with the base's creation, which no start can do without. The figure is
the median over the pairs of the ratio of the two. The program remembers no verdict on any picture, so that the check of
all of them goes on beside.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.machine import describe_machine

CONTENTS = 300
_REPOSITORY = Path(__file__).resolve().parents[2]
_PROGRAM = (sys.executable, "-c", "import sys; from cadapt.cli.main import main; main(sys.argv[1:])")


def make_folder(root: Path, files: int, classes: int, size: tuple[int, int], *, links: bool) -> None:
    """Fill a folder with JPEG files of few different contents, each a file of its own or links to one per content."""
    contents = [_jpeg(seed, size) for seed in range(CONTENTS)]
    originals = root / ".contents"
    originals.mkdir(parents=True)
    for number, data in enumerate(contents if links else ()):
        (originals / f"{number}.jpg").write_bytes(data)
    for number in range(files):
        folder = root / f"class{number % classes:03d}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{number:06d}.jpg"
        if links:
            path.hardlink_to(originals / f"{number % CONTENTS}.jpg")
        else:
            path.write_bytes(contents[number % CONTENTS])


def seconds_to_first_step(data: Path, adapter: Path, batch: int, environment: dict[str, str]) -> float:
    """Run ``cadapt train`` up to its line on the first step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", data, "-m", adapter, "-o", f"{folder}/out.safetensors", "--run", f"{folder}/run"]
        arguments += ["--batch-size", batch, "--epochs", 1, "--device", "cpu"]
        return seconds_to_line([*_PROGRAM, *map(str, arguments)], "epoch 1/1 step 1/", environment)


def seconds_of_imports(model: str, environment: dict[str, str]) -> float:
    """Run what the start is compared with."""
    code = f"import sys, torch, timm; timm.create_model({model!r}); print('made', file=sys.stderr)"
    return seconds_to_line([sys.executable, "-c", code], "made", environment)


def seconds_to_line(command: list[str], beginning: str, environment: dict[str, str]) -> float:
    """Start a process, wait for a line on its stderr, and end it."""
    lines = []
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(beginning):
                seconds = time.perf_counter() - started
                process.terminate()
                process.communicate()
                return seconds
            lines.append(line)
    raise RuntimeError(f"{command[0]} never wrote {beginning!r}: {''.join(lines)}")


def measure(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the pairs' seconds, their medians and the median of their ratios."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CADAPT_CACHE": "off", "PYTHONPATH": str(_REPOSITORY)}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter.safetensors"
        made = ["insert", options.model, "--no-pretrained", "--img-size", str(options.img_size), "-o", str(adapter)]
        subprocess.run([*_PROGRAM, *made, "--scheme", "conv-par", "-q"], check=True, env=environment)
        pairs = []
        for number in range(options.pairs + 1):
            imports = seconds_of_imports(options.model, environment)
            step = seconds_to_first_step(data, adapter, options.batch, environment)
            if number > 0:  # the first pair brings files and compiled modules into memory
                pairs.append((imports, step))
                print(
                    f"imports and model {imports:6.2f} s   first step {step:6.2f} s   {step / imports:.2f}", flush=True
                )
    ratios = [step / imports for imports, step in pairs]
    return {
        "imports_seconds": statistics.median(imports for imports, _ in pairs),
        "first_step_seconds": statistics.median(step for _, step in pairs),
        "ratio": statistics.median(ratios),
        "pairs": pairs,
    }


def main() -> None:
    """Measure as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 96), help="width and height of the pictures")
    parser.add_argument("--links", action="store_true", help="hard links in place of files of their own")
    parser.add_argument("--folder", type=Path, help="where the pictures are, or will be made and left")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "pictures"
        if not folder.exists():
            make_folder(folder, options.files, options.classes, tuple(options.size), links=options.links)
        result = measure(folder, options)
    print(f"median of {options.pairs} ratios: {result['ratio']:.2f}")
    if options.output is not None:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        told = {key: value for key, value in told.items() if key not in ("folder", "output")}
        record = {"machine": describe_machine("cpu", torch.get_num_threads()), "options": told, **result}
        options.output.write_text(json.dumps(record, indent=2) + "\n")


def _jpeg(seed: int, size: tuple[int, int]) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
