"""``cadapt inspect GLOB``: one command, many models; what fails is said, and an interruption leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.cli.program import check_refused, finish, run, start

GLOB = "test_convnext*"


def test_a_glob_is_a_table() -> None:
    ran = run("inspect", GLOB)
    assert (ran.code, ran.stdout) == (0, b"")
    lines = ran.stderr.splitlines()
    assert lines[0].split()[:5] == ["model", "parameters", "input", "blocks", "convs"]
    assert [line.split()[0] for line in lines[1:4]] == ["test_convnext", "test_convnext2", "test_convnext3"]
    assert lines[-1] == "3 models"
    assert "\x1b" not in ran.stderr


def test_json_holds_the_reasons() -> None:
    found = run("inspect", "test_vit2*", "--json", "-q").json
    (model,) = found["models"]
    assert model["weights"] == ["r160_in1k"]
    assert all(scheme["reason"] is None or scheme["sites"] == 0 for scheme in model["schemes"])
    assert [scheme["name"] for scheme in model["schemes"]] == found["schemes"]


def test_the_input_size_is_taken() -> None:
    found = run("inspect", "test_convnext2*", "--img-size", "96", "--json", "-q").json
    assert found["models"][0]["input_size"] == [3, 96, 96]


def _fail_for(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    from cadapt.describe import listing

    real = listing.survey

    def failing(backbone: object) -> object:
        if backbone.base.name in names:  # type: ignore[attr-defined]
            raise RuntimeError("boom")
        return real(backbone)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "survey", failing)


def test_one_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_for(monkeypatch, "test_convnext2")
    ran = run("inspect", GLOB)
    assert ran.code == 0
    assert "could not be surveyed: RuntimeError: boom: test_convnext2\n" in ran.stderr
    assert ran.stderr.endswith("3 models, of which 1 could not be surveyed\n")


def test_where_all_fail_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_for(monkeypatch, "test_convnext2")
    ran = run("inspect", "test_convnext2*", "--json", "-q")
    assert ran.code == 1
    assert ran.json["models"][0]["error"] == "RuntimeError: boom"
    assert ran.errors[0] == "cadapt: error: no model that matches 'test_convnext2*' could be surveyed"


def test_wrong_globs() -> None:
    check_refused(run("inspect", "efficentnet*"), 2, "no model matches 'efficentnet*'", hint="efficientnet*")
    check_refused(run("inspect", GLOB, "--sites"), 2, "--sites", hint="cadapt inspect MODEL --sites")
    check_refused(run("inspect", GLOB, "--backbone", "resnet18"), 2, "--backbone", hint="cadapt inspect FILE")


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize("wait_seconds", [0.0, 2.0])
def test_ctrl_c_ends_all_processes_without_a_word(wait_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys\nfrom cadapt.describe import listing\nlisting.usable_cores = lambda: 2\n"
    script += "print('ready', file=sys.stderr, flush=True)\nfrom cadapt.cli.main import main\nmain(sys.argv[1:])"
    monkeypatch.setattr("tests.cli.program.SCRIPT", script)
    process = start("inspect", "test_*", "-q", start_new_session=True)
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    time.sleep(0.5 + wait_seconds)
    # as a terminal does: to all processes of the group
    os.killpg(process.pid, signal.SIGINT)
    ran = finish(process, timeout=60)
    assert (ran.code, ran.stdout, ran.stderr) == (130, b"", "")
    assert _is_gone(process.pid)


def _is_gone(group: int, within_seconds: float = 20.0) -> bool:
    """Whether a process group ends; Python's own keeper of resources does so a moment after the one it works for."""
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
