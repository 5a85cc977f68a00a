"""One architecture's checks, each from one model: sites on the meta device, numbers with real weights, and a rebuild.

Records are plain JSON objects; their seconds are of the processor. A check that finds something wrong says so in its
record; it raises only where the machine's memory does not suffice.
"""

from __future__ import annotations

import gc
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError
from cadapt.hashing import tensor_bytes
from cadapt.planning import Survey, plan_insertions, survey, with_head
from cadapt.surgery import operate
from tests.zoo.census import family_of, kind_of, make_on_meta
from tests.zoo.digest import digest_of
from tests.zoo.lively import calibrate, make_lively
from tests.zoo.setting import SCHEMES, Setting, bare_backbone, choose_setting, count_adapters, make_plan
from tests.zoo.wiring import compare_with_hooks

SITE_KINDS = ("block", "conv", "downsample", "stage", "attention", "mlp", "linear")
# a block whose paths are dropped for both pictures passes no gradient: then others are drawn
_DRAWS = 4
_TASK_CLASSES = 5


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "bad_alloc")
    )


def check_sites(name: str) -> dict[str, Any]:
    """The architecture's golden row, with the reasons of refusals and the seconds that tracing and finding took."""
    model = make_on_meta(name)
    record: dict[str, Any] = {"name": name, "family": family_of(name), "kind": kind_of(model)}
    if record["kind"] is None:
        return record
    backbone = bare_backbone(name, model, None)
    size = backbone.preprocessing.input_size
    record |= {"parameters_m": round(backbone.base.parameters / 1e6, 3), "input": f"{size[1]}x{size[2]}"}
    start = time.process_time()
    try:
        surveyed = survey(backbone)
    except Exception as error:  # whatever a model's code raises belongs in the table
        return record | {"error": in_words(error), "seconds": round(time.process_time() - start, 3)}
    record["seconds"] = round(time.process_time() - start, 3)
    found = [site.kind for site in surveyed.sites]
    record["sites"] = {kind: found.count(kind) for kind in SITE_KINDS}
    record["schemes"] = count_adapters(backbone, surveyed)
    record["head"] = head_problem(backbone, surveyed)
    return record


def head_problem(backbone: Backbone, surveyed: Survey) -> str | None:
    """Why a task's head cannot stand in for the model's classifier, or None where it gives its classes."""
    images = torch.empty(2, *backbone.preprocessing.input_size, device="meta")
    try:
        plan = with_head(plan_insertions(backbone, "linear"), backbone, _TASK_CLASSES)
        with torch.no_grad():
            shape = tuple(_tensor(operate(backbone, plan, surveyed).eval()(images)).shape)
    except Exception as error:  # whatever a model's code raises belongs in the table
        return in_words(error)
    return None if shape == (2, _TASK_CLASSES) else f"its logits have shape {shape}"


def check_numbers(name: str, native: Mapping[str, int | str]) -> dict[str, Any]:
    """What all schemes do to the architecture with real weights.

    Args:
        name: the architecture.
        native: for each scheme the number of its adapters at the native size, or why it refuses.
    """
    start = time.process_time()
    setting, surveyed = choose_setting(name, native)
    base = make_base(setting)
    backbone = bare_backbone(name, base, setting.side)
    record: dict[str, Any] = {"name": name, "setting": asdict(setting)}
    before = checksum(base)
    expected = _Expected(backbone)
    record |= {"side": backbone.preprocessing.input_size[1], "drops": not torch.equal(expected.train, expected.eval)}
    record["problems"] = [] if expected.finite else ["the base's logits are not finite"]
    if checksum(base) != before:
        record["problems"].append("a forward in train mode changes the base's own state")
    before = checksum(base)
    record["schemes"] = {}
    for scheme in SCHEMES:
        record["schemes"][scheme] = _tried(backbone, surveyed, scheme, expected, native.get(scheme))
        gc.collect()
    if checksum(base) != before:
        record["problems"].append("the base was changed")
    return record | {"seconds": round(time.process_time() - start, 2), "peak_gb": peak_gb()}


def check_rebuild(name: str, numbers: Mapping[str, Any], plans: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a process that made none of the plans gets the same models from their JSON.

    Args:
        name: the architecture.
        numbers: the record of :func:`check_numbers`.
        plans: for each scheme that fits, its plan's JSON and the model's digest.
    """
    from cadapt.plan import Plan

    start = time.process_time()
    setting = Setting(**numbers["setting"])
    backbone = bare_backbone(name, make_base(setting), setting.side)
    surveyed = survey(backbone)
    images = make_images(backbone)
    differing: dict[str, list[str]] = {}
    for scheme, noted in plans.items():
        model = operate(backbone, Plan.from_json(noted["plan"]), surveyed)
        seen = digest_of(model, images)
        differing[scheme] = [part for part, value in noted["digest"].items() if seen[part] != value]
        del model
    return {"name": name, "differing": differing, "seconds": round(time.process_time() - start, 2)}


def check_on_meta(name: str) -> dict[str, Any]:
    """What can be seen of a model too large to be run: its adapted twin without data has its keys and its output."""
    model = make_on_meta(name)
    backbone = bare_backbone(name, model, None)
    surveyed = survey(backbone)
    images = torch.empty(2, *backbone.preprocessing.input_size, device="meta")
    with torch.no_grad():
        shape = _tensor(model(images)).shape
    problems = []
    for scheme in SCHEMES:
        try:
            adapted = operate(backbone, make_plan(backbone, scheme, surveyed), surveyed).eval()
        except CadaptError:
            continue
        with torch.no_grad():
            if _tensor(adapted(images)).shape != shape:
                problems.append(f"{scheme}: another output")
        if {key for key in adapted.state_dict() if not key.startswith(f"{ADAPTERS}.")} != set(model.state_dict()):
            problems.append(f"{scheme}: other keys")
    return {"name": name, "meta": True, "problems": problems, "schemes": {}}


def make_base(setting: Setting) -> nn.Module:
    """The lively model of a setting, the same in every process."""
    base = make_lively(setting.name, setting.arguments).requires_grad_(False)
    calibrate(base, make_images(bare_backbone(setting.name, base, setting.side), batch=4, seed=7))
    return base


def make_images(backbone: Backbone, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise of the size a model takes."""
    return torch.randn(batch, *backbone.preprocessing.input_size, generator=torch.Generator().manual_seed(seed))


def checksum(model: nn.Module) -> dict[str, int]:
    """A checksum of each tensor of a model's state and of its other buffers."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: zlib.crc32(tensor_bytes(name, tensor)) for name, tensor in tensors.items()}


def peak_gb() -> float | None:
    """The most memory this process has held, where the system tells."""
    try:
        with open("/proc/self/status") as status:  # noqa: PTH123 - a file of the kernel's
            lines = [line.split() for line in status if line.startswith("VmHWM")]
    except OSError:
        return None
    return round(int(lines[0][1]) / 2**20, 2) if lines else None


class _Expected:
    """What the base computes. The train mode comes first: what it changes of the base, copies of the base have too."""

    def __init__(self, backbone: Backbone) -> None:
        self.images = make_images(backbone)
        self.train = _run(_frozen_norms(backbone.model), self.images)
        self.eval = _run(backbone.model.eval(), self.images)
        self.finite = bool(self.train.isfinite().all() and self.eval.isfinite().all())


def _tried(
    backbone: Backbone, surveyed: Survey, scheme: str, expected: _Expected, native: int | str | None
) -> dict[str, Any]:
    try:
        plan = make_plan(backbone, scheme, surveyed)
    except CadaptError as error:
        return {"status": "refused", "reason": error.message}
    try:
        model = operate(backbone, plan, surveyed)
        record = _examine(model, backbone, expected)
    except Exception as error:
        if out_of_memory(error):
            raise
        return {"status": "failed", "problems": [in_words(error)]}
    record |= {"adapters": len(plan.insertions), "plan": plan.to_json()}
    if record["adapters"] != native:
        record["problems"].append(f"{record['adapters']} adapters, {native} at the native size")
    if plan.head is None:
        record["head"] = "none"
    return {"status": "failed" if record["problems"] else "passed", **record}


def _examine(model: AdaptedModel, backbone: Backbone, expected: _Expected) -> dict[str, Any]:
    """Compare an adapted model with its base, then wake its adapters and look at their effect and gradients."""
    problems = []
    for mode, wanted in (("eval", expected.eval), ("train", expected.train)):
        seen = _run(model.train(mode == "train"), expected.images)
        if not torch.equal(seen, wanted):
            problems.append(f"{mode} differs by {float((seen - wanted).abs().max()):.2g}")
    problems += _state_problems(model, backbone.model)
    digest = digest_of(model, expected.images)
    awake = _run(model.eval(), expected.images)
    effect = float((awake - expected.eval).abs().max() / expected.eval.abs().max().clamp_min(1e-9))
    if not effect > 0:
        problems.append(f"awake adapters move the logits by {effect}")
    silent, problem = _gradients(model, expected.images)
    problems += problem
    hooked, problem = compare_with_hooks(model.eval(), backbone.model, expected.images)
    problems += problem
    problems += _state_problems(model, backbone.model)
    return {"problems": problems, "effect": effect, "silent": silent, "hooked": hooked, "digest": digest}


def _state_problems(model: AdaptedModel, base: nn.Module) -> list[str]:
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{ADAPTERS}.")}
    wanted = base.state_dict()
    if own.keys() != wanted.keys():
        missing, new = sorted(wanted.keys() - own.keys()), sorted(own.keys() - wanted.keys())
        return [f"state keys: {len(missing)} missing ({missing[:2]}), {len(new)} new ({new[:2]})"]
    changed = [key for key, value in own.items() if not torch.equal(value, wanted[key])]
    return [f"{len(changed)} base tensors changed: {changed[:3]}"] if changed else []


def _gradients(model: AdaptedModel, images: torch.Tensor) -> tuple[list[str], list[str]]:
    """Names of planned tensors that get no gradient, and what else is wrong with the gradients."""
    model.train()
    named = dict(model.named_parameters())
    planned = {name for name in named if name.startswith(f"{ADAPTERS}.")} | set(model.plan.trainable)
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        logits = _tensor(model(images))
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed + 1))
        (logits * direction).sum().backward()
        # largest values: the sum of squares of a small gradient may vanish
        silent = [name for name in sorted(planned) if named[name].grad is None or not bool(named[name].grad.any())]
        if not silent:
            break
    reached = {name for name, item in named.items() if item.grad is not None}
    problems = [f"{len(silent)} of {len(planned)} planned tensors without gradient: {silent[:3]}"] if silent else []
    if reached - planned:
        problems.append(f"unplanned gradients: {sorted(reached - planned)[:3]}")
    infinite = [name for name in reached if not bool(named[name].grad.isfinite().all())]
    if infinite:
        problems.append(f"{len(infinite)} gradients are not finite: {sorted(infinite)[:3]}")
    return silent, problems


def _frozen_norms(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


@torch.no_grad()
def _run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return _tensor(model(images))


def _tensor(output: Any) -> torch.Tensor:
    """Logits, also of the distilled models that give two of them in train mode."""
    if isinstance(output, torch.Tensor):
        return output
    return torch.cat([_tensor(item).flatten(1) for item in output], 1)


def in_words(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]
