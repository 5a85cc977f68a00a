"""The scheme × family table by sample: some cells a day on light models, one of them through ONNX.

``CADAPT_ZOO_SEED`` chooses the sample, else the date. ``--zoo full`` tries every cell, into the folder that
``CADAPT_ZOO_OUT`` names, where a run that was stopped goes on. Broken schemes show that a cell would notice.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import cadapt.adapters
from cadapt.adapters import SCHEMES, MergedLayer, Scheme
from cadapt.plan import Form
from cadapt.site import Site
from tests.zoo import families
from tests.zoo.cell_checks import bench
from tests.zoo.cells import check_cell
from tests.zoo.families import COLUMNS, Table, cell_work, chosen, in_short, main, markdown, settle, write_reports
from tests.zoo.members import MEMBERS, may_refuse, scheme_names
from tests.zoo.sweep import fingerprint

_CELLS_A_DAY = 8
_LIGHT = [title for title, member in MEMBERS.items() if member.light]


def sample() -> list[tuple[str, str]]:
    """Cells of light models: days in a row take one after the other, models and schemes both moving on."""
    seed = int(os.environ.get("CADAPT_ZOO_SEED") or datetime.datetime.now(datetime.UTC).date().toordinal())
    return cells_of(seed)


def cells_of(day: int) -> list[tuple[str, str]]:
    schemes, turns = scheme_names(), range(day * _CELLS_A_DAY, (day + 1) * _CELLS_A_DAY)
    # each time through the models, every one of them meets its next scheme
    return sorted(
        (_LIGHT[turn % len(_LIGHT)], schemes[(turn // len(_LIGHT) + turn % len(_LIGHT)) % len(schemes)])
        for turn in turns
    )


def tried(title: str, scheme: str, *, onnx: bool = False) -> dict[str, Any]:
    record = check_cell(f"{title} × {scheme}", title=title, scheme=scheme, onnx=onnx)
    return settle(json.loads(json.dumps(record)))


@pytest.mark.filterwarnings("default")  # timm's own
@pytest.mark.parametrize(("title", "scheme"), sample())
def test_a_cell_is_ok_or_refused_with_a_reason(title: str, scheme: str) -> None:
    record = tried(title, scheme)
    assert record["status"] in ("ok", "refused"), in_short(record)


@pytest.mark.filterwarnings("default")
def test_a_cell_goes_through_onnx() -> None:
    schemes = [name for name in scheme_names() if name != "full"]
    scheme = schemes[sum(map(len, sample()[0])) % len(schemes)]
    record = tried("test_resnet", scheme, onnx=True)
    assert record["status"] in ("ok", "refused"), in_short(record)
    if record["status"] == "ok":
        assert record["onnx"]["batches"] == [1, 2, 3, 7]


def test_the_days_take_every_light_cell_in_turn() -> None:
    days = len(_LIGHT) * len(scheme_names())
    seen = {cell for day in range(days) for cell in cells_of(day)}
    assert seen == set(chosen(["*"], ["*"])) & {(title, scheme) for title in _LIGHT for scheme in scheme_names()}


def test_every_cell(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("zoo") != "full":
        pytest.skip("--zoo full tries every scheme on every family, for hours")
    default = request.config.rootpath / ".pytest_cache" / "zoo"
    folder = Path(os.environ.get("CADAPT_ZOO_OUT") or default) / "families" / fingerprint()
    table = Table(folder=folder, jobs=os.cpu_count() or 1)
    table.go(chosen(["*"], ["*"]), onnx=True)
    cells = table.cells()
    write_reports(folder, cells)
    assert {name: in_short(cell) for name, cell in cells.items() if cell["status"] == "FAILED"} == {}
    assert cells.keys() == {f"{title} × {scheme}" for title, scheme in chosen(["*"], ["*"])}


class _Spoilt(nn.Module):
    """An adapter with one fault more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta: torch.Tensor = self.inner(x)
        return delta


class _Biased(_Spoilt):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-6


class _Idle(_Spoilt):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.idle = nn.Parameter(torch.zeros(3))


class _Forgetful(_Spoilt):
    """Counts its training steps outside of its state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)


class _Drawing(_Spoilt):
    """Draws what the base would have drawn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return super().forward(x) + 1e-6 * self.training


class _Meddling(_Spoilt):
    """Changes what the base goes on to use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = super().forward(x)
        if self.training:
            x.detach().mul_(1.5)
        return delta


def _built_as(spoilt: Callable[[nn.Module], nn.Module]) -> Callable[[Scheme], Scheme]:
    def change(scheme: Scheme) -> Scheme:
        return replace(scheme, build=lambda *given: spoilt(scheme.build(*given)))

    return change


def _merging_too_much(scheme: Scheme) -> Scheme:
    def merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer:
        weight = layer.get_parameter("weight") if layer is not None else torch.zeros(1)
        return MergedLayer(weight=weight.detach() * 1.001, bias=None)

    return replace(scheme, merge=merge)


def _failing_to_build(scheme: Scheme) -> Scheme:
    def build(*given: Any) -> nn.Module:
        raise KeyError("width")

    return replace(scheme, build=build)


def _refusing_all(scheme: Scheme) -> Scheme:
    return replace(scheme, select=lambda sites, config: ())


_MUTANTS = {
    "insertion: eval differs": _built_as(_Biased),
    "insertion: train, with the adapters' own dropout off, differs": _built_as(_Drawing),
    "insertion: train differs": _built_as(_Meddling),
    "planned tensors get no gradient": _built_as(_Idle),
    "file: the loaded model differs": _built_as(_Forgetful),
    "the merged layer fails its check": _merging_too_much,
    "insertion: KeyError: 'width' at cadapt/making.py:": _failing_to_build,
}


@pytest.mark.parametrize("words", _MUTANTS)
def test_a_broken_scheme_fails_its_cell(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("test_resnet")
    mutants = {**SCHEMES, "conv-par": _MUTANTS[words](SCHEMES["conv-par"])}
    monkeypatch.setattr(cadapt.adapters, "SCHEMES", MappingProxyType(mutants))
    record = tried("test_resnet", "conv-par")
    assert record["status"] == "FAILED"
    assert any(words in problem for problem in record["problems"]), record["problems"]


def test_a_scheme_that_refuses_what_it_fits_fails_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    bench("test_resnet")
    mutants = {**SCHEMES, "conv-par": _refusing_all(SCHEMES["conv-par"])}
    monkeypatch.setattr(cadapt.adapters, "SCHEMES", MappingProxyType(mutants))
    record = tried("test_resnet", "conv-par")
    assert record["status"] == "FAILED"
    assert "where fitting_schemes says it fits" in record["problems"][0]


def in_this_process(work: Callable[..., Any], tasks: Iterable[tuple[str, Any]], **_: Any) -> Iterator[Any]:
    """In the place of the pool, which its own tests try."""
    for name, arguments in tasks:
        yield json.loads(json.dumps(work(name, **arguments)))


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"name": "test_resnet × linear", "title": "test_resnet", "scheme": "linear", "status": "ok"}
    death = {"error": "the worker died, exit code 3"}
    monkeypatch.setattr(families, "run_pool", in_this_process)
    said: list[str] = []
    table = Table(folder=tmp_path, say=said.append, work=lambda name, **_: {"name": name, **death})
    (tmp_path / "cells.jsonl").write_text(json.dumps(done) + '\n{"name": "te')
    pairs = [("test_resnet", "linear"), ("test_resnet", "bias")]
    table.go(pairs, onnx=False)
    assert said == ["1/1 test_resnet × bias: FAILED: the worker died, exit code 3"]
    assert {name: cell["status"] for name, cell in table.cells().items()} == {
        "test_resnet × linear": "ok",
        "test_resnet × bias": "FAILED",
    }
    # what was tried without an export is tried again where one is asked for
    table.go(pairs, onnx=True)
    assert [line.partition(":")[0] for line in said[1:]] == ["1/1 test_resnet × linear"]


def test_no_cell_fails_without_a_word() -> None:
    for name, status in (("test_vit × residual-par", "refused"), ("test_vit × bias", "FAILED")):
        record = settle({"name": name, "status": status, "problems": []})
        assert record["status"] == "FAILED"
        assert record["problems"] == ["neither a reason nor a problem was given"]
    broad = settle({"name": "test_vit × bias", "status": "refused", "reason": "it has none", "problems": []})
    assert in_short(broad) == "FAILED: refused, and the family has what it takes: it has none"
    assert may_refuse("test_resnet", "convpass+norm")
    assert not may_refuse("test_resnet", "conv-par+norm")
    raised = settle({"name": "test_vit × conv-par+norm", "error": "ValueError: no such layer", "at": "fits:12"})
    assert (raised["title"], raised["scheme"], raised["status"]) == ("test_vit", "conv-par+norm", "FAILED")
    assert in_short(raised) == "FAILED: ValueError: no such layer fits:12"


def test_the_reports_hold_every_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "run_pool", in_this_process)
    arguments = ["--out", str(tmp_path), "--only-model", "test_resnet", "--only-scheme", "bias", "convpass", "--jobs=1"]
    assert main([*arguments, "--no-onnx"]) == 0
    assert "1 ok, 1 refused" in capsys.readouterr().out
    text = next(tmp_path.rglob("cells.md")).read_text()
    assert "1. it has nothing to adapt under convpass" in text
    lines = next(tmp_path.rglob("cells.csv")).read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert [line.split(",")[3:5] for line in lines[1:]] == [["convpass", "refused"], ["bias", "ok"]]
    empty = markdown({})
    assert empty.count(f"| {' | '.join('–' for _ in scheme_names())} |") == 3 * len(MEMBERS)


def test_the_work_of_the_pool_is_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cell_work("a name", "test_resnet", "convpass", False)["status"] == "refused"
