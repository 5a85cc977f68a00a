"""Text from other people's files, shown: no terminal obeys it, and a forged header is refused in one line."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cadapt.bundle import load_bundle, save_bundle
from tests.cli.program import check_refused, run
from tests.data.pictures import make_classes

EVIL = "cat\x1b]0;pwned\x07\x9b2J"


@pytest.fixture
def forged(here: Path, trained: bytes) -> Path:
    """A trained adapter whose first class is named to command a terminal."""
    path = here / "adapter.safetensors"
    bundle = load_bundle(trained)
    save_bundle(path, replace(bundle, classes=(EVIL, "dog"), training={EVIL: EVIL}), overwrite=True)
    return path


def test_class_names_do_not_reach_the_terminal_raw(forged: Path, here: Path) -> None:
    data = make_classes(here / "pets", {"fox": 2, "owl": 2}, (20, 18))
    some = make_classes(here / "some", {"dog": 2, "owl\x1b[2J": 1}, (20, 18))
    shown = run("inspect", forged)
    assert r"cat\x1b]0;pwned\x07\x9b2J" in shown.stderr
    refused = run("eval", data, "--workers", "0")
    check_refused(refused, 4, r"cat\x1b]0;pwned\x07")
    evaluated = run("eval", some, "--workers", "0")
    assert (evaluated.code, r"owl\x1b[2J" in evaluated.stderr) == (0, True)
    for ran in (shown, refused, evaluated):
        assert not set(ran.stderr) & set("\x1b\x07\x9b")


def test_json_escapes_them_too(forged: Path) -> None:
    ran = run("inspect", forged, "--json")
    assert ran.json["classes"] == [EVIL, "dog"]
    assert not set(ran.stdout.decode()) & set("\x1b\x07\x9b")


def test_file_names_in_errors() -> None:
    check_refused(run("inspect", "no\x1b[2J/such.safetensors"), 1, r"no\x1b[2J")


@pytest.mark.parametrize(
    "header",
    [b'{"__metadata__": 5}', b'{"__metadata__": {"cadapt": 5}}', b'{"a": ' + b"[" * 100_000, b"[1]", b"{"],
    ids=["number", "no text", "deep", "list", "cut"],
)
def test_a_forged_safetensors_header(header: bytes, here: Path) -> None:
    path = here / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    check_refused(run("inspect", path), 4, "weights.safetensors", hint=None)


def test_a_checkpoint_shows_what_it_says_of_itself(here: Path) -> None:
    path = here / "weights.safetensors"
    save_file({"fc.weight": torch.zeros(2, 2)}, path, {"architecture": "resnet18", "note": json.dumps([1])})
    assert run("inspect", path, "--json").json["metadata"] == {"architecture": "resnet18", "note": "[1]"}
    assert "resnet18" in run("inspect", path).stderr
