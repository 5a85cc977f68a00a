"""The benchmark's plots: bars of time and memory for each model, and lines over whatever grows in a run.

Written as PNG and SVG beside the JSON file they are drawn from; ``python -m tests.benchmarks.plots DIR`` draws again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.report import MEBIBYTE, group_by_case

Row = Mapping[str, Any]
# depth is told by the model's own name
_AXES = {"depth": "model", "batch": "batch", "resolution": "size"}
_TITLES = {"depth": "model", "batch": "images in a batch", "resolution": "side of the images, pixels"}
_FIGURES: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("seconds per step", lambda row: row["median_step_seconds"]),
    ("MiB kept for backward", lambda row: row["saved"]["bytes"] / MEBIBYTE),
    ("peak MiB over model and data", lambda row: _peak(row)),
)


def draw(rows: Sequence[Row], growth: str | None, folder: Path) -> list[Path]:
    """Draw what the rows show and return the files; none where nothing ran."""
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return []
    written = []
    for precision in sorted({row["precision"] for row in done}):
        chosen = [row for row in done if row["precision"] == precision]
        stem = f"{growth or 'steps'}-{precision}"
        written += _lines(chosen, growth, folder / stem) if growth else _bars(chosen, folder / stem)
    return written


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # text in an SVG stays text, and two drawings of the same figures are the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cadapt", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def _colours(pyplot: Any) -> dict[str, Any]:
    """A colour for each contender that is the same in every plot."""
    palette = pyplot.get_cmap("tab20").colors
    return {name: palette[place % len(palette)] for place, name in enumerate(CONTENDERS)}


def _bars(rows: Sequence[Row], path: Path) -> list[Path]:
    """One row of panels for each case: time, memory kept, peak."""
    pyplot = _pyplot()
    colours = _colours(pyplot)
    cases = group_by_case(rows)
    tallest = max(len(by_name) for by_name in cases.values())
    figures = _known(rows)
    figure, axes = pyplot.subplots(
        len(cases), len(figures), figsize=(12, (0.6 + 0.2 * tallest) * len(cases)), squeeze=False
    )
    for panels, (case, by_name) in zip(axes, cases.items(), strict=True):
        for column, (panel, (title, value)) in enumerate(zip(panels, figures, strict=True)):
            names = list(by_name)
            panel.barh(names, [value(by_name[name]) or 0.0 for name in names], color=[colours[name] for name in names])
            panel.invert_yaxis()
            panel.tick_params(labelleft=column == 0)
            panel.set_title(f"{case[0]}, batch {case[1]}: {title}" if column == 0 else title)
    return _save(pyplot, figure, path)


def _lines(rows: Sequence[Row], growth: str, path: Path) -> list[Path]:
    """Three panels over what grows, a line for each contender."""
    pyplot = _pyplot()
    colours = _colours(pyplot)
    figures = _known(rows)
    figure, axes = pyplot.subplots(1, len(figures), figsize=(12, 4))
    for panel, (title, value) in zip(axes, figures, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row[_AXES[growth]], value(row)) for row in rows if row["contender"] == name]
            known = [(at, figure_) for at, figure_ in points if figure_ is not None]
            if known:
                panel.plot(*zip(*known, strict=True), marker="o", label=name, color=colours[name])
        panel.set_xlabel(_TITLES[growth])
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    axes[0].legend()
    return _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> list[Path]:
    figure.tight_layout()
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files


def _known(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], float | None]]]:
    """The figures that any row has."""
    return [(title, value) for title, value in _FIGURES if any(value(row) is not None for row in rows)]


def _peak(row: Row) -> float | None:
    peak = row.get("peak", {}).get("peak_bytes")
    return None if peak is None else peak / MEBIBYTE


if __name__ == "__main__":
    target = Path(sys.argv[1])
    record = json.loads((target / "steps.json").read_text(encoding="utf-8"))
    for drawn in draw(record["rows"], record["growth"], target):
        print(drawn)
