"""Which errors are the user's to mend: cadapt's own, the option parser's, and what the system refuses.

Everything else is a fault of ours and keeps its traceback. Imports no torch.
"""

from __future__ import annotations

import errno
import os

from cadapt.errors import CadaptError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED_BY_SYSTEM = _FULL | {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE),
}


def explain(error: BaseException) -> CadaptError | None:
    """Return an error as one that has a line, a hint and an exit code, or None where the fault is ours."""
    if isinstance(error, CadaptError):
        return error
    if callable(getattr(error, "format_message", None)) and hasattr(error, "exit_code"):
        return _of_parser(error)
    if isinstance(error, OSError) and error.errno in _REFUSED_BY_SYSTEM:
        return _of_system(error)
    # torch.save meets a full disk with an error of its own, and the system's is behind it
    behind = error.__cause__ or error.__context__
    if isinstance(error, RuntimeError) and isinstance(behind, OSError) and behind.errno in _FULL:
        return _of_system(behind)
    return None


def _of_parser(error: BaseException) -> UsageError:
    # recognised by what it has: Typer brings its own copy of Click, and earlier ones did not
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "cadapt"
    return UsageError(message[:1].lower() + message[1:], hint=f"{path} --help")


def _of_system(error: OSError) -> CadaptError:
    what = error.strerror or os.strerror(error.errno or 0)
    where = "" if error.filename is None else f" '{os.fsdecode(error.filename)}'"
    hint = "free some space, and try again" if error.errno in _FULL else None
    return CadaptError(f"the system refused{where}: {what}", hint=hint)
