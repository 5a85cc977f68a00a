"""The whole path as the commands take it: insert → one training step on JPEG files → file → ONNX → onnxruntime."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.nn import functional

import cadapt
from cadapt.adapted import AdaptedModel
from cadapt.backbone import Backbone, load_backbone
from cadapt.bundle import bundle_bytes, load_bundle
from cadapt.data import evaluation_batches, open_evaluation_data
from cadapt.export import ExportReport, onnx_bytes
from cadapt.export.report import Optimisation
from cadapt.export.verify import open_session
from cadapt.files import write_atomically
from cadapt.jobs import TaskOptions, TrainJob, trained_model
from cadapt.library import from_bundle, to_bundle
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.surgery import operate
from cadapt.train import TrainConfig, TrainResult
from cadapt.verify import InsertionCheck, check_insertion
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.livened import cached_base, wake

CLASSES = ("bars", "discs", "plain")
_TRAIN, _TEST = 2, 1


@dataclass(frozen=True, kw_only=True)
class Route:
    """What one way from insertion to ONNX showed.

    ``loss_before`` and ``loss_after`` are of the inserted and the trained model in eval mode, ``loss_in_step`` what
    the engine said of its one step. ``moved`` is how many of ``adapters`` one step changed; ``reloaded`` says that
    the file gives the model that wrote it, bit for bit. Errors of the ONNX file and of torch itself are against fp64
    on real pictures, relative to how far logits move between pictures, as is ``effect``, what the adapters do to
    them.
    """

    insertion: InsertionCheck
    steps: int
    loss_before: float
    loss_in_step: float
    loss_after: float
    adapters: int
    moved: int
    reloaded: bool
    export: ExportReport
    onnx_off: float
    onnx_default: float
    torch_error: float
    effect: float
    file_bytes: int


def draw_pictures(folder: Path) -> Path:
    """Write JPEGs of three classes into ``train`` and ``test`` of a folder, each of another size."""
    generator = np.random.default_rng(0)
    for part, count in (("train", _TRAIN), ("test", _TEST)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                _draw(name, generator).save(folder / part / name / f"{index}.jpg", quality=90)
    return folder


def _draw(name: str, generator: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in generator.integers(230, 340, 2))
    grain = generator.normal(0, 12, (height, width, 3))
    image = Image.fromarray(np.uint8(np.clip(generator.integers(40, 216, 3) + grain, 0, 255)))
    draw = ImageDraw.Draw(image)
    for _ in range(0 if name == "plain" else 8):
        x, y, size = (int(value) for value in generator.integers(20, 200, 3))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        if name == "discs":
            draw.ellipse((x, y, x + size // 2, y + size // 2), fill=colour)
        else:
            draw.rectangle((x, 0, x + size // 8, height), fill=colour)
    return image


def travel(name: str, scheme: str, pictures: Path, folder: Path) -> Route:
    """Take one model and scheme through the whole path, as ``insert``, ``train`` and ``export`` do.

    Args:
        name: a timm model, of :data:`ARCHITECTURES`.
        scheme: what to insert.
        pictures: the folder that :func:`draw_pictures` filled.
        folder: where files go.
    """
    weights, file = folder / "weights.safetensors", folder / "adapter.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in cached_base(name).state_dict().items()}, weights)
    base = load_backbone(name, checkpoint=weights, img_size=ARCHITECTURES[name].side)
    check = _insert(base, scheme, file)
    first = load_bundle(file)
    start = operate(base, with_head(first.plan, base, len(CLASSES), seed=0)).eval()
    result = _train(file, pictures, folder / "run", weights)
    bundle = load_bundle(file)
    changed = {
        key.split(".")[2] for key, tensor in first.tensors.items() if not torch.equal(tensor, bundle.tensors[key])
    }
    model = trained_model(bundle, checkpoint=weights)
    images, labels = _read(model, pictures / "train")
    before, after = (float(functional.cross_entropy(_run(item, images), labels)) for item in (start, model))
    # one step moves adapters too little to be told from rounding: go on as if after many
    wake(model.adapters)
    cadapt.save(model, file, overwrite=True)
    again = cadapt.load(file, checkpoint=weights)
    images, _ = _read(model, pictures / "test")
    return Route(
        insertion=check,
        steps=result.steps,
        loss_before=before,
        loss_in_step=result.loss_curve[0],
        loss_after=after,
        adapters=len(bundle.plan.insertions),
        moved=len(changed),
        reloaded=torch.equal(_run(again, images), _run(model, images)) and again.classes == CLASSES,
        file_bytes=file.stat().st_size,
        **_exported(again, images),
    )


def _insert(base: Backbone, scheme: str, file: Path) -> InsertionCheck:
    surveyed = survey(base)
    data = bundle_bytes(to_bundle(operate(base, plan_insertions(base, scheme, surveyed=surveyed), surveyed)))
    check = check_insertion(base, from_bundle(load_bundle(data), base))
    write_atomically(file, data, overwrite=False)
    return check


def _train(file: Path, pictures: Path, folder: Path, weights: Path) -> TrainResult:
    """One epoch of one step; without augmentation and dropout its loss is that of the model as inserted."""
    options = TaskOptions(data=str(pictures / "train"), val_split=0, augment="none", head_dropout=0.0)
    config = TrainConfig(
        epochs=1, batch_size=_TRAIN * len(CLASSES), lr=2e-5, min_lr=2e-5, warmup_epochs=0, keep="last", device="cpu"
    )
    start = load_bundle(file)
    job = TrainJob.begin(start, options, config, folder=folder, force=False, output=str(file), checkpoint=weights)
    trained = job.train(workers=0)
    write_atomically(file, bundle_bytes(trained.bundle), overwrite=True)
    return trained.result


def _exported(model: AdaptedModel, images: torch.Tensor) -> dict[str, Any]:
    """The export's own report, and the file's errors on real pictures with what the adapters do to them."""
    merged, _ = cadapt.merge(model)
    data, report = onnx_bytes(
        merged, preprocessing=model.preprocessing, classes=model.classes, name=f"{model.plan.base.name}-adapted"
    )
    exact = _run(copy.deepcopy(model).double(), images.double())
    spread = (exact - exact.mean(0)).abs().max()
    seen = {
        "onnx_off": _run_onnx(data, images, "off"),
        "onnx_default": _run_onnx(data, images, "default"),
        "torch_error": _run(model, images),
        "effect": _run(_asleep(model), images),
    }
    return {"export": report, **{key: float((item - exact).abs().max() / spread) for key, item in seen.items()}}


def _read(model: AdaptedModel, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = open_evaluation_data(str(folder))
    return next(iter(evaluation_batches(data.images, model.preprocessing, batch_size=16)))


@torch.no_grad()
def _run(model: AdaptedModel, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(images)
    return logits


def _run_onnx(data: bytes, images: torch.Tensor, optimisation: Optimisation) -> torch.Tensor:
    session = open_session(data, optimisation)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@torch.no_grad()
def _asleep(model: AdaptedModel) -> AdaptedModel:
    """The model with its trained head and silent adapters."""
    silent = copy.deepcopy(model)
    for name, parameter in silent.adapters.named_parameters():
        if name.endswith("alpha"):
            parameter.zero_()
    return silent
