"""The comparison of all schemes in examples/: its choices, its table, its plot, and a small run from end to end."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cadapt
from cadapt.adapters.scheme import Scheme

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return __import__(name)


table, store, runs, compare = (
    load(name) for name in ("scheme_table", "scheme_store", "scheme_runs", "compare_schemes")
)


def record(lr: float, seed: int = 0, **figures: Any) -> Mapping[str, Any]:
    sizes = {"adapters": 7, "base_tensors": 0, "parameters": 250, "base_parameters": 1000, "train_seconds": 2.0}
    known = {"backbone": "b", "scheme": "s", "status": "done", "val_top1": 0.5, "val_loss": 1.0, "test_top1": 0.5}
    return {**known, **sizes, "lr": lr, "seed": seed, **figures}


def test_the_rate_is_chosen_by_the_validation_split_alone() -> None:
    better_on_test = record(1e-3, val_top1=0.8, test_top1=0.99)
    better_on_val = record(3e-3, val_top1=0.9, test_top1=0.5)
    of_another_seed = record(1e-2, seed=1, val_top1=1.0)
    assert table.choose_lr([better_on_test, better_on_val, of_another_seed], 0) == 3e-3
    assert table.choose_lr([record(1e-3, val_loss=0.3), record(1e-2, val_loss=0.2)], 0) == 1e-2
    assert table.choose_lr([record(1e-3, status="diverged", reason="")], 0) is None


def test_a_row_sums_up_the_chosen_runs() -> None:
    searched = [record(1e-3, val_top1=0.9, test_top1=0.80, merged=3, mergeable_of=7), record(1e-2, test_top1=1.0)]
    repeats = [record(1e-3, seed=1, test_top1=0.84), record(1e-3, seed=2, test_top1=0.82)]
    row = table.make_row([*searched, *repeats], range(3))
    assert (row.lr, row.seeds, row.parameters, row.share, row.merged, row.mergeable_of) == (1e-3, 3, 250, 0.25, 3, 7)
    assert row.top1 == pytest.approx(0.82, abs=1e-12)
    assert row.top1_std == pytest.approx(0.02, abs=1e-12)


def test_a_failed_run_fails_its_row_and_a_diverged_rate_does_not() -> None:
    good = record(1e-3, val_top1=0.9)
    assert table.make_row([good, record(1e-2, status="diverged", reason="nan")], range(1)).status == "done"
    row = table.make_row([good, record(1e-2, status="failed", reason="KeyError: 'x'")], range(1))
    assert (row.status, row.reason, row.top1) == ("failed", "KeyError: 'x'", None)
    assert table.make_row([good, record(1e-3, seed=1, status="diverged", reason="nan")], range(2)).status == "diverged"


def crowd(count: int) -> list[Any]:
    """Rows as a comparison ends: most within a percent of each other."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        parameters = 0 if number == 0 else int(10 ** draw.uniform(3, 5))
        top1 = 0.9 if number == 0 else 0.98 + draw.uniform(-0.006, 0.006)
        known = {"backbone": f"b{number % 2}", "scheme": f"consolidator+{number}", "status": "done"}
        rows.append(table.Row(**known, parameters=parameters, top1=top1, top1_std=draw.uniform(0, 0.005)))
    return rows


def test_names_in_the_plot_do_not_overlap(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation

    plot = load("scheme_plot")
    figure = plot.draw(crowd(50), {"b0": "One"})
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    for axes in figure.axes:
        boxes = [plot.name_box(child) for child in axes.get_children() if isinstance(child, Annotation)]
        assert len(boxes) == 25
        pairs = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number]]
        assert not any(one.overlaps(other) for one, other in pairs)
    first = [path.read_bytes() for path in plot.save(figure, tmp_path / "first")]
    again = [path.read_bytes() for path in plot.save(plot.draw(crowd(50), {"b0": "One"}), tmp_path / "again")]
    assert first == again


def test_an_interrupted_line_is_a_run_to_make_again(tmp_path: Path) -> None:
    paths = {"data": tmp_path, "weights": tmp_path}
    job = runs.Job(backbone="b", scheme="s", seed=0, lr=1e-3, budget=runs.Budget(), weights_sha256="", **paths)
    other = replace(job, seed=1)
    kept = store.Runs(tmp_path / "runs.jsonl")
    kept.add(job, {"status": "done"})
    kept.add(other, {"status": "done"})
    whole = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(whole[:-5])
    again = store.Runs(tmp_path / "runs.jsonl")
    assert again.missing([job, other]) == [other]
    assert again.missing([replace(job, merge=True)]) == []
    again.add(other, {"status": "done"})
    assert (tmp_path / "runs.jsonl").read_text() == whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, and random weights for both backbones."""
    made = tmp_path_factory.mktemp("comparison")
    for backbone in load("glyph_backbones").BACKBONES.values():
        save_file(backbone.create().state_dict(), made / backbone.weights_name)
    compare.make_data(made / "digits")
    return made


def call(folder: Path, output: Path, *more: str) -> int:
    given = ("--fast", "--weights", str(folder), "--data", str(folder / "digits"), "-o", str(output), *more)
    code: int = compare.main(given)
    return code


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_fast_mode_from_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, tmp_path) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.suffix for path in written] == [".md", ".csv", ".json", ".svg", ".png"]
    assert all(path.stat().st_size for path in written)
    rows = list(csv.DictReader((tmp_path / "schemes.csv").read_text().splitlines()))
    assert [(row["backbone"], row["scheme"]) for row in rows] == [
        (backbone, scheme) for backbone in ("test_resnet", "test_vit") for scheme in ("linear", "norm", "conv-par")
    ]
    found = json.loads((tmp_path / "schemes.json").read_text())
    assert {row["status"] for row in found["rows"]} == {"done"}
    # affines of the ViT's norms: two in each of six blocks and the last, 64 wide
    assert found["rows"][4]["parameters"] == 13 * 2 * 64
    assert found["rows"][4]["merged"] == found["rows"][4]["mergeable_of"] == 26

    before = (tmp_path / "runs.jsonl").read_bytes()
    assert call(folder, tmp_path) == 0
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert "search" not in capsys.readouterr().err


@pytest.mark.usefixtures("threads")
def test_a_broken_scheme_is_named_and_stops_no_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def select(sites: Any, config: Any) -> Any:
        raise KeyError("what is missing")

    broken = Scheme(name="broken", paper="", summary="", needs="a site", select=select)
    monkeypatch.setattr("cadapt.adapters.SCHEMES", MappingProxyType({**cadapt.SCHEMES, "broken": broken}))
    chosen = ("--backbones", "test_resnet", "--schemes", "broken", "linear", "--no-plot")
    assert call(folder, tmp_path, *chosen) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: broken on test_resnet failed: KeyError: 'what is missing'"
    statuses = {row["scheme"]: row["status"] for row in json.loads((tmp_path / "schemes.json").read_text())["rows"]}
    assert statuses == {"broken": "failed", "linear": "done"}
    assert "- `broken` FAILED: KeyError" in (tmp_path / "schemes.md").read_text()


@pytest.mark.usefixtures("threads")
def test_a_scheme_that_does_not_fit_is_told_with_its_reason(folder: Path, tmp_path: Path) -> None:
    chosen = ("--backbones", "test_resnet", "--schemes", "linear", "conv-par", "--set", "conv-par.gamma=7")
    assert call(folder, tmp_path, *chosen, "--no-plot") == 0
    text = (tmp_path / "schemes.md").read_text()
    assert "- `conv-par` does not fit: cannot put conv-par at" in text


def test_an_unknown_scheme_and_missing_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: unknown scheme 'conv-pr'"):
        call(folder, tmp_path, "--schemes", "conv-pr")
    with pytest.raises(SystemExit, match="error: no weights"):
        call(folder, tmp_path, "--weights", str(tmp_path))
