"""One case of the engine's sweep: a prepared model beside the plain one of an architecture under a scheme.

Gradients are taken for two batches, two sizes, both modes and behind a step of SGD, and the bytes kept are counted. The
plain model's in fp64 are what all is held against.
"""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError
from cadapt.frozen import Memory, prepare
from cadapt.planning import Survey, survey
from cadapt.surgery import operate
from tests.zoo.cell_checks import awaken
from tests.zoo.census import make_on_meta
from tests.zoo.check import in_words, make_base
from tests.zoo.engine_step import SITUATIONS, Situation, Step, differences, take_step
from tests.zoo.setting import SIDES, Setting, bare_backbone, make_plan

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-5}
"""Of a gradient, relative to the largest of all; where plain fp32 is off by more from fp64, so much more."""
_NOISE = 4.0
_JITTERS = (1, 2, 3)
# a wrong gradient of a small tensor does not show beside the largest; in fp64 each is held against itself as well
_OF_ITSELF = 1e3
_LR = 1e-3
# what fewer layers are asked for by; a model that takes none of them is tried whole
_SHALLOW: tuple[Mapping[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 2, 1, 1)},
    {"depths": (1, 2, 1)},
    {"layers": (1, 2, 1, 1)},
    {"num_layers": (1, 2, 1, 1)},
    {"block_config": (1, 2, 1, 1)},
)
_DROPS: tuple[Mapping[str, Any], ...] = (
    {"drop_path_rate": 0.1, "drop_rate": 0.1},
    {"drop_path_rate": 0.1},
    {"drop_rate": 0.1},
    {},
)
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An architecture's lively base, made small, and its sites."""

    backbone: Backbone
    surveyed: Survey


@functools.lru_cache(maxsize=1)
def bench(name: str) -> Bench:
    """The base of an architecture, with fewer layers and at the smallest side that it takes."""
    setting = _setting(name)
    base = make_base(setting)
    backbone = bare_backbone(name, base, setting.side)
    return Bench(backbone=backbone, surveyed=survey(backbone))


def _setting(name: str) -> Setting:
    whole = count_parameters(make_on_meta(name))
    shallow = [arguments for arguments in _SHALLOW if 0 < _parameters_given(name, arguments) < whole]
    for fewer in (*shallow[:1], {}):
        for drops in _DROPS:
            for side in (*SIDES, None):
                for sized in ({}, {"img_size": side}) if side else ({},):
                    setting = Setting(name=name, side=side, arguments={**fewer, **drops, **sized})
                    if _runs(setting):
                        return setting
    # it says why
    survey(bare_backbone(name, make_on_meta(name), None))
    raise RuntimeError(f"{name} runs at no size")


def _runs(setting: Setting) -> bool:
    try:
        model = make_on_meta(setting.name, **setting.arguments)
        backbone = bare_backbone(setting.name, model, setting.side)
        with torch.no_grad():
            model(torch.empty(2, *backbone.preprocessing.input_size, device="meta"))
        survey(backbone)
    except Exception:  # models refuse sizes and settings in as many ways as there are models
        return False
    return True


def _parameters_given(name: str, arguments: Mapping[str, Any]) -> int:
    try:
        return count_parameters(make_on_meta(name, **arguments))
    except Exception:  # a setting that this model does not know, or not of this length
        return 0


def count_parameters(model: nn.Module) -> int:
    return sum(item.numel() for item in model.parameters())


def make_adapted(table: Bench, scheme: str) -> AdaptedModel:
    """A base with awake adapters and a copy of its head, in fp64 and train mode.

    Raises:
        CadaptError: the scheme has nothing to adapt here.
    """
    model = operate(table.backbone, make_plan(table.backbone, scheme, table.surveyed), table.surveyed)
    if not any(item.requires_grad for item in model.parameters()):
        raise CadaptError("nothing would train: its head cannot be copied")
    awaken(model.adapters)
    return model.double().train()


def check(name: str, scheme: str, memories: list[Memory], precision: str = "fp64") -> Iterator[Record]:
    """The record of an architecture and a scheme under each memory setting."""
    titles = [case_name(name, scheme, memory, precision) for memory in memories]
    try:
        expected = Expected.of(make_adapted(bench(name), scheme), precision)
    except CadaptError as refusal:
        yield from ({"name": title, "status": "refused", "reason": refusal.message} for title in titles)
        return
    except Exception as error:  # a finding about the plain model, or about this sweep
        yield from ({"name": title, "status": "FAILED", "problems": [f"plain: {_told(error)}"]} for title in titles)
        return
    for title, memory in zip(titles, memories, strict=True):
        start = time.process_time()
        try:
            record = compare(expected, memory)
        except Exception as error:  # whatever is raised is a finding about this case
            record = {"problems": [f"prepare: {_told(error)}"]}
        expected.model.load_state_dict(expected.first)
        status = "FAILED" if record["problems"] else "ok"
        yield {"name": title, "status": status, "seconds": round(time.process_time() - start, 1)} | record


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{in_words(error)} at {Path(last.filename).name}:{last.lineno}"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A model, its steps in fp64 by their situation's title, what plain ones keep, and which error is allowed."""

    model: AdaptedModel
    first: Mapping[str, torch.Tensor]
    stepped: Mapping[str, torch.Tensor]
    steps: Mapping[str, Step]
    plain_bytes: Mapping[str, int]
    tolerance: Mapping[str, float]
    of_itself: float

    @classmethod
    def of(cls, model: AdaptedModel, precision: str) -> Expected:
        """Take the plain model's steps; the model is left in the precision."""
        first = _copied(model)
        steps: dict[str, Step] = {}
        stepped: dict[str, torch.Tensor] = {}
        for situation in SITUATIONS:
            if situation.stepped:
                stepped = _moved(first, steps["train"])
            _add_step(model, situation, steps, stepped or first)
        plain = steps
        if precision != "fp64":
            model.to(DTYPES[precision])
            plain = {}
            for situation in SITUATIONS:
                _add_step(model, situation, plain, stepped if situation.stepped else first)
        model.load_state_dict(first)
        noise = {key: differences(plain[key], steps[key], math.inf, math.inf)[0] for key in plain}
        return cls(
            model=model,
            first=first,
            stepped=stepped,
            steps=steps,
            plain_bytes={key: step.kept_bytes for key, step in plain.items()},
            tolerance={key: max(TOLERANCES[precision], _NOISE * item) for key, item in noise.items()},
            of_itself=_OF_ITSELF if precision == "fp64" else math.inf,
        )


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: item.detach().clone() for key, item in model.state_dict().items()}


def _moved(first: Mapping[str, torch.Tensor], step: Step) -> dict[str, torch.Tensor]:
    """A state behind a step of SGD."""
    own = {key: gradient for key, gradient in step.gradients.items() if gradient is not None}
    scale = _LR / max(float(item.abs().max()) for item in own.values())
    return {**first, **{key: first[key] - scale * item for key, item in own.items()}}


def _add_step(
    model: AdaptedModel, situation: Situation, steps: dict[str, Step], state: Mapping[str, torch.Tensor]
) -> None:
    model.load_state_dict(state)
    try:
        steps[situation.title] = take_step(model, model, situation)
    except Exception:
        if not situation.more:  # many models take one size only
            raise


def compare(expected: Expected, memory: Memory) -> Record:
    """A prepared model beside the plain one in all situations, and prepared in eval mode once more."""
    model = expected.model
    problems: list[str] = []
    kept: dict[str, int] = {}
    worst = 0.0
    for is_training in (True, False):
        prepared = prepare(model.train(is_training), memory=memory, channels_last=False)
        for situation in SITUATIONS if is_training else SITUATIONS[:1]:
            title, key = situation.title if is_training else "prepared in eval mode", situation.title
            if key not in expected.steps:
                continue
            model.load_state_dict(expected.stepped if situation.stepped else expected.first)
            try:
                step = take_step(model, prepared, situation)
            except Exception as error:  # a finding
                problems.append(f"{title}: {_told(error)}")
                continue
            error, found = _judge(expected, situation, step)
            problems += [f"{title}: {item}" for item in found]
            worst, kept[title] = max(worst, error), step.kept_bytes
        model.load_state_dict(expected.first)
    plain = expected.plain_bytes
    return {
        "kept_bytes": kept.get("train"),
        "plain_bytes": plain["train"],
        "kept": kept.get("train", 0) / max(1, plain["train"]),
        "error": worst,
        "problems": problems + _kept_problems(kept, plain),
        "notes": [] if kept.get("train", 0) <= plain["train"] else ["products of weights outweigh two tiny pictures"],
    }


def _judge(expected: Expected, situation: Situation, step: Step) -> tuple[float, list[str]]:
    """The error of a step, and what is wrong with it that rounding does not explain."""
    wanted = expected.steps[situation.title]
    error, found = differences(step, wanted, expected.tolerance[situation.title], expected.of_itself)
    if not found or next(expected.model.parameters()).dtype != torch.float64:
        return error, found
    # some networks blow up the last digit of a pixel by as much
    shaken = (take_step(expected.model, expected.model, situation, jitter) for jitter in _JITTERS)
    noise = max(differences(item, wanted, math.inf, math.inf)[0] for item in shaken)
    return differences(step, wanted, max(TOLERANCES["fp64"], _NOISE * noise), expected.of_itself)


def _kept_problems(kept: Mapping[str, int], plain: Mapping[str, int]) -> list[str]:
    """Where more is kept of each picture; products of weights do not grow with the batch."""
    if not {"train", "another batch"} <= kept.keys():
        return []
    each, wanted = (item["another batch"] - item["train"] for item in (kept, plain))
    return [f"keeps {each} bytes of each picture, plain {wanted}"] if each > wanted else []


def case_name(name: str, scheme: str, memory: str, precision: str) -> str:
    """What tells a case from all others."""
    return f"{name} {scheme} {memory} {precision}"
