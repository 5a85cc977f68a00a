"""The judge of the export, on ONNX graphs written by hand."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cadapt.errors import CadaptError
from cadapt.export import verify as verifying
from cadapt.export.pad_before_pool import name_pad_axes
from cadapt.export.prepare import Deployable
from cadapt.export.verify import check_validity, make_images, open_session, verify
from cadapt.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_size=(3, 8, 8))


def make_proto(nodes, weights, *, output=("batch", 4), opset=20):
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def linear_proto(layer, bias):
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
    ]
    return make_proto(nodes, {"weight": layer.weight.detach().numpy(), "bias": bias})


def make_linear(bias=0.0):
    torch.manual_seed(0)
    layer = nn.Linear(192, 4)
    nn.init.constant_(layer.bias, bias)
    reference = Deployable(
        nn.Sequential(nn.Flatten(), layer), PREPROCESSING, normalize=False, softmax=False, dtype=torch.float32
    )
    return layer, reference.eval()


def judge(proto, reference, tolerance=1e-4):
    return verify(proto.SerializeToString(), reference, PREPROCESSING, dtype="fp32", tolerance=tolerance)


def test_right_file_passes():
    layer, reference = make_linear()
    verdict = judge(linear_proto(layer, layer.bias.detach().numpy()), reference)
    assert len(verdict.checks) == 8
    assert max(check.relative_error for check in verdict.checks) < 1e-6
    assert all(check.argmax_agreement == 1.0 for check in verdict.checks)
    assert verdict.torch_error is None


@pytest.mark.parametrize("offset", [1e-2, float("nan")])
def test_perturbed_file_is_refused_with_figures(offset):
    layer, reference = make_linear()
    wrong = layer.bias.detach().numpy() + np.float32(offset)
    with pytest.raises(
        CadaptError, match=r"relative error .*tolerance 1\.0e-04, torch's own fp32 error is .*not written"
    ):
        judge(linear_proto(layer, wrong), reference)


def test_rounding_that_torch_has_too_is_no_error():
    class AddedSlowly(nn.Module):
        """The same sums as the linear layer's, in an order that rounds more."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return (image.flatten(1)[:, None] * layer.weight.to(image.dtype)).cumsum(-1)[..., -1]

    layer, _ = make_linear()
    nn.init.uniform_(layer.weight, 30.0, 31.0)
    reference = Deployable(AddedSlowly(), PREPROCESSING, normalize=False, softmax=False, dtype=torch.float32).eval()
    verdict = judge(linear_proto(layer, layer.bias.detach().numpy()), reference, tolerance=1e-9)
    assert verdict.torch_error is not None
    assert verdict.torch_error > 1e-9


def test_error_is_seen_beside_a_large_constant():
    layer, reference = make_linear(bias=100.0)
    proto = linear_proto(layer, layer.bias.detach().numpy() + np.float32(5e-3))  # 5e-5 of the outputs' size
    with pytest.raises(CadaptError, match="disagrees"):
        judge(proto, reference)


def test_disagreement_at_default_optimisation_only_blames_the_optimiser(monkeypatch):
    layer, reference = make_linear()
    right, wrong = (
        linear_proto(layer, layer.bias.detach().numpy() + np.float32(x)).SerializeToString() for x in (0, 1)
    )

    def open_other(data, optimisation):
        return open_session(wrong if optimisation == "default" else right, optimisation)

    monkeypatch.setattr(verifying, "open_session", open_other)
    with pytest.raises(CadaptError, match="onnxruntime's optimiser changes the result"):
        judge(linear_proto(layer, layer.bias.detach().numpy()), reference)


def test_model_without_finite_outputs_cannot_be_checked():
    layer, reference = make_linear(bias=float("inf"))
    with pytest.raises(CadaptError, match="not finite"):
        judge(linear_proto(layer, layer.bias.detach().numpy()), reference)


def test_pad_before_pool_agrees_in_both_settings():
    pool = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, stride=2), nn.Flatten())
    reference = Deployable(pool, PREPROCESSING, normalize=False, softmax=False, dtype=torch.float32).eval()
    # normalised images have dark corners below zero, where the padding's zero is the maximum
    assert (make_images(7, PREPROCESSING, normalized=True)[..., 0, 0] < 0).any()
    nodes = [
        helper.make_node("Pad", ["image", "pads", "zero"], ["padded"], name="pad"),
        helper.make_node("MaxPool", ["padded"], ["pooled"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    weights = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64), "zero": np.zeros((), dtype=np.float32)}
    proto = make_proto(nodes, weights, output=("batch", 48))
    assert name_pad_axes(proto) == 1
    assert name_pad_axes(proto) == 0
    check_validity(proto)
    verdict = judge(proto, reference)
    assert max(check.max_abs_error for check in verdict.checks) == 0.0


def test_pad_rule_leaves_old_opsets_and_other_pads_alone():
    nodes = [helper.make_node("Pad", ["image", "pads"], ["logits"], name="pad")]
    weights = {"pads": np.zeros(8, dtype=np.int64)}
    assert name_pad_axes(make_proto(nodes, weights, output=("batch", 3, 8, 8))) == 0
    assert name_pad_axes(make_proto(nodes, weights, output=("batch", 3, 8, 8), opset=17)) == 0


def test_invalid_graph_is_an_error():
    with pytest.raises(CadaptError, match="not valid ONNX"):
        check_validity(make_proto([helper.make_node("NoSuchOperator", ["image"], ["logits"])], {}))
    with pytest.raises(CadaptError, match="does not accept"):
        open_session(b"no model", "off")


def test_images_are_normalised_pictures():
    plain = make_images(3, PREPROCESSING, normalized=False)
    assert plain.shape == (3, 3, 8, 8)
    assert plain.min() >= 0
    assert plain.max() <= 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    torch.testing.assert_close(make_images(3, PREPROCESSING, normalized=True), (plain - mean) / std)
