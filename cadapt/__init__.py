"""cadapt: surgery on pretrained vision checkpoints.

Importing the package imports no torch; the names below bring it in when they are first used.

>>> import cadapt, timm
>>> adapted = cadapt.insert(timm.create_model("test_resnet"), scheme="res-seq", num_classes=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cadapt.errors import CadaptError
from cadapt.version import __version__

if TYPE_CHECKING:
    from cadapt.adapted import AdaptedModel, disabled
    from cadapt.adapters import SCHEMES
    from cadapt.costing import cost
    from cadapt.evaluation import evaluate
    from cadapt.export import export_onnx
    from cadapt.library import insert, load, save
    from cadapt.merging import Fit, merge, to_deltas
    from cadapt.tolerance import Tolerance, parse_tolerance
    from cadapt.train import fit

_HOMES = {
    "AdaptedModel": "cadapt.adapted",
    "Fit": "cadapt.merging",
    "SCHEMES": "cadapt.adapters",
    "Tolerance": "cadapt.tolerance",
    "cost": "cadapt.costing",
    "disabled": "cadapt.adapted",
    "evaluate": "cadapt.evaluation",
    "export_onnx": "cadapt.export",
    "fit": "cadapt.train",
    "insert": "cadapt.library",
    "load": "cadapt.library",
    "merge": "cadapt.merging",
    "parse_tolerance": "cadapt.tolerance",
    "save": "cadapt.library",
    "to_deltas": "cadapt.merging",
}

__all__ = [
    "SCHEMES",
    "AdaptedModel",
    "CadaptError",
    "Fit",
    "Tolerance",
    "__version__",
    "cost",
    "disabled",
    "evaluate",
    "export_onnx",
    "fit",
    "insert",
    "load",
    "merge",
    "parse_tolerance",
    "save",
    "to_deltas",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cadapt' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
