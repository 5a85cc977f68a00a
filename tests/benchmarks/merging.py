"""Merges at real size: what of each scheme's adapters folds into each base, how exactly, and what that saves.

    python -m tests.benchmarks.merging --out merging.md
    python -m tests.benchmarks.merging --models resnet50 vit_small_patch16_224 --schemes lora consolidator --latency

Bases and adapters have random weights of the size that trained ones have, since no pretrained ones can be assumed:
kernels by their fan-in, norms around one with the statistics of smooth random pictures, adapters moved from where they
start by noise, so that each changes what it joins by some percent up to as much again. The table gives that effect.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cadapt
from cadapt.adapted import AdaptedModel
from cadapt.errors import CadaptError
from cadapt.export import compare_models
from cadapt.export.verify import make_images
from cadapt.merging.forms import forms_of
from cadapt.merging.report import Latency, MergeReport, ModelLatency
from cadapt.preprocessing import Preprocessing
from tests.benchmarks.machine import describe_machine
from tests.zoo.lively import calibrate, make_lively

MODELS = (
    "resnet50",
    "resnetv2_50x1_bit",
    "convnext_tiny",
    "tf_efficientnet_b0",
    "resnext50_32x4d",
    "vit_small_patch16_224",
)
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "consolidator": ("consolidator", {}),
    "residual-par": ("residual-par", {}),
    "conv-par": ("conv-par", {}),
    "conv-par identity": ("conv-par", {"activation": "identity"}),
    "ssf": ("ssf", {}),
}
CLASSES = 100
_CALIBRATION_IMAGES = 4
_JUDGED_IMAGES = 2
_PARTICULARS = re.compile(r"'[^']+'|\b\d[\d.]*\b")  # names of layers and sizes, in reasons that are otherwise the same


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme on one base: its merge, its latency where asked for, or why there is none."""

    model: str
    scheme: str
    report: MergeReport | None = None
    latency: Latency | None = None
    reason: str = ""
    seconds: float = 0.0


def make_trained(name: str, scheme: str) -> AdaptedModel:
    """A base with adapters and a head of :data:`CLASSES`, all with lively weights.

    Raises:
        CadaptError: the scheme has no place on the base.
    """
    base = make_lively(name, {})
    method, settings = SCHEMES[scheme]
    adapted = cadapt.insert(base, method, num_classes=CLASSES, **settings)
    calibrate(adapted, pictures(_CALIBRATION_IMAGES, adapted.preprocessing))
    enliven_adapters(adapted)
    adapted.classes = tuple(f"class {place}" for place in range(CLASSES))
    return adapted.eval()


def pictures(count: int, preprocessing: Preprocessing) -> torch.Tensor:
    """Stand-ins for pictures ``[count, C, H, W]``, normalised."""
    return make_images(count, preprocessing, normalized=True, seed=1)


@torch.no_grad()
def enliven_adapters(adapted: AdaptedModel, seed: int = 1) -> None:
    """Move every parameter of adapters and head from where it starts, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.adapters.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.05
        parameter.add_(scale * noise)


def run_case(name: str, scheme: str, options: argparse.Namespace) -> Row:
    """Merge one scheme on one base, and measure the forms where asked."""
    started = time.monotonic()
    try:
        adapted = make_trained(name, scheme)
    except CadaptError as error:
        return Row(model=name, scheme=scheme, reason=error.message)
    try:
        images = pictures(_JUDGED_IMAGES, adapted.preprocessing)
        merged, report = cadapt.merge(adapted, images=images, dense=options.dense)
    except CadaptError as error:
        return Row(model=name, scheme=scheme, reason=f"FAILED: {error.message}")
    latency = None
    if options.latency:
        latency = compare_models(
            forms_of(adapted, merged), preprocessing=adapted.preprocessing, classes=adapted.classes,
            batch_size=options.batch, threads=options.threads, seconds=options.seconds,
        )  # fmt: skip
    return Row(model=name, scheme=scheme, report=report, latency=latency, seconds=time.monotonic() - started)


# --- the tables

MERGES = (
    "| model | scheme | adapters | exact | simplified | kept | refused | error fp64 | error fp32 | effect | "
    "logits fp64 | logits fp32 | logits' effect | GMACs | s |",
    "| --- | --- " + "| --: " * 13 + "|",
)
LATENCIES = (
    "| model | scheme | base, ms | adapted | simplified | merged | nodes | turns |",
    "| --- | --- | --: | --: | --: | --: | --- | --: |",
)


def merge_line(row: Row) -> str:
    """A row of the merges' table: errors and effects relative, per adapter and of the logits; MACs before and after."""
    report = row.report
    if report is None:
        return f"| {row.model} | {row.scheme} | {row.reason} |" + " |" * 12
    counts = [report.count(status) for status in ("exact", "simplified", "kept", "refused")]
    whole = report.end_to_end
    scale = whole.logit_scale or 1.0
    figures = [
        _worst(site.error_fp64 for site in report.sites),
        _worst(site.error_fp32 for site in report.sites),
        _median(site.effect for site in report.sites),
        *(f"{error / scale:.0e}" for error in (whole.max_abs_error_fp64, whole.max_abs_error)),
        f"{whole.logit_effect / scale:.1g}",
        f"{report.macs_before / 1e9:.3f} → {report.macs_after / 1e9:.3f}",
        f"{row.seconds:.0f}",
    ]
    return f"| {row.model} | {row.scheme} | {report.total} | {' | '.join(map(str, counts))} | {' | '.join(figures)} |"


def latency_line(row: Row) -> str:
    """A row of the latencies' table: medians of ratios to the base, with quartiles."""
    assert row.latency is not None
    models = {model.name: model for model in row.latency.models}
    ratios = [_ratio(models.get(name)) for name in ("adapted", "simplified", "merged")]  # type: ignore[call-overload]
    nodes = " / ".join(f"{name} {model.nodes}" for name, model in models.items())
    base = f"{models['base'].milliseconds:.1f}"
    return f"| {row.model} | {row.scheme} | {base} | {' | '.join(ratios)} | {nodes} | {row.latency.turns} |"


def reason_lines(row: Row) -> list[str]:
    """Why adapters did not fold, or what else changed where they did, and how often."""
    if row.report is None:
        return []
    reasons = collections.Counter(
        _PARTICULARS.sub("…", f"{site.status}: {site.reason}" if site.reason else f"noted: {site.note}")
        for site in row.report.sites
        if site.reason or site.note
    )
    return [f"- {row.model}, {row.scheme}: {count} × {reason}" for reason, count in reasons.most_common()]


def render(rows: Sequence[Row], threads: int) -> str:
    """Return the whole as Markdown."""
    machine = describe_machine("cpu", threads)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines = [f"{machine['processor']}, {versions}", "", *MERGES, *map(merge_line, rows)]
    measured = [row for row in rows if row.latency is not None]
    if measured:
        latency = measured[0].latency
        assert latency is not None
        said = f"{latency.runtime}, batch {latency.batch_size}, threads {latency.threads}; median (quartiles) of ratios"
        lines += ["", said, "", *LATENCIES, *map(latency_line, measured)]
    reasons = [line for row in rows for line in reason_lines(row)]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def _worst(errors: Iterable[float | None]) -> str:
    found = [error for error in errors if error is not None]
    return f"{max(found):.0e}" if found else "–"


def _median(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.2g}" if found else "–"


def _ratio(model: ModelLatency | None) -> str:
    return "–" if model is None else f"{model.ratio:.3f} ({model.ratio_low:.3f}–{model.ratio_high:.3f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm's")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--dense", action="store_true", help="fold even where the sum costs more than its parts")
    parser.add_argument("--latency", action="store_true", help="export all forms and time them in onnxruntime")
    parser.add_argument("--seconds", type=float, default=30.0, help="the most to spend on one case's timing")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once, in the timing")
    parser.add_argument("--threads", type=int, default=1, help="of torch and onnxruntime")
    parser.add_argument("--quick", action="store_true", help="one tiny model and few turns: does it all run?")
    parser.add_argument("--out", type=Path, help="the Markdown; none prints it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.seconds = ["test_resnet"], 0.1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases; each is told on stderr when it is done."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        for scheme in options.schemes:
            rows.append(run_case(name, scheme, options))
            print(merge_line(rows[-1]), file=sys.stderr, flush=True)
            if rows[-1].latency is not None:
                print(latency_line(rows[-1]), file=sys.stderr, flush=True)
    text = render(rows, options.threads)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
