"""Run the exported file in onnxruntime beside the torch model, and refuse a file that does not agree.

Exporters and runtime optimisers have both been wrong before, so the file runs with graph optimisation off and at its
default, at batch sizes the exporter has not seen. Errors are measured against how far outputs move between images:
a model whose outputs hardly move would agree with anything if they were measured against their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cadapt.errors import CadaptError
from cadapt.export.convert import INPUT_NAME
from cadapt.export.prepare import Deployable
from cadapt.export.report import Check, Dtype, Optimisation
from cadapt.preprocessing import Preprocessing

BATCHES = (1, 2, 3, 7)
TOLERANCES: Mapping[Dtype, float] = {"fp32": 1e-4, "fp16": 2e-2}

_OPTIMISATIONS: tuple[Optimisation, ...] = ("off", "default")
_ROUNDING_ALLOWANCE = 4.0  # two right fp32 programs that add in another order are this close in practice
_FATAL_ONLY = 4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparisons made, and torch's own fp32 error relative to fp64, if it was needed to judge them."""

    checks: tuple[Check, ...]
    tolerance: float
    torch_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Expected:
    images: dict[int, torch.Tensor]
    outputs: dict[int, torch.Tensor]
    scale: float
    largest: float


def make_images(batch: int, preprocessing: Preprocessing, *, normalized: bool, seed: int = 0) -> torch.Tensor:
    """Return random images that differ as pictures do: smooth colours of random strength under a little noise.

    Args:
        batch: how many.
        preprocessing: input size, and what to normalise with.
        normalized: normalise them; else they are in [0, 1].
        seed: of the images.
    """
    channels, height, width = preprocessing.input_size
    generator = torch.Generator().manual_seed(seed * 1000 + batch)
    coarse = torch.rand((batch, channels, 4, 4), generator=generator)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    noise = torch.rand((batch, channels, height, width), generator=generator)
    share = torch.rand((batch, 1, 1, 1), generator=generator)
    image = (1 - share) * smooth + share * noise
    if not normalized:
        return image
    mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    return (image - mean) / std


def _expect(reference: Deployable, preprocessing: Preprocessing) -> _Expected:
    images = {n: make_images(n, preprocessing, normalized=not reference.normalize) for n in BATCHES}
    with torch.no_grad():
        outputs = {n: reference(image) for n, image in images.items()}
    together = torch.cat(list(outputs.values()))
    if not together.isfinite().all():
        raise CadaptError("the model's own outputs on random images are not finite, so no file can be checked")
    spread = float((together - together.mean(0)).abs().max())
    largest = float(together.abs().max())
    # a model that gives the same for all images has no spread; then its rounding is the scale
    scale = max(spread, torch.finfo(torch.float32).eps * largest, torch.finfo(torch.float32).tiny)
    return _Expected(images=images, outputs=outputs, scale=scale, largest=largest)


def open_session(data: bytes, optimisation: Optimisation, *, threads: int | None = None) -> Any:
    """Open a model's bytes in onnxruntime on the CPU, silently, with as many threads as torch has unless said.

    Raises:
        CadaptError: onnxruntime does not accept it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if optimisation == "off":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds share no public base
        reason = str(error).splitlines()[0]
        raise CadaptError(
            f"onnxruntime {onnxruntime.__version__} does not accept the exported model: {reason}"
        ) from error


def _run(session: Any, expected: _Expected) -> dict[int, torch.Tensor]:
    return {
        n: torch.from_numpy(session.run(None, {INPUT_NAME: image.numpy()})[0]) for n, image in expected.images.items()
    }


def _compare(actual: torch.Tensor, wanted: torch.Tensor, scale: float, optimisation: Optimisation) -> Check:
    if actual.shape != wanted.shape:
        raise CadaptError(f"the exported model gives {list(actual.shape)}, expected {list(wanted.shape)}; not written")
    error = float((actual.double() - wanted.double()).abs().max())
    return Check(
        batch=len(wanted),
        optimisation=optimisation,
        max_abs_error=error,
        relative_error=error / scale,
        argmax_agreement=float((actual.argmax(1) == wanted.argmax(1)).double().mean()),
    )


def _exact_outputs(reference: Deployable, expected: _Expected, preprocessing: Preprocessing) -> dict[int, torch.Tensor]:
    double = Deployable(
        deepcopy(reference.model),
        preprocessing,
        normalize=reference.normalize,
        softmax=reference.softmax,
        dtype=torch.float64,
    ).eval()
    with torch.no_grad():
        return {n: double(image.double()) for n, image in expected.images.items()}


def _largest_error(actual: Mapping[int, torch.Tensor], exact: Mapping[int, torch.Tensor]) -> float:
    return max(float((actual[n].double() - exact[n]).abs().max()) for n in exact)


def _failed(checks: tuple[Check, ...], tolerance: float) -> tuple[Check, ...]:
    # written so that NaN fails
    return tuple(check for check in checks if not check.relative_error <= tolerance)


def _refusal(failed: tuple[Check, ...], tolerance: float, torch_error: float | None) -> CadaptError:
    worst = max(
        failed, key=lambda check: float("inf") if check.relative_error != check.relative_error else check.relative_error
    )
    where = f"at batch {worst.batch} with onnxruntime's optimisation {worst.optimisation}"
    own = "" if torch_error is None else f", torch's own fp32 error is {torch_error:.1e}"
    message = (
        f"the exported model disagrees with torch {where}: relative error {worst.relative_error:.1e} "
        f"(absolute {worst.max_abs_error:.1e}), tolerance {tolerance:.1e}{own}; not written"
    )
    if {check.optimisation for check in failed} == {"default"}:
        return CadaptError(
            f"{message}; it agrees with optimisation off, so onnxruntime's optimiser changes the result",
            hint="try another onnxruntime version or another opset",
        )
    return CadaptError(message, hint="try another opset, or another torch version")


def verify(
    data: bytes, reference: Deployable, preprocessing: Preprocessing, *, dtype: Dtype, tolerance: float | None
) -> Verdict:
    """Compare a serialised model with the torch model at all batch sizes and both optimisation settings.

    A check above the tolerance still passes in fp32 if the file is as close to fp64 as torch itself is.

    Args:
        data: the file.
        reference: what it must agree with, in fp32.
        preprocessing: input size, and what to normalise images with.
        dtype: what the file computes in.
        tolerance: on the largest error divided by the spread of outputs over images; None for that of the dtype.

    Raises:
        CadaptError: the file is invalid, does not run, or does not agree; with the figures.
    """
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    expected = _expect(reference, preprocessing)
    outputs = {setting: _run(open_session(data, setting), expected) for setting in _OPTIMISATIONS}
    checks = tuple(
        _compare(outputs[setting][n], expected.outputs[n], expected.scale, setting)
        for setting in _OPTIMISATIONS
        for n in BATCHES
    )
    failed = _failed(checks, limit)
    if not failed:
        return Verdict(checks=checks, tolerance=limit)
    if dtype != "fp32":
        raise _refusal(failed, limit, None)
    exact = _exact_outputs(reference, expected, preprocessing)
    torch_error = _largest_error(expected.outputs, exact)
    allowed = _ROUNDING_ALLOWANCE * max(torch_error, torch.finfo(torch.float32).eps * expected.largest)
    off = {setting for setting in outputs if not _largest_error(outputs[setting], exact) <= allowed}
    failed = tuple(check for check in failed if check.optimisation in off)
    if failed:
        raise _refusal(failed, limit, torch_error / expected.scale)
    return Verdict(checks=checks, tolerance=limit, torch_error=torch_error / expected.scale)


def check_validity(model: Any) -> None:
    """Run onnx's full checker, shape inference included.

    Raises:
        CadaptError: the model breaks the ONNX specification.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise CadaptError(f"the exported model is not valid ONNX: {reason}; not written") from error
