"""Help, versions, exit codes, what is imported: the parts of the contract that need no model."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import cadapt
import cadapt.cli
from cadapt.cli.main import build_app
from tests.cli.program import process_environment, run

COMMANDS = sorted(
    item.name.replace("_", "-")
    for item in pkgutil.iter_modules(cadapt.cli.__path__)
    if not item.name.startswith("_") and item.name != "main"
)
README = Path(__file__).parents[2] / "README.md"
_WITHOUT_TORCH = """
import sys
from cadapt.cli.main import _run
code = _run(sys.argv[1:])
heavy = sorted({"torch", "timm", "numpy", "PIL", "safetensors"} & sys.modules.keys())
assert not heavy, heavy
sys.exit(code)
"""


def parameters(command: str) -> list[Any]:
    group = typer.main.get_command(build_app())
    return list(group.commands[command].params)


def light(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run in a process that fails if anything heavy was imported."""
    command = [sys.executable, "-c", _WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env=process_environment(), timeout=60, check=False)


def test_the_commands_are_those_of_the_contract() -> None:
    assert {"inspect", "insert", "train", "eval", "merge-report", "export"} <= set(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["insert", "-h"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    ran = light(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert ran.stderr == b""


def test_version() -> None:
    ran = run("--version")
    assert ran.line == f"cadapt {cadapt.__version__}"


def test_completion_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH]
    completion = {"_CADAPT_COMPLETE": "complete_bash", "COMP_WORDS": "cadapt ins", "COMP_CWORD": "1"}
    environment = process_environment(completion)
    ran = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert b"AssertionError" not in ran.stderr
    assert b"insert" in ran.stdout and b"inspect" in ran.stdout


@pytest.mark.parametrize("form", ["text", "json", "stdin"])
def test_inspecting_an_adapter_imports_nothing_heavy(form: str, trained_adapter: Path, trained: bytes) -> None:
    arguments = {"text": [trained_adapter], "json": [trained_adapter, "--json"], "stdin": ["-", "--json"]}[form]
    ran = light("inspect", *arguments, stdin=trained if form == "stdin" else b"")
    assert ran.returncode == 0, ran.stderr
    shown = (ran.stderr if form == "text" else ran.stdout).decode()
    for expected in ("conv-par", "test_resnet", "cat", "dog"):
        assert expected in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_an_example_that_parses(command: str) -> None:
    shown = run(command, "--help")
    assert shown.code == 0
    example = " ".join(shown.stdout.decode().rsplit("\n\n", 1)[1].split())
    assert example.startswith(f"cadapt {command} ")
    known = {name for item in parameters(command) for name in item.opts}
    assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", example)) <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_and_option_has_help(command: str) -> None:
    silent = [item.name for item in parameters(command) if not getattr(item, "help", None)]
    assert silent == []


@pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_documented_in_the_readme(command: str) -> None:
    assert f"cadapt {command}" in README.read_text()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["export", "--foo"], "no such option: --foo", "cadapt export --help"),
        (["bogus"], "no such command 'bogus'", "cadapt --help"),
        (["insert", "resnet50"], "missing option '--scheme'", "cadapt insert --help"),
        (["eval"], "missing argument", "cadapt eval --help"),
        (["train", "x", "--epochs", "many"], "invalid value for '--epochs'", "cadapt train --help"),
        (["train", "x", "--workers", "-1"], "invalid value for '--workers'", "cadapt train --help"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: list[str], message: str, hint: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.stdout) == (2, b"")
    line, last = ran.stderr.splitlines()
    assert line.startswith(f"cadapt: error: {message}")
    assert last == f"  hint: {hint}"


def test_no_command_shows_the_help_and_exits_2() -> None:
    ran = run()
    assert (ran.code, ran.stdout) == (2, b"")
    assert "Commands:" in ran.stderr


def test_debug_adds_a_traceback_and_keeps_the_exit_code() -> None:
    plain = run("eval", "imgs", "--fail-under", "top1")
    debugged = run("--debug", "eval", "imgs", "--fail-under", "top1")
    assert plain.code == debugged.code == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debugged.stderr
    assert debugged.errors == plain.errors


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_texts: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cadapt.cli.eval.parse_thresholds", broken)
    with pytest.raises(ZeroDivisionError):
        run("eval", "imgs")


def test_something_is_said_at_once_but_not_to_the_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from cadapt.cli import main

    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_settings: said.append(text))
    for given in (["train", "x"], ["train", "x", "-q"], ["train", "x", "--quiet"], ["--help"], ["eval", "x", "--json"]):
        main._say_hello(given)
    assert said == ["cadapt train …"]
