"""Real architectures at their real sizes: sites and splices against hooks, and the whole path from files to ONNX.

A plain run takes one light and one heavy model, others every day, and the whole path with the light one; ``--zoo full``
takes all of them, and ``--zoo NAME`` one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import cadapt
from cadapt.backbone import describe_model
from cadapt.errors import CadaptError
from cadapt.planning import plan_insertions
from tests.zoo.agreement import compare
from tests.zoo.architectures import ARCHITECTURES, HEAVY, LIGHT, SCHEMES, sample
from tests.zoo.route import draw_pictures, travel

Case = tuple[str, str]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def test_adapters_sit_where_hooks_on_the_untraced_model_put_them(compared: Case, note: Callable[..., None]) -> None:
    seen = compare(*compared)
    note(
        sites=seen.sites,
        trainable=seen.trainable,
        identical=seen.identical,
        eval=seen.eval_error,
        train=seen.train_error,
        gradient=seen.gradient_error,
        effect=seen.effect,
    )
    assert seen.sites_as_expected
    assert seen.trainable == seen.formula
    assert seen.identical
    assert seen.off_identical
    # what follows would hold of adapters that do nothing, too
    assert seen.effect > 0.01
    assert seen.weakest_gradient > 0
    assert seen.eval_error <= 1e-5
    assert seen.train_error <= 1e-5
    assert seen.gradient_error <= 2e-5


def test_the_whole_path(travelled: Case, pictures: Path, tmp_path: Path, note: Callable[..., None]) -> None:
    seen = travel(*travelled, pictures, tmp_path)
    checks = {
        setting: [item for item in seen.export.checks if item.optimisation == setting] for setting in ("off", "default")
    }
    note(
        identical=seen.insertion.identical_on,
        loss=f"{seen.loss_before:.4f}→{seen.loss_after:.4f}",
        moved=f"{seen.moved}/{seen.adapters}",
        off=seen.onnx_off,
        default=seen.onnx_default,
        torch=seen.torch_error,
        effect=seen.effect,
        nodes=seen.export.nodes,
        file=seen.file_bytes,
    )
    assert seen.insertion.identical_on
    assert seen.insertion.identical_off
    assert seen.steps == 1
    assert seen.loss_after < seen.loss_before
    if "swin" not in travelled[0]:  # it drops paths in train mode
        assert seen.loss_in_step == pytest.approx(seen.loss_before, rel=1e-3)
    assert seen.moved == seen.adapters
    assert seen.reloaded
    assert all([item.batch for item in items] == [1, 2, 3, 7] for items in checks.values())
    # these random networks make more of rounding than trained ones do; torch shows how much
    bound = max(1e-4, 4 * seen.torch_error)
    assert seen.onnx_off <= bound
    assert seen.onnx_default <= bound
    # and it would catch adapters missing from the ONNX file
    assert seen.effect > 10 * bound


def test_models_without_convs_or_attention_refuse_and_name_what_fits() -> None:
    with torch.device("meta"):
        backbone = describe_model(timm.create_model("mixer_s32_224").eval())
    for scheme in SCHEMES[:2]:
        with pytest.raises(CadaptError, match="has nothing to adapt under") as refusal:
            plan_insertions(backbone, scheme)
        assert "res-par, res-seq" in str(refusal.value.hint)


@pytest.mark.parametrize("head_norm", [False, True])
def test_a_fresh_head_stands_where_a_classifier_of_tokens_did(head_norm: bool) -> None:
    with torch.device("meta"):
        model = cadapt.insert(
            timm.create_model("resnet50_clip").eval(), "linear", num_classes=3, head_norm=head_norm, head_dropout=0.2
        )
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 3)


def test_the_rotation_passes_through_every_model_and_scheme() -> None:
    turns = len(LIGHT) * len(HEAVY) * len(SCHEMES)
    seen = {case for turn in range(turns) for case in sample(turn)}
    assert seen == {(item.name, scheme) for item in ARCHITECTURES.values() for scheme in item.schemes}
