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
    from cadapt.merging import merge
    from cadapt.train import fit

_HOMES = {
    "AdaptedModel": "cadapt.adapted",
    "disabled": "cadapt.adapted",
    "SCHEMES": "cadapt.adapters",
    "cost": "cadapt.costing",
    "evaluate": "cadapt.evaluation",
    "export_onnx": "cadapt.export",
    "fit": "cadapt.train",
    "insert": "cadapt.library",
    "load": "cadapt.library",
    "merge": "cadapt.merging",
    "save": "cadapt.library",
}

__all__ = [
    "SCHEMES",
    "AdaptedModel",
    "CadaptError",
    "__version__",
    "cost",
    "disabled",
    "evaluate",
    "export_onnx",
    "fit",
    "insert",
    "load",
    "merge",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cadapt' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
