"""Schemes joined by ``+`` through the commands: one file, one training, one merge; and sums that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadapt.bundle import read_header
from tests.cli.conftest import BASE, FAST
from tests.cli.program import check_refused, run
from tests.data.pictures import make_classes

NET = BASE[0]


@pytest.mark.parametrize(
    ("scheme", "more", "said", "hint"),
    [
        ("conv-par+nrom", [], "unknown scheme 'nrom'", "norm"),
        ("norm+norm", [], "names norm twice", None),
        ("full+norm", [], "full trains every tensor already", "--scheme full"),
        ("linear+norm", [], "linear adds nothing", "--scheme norm"),
        ("conv-par+norm", ["--set", "gama=2"], "conv-par+norm has no setting 'gama'", "gamma"),
        ("bias+norm", ["--gamma", "2"], "bias+norm has no setting 'gamma'", "they have none"),
    ],
)
def test_sums_that_make_no_sense(scheme: str, more: list[str], said: str, hint: str | None) -> None:
    ran = run("insert", NET, "--no-pretrained", "--scheme", scheme, *more)
    check_refused(ran, 2, said, hint=hint)
    assert not Path("adapter.safetensors").exists()


def test_a_sum_goes_the_whole_way() -> None:
    """Insert, train, evaluate, merge and ship: the file holds adapters and differences, the checkpoint neither."""
    pictures = make_classes(Path("pets"), {"cat": 4, "dog": 4}, (40, 36))
    linear = ["--set", "conv-par.activation=identity", "--gamma", "2"]
    ran = run("insert", NET, "--no-pretrained", "--scheme", "conv-par+norm", *linear, "-q")
    assert ran.code == 0, ran.stderr
    plan = read_header(Path(ran.line)).plan
    assert plan.scheme == "conv-par+norm" and plan.deltas and plan.insertions
    assert {item.scheme for item in plan.insertions} == {"conv-par"}
    ran = run("train", str(pictures), *FAST, "-q")
    assert ran.code == 0, ran.stderr
    header = read_header(Path(ran.line))
    assert all(name.startswith("adapters.") for name in header.tensors)
    assert sum(name.startswith("adapters.delta.") for name in header.tensors) == len(plan.deltas)
    ran = run("merge-report", "--json", "-q")
    assert ran.code == 0, ran.stderr
    assert ran.json["merged"] == ran.json["total"] == len(plan.insertions)
    assert f"{len(plan.deltas)} of the base's tensors" in ran.json["summary"]
    assert ran.json["macs_before"] > ran.json["macs_after"]
    ran = run("export", "--timm", "-o", "merged.safetensors", "-q")
    assert ran.code == 0, ran.stderr
    ran = run("export", "--onnx", "-q")
    assert ran.code == 0, ran.stderr
