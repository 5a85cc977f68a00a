"""The parts of one cell of the scheme × family table: insertion, one step of training, the file, the merge, ONNX.

Each takes a :class:`Bench`, a model with what it computes, and returns a plain record with ``problems`` and ``notes``.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import cadapt
from cadapt.adapted import ADAPTERS, AdaptedModel, disabled
from cadapt.backbone import Backbone, describe_model
from cadapt.export import onnx_bytes
from cadapt.merging import MergeReport, merge
from cadapt.plan import Plan
from cadapt.planning import Survey, fitting_schemes, survey, with_head
from cadapt.surgery import operate
from tests.contract.cases import starts_as_identity
from tests.zoo.check import checksum, make_images
from tests.zoo.lively import calibrate, make_lively
from tests.zoo.members import MEMBERS

Record = dict[str, Any]
TASK_CLASSES = 5
_LR = 1e-3
# a branch dropped for both pictures passes no gradient, nor do rectified units that are off for both: then other paths
# and other pictures are drawn as well
_DRAWS = 4
# the merged model is rounded to fp32 once, and computes in another order
_MERGED_FP32 = 1e-4


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model that cells are tried on, and what it computes: logits in eval mode for ``images``."""

    backbone: Backbone
    surveyed: Survey
    images: torch.Tensor
    logits: torch.Tensor
    state: dict[str, int]
    reasons: dict[str, str | None]


@functools.lru_cache(maxsize=1)
def bench(title: str) -> Bench:
    """The bench of a member of the table, built once while its cells are tried."""
    member = MEMBERS[title]
    base = make_lively(member.model, dict(member.arguments)).requires_grad_(False)
    calibrate(base, torch.randn(4, 3, member.side, member.side, generator=torch.Generator().manual_seed(7)))
    backbone = describe_model(base, member.side)
    surveyed = survey(backbone)
    images = make_images(backbone)
    return Bench(
        backbone=backbone,
        surveyed=surveyed,
        images=images,
        logits=run(base, images),
        state=checksum(base),
        reasons=fitting_schemes(surveyed),
    )


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits under a seed of their own; those of several classifiers side by side."""
    torch.manual_seed(0)
    output = model(images)
    return output if isinstance(output, torch.Tensor) else torch.cat(list(output), 1)


@torch.no_grad()
def awaken(adapters: nn.Module) -> None:
    """Add noise to every parameter, as training would, by fan-in: what starts at zero then does something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters():
        scale = 0.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.05
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def check_insertion(table: Bench, plan: Plan, scheme: str) -> Record:
    """Bit-identity with the base in both modes and switched off, and that awake adapters reach the logits."""
    base, images = table.backbone.model, table.images
    model = operate(table.backbone, with_head(plan, table.backbone, None), table.surveyed)
    problems: list[str] = []
    notes: list[str] = []
    if all(starts_as_identity(part) for part in scheme.split("+")):
        problems += _difference("eval", run(model.eval(), images), table.logits)
        found = _train_difference(model, base, images)
        notes += found[1]
        problems += found[0]
    else:
        notes.append("starts away from the base by its paper's definition")
    model.eval()
    with disabled(model):
        problems += _difference("switched off", run(model, images), table.logits)
    own = [module for name, module in model.adapters.named_children() if name != "head"]
    for module in own:
        awaken(module)
    moved = float((run(model, images) - table.logits).abs().max() / table.logits.abs().max()) if own else None
    if moved is not None and not moved > 0:
        problems.append(f"awake adapters move the logits by {moved}")
    with disabled(model):
        problems += _difference("awake and switched off", run(model, images), table.logits)
    return {"problems": problems, "notes": notes, "effect": moved}


def _difference(what: str, seen: torch.Tensor, wanted: torch.Tensor) -> list[str]:
    if seen.shape == wanted.shape and torch.equal(seen, wanted):
        return []
    if seen.shape != wanted.shape:
        return [f"{what} gives {tuple(seen.shape)}, expected {tuple(wanted.shape)}"]
    return [f"{what} differs by {float((seen - wanted).abs().max()):.2g} of {float(wanted.abs().max()):.2g}"]


def _train_difference(model: AdaptedModel, base: nn.Module, images: torch.Tensor) -> tuple[list[str], list[str]]:
    """Problems and notes of the train mode, where a dropout of the adapters draws what the base would have drawn."""
    twin = copy.deepcopy(base).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and model.plan.bn_policy == "frozen":
            module.eval()
    wanted = run(twin, images)
    drawn = torch.get_rng_state()
    seen = run(model.train(), images)
    problems = _difference("train", seen, wanted)
    if not problems or torch.equal(torch.get_rng_state(), drawn):
        return problems, []
    model.train()
    for name, module in model.adapters.named_modules():
        if "drop" in type(module).__name__.lower() and not name.startswith("head"):
            module.eval()
    problems = _difference("train, with the adapters' own dropout off,", run(model, images), wanted)
    return problems, ["in train mode compared with the adapters' own dropout off"]


def check_training(table: Bench, plan: Plan) -> tuple[AdaptedModel, Record]:
    """One step of SGD with awake adapters and a fresh head: who gets gradients, and who moves, and how far."""
    model = operate(table.backbone, with_head(plan, table.backbone, TASK_CLASSES), table.surveyed)
    awaken(model.adapters)
    model.train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    planned = dict(model.trained_tensors())
    parameters = {name: item for name, item in model.named_parameters() if name in planned}
    silent = _draw_gradients(model, parameters, table.images)
    reached = {name for name, item in model.named_parameters() if item.grad is not None}
    problems = [f"gradients outside the plan: {sorted(reached - planned.keys())[:3]}"] * bool(reached - planned.keys())
    none = sorted(parameters.keys() - reached)
    problems += [f"{len(none)} of {len(parameters)} planned tensors get no gradient: {none[:3]}"] if none else []
    infinite = sorted(name for name in reached if not bool(model.get_parameter(name).grad.isfinite().all()))  # type: ignore[union-attr]
    problems += [f"{len(infinite)} gradients are not finite: {infinite[:3]}"] if infinite else []
    zero = [name for name in silent if name not in none]
    problems += [f"{len(zero)} of {len(parameters)} planned tensors have a zero gradient: {zero[:3]}"] if zero else []
    torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=_LR, foreach=False).step()
    problems += _movement(model, before, parameters, planned.keys())
    logits = run(model.eval(), table.images)
    if tuple(logits.shape) != (len(table.images), TASK_CLASSES) or not bool(logits.isfinite().all()):
        problems.append(f"trained logits have shape {tuple(logits.shape)} or are not finite")
    model.zero_grad(set_to_none=True)
    count = sum(item.numel() for item in parameters.values())
    return model, {"problems": problems, "tensors": len(parameters), "trainable": count}


def _draw_gradients(model: AdaptedModel, parameters: dict[str, nn.Parameter], images: torch.Tensor) -> list[str]:
    """Leave gradients of a cross-entropy in the parameters; return the names of those that are zero throughout."""
    silent: list[str] = []
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        output = model(images if seed == 0 else torch.randn_like(images))
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        sum(functional.cross_entropy(item, torch.tensor([1, 3])) for item in outputs).backward()  # type: ignore[union-attr]
        silent = [name for name, item in parameters.items() if item.grad is None or not bool(item.grad.any())]
        if not silent:
            break
    return silent


def _movement(
    model: AdaptedModel, before: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], planned: Collection[str]
) -> list[str]:
    """What moved beside the plan, and what of the plan did not go where plain SGD sends it."""
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    problems = [f"moved beside the plan: {sorted(moved - set(planned))[:3]}"] if moved - set(planned) else []
    astray = [
        name
        for name, item in parameters.items()
        if item.grad is not None and not torch.equal(item.detach(), before[name].add(item.grad, alpha=-_LR))
    ]
    return problems + ([f"{len(astray)} planned tensors did not take the step: {astray[:3]}"] if astray else [])


def check_file(table: Bench, model: AdaptedModel) -> Record:
    """The adapter file read back on the same base: the same logits, the same bytes when written again."""
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "task.safetensors", Path(folder) / "again.safetensors"
        cadapt.save(model, path)
        loaded = cadapt.load(path, model=table.backbone.model)
        problems = _difference("the loaded model", run(loaded, table.images), run(model.eval(), table.images))
        cadapt.save(loaded, again)
        problems += [] if path.read_bytes() == again.read_bytes() else ["written again, the file has other bytes"]
        return {"problems": problems, "bytes": path.stat().st_size}


def check_merge(table: Bench, model: AdaptedModel) -> Record:
    """The merge's own verdict, and the merged model beside the adapted one on pictures the merge has not seen."""
    before = checksum(model)
    merged, report = merge(model)
    problems = [] if report.verified else ["not verified"]
    problems += [f"'{row.site}': {row.reason}" for row in report.sites if row.status == "refused"][:2]
    if checksum(model) != before:
        problems.append("the merge changed the model it was given")
    wanted, seen = run(model.eval(), table.images), run(merged.eval(), table.images)
    error = float((seen - wanted).abs().max() / wanted.abs().max())
    if not error <= _MERGED_FP32:
        problems.append(f"the merged logits differ by {error:.1e} in fp32, expected at most {_MERGED_FP32:.0e}")
    if ADAPTERS not in dict(merged.named_children()):
        problems.append("the merged model has no head")
    return {"problems": problems, "error_fp32": error, **_figures(report)}


def _figures(report: MergeReport) -> Record:
    errors = [row.error_fp64 for row in report.sites if row.error_fp64 is not None]
    reasons = sorted({row.reason for row in report.sites if row.status not in ("exact", "refused")})
    return {
        "merged": report.merged,
        "total": report.total,
        "simplified": report.count("simplified"),
        "worst_fp64": max(errors, default=None),
        "end_to_end_fp64": report.end_to_end.max_abs_error_fp64,
        "logit_effect": report.end_to_end.logit_effect,
        "timm_loadable": report.timm_loadable,
        "summary": report.summary,
        "reasons": reasons,
    }


def check_onnx(model: AdaptedModel) -> Record:
    """The export's own comparisons with onnxruntime, at batches of 1, 2, 3 and 7; it raises where they fail."""
    classes = [f"class {index}" for index in range(TASK_CLASSES)]
    data, report = onnx_bytes(model.eval(), preprocessing=model.preprocessing, classes=classes, name="cell")
    return {
        "worst": max(check.relative_error for check in report.checks),
        "batches": sorted({check.batch for check in report.checks}),
        "tolerance": report.tolerance,
        "torch_error": report.torch_error,
        "opset": report.opset,
        "bytes": len(data),
    }
