"""``cadapt inspect GLOB``: one command, many models; what fails is said, and an interruption leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import timm
from torch import nn

from cadapt.adapters import SCHEMES
from cadapt.cli._schemes import LISTED, SCHEME_NAMES
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


def test_schemes_named_are_the_columns() -> None:
    found = run("inspect", "test_vit2*", "--scheme", "lora,bias", "--scheme", "bias+norm", "--json", "-q").json
    assert found["schemes"] == ["lora", "bias", "bias+norm"]
    shown = run("inspect", "test_vit2*", "--scheme", "bias").stderr
    assert "50 t 1.34 %" in shown and "t: tensors of the base" in shown


def test_all_schemes_are_on_one_screen_with_why_some_do_not_fit() -> None:
    ran = run("inspect", "test_resnet", "--schemes")
    assert (ran.code, ran.stdout) == (0, b"")
    lines = ran.stderr.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40
    first = {line.split()[0] for line in lines if line}
    misfits = " ".join(line for line in lines if line.startswith("does not fit: "))
    for name in SCHEME_NAMES:
        assert name in first or name in misfits, name
    assert "convpass" in misfits
    assert "stage  path" not in ran.stderr


def test_json_of_all_schemes_says_what_merges() -> None:
    found = run("inspect", "test_resnet", "--schemes", "--json", "-q").json
    schemes = {item["name"]: item for item in found["schemes"]}
    assert set(schemes) == set(SCHEME_NAMES)
    assert schemes["lora"]["merged"] == schemes["lora"]["sites"] > 0
    assert schemes["conv-par"]["merged"] == 0
    assert schemes["conv-par"]["merge_reasons"] == [
        {"reason": "its ReLU between the two convs is not linear", "adapters": 7}
    ]
    assert schemes["norm"]["tensors"] > 0


def test_a_model_shows_the_usual_schemes_and_where_the_others_are() -> None:
    shown = run("inspect", "test_resnet").stderr
    assert "stage  path" in shown and "conv-par" in shown and "lora" not in shown
    assert shown.endswith("all schemes: cadapt inspect test_resnet --schemes\n")


def test_activations_of_a_batch() -> None:
    one, many = (
        run("inspect", "test_resnet", "--scheme", "conv-par", "--json", "-q", *more).json
        for more in ((), ("--batch-size", "8"))
    )
    assert (one["activation_batch"], many["activation_batch"]) == (1, 8)
    assert many["schemes"][0]["engine_activation_bytes"] > 7 * one["schemes"][0]["engine_activation_bytes"]
    shown = run("inspect", "test_resnet", "--scheme", "conv-par", "--batch-size", "8").stderr
    assert "a batch of 8" in " ".join(shown.split())
    check_refused(run("inspect", GLOB, "--batch-size", "8"), 2, "one model", hint="inspect MODEL --batch-size")


def test_layers_are_counted_and_not_listed() -> None:
    shown = run("inspect", "test_resnet", "--sites", "--scheme", "ssf").stderr
    assert "and 30 layer sites: --json lists them" in shown
    assert "fc" not in {line.split()[0] for line in shown.splitlines() if line}
    assert not [line for line in shown.splitlines() if line.split()[1:2] == ["layer"]]


def test_an_adapter_that_changes_tensors_says_how_many(here: Path) -> None:
    base = ("test_resnet", "--no-pretrained", "--img-size", "32")
    model = timm.create_model("test_resnet", num_classes=0)
    own = len(list(model.parameters()))
    layers = sum(isinstance(item, nn.Conv2d | nn.BatchNorm2d) for item in model.modules())
    told = {"bias": f"learned for {layers} tensors of the base", "full": f"{own} tensors of the base's own"}
    for scheme, said in told.items():
        assert run("insert", *base, "--scheme", scheme, "-o", f"{scheme}.safetensors", "-q").code == 0
        assert said in run("inspect", f"{scheme}.safetensors").stderr
    check_refused(run("inspect", "bias.safetensors", "--schemes"), 2, "not on a file", hint="inspect MODEL --schemes")


def test_the_help_lists_the_registry() -> None:
    assert set(SCHEME_NAMES) == set(SCHEMES)
    assert len(SCHEME_NAMES) == len(set(SCHEME_NAMES))
    for command in ("insert", "inspect"):
        said = run(command, "--help").stdout.decode()
        # a line may break at a hyphen
        assert LISTED.replace(" ", "").replace("-", "") in "".join(said.split()).replace("-", "").replace("│", "")


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
    check_refused(run("inspect", GLOB, "--scheme", "lorra"), 2, "unknown scheme 'lorra'", hint="lora")
    check_refused(run("inspect", GLOB, "--schemes", "--scheme", "lora"), 2, "--schemes", hint="leave one out")
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
