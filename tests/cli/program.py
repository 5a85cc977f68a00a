"""Runs the program: in this process with real descriptors, or as a process of its own where signals are sent."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = "import sys; from cadapt.cli.main import main; main(sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class Ran:
    code: int
    stdout: bytes
    stderr: str

    @property
    def line(self) -> str:
        """The single line on stdout."""
        text = self.stdout.decode()
        assert text.endswith("\n") and text.count("\n") == 1, text
        return text[:-1]

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.stdout, parse_constant=_no_constant)
        assert isinstance(found, dict)
        return found

    @property
    def errors(self) -> list[str]:
        """The lines of an error: one, and perhaps a hint."""
        return [line for line in self.stderr.splitlines() if line.startswith(("cadapt: error:", "  hint:"))]


def check_refused(ran: Ran, code: int, *said: str, hint: str | None = "") -> None:
    """One line, a hint (None: there is none), the exit code, and nothing on stdout."""
    assert (ran.code, ran.stdout) == (code, b""), ran.stderr
    assert "Traceback" not in ran.stderr
    assert len([line for line in ran.errors if line.startswith("cadapt: error: ")]) == 1, ran.stderr
    for text in said:
        assert text in ran.errors[0], ran.stderr
    assert ran.stderr.splitlines()[-len(ran.errors) :] == ran.errors
    if hint is not None:
        assert len(ran.errors) == 2, ran.stderr
        assert hint in ran.errors[1], ran.stderr


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def run(*arguments: object, stdin: bytes | None = None) -> Ran:
    """Run the program in this process; ``stdin`` comes through a real pipe, and None is /dev/null."""
    from cadapt.cli.main import _run

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _descriptors(stdin, out.fileno(), err.fileno()):
            code = _run([str(item) for item in arguments])
        out.seek(0)
        err.seek(0)
        return Ran(code=code, stdout=out.read(), stderr=err.read().decode())


@contextmanager
def _descriptors(stdin: bytes | None, out: int, err: int) -> Iterator[None]:
    """Put a pipe and two files in the place of the standard streams, below Python and in it."""
    source, feeder = _feed(stdin)
    kept = [os.dup(number) for number in (0, 1, 2)]
    streams = sys.stdin, sys.stdout, sys.stderr
    for number, descriptor in enumerate((source, out, err)):
        os.dup2(descriptor, number)
    os.close(source)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: PTH123, SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), encoding="utf-8", write_through=True)  # noqa: PTH123, SIM115
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(kept):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if feeder is not None:
            feeder.join(timeout=10)


def _feed(stdin: bytes | None) -> tuple[int, threading.Thread | None]:
    if stdin is None:
        return os.open(os.devnull, os.O_RDONLY), None
    source, sink = os.pipe()

    def write() -> None:
        with os.fdopen(sink, "wb") as handle:
            try:
                handle.write(stdin)
                handle.flush()
            except BrokenPipeError:
                handle.detach()

    feeder = threading.Thread(target=write)
    feeder.start()
    return source, feeder


def process_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, **(extra or {})}


def start(*arguments: object, **settings: Any) -> subprocess.Popen[bytes]:
    """Start the program as a process."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen(command, env=process_environment(settings.pop("env", None)), **settings)


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None, timeout: float = 120) -> Ran:
    out, err = process.communicate(stdin, timeout=timeout)
    return Ran(code=process.returncode, stdout=out or b"", stderr=(err or b"").decode())
