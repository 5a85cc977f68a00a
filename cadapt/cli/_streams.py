"""What goes in and out of a command: the adapter by file or pipe, one line or bytes on stdout, notes on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadapt.errors import CadaptError, RefusedError, UsageError

if TYPE_CHECKING:
    from cadapt.bundle import Bundle

DEFAULT_ADAPTER = Path("adapter.safetensors")
_LONGEST_PATH = 4096
_STDOUT = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}


class StdoutError(CadaptError):
    """What a command gives could not be written to stdout: the disk behind it is full, for example."""


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
    if path.is_fifo():  # -m <(…)
        return AdapterSource(path=None, data=path.read_bytes())
    if not path.is_file():
        hint = "make one: cadapt insert BACKBONE --scheme conv-par, or name one: -m FILE"
        raise CadaptError(f"no adapter at '{path}'", hint=hint)
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
        raise CadaptError(
            "no adapter came down the pipe: the command before this one gave nothing",
            hint="its own error is above; or name a file: -m FILE",
        )
    # a path is text of one line; a safetensors file begins with a length, which as text has zeros in it
    if b"\0" in data or len(data) > _LONGEST_PATH:
        return AdapterSource(path=None, data=data)
    text = os.fsdecode(data.strip(b"\r\n"))
    path = Path(text)
    if "\n" in text or not path.is_file():
        first = ascii(text.splitlines()[0][:80])
        raise CadaptError(
            f"stdin brought {first}, expected the path of an adapter file in one line, or its bytes",
            hint="cadapt insert BACKBONE --scheme conv-par | cadapt train DATA, or name a file: -m FILE",
        )
    return AdapterSource(path=path, data=b"")


def load_adapter(source: AdapterSource) -> Bundle:
    """Read the adapter file that was found.

    Raises:
        RefusedError: it is damaged or no adapter file.
        CadaptError: it cannot be read.
    """
    from cadapt.bundle import load_bundle

    with naming_stdin():
        return load_bundle(source.content)


@contextmanager
def naming_stdin() -> Iterator[None]:
    """Say where a refused adapter came from if it came down a pipe, and what to do about it."""
    try:
        yield
    except RefusedError as error:
        message = error.message.replace("adapter file from memory", "stdin")
        hint = error.hint or "copy the file again from where it is whole, or begin anew: cadapt insert"
        raise RefusedError(message, hint=hint) from error


def check_output(output: str, *, force: bool, as_json: bool, but: Path | None = None) -> None:
    """Refuse an existing output before any work is done for it.

    Args:
        output: the path, or ``-`` for stdout.
        force: overwriting was allowed.
        as_json: stdout is wanted for JSON.
        but: the one file that may be overwritten anyway.

    Raises:
        UsageError: it exists, or stdout cannot take it.
        CadaptError: its folder does not exist, or cannot be written to.
    """
    if output == "-":
        if as_json:
            raise UsageError("-o - and --json both write to stdout", hint="leave one out, or -o FILE --json")
        if sys.stdout.isatty():
            raise UsageError("-o - writes a file's bytes, which a terminal cannot show", hint="pipe it, or -o FILE")
        return
    path = Path(output)
    if not path.parent.is_dir():
        raise CadaptError(
            f"no folder '{path.parent}' to write '{path.name}' to", hint=f"mkdir -p {shlex.quote(str(path.parent))}"
        )
    if path.is_dir():
        raise UsageError(
            f"'{path}' is a folder, expected a file to write", hint=f"-o {shlex.quote(str(path / 'FILE'))}"
        )
    same = but is not None and path.exists() and but.exists() and path.samefile(but)
    if path.exists() and not force and not same and path.is_file():
        raise UsageError(f"'{path}' exists", hint="replace it with --force, or name another output: -o FILE")
    # before the work, not after it; a device is written straight and needs no folder
    if (path.is_file() or not path.exists()) and not os.access(path.parent, os.W_OK):
        raise CadaptError(f"cannot write into the folder '{path.parent}'", hint="write elsewhere: -o FILE")


def deliver(data: bytes, output: str, *, overwrite: bool) -> None:
    """Write a file and print its path, or write its bytes to stdout for ``-``."""
    from cadapt.files import write_atomically

    if output == "-":
        _to_stdout(data)
        return
    try:
        write_atomically(Path(output), data, overwrite=overwrite)
    except CadaptError as error:
        error.hint = error.hint or "write elsewhere: -o FILE"
        raise


def print_path(output: str, *, as_json: bool) -> None:
    """The one line of a command that wrote a file: its path; none beside bytes or JSON."""
    if output not in _STDOUT and not as_json:
        _to_stdout(os.fsencode(output) + b"\n")


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinities, which JSON cannot say, are null."""
    text = json.dumps(_sayable(record), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON leaves these as they are, and a terminal may obey them
    text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found.group()):04x}", text)
    # a file name that is no UTF-8 keeps its bytes as escapes
    _to_stdout(text.encode(errors="backslashreplace") + b"\n")


def _sayable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _sayable(item) for key, item in value.items()}
    return [_sayable(item) for item in value] if isinstance(value, list | tuple) else value


def _to_stdout(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(
            f"cannot write to stdout: {error.strerror or error}", hint="write to a file: -o FILE"
        ) from error
