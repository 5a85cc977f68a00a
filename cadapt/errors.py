"""The one exception the toolkit raises for what a user can mend, and its kinds.

Each kind carries the exit code the command line ends with, so that no command maps errors itself.
"""

from __future__ import annotations

from collections.abc import Iterable


class CadaptError(Exception):
    """Something the user can mend: one line that says what, where, got and expected.

    Args:
        message: the line.
        hint: what to try instead, as a command where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CadaptError):
    """A name, an option or a combination that cadapt does not know (exit 2)."""

    exit_code = 2


class ThresholdMissedError(CadaptError):
    """A threshold that the user set was not met (exit 3)."""

    exit_code = 3


class RefusedError(CadaptError):
    """An unsafe file, the wrong base, or damaged data: refused, never warned about (exit 4)."""

    exit_code = 4


class InterruptedRunError(CadaptError):
    """A run that stopped on SIGINT (exit 130) or SIGTERM (exit 143) after saving."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def close_matches(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a "did you mean …" phrase for an unknown name, or a phrase that lists what is known.

    >>> close_matches("resnet5", ["resnet50", "vgg16", "convnext_tiny"])
    'did you mean resnet50?'
    """
    import difflib

    options = sorted(set(known))
    matches = difflib.get_close_matches(name, options, n=count, cutoff=0.6)
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"known: {shown}"
