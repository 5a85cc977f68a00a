"""Whether the packages of the ``onnx`` extra are there, said before any work is done.

They are optional: training and evaluating need none of them. Every entry of the export calls this first.
"""

from __future__ import annotations

from importlib.util import find_spec

from cadapt.errors import CadaptError

WRITING = ("onnx", "onnxscript", "onnxruntime")
READING = ("onnx",)


def require_packages(names: tuple[str, ...], purpose: str) -> None:
    """Check that packages can be imported.

    Args:
        names: import names.
        purpose: what they are needed for, a verb phrase for the message.

    Raises:
        CadaptError: some are not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise CadaptError(
            f"cannot {purpose}: {', '.join(missing)} not installed",
            hint="pip install 'cadapt[onnx]'",
        )
