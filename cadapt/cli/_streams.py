"""What goes in and out of a command: the adapter by file or pipe, one line or bytes on stdout, notes on stderr."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadapt.errors import CadaptError, UsageError

DEFAULT_ADAPTER = Path("adapter.safetensors")
_LONGEST_PATH = 4096


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """Where an adapter came from: a file, or the bytes that came down a pipe (then ``path`` is None)."""

    path: Path | None
    data: bytes

    @property
    def content(self) -> Path | bytes:
        """What the bundle's reader takes."""
        return self.path if self.path is not None else self.data

    @property
    def folder(self) -> Path:
        """Where to look for files beside it."""
        return self.path.parent if self.path is not None else Path.cwd()

    @property
    def stem(self) -> str:
        """A name for what is made from it."""
        return self.path.stem if self.path is not None else DEFAULT_ADAPTER.stem


def find_adapter(given: str | None) -> AdapterSource:
    """The adapter a command works on: ``-m``, else what a pipe brings, else ``adapter.safetensors`` here.

    Raises:
        CadaptError: there is none.
    """
    if given == "-" or (given is None and _stdin_is_pipe()):
        return _from_stdin()
    path = Path(given) if given is not None else DEFAULT_ADAPTER
    if not path.is_file():
        hint = "make one: cadapt insert BACKBONE --scheme conv-par, or name one: -m FILE"
        raise CadaptError(f"no adapter at {path}", hint=hint)
    return AdapterSource(path=path, data=b"")


def _stdin_is_pipe() -> bool:
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _from_stdin() -> AdapterSource:
    data = sys.stdin.buffer.read()
    if not data.strip():
        raise CadaptError("no adapter came down the pipe: the command before this one gave nothing")
    # a safetensors file opens with the length of its header and a brace; read as text, that length is beyond any path
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return AdapterSource(path=None, data=data)
    if len(data) > _LONGEST_PATH:
        return AdapterSource(path=None, data=data)
    text = data.decode(errors="replace").strip()
    path = Path(text)
    if "\n" in text or not path.is_file():
        raise CadaptError(f"stdin brought {text.splitlines()[0][:80]!r}, expected an adapter's path or its bytes")
    return AdapterSource(path=path, data=b"")


def check_output(output: str, *, force: bool, but: Path | None = None) -> None:
    """Refuse an existing output before any work is done for it.

    Args:
        output: the path, or ``-`` for stdout.
        force: overwriting was allowed.
        but: the one file that may be overwritten anyway.

    Raises:
        UsageError: it exists.
        CadaptError: its folder does not exist, or bytes would go to a terminal.
    """
    if output == "-":
        if sys.stdout.isatty():
            raise UsageError("-o - writes a file's bytes, which a terminal cannot show", hint="pipe it, or -o FILE")
        return
    path = Path(output)
    if not path.parent.is_dir():
        raise CadaptError(f"no folder {path.parent} to write {path.name} to", hint=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file to write")
    same = but is not None and path.exists() and but.exists() and path.samefile(but)
    if path.exists() and not force and not same and path.is_file():
        raise UsageError(f"{path} exists", hint="replace it with --force, or name another output: -o FILE")


def deliver(data: bytes, output: str, *, overwrite: bool) -> None:
    """Write a file and print its path, or write its bytes to stdout for ``-``."""
    from cadapt.files import write_atomically

    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    write_atomically(Path(output), data, overwrite=overwrite)


def print_path(output: str, *, as_json: bool) -> None:
    """The one line of a command that wrote a file: its path; none beside bytes or JSON."""
    if output != "-" and not as_json:
        print(output, flush=True)


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(record, indent=2, ensure_ascii=False), flush=True)


def note(text: str, *, quiet: bool) -> None:
    """Say something to the person at the terminal, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
