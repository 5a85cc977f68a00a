import pytest
import torch
from torch import nn

from cadapt.errors import CadaptError, UsageError
from cadapt.export.convert import convert


class FixedBatch(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.view(2, 3, 8, 8).mean((2, 3))


class DataDependent(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean((2, 3)) * (1.0 if image.mean() > 0 else 2.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FixedBatch(), "fixes the first dimension of 'image' to 2"),
        (DataDependent(), "torch cannot convert the model to ONNX: .*data-dependent"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_nothing_else(model, message, capfd):
    with pytest.raises(CadaptError, match=message) as caught:
        convert(model.eval(), (3, 8, 8), output_name="logits", opset=None)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_batch_stays_free_and_nothing_is_printed(capfd):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    proto = convert(model, (3, 8, 8), output_name="logits", opset=18)
    assert proto.opset_import[0].version == 18
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [0, 17, 99])
def test_unknown_opset(opset):
    with pytest.raises(UsageError, match=f"unknown opset {opset}, expected 18 to "):
        convert(nn.Flatten(), (3, 8, 8), output_name="logits", opset=opset)
