"""The benchmark of training steps: ``python -m tests.benchmarks.steps --models resnet50 --batches 8 --output DIR``.

Compares cadapt, with and without its engine for frozen backbones, with full fine-tuning, linear probing, the paper's
way and PEFT's LoRA, in speed and memory. Writes ``steps.json`` (raw figures, after every case), ``steps.md`` and plots;
``--profile A B`` shows instead where the time of a step goes, ``--table schemes`` what every scheme keeps for backward.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before anything asks the hub for weights, which none of this needs
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.benchmarks.case import Case
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.grid import run_case
from tests.benchmarks.machine import describe_machine, set_up
from tests.benchmarks.operators import profile_contenders, render_profile
from tests.benchmarks.plots import draw
from tests.benchmarks.report import render
from tests.benchmarks.schemes import count_schemes, render_schemes

MODELS = (
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "regnety_040",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BATCHES = (8, 16, 32, 64)
SIZES = (128, 192, 256, 320)
Record = dict[str, Any]
QUICK_MODEL, QUICK_SIZE, QUICK_BATCH, QUICK_REPEATS = "resnet14t", 64, 2, 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm names (default: the six of the report)")
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="sides of the images in pixels")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=None, help="threads on the CPU (default: torch's own)")
    parser.add_argument("--growth", choices=("depth", "batch", "resolution"), help="vary this one, on the first model")
    parser.add_argument("--profile", nargs="+", choices=list(CONTENDERS), help="where a step's time goes, side by side")
    parser.add_argument("--table", choices=("schemes",), help="bytes kept for backward by every scheme on every model")
    parser.add_argument("--no-peaks", action="store_true", help="leave out peak memory, a process per row")
    parser.add_argument("--output", type=Path, required=True, help="folder for steps.json, steps.md and the plots")
    parser.add_argument("--quick", action="store_true", help="one small model at a small size: does it all run?")
    return parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for."""
    models, batches, sizes = options.models, options.batches, options.sizes
    if options.quick:
        models, batches, sizes = [QUICK_MODEL], [QUICK_BATCH], [QUICK_SIZE]
    if options.growth == "depth":
        models = DEPTHS
    elif options.growth is not None:
        models = models[:1]
        batches, sizes = (BATCHES, sizes) if options.growth == "batch" else (batches, SIZES)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        Case(model=model, batch=batch, size=size, precision=precision, device=device)
        for model in models
        for precision in options.precisions
        for batch in batches
        for size in sizes
    ]


def main(arguments: Sequence[str]) -> int:
    """Run; return 1 if a contender failed that should not."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.repeats = QUICK_REPEATS
    options.output.mkdir(parents=True, exist_ok=True)
    cases = cases_of(options)
    set_up(cases[0].device)
    machine = describe_machine(cases[0].device, torch.get_num_threads())
    if options.table is not None:
        return _tabulate(cases, machine, options.output)
    if options.profile is not None:
        return _profile(cases, machine, options)
    return _measure(cases, machine, options)


def _measure(cases: Sequence[Case], machine: Record, options: argparse.Namespace) -> int:
    rows: list[Record] = []
    for number, case in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        rows += run_case(case, options.contenders, repeats=options.repeats, peaks=not options.no_peaks)
        record = {"machine": machine, "repeats": options.repeats, "growth": options.growth, "rows": rows}
        _write(options.output / "steps", record, render(rows, machine))
    for path in draw(rows, options.growth, options.output):
        print(f"drew {path}", file=sys.stderr)
    print(render(rows, machine))
    return _exit_status(rows)


def _tabulate(cases: Sequence[Case], machine: Record, folder: Path) -> int:
    rows = [row for case in cases for row in count_schemes(case)]
    _write(folder / "schemes", {"machine": machine, "rows": rows}, render_schemes(rows))
    print(render_schemes(rows))
    return _exit_status(rows)


def _profile(cases: Sequence[Case], machine: Record, options: argparse.Namespace) -> int:
    found = [(case, profile_contenders(case, options.profile, options.repeats)) for case in cases]
    text = "\n".join(render_profile(case, groups) for case, groups in found)
    rows = [{**case.to_json(), "seconds": groups} for case, groups in found]
    _write(options.output / "profile", {"machine": machine, "repeats": options.repeats, "rows": rows}, text)
    print(text)
    return 0


def _exit_status(rows: Sequence[Record]) -> int:
    return int(any(row["status"] == "failed" for row in rows))


def _write(stem: Path, record: Record, text: str) -> None:
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
