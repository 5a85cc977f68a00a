"""Turn the prepared torch model into an ONNX graph, with a batch dimension that stays free.

Only torch's dynamo exporter is used: the older one crashes on code that torch.fx generated. It prints nothing here
and needs no network.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.onnx import OnnxExporterError

from cadapt.errors import CadaptError, UsageError

# has Gelu as one operator; every onnxruntime that the onnx extra admits runs it
DEFAULT_OPSET = 20
INPUT_NAME = "image"
_LOG = logging.getLogger(__name__)
_BATCH = "batch"
_FIRST_OPSET = 18  # what torch writes before any conversion
_EXAMPLE_BATCH = 2  # torch.export treats sizes 0 and 1 as constants


def convert(model: nn.Module, input_size: tuple[int, int, int], *, output_name: str, opset: int | None) -> Any:
    """Return the ``onnx.ModelProto`` of a model in eval mode.

    Args:
        model: maps ``image`` ``[batch, channels, height, width]`` to ``[batch, classes]``.
        input_size: channels, height and width, fixed in the graph.
        output_name: of the graph's only output.
        opset: version of the operator set; None for the default.

    Raises:
        UsageError: there is no such operator set here.
        CadaptError: torch cannot convert the model, for example because it fixes the batch size.
    """
    wanted = _check_opset(DEFAULT_OPSET if opset is None else opset)
    example = torch.rand((_EXAMPLE_BATCH, *input_size))
    try:
        with _silenced():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT_NAME],
                output_names=[output_name],
                dynamic_shapes=({0: torch.export.Dim(_BATCH)},),
                opset_version=wanted,
            )
    except Exception as error:  # the exporter lets its packages' own kinds through, which share no base
        cause = (error.__cause__ if isinstance(error, OnnxExporterError) else None) or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
        raise CadaptError(f"torch cannot convert the model to ONNX: {type(cause).__name__}: {reason}") from error
    if program is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returned no program")
    proto = program.model_proto
    found = opset_of(proto)
    if found != wanted:
        raise CadaptError(f"torch converted the model to opset {found}, expected {wanted}", hint=f"--opset {found}")
    _check_batch(proto)
    return proto


def opset_of(proto: Any) -> int:
    """Return the version of the standard operator set that an ``onnx.ModelProto`` uses; 0 if it uses none."""
    return max((int(item.version) for item in proto.opset_import if item.domain in ("", "ai.onnx")), default=0)


def _check_opset(opset: int) -> int:
    """Torch takes any number, and silently gives another operator set where it does not know it."""
    import onnx

    latest = onnx.defs.onnx_opset_version()
    if not _FIRST_OPSET <= opset <= latest:
        raise UsageError(f"unknown opset {opset}, expected {_FIRST_OPSET} to {latest}")
    return opset


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep torch from printing whole graphs when a conversion fails: the error says what went wrong."""
    previous = logging.root.manager.disable
    said = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        logging.disable(previous)
        if said.getvalue():
            _LOG.debug("the exporter said: %s", said.getvalue())


def _check_batch(proto: Any) -> None:
    """Torch may fix the batch size without a word, although it was told to keep it free."""
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param != _BATCH:
            found = first.dim_value if first.HasField("dim_value") else first.dim_param or "unknown"
            raise CadaptError(
                f"cannot export for any batch size: its code fixes the first dimension of '{value.name}' to {found}"
            )
