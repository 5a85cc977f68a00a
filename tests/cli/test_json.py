"""``--json``: one object on stdout whose keys stay. A golden file per command lists them; keys are only ever added.

To accept new keys: ``CADAPT_UPDATE_GOLDEN=1 pytest tests/cli/test_json.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import BASE, FAST
from tests.cli.program import Ran, run

GOLDEN = Path(__file__).parent / "golden"
# their keys are names of the user's, or of versions of others
_OPEN = ("versions", "short_classes")


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Every path to a value, with its kind; items of a list are one, since their number is not the schema's."""
    if isinstance(value, dict) and not path.endswith(_OPEN):
        for key, item in value.items():
            yield from keys_of(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        yield from keys_of(value[0], f"{path}[]")
    else:
        yield f"{path}: {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "flag"
    kinds = {int: "number", float: "number", str: "text", list: "list", dict: "object", type(None): "null"}
    return kinds[type(value)]


def check_golden(name: str, ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.startswith(b"{") and ran.stdout.endswith(b"}\n")
    found = ran.json
    assert found["schema"] == 1
    keys = sorted(set(keys_of(found)))
    path = GOLDEN / f"{name}.json"
    if os.environ.get("CADAPT_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(keys, indent=1, ensure_ascii=False) + "\n")
    lost = sorted(set(json.loads(path.read_text())) - set(keys))
    assert lost == [], f"--json of {name} lost keys or changed their kind"
    return found


def test_insert() -> None:
    found = check_golden("insert", run("insert", *BASE, "--json", "-q"))
    assert found["bytes"] == Path(found["output"]).stat().st_size


def test_insert_dry_run_writes_nothing(here: Path) -> None:
    found = check_golden("insert-dry-run", run("insert", *BASE, "--dry-run", "--json", "-q"))
    assert found["dry_run"] is True
    shown = run("insert", *BASE, "--dry-run")
    assert (shown.code, shown.stdout) == (0, b"")
    assert "layer1.0.conv1" in shown.stderr
    assert list(here.iterdir()) == []


def test_train(adapter: Path, imgs: Path) -> None:
    found = check_golden("train", run("train", imgs, *FAST, "--json", "-q"))
    assert found["classes"] == ["cat", "dog"]
    assert Path(found["run"]).is_dir()


def test_eval(trained_adapter: Path, imgs: Path) -> None:
    found = check_golden("eval", run("eval", imgs, "--workers", "0", "--json", "-q"))
    assert found["images"] == 12
    assert found["top1"] == sum(item["correct"] for item in found["per_class"]) / 12


def test_eval_gives_its_json_even_when_a_threshold_is_missed(trained_adapter: Path, imgs: Path) -> None:
    ran = run("eval", imgs, "--workers", "0", "--json", "-q", "--fail-under", "top1=100%", "--fail-under", "loss=0")
    assert ran.code == 3
    assert ran.json["images"] == 12
    assert ran.stderr.count("\n") == 1
    assert "loss is" in ran.errors[0]


def test_merge_report(trained_adapter: Path, imgs: Path) -> None:
    found = check_golden(
        "merge-report",
        run("merge-report", "--data", imgs, "--no-fit", "--no-latency", "--workers", "0", "--json", "-q"),
    )
    assert found["data"]["images"] == 12
    assert found["data"]["top1_before"] == found["data"]["top1_after"]


def test_export(adapter: Path) -> None:
    found = check_golden("export", run("export", "--dtype", "fp16", "--json", "-q"))
    assert found["output"] == "adapter-fp16.safetensors"


def test_export_onnx_and_inspect_it(trained_adapter: Path) -> None:
    found = check_golden("export-onnx", run("export", "--onnx", "--softmax", "--normalize", "--json", "-q"))
    assert {check["batch"] for check in found["checks"]} == {1, 2, 3, 7}
    facts = check_golden("inspect-onnx", run("inspect", "adapter.onnx", "--json", "-q"))
    assert json.loads(facts["metadata"]["classes"]) == ["cat", "dog"]


def test_export_timm(imgs: Path) -> None:
    """Only what folds in whole can be a timm checkpoint: a linear probe does."""
    made = run("insert", "test_resnet", "--no-pretrained", "--img-size", "32", "--scheme", "linear", "-q")
    assert made.code == 0, made.stderr
    assert run("train", imgs, *FAST, "-q").code == 0
    found = check_golden("export-timm", run("export", "--timm", "--json", "-q"))
    checkpoint = check_golden("inspect-checkpoint", run("inspect", found["output"], "--json", "-q"))
    assert checkpoint["kind"] == "checkpoint"
    described = run("inspect", found["output"], "--backbone", "test_resnet", "--json", "-q")
    assert described.json["kind"] == "model"


def test_export_timm_refuses_what_does_not_fold(trained_adapter: Path, here: Path) -> None:
    ran = run("export", "--timm", "-q")
    assert ran.stdout == b""
    assert ran.code in (1, 4)
    assert [path.name for path in here.iterdir()] == ["adapter.safetensors"]
    assert len(ran.errors) == 2, ran.stderr


@pytest.mark.parametrize("target", ["adapter", "model", "listing"])
def test_inspect(target: str, trained_adapter: Path) -> None:
    named = {"adapter": str(trained_adapter), "model": "test_resnet", "listing": "test_[rv]*"}[target]
    found = check_golden(f"inspect-{target}", run("inspect", named, "--json", "-q"))
    assert found["kind"] == target
    shown = run("inspect", named)
    assert (shown.code, shown.stdout) == (0, b"")
    assert "test_resnet" in shown.stderr


def test_inspect_small_pictures() -> None:
    # at the last stage a map is a single pixel, of which a training batch norm cannot take statistics
    found = run("inspect", "test_resnet", "--img-size", "32", "--json", "-q")
    assert found.code == 0, found.stderr
    assert {item["name"] for item in found.json["schemes"] if item["reason"] is None} >= {"full", "conv-par", "res-seq"}
