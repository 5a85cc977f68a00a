"""Evaluation against scikit-learn and formulas written out, and how it treats the model and broken input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn import metrics
from torch import Tensor, nn

from cadapt.errors import CadaptError, UsageError
from cadapt.evaluation import EvalResult, evaluate

CLASSES = tuple(f"class {index}" for index in range(8))


def synthetic(count: int = 301, classes: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs that are right about half of the time, and labels; class 6 has no images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    labels[labels == 6] = 2
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.2
    return 2 * logits, labels


def batches_of(outputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(outputs.split(size), labels.split(size), strict=True))


def run(outputs: Tensor, labels: Tensor, size: int = 64, **options: Any) -> EvalResult:
    options.setdefault("classes", CLASSES[: outputs.shape[1]])
    return evaluate(nn.Identity(), batches_of(outputs, labels, size), **options)


def naive_ece(outputs: Tensor, labels: Tensor) -> float:
    probabilities = np.exp(outputs.double().numpy())
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for lower in range(15):
        inside = (confidence > lower / 15) & (confidence <= (lower + 1) / 15)
        if inside.any():
            hits = (predicted == labels.numpy())[inside].mean()
            total += inside.mean() * abs(hits - confidence[inside].mean())
    return float(total)


def test_against_scikit_learn() -> None:
    outputs, labels = synthetic()
    result = run(outputs, labels)
    predicted = outputs.argmax(dim=1).numpy()
    truth, names = labels.numpy(), list(range(8))
    probabilities = outputs.double().softmax(dim=1).numpy()
    assert result.images == 301
    assert result.top1 == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-12)
    assert result.top5 == pytest.approx(
        metrics.top_k_accuracy_score(truth, outputs.numpy(), k=5, labels=names), abs=1e-12
    )
    present = sorted(set(truth.tolist()))
    recall = metrics.recall_score(truth, predicted, average="macro", labels=present)
    assert result.mean_per_class == pytest.approx(recall, abs=1e-12)
    assert result.loss == pytest.approx(metrics.log_loss(truth, probabilities, labels=names), rel=1e-9)
    assert np.array_equal(np.array(result.confusion), metrics.confusion_matrix(truth, predicted, labels=names))
    assert result.ece == pytest.approx(naive_ece(outputs, labels), abs=1e-9)
    assert 0.3 < result.top1 < 0.9 and result.ece > 0.01


def test_per_class() -> None:
    outputs, labels = synthetic()
    result = run(outputs, labels)
    predicted = outputs.argmax(dim=1)
    for index, item in enumerate(result.per_class):
        own = labels == index
        assert (item.name, item.images) == (CLASSES[index], int(own.sum()))
        assert item.correct == int((predicted[own] == index).sum())
        assert item.recall == (item.correct / item.images if item.images else None)
    assert result.per_class[6].recall is None


@pytest.mark.parametrize("size", [1, 7, 301])
def test_batch_size_does_not_matter(size: int) -> None:
    outputs, labels = synthetic()
    whole, split = run(outputs, labels, size=50), run(outputs, labels, size=size)
    assert (split.top1, split.top5, split.confusion) == (whole.top1, whole.top5, whole.confusion)
    assert split.loss == pytest.approx(whole.loss, rel=1e-12)
    assert split.ece == pytest.approx(whole.ece, abs=1e-12)


def test_ties_are_broken_by_order() -> None:
    labels = torch.arange(8)
    result = run(torch.zeros(8, 8), labels)
    assert result.top1 == 1 / 8 and result.top5 == 5 / 8
    assert result.loss == pytest.approx(math.log(8), rel=1e-12)
    assert result.ece == pytest.approx(0.0, abs=1e-12)


def test_five_classes_have_no_top5() -> None:
    outputs, labels = synthetic(classes=5)
    assert run(outputs, labels).top5 is None


def test_certainty_falls_into_the_last_bin() -> None:
    outputs = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    result = run(outputs, torch.tensor([0, 1]))
    assert result.ece == pytest.approx(0.5, abs=1e-12)
    assert result.loss == pytest.approx(5e3, rel=1e-9)


def test_data_of_fewer_classes_than_outputs() -> None:
    outputs, _ = synthetic()
    labels = torch.arange(len(outputs)) % 3
    result = run(outputs, labels, classes=CLASSES[:3])
    assert result.confusion is not None
    assert (len(result.confusion), len(result.confusion[0])) == (3, 8)
    assert sum(map(sum, result.confusion)) == len(outputs)


def test_json_round_trip() -> None:
    outputs, labels = synthetic()
    result = run(outputs, labels)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record == result.to_json()
    assert record["per_class"][6] == {"name": "class 6", "images": 0, "correct": 0, "recall": None}
    assert result.seconds > 0 and result.images_per_second == pytest.approx(301 / result.seconds)


def test_large_tables_are_left_out() -> None:
    result = run(torch.eye(3).repeat(1, 700)[:, :2001], torch.tensor([0, 1, 2]), classes=["a", "b", "c"])
    assert result.confusion is None and result.to_json()["confusion"] is None


def frozen_model() -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=8).train()
    model.get_submodule("layer1").eval()
    return model


def test_model_runs_in_eval_mode_and_is_put_back() -> None:
    model, seen = frozen_model(), []
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0])))
    images = torch.randn(4, 3, 32, 32)
    counts: list[int] = []
    result = evaluate(model, [(images, torch.arange(4))] * 2, classes=CLASSES, on_batch=counts.append)
    assert not seen[0][0] and seen[0][1].is_contiguous(memory_format=torch.channels_last)
    assert counts == [4, 8] and result.images == 8
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_put_back_on_failure() -> None:
    model = frozen_model()
    modes = [module.training for module in model.modules()]
    with pytest.raises(CadaptError):
        evaluate(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 8]))], classes=CLASSES)
    assert [module.training for module in model.modules()] == modes


def test_caches_of_eval_mode_do_not_outlive_it() -> None:
    model = timm.create_model("levit_128s", num_classes=8).train()
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([0, 1])
    evaluate(model, [(images, labels)], classes=CLASSES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_()
    fresh = timm.create_model("levit_128s", num_classes=8)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), fresh.eval()(images))


def test_precision_and_device() -> None:
    model = timm.create_model("test_resnet", num_classes=8)
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    full = evaluate(model, batches, classes=CLASSES, device="cpu")
    mixed = evaluate(model, batches, classes=CLASSES, precision="bf16")
    assert mixed.loss == pytest.approx(full.loss, abs=0.05) and mixed.loss != full.loss
    with pytest.raises(UsageError, match="unknown precision 'bf61'"):
        evaluate(model, batches, classes=CLASSES, precision="bf61")  # type: ignore[arg-type]


def test_broken_input_is_named() -> None:
    outputs, labels = synthetic(10)
    broken = outputs.clone()
    broken[[1, 4, 7], 2] = math.nan
    broken[7, 0] = math.inf
    for arguments, message in (
        ((broken, labels), "NaN or infinite outputs for 3 of 10 images in batch 1"),
        ((outputs, torch.full((10,), 8)), "label 8 in batch 1 has no class: there are 8 classes and 8 model outputs"),
        ((outputs, labels - 9), "has no class"),
        ((outputs, labels.float()), "labels of batch 1 are"),
        ((outputs[:, :5], labels), "the model has 5 outputs, but there are 8 classes"),
    ):
        with pytest.raises(CadaptError, match=message):
            run(*arguments, classes=CLASSES)
    with pytest.raises(CadaptError, match="expected outputs of shape"):
        evaluate(nn.Identity(), [(torch.zeros(2, 3, 4, 4), labels[:2])], classes=CLASSES)
    with pytest.raises(CadaptError, match="no images"):
        evaluate(nn.Identity(), [], classes=CLASSES)
