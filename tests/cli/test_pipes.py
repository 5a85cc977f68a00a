"""The adapter by file, by path line and by bytes; stdout carries data alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cadapt.bundle import load_bundle
from tests.cli.conftest import BASE, FAST
from tests.cli.program import SCRIPT, process_environment, run


def test_a_pipe_of_path_lines(imgs: Path) -> None:
    inserted = run("insert", *BASE)
    assert inserted.stdout == b"adapter.safetensors\n"
    trained = run("train", imgs, *FAST, stdin=inserted.stdout)
    assert trained.stdout == b"adapter.safetensors\n"
    assert load_bundle("adapter.safetensors").classes == ("cat", "dog")
    exported = run("export", "--onnx", stdin=trained.stdout)
    assert exported.stdout == b"adapter.onnx\n"
    assert Path("adapter.onnx").stat().st_size > 1_000_000
    assert "against torch in onnxruntime" in exported.stderr


def test_a_pipe_of_bytes_writes_no_file_but_the_run(imgs: Path, here: Path) -> None:
    inserted = run("insert", *BASE, "-o", "-")
    assert not load_bundle(inserted.stdout).classes
    trained = run("train", imgs, *FAST, "-m", "-", "-o", "-", stdin=inserted.stdout)
    assert load_bundle(trained.stdout).classes == ("cat", "dog")
    exported = run("export", "-m", "-", "-o", "-", "--onnx", stdin=trained.stdout)
    import onnx

    assert onnx.load_from_string(exported.stdout).ByteSize() == len(exported.stdout)
    assert [path.name for path in here.iterdir()] == ["runs"]


def test_bytes_and_files_are_the_same(adapter: Path, fresh: bytes) -> None:
    assert run("insert", *BASE, "-o", "-", "-q").stdout == fresh
    by_pipe = run("export", "-o", "-", "-q", stdin=fresh)
    by_path = run("export", "-o", "-", "-q", stdin=b"adapter.safetensors\n")
    by_option = run("export", "-o", "-", "-m", adapter)
    by_default = run("export", "-o", "-")
    assert by_pipe.stdout == by_path.stdout == by_option.stdout == by_default.stdout == fresh
    assert by_pipe.stderr == by_path.stderr == ""


def test_bytes_without_an_output_go_to_the_default_name(imgs: Path, fresh: bytes) -> None:
    assert run("train", imgs, *FAST, "-q", stdin=fresh).line == "adapter.safetensors"
    again = run("train", imgs, *FAST, "-q", stdin=fresh)
    assert (again.code, again.errors[0]) == (2, "cadapt: error: 'adapter.safetensors' exists")


def test_a_named_pipe_is_read_as_bytes(fresh: bytes) -> None:
    source, sink = os.pipe()
    os.write(sink, fresh[:60_000])
    os.close(sink)
    try:
        ran = run("inspect", "-", "--json", stdin=fresh)
        cut = run("export", "-o", "-", "-m", f"/dev/fd/{source}")
    finally:
        os.close(source)
    assert ran.json["plan"]["scheme"] == "conv-par"
    assert (cut.code, cut.stdout) == (4, b"")


def test_names_that_are_no_utf8_pass_through(adapter: Path) -> None:
    name = os.fsdecode(b"caf\xe9.safetensors")
    adapter.rename(name)
    ran = run("export", "-q", stdin=os.fsencode(name) + b"\n")
    assert ran.stdout == b"caf\xe9-fp32.safetensors\n"
    assert json.loads(run("export", "-q", "-m", name, "--json", "--force").stdout)["output"].endswith(
        "-fp32.safetensors"
    )


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "adapter.safetensors"], ["merge-report"], ["export"], ["insert", *BASE, "-o", "other.safetensors"]],
    ids=lambda arguments: arguments[0],
)
def test_quiet_silences_stderr(arguments: list[str], adapter: Path) -> None:
    ran = run(*arguments, "-q")
    assert (ran.code, ran.stderr) == (0, "")


def test_quiet_training_and_evaluation_say_nothing(imgs: Path, adapter: Path) -> None:
    assert run("train", imgs, *FAST, "-q").stderr == ""
    assert run("eval", imgs, "-q", "--workers", "0").stderr == ""
    missed = run("eval", imgs, "-q", "--workers", "0", "--fail-under", "loss=0")
    assert (missed.code, missed.stdout, len(missed.stderr.splitlines())) == (3, b"", 1)


def test_json_and_bytes_cannot_share_stdout(adapter: Path) -> None:
    for arguments in (["insert", *BASE], ["export"], ["train", "imgs"]):
        ran = run(*arguments, "-o", "-", "--json")
        assert (ran.code, ran.stdout) == (2, b"")
        assert "both write to stdout" in ran.errors[0]


@pytest.mark.parametrize("stdin", [b"", b"\n", b"  \n\n"])
def test_an_empty_pipe(stdin: bytes, adapter: Path) -> None:
    for arguments in (["train", "imgs"], ["eval", "imgs"], ["export"], ["merge-report"], ["inspect", "-"]):
        ran = run(*arguments, stdin=stdin)
        assert (ran.code, ran.stdout) == (1, b"")
        assert ran.errors[0].startswith("cadapt: error: no adapter came down the pipe")
        assert len(ran.errors) == 2


@pytest.mark.parametrize(
    ("stdin", "code"),
    [
        (b"not/there.safetensors\n", 1),
        (b"garbage", 1),
        (b"two\nlines\n", 1),
        (b"adapter.safetensors\nadapter.safetensors\n", 1),
        (b"\x00\x01\x02", 4),
        (os.urandom(10_000), 4),
        (b"long " * 10_000, 4),
    ],
)
def test_garbage_on_stdin(stdin: bytes, code: int, adapter: Path) -> None:
    for arguments in (["export", "-o", "new.safetensors"], ["inspect", "-"]):
        ran = run(*arguments, stdin=stdin)
        assert (ran.code, ran.stdout) == (code, b"")
        assert "stdin" in ran.errors[0]
        assert len(ran.errors) == 2
    assert not Path("new.safetensors").exists()


def test_a_real_pipe_whose_first_command_fails() -> None:
    """The one whole pipe of processes: nobody hangs, each says why, nothing is written."""
    command = [sys.executable, "-c", SCRIPT]
    environment = process_environment()
    first = subprocess.Popen([*command, "insert", "test_resne", "--scheme", "conv-par"], env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    second = subprocess.Popen([*command, "export"], env=environment, stdin=first.stdout,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert first.stdout is not None and first.stderr is not None
    first.stdout.close()
    out, err = second.communicate(timeout=60)
    assert (first.wait(60), second.returncode, out) == (2, 1, b"")
    assert b"unknown model 'test_resne'" in first.stderr.read()
    first.stderr.close()
    assert err.splitlines()[1].startswith(b"cadapt: error: no adapter came down the pipe")
    assert list(Path().iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(adapter: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "inspect", str(adapter), "--json"]
    process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(adapter: Path) -> None:
    """As a process: the interpreter must not fail once more when it ends."""
    command = [sys.executable, "-c", SCRIPT, "inspect", str(adapter), "--json"]
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(command, env=process_environment(), stdin=subprocess.DEVNULL, stdout=full,
                             stderr=subprocess.PIPE, timeout=60, check=False)  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.decode().splitlines() == [
        "cadapt: error: cannot write to stdout: No space left on device",
        "  hint: write to a file: -o FILE",
    ]
