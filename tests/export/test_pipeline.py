"""The whole export on tiny models: what is delivered, what it holds, and what is refused before or after the work."""

import json
import site
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cadapt.errors import CadaptError, UsageError
from cadapt.export import ExportReport, export_onnx, onnx_bytes, pad_before_pool, read_onnx_header
from cadapt.graph import standardised

from .models import CLASSES, PREPROCESSING, SIZE, make_bit, make_timm, trace

ARGUMENTS = {"preprocessing": PREPROCESSING, "classes": CLASSES, "name": "tiny"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trace(make_bit()).train()


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("export") / "bit.onnx"
    metadata = {"base": "resnetv2_tiny", "scheme": "res-seq"}
    return path, export_onnx(model, path, **ARGUMENTS, metadata=metadata, normalize=True, softmax=True)


def test_file_computes_softmax_of_normalised_image(model, exported):
    path, _ = exported
    image = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    model.eval()
    with torch.no_grad():
        exponentials = model((image - mean) / std).double().exp()
    model.train()
    wanted = (exponentials / exponentials.sum(1, keepdim=True)).numpy()
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(["probabilities"], {"image": image.numpy()})
    np.testing.assert_allclose(actual, wanted, atol=1e-6, rtol=0)


def test_model_is_left_as_it_was(model, exported):
    assert model.training
    assert any(type(module).__name__ == "StdConv2d" for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_report(exported):
    path, report = exported
    assert report.path == str(path)
    assert report.bytes == path.stat().st_size
    assert [(check.batch, check.optimisation) for check in report.checks] == [
        (batch, setting) for setting in ("off", "default") for batch in (1, 2, 3, 7)
    ]
    assert all(check.relative_error <= report.tolerance == 1e-4 for check in report.checks)
    assert report.rewrites[pad_before_pool.RULE] == 1
    assert report.rewrites[standardised.RULE] == 17
    assert report.inputs[0].shape == ("batch", 3, SIZE, SIZE)
    assert json.loads(json.dumps(report.to_json()))["outputs"][0]["name"] == "probabilities"


def test_header_tells_how_to_use_the_file(exported):
    header = read_onnx_header(exported[0])
    assert json.loads(header.metadata["classes"]) == list(CLASSES)
    assert json.loads(header.metadata["preprocessing"])["mean"] == list(PREPROCESSING.mean)
    assert header.metadata["base"] == "resnetv2_tiny"
    assert header.metadata["scheme"] == "res-seq"
    assert header.metadata["normalize"] == header.metadata["softmax"] == "true"
    assert header.producer.startswith("cadapt ")
    assert header.outputs[0].shape == ("batch", len(CLASSES))


def test_file_holds_no_local_path_and_no_notes(exported):
    data = exported[0].read_bytes()
    for place in (Path.home(), Path.cwd(), *site.getsitepackages(), Path(torch.__file__).parent, "site-packages"):
        assert str(place) == "/" or str(place).encode() not in data
    graph = onnx.load_from_string(data).graph
    assert not any(item.metadata_props or item.doc_string for item in (*graph.node, *graph.input, *graph.value_info))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("test_resnet", {}), ("test_efficientnet", {"pad_type": "same"}), ("test_nfnet", {})],
)
def test_kinds_of_models_agree(name, settings):
    torch.manual_seed(0)
    report = export_onnx(trace(make_timm(name, **settings)), None, **ARGUMENTS)
    assert report.path is None
    assert len(report.checks) == 8
    assert max(check.relative_error for check in report.checks) <= 1e-4


def test_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(256, len(CLASSES)))
    data, report = onnx_bytes(model, **ARGUMENTS, dtype="fp16")
    kinds = {item.data_type for item in onnx.load_from_string(data).graph.initializer if len(item.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert report.inputs[0].dtype == report.outputs[0].dtype == "float"
    assert max(check.relative_error for check in report.checks) <= 2e-2


def test_disagreeing_file_is_not_delivered(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(256, len(CLASSES)))

    def spoil(proto):
        bias = next(item for item in proto.graph.initializer if list(item.dims) == [len(CLASSES)])
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
        return 0

    monkeypatch.setattr(pad_before_pool, "name_pad_axes", spoil)
    with pytest.raises(CadaptError, match=r"disagrees with torch at batch \d .*; not written"):
        export_onnx(model, tmp_path / "wrong.onnx", **ARGUMENTS)
    assert list(tmp_path.iterdir()) == []


def test_refused_before_any_work(tmp_path, monkeypatch):
    path = tmp_path / "there.onnx"
    path.write_text("mine")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(UsageError, match="exists"):
        export_onnx(model, path, **ARGUMENTS)
    assert path.read_text() == "mine"
    with pytest.raises(CadaptError, match=r"output is \[2, 4\] for 2 images and 5 class names"):
        export_onnx(model, None, **ARGUMENTS)
    with pytest.raises(UsageError, match="metadata classes set by the export itself"):
        export_onnx(model, None, **ARGUMENTS, metadata={"classes": "x"})
    monkeypatch.setattr("cadapt.export.extras.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(CadaptError, match="onnxscript not installed") as caught:
        export_onnx(model, None, **ARGUMENTS)
    assert caught.value.hint == "pip install 'cadapt[onnx]'"


def test_model_beyond_the_size_of_one_file_is_refused():
    with pytest.raises(CadaptError, match=r"holds 4.0 GiB of fp32 weights"):
        export_onnx(nn.Linear(2**15, 2**15, device="meta"), None, **ARGUMENTS)
