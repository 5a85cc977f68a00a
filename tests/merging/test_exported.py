"""What a merge saves is there in the exported file as well: the batch norms go into the convs that took adapters up."""

from collections import Counter

import pytest

from cadapt.export import onnx_bytes
from cadapt.merging import merge
from tests.merging.cases import trained

onnx = pytest.importorskip("onnx")


def test_no_batch_norm_and_no_adapter_is_left_in_the_file_of_a_merged_resnet() -> None:
    model = trained("plain", "all-conv-par")
    merged, report = merge(model)
    assert report.merged == report.total
    data, _ = onnx_bytes(merged, preprocessing=model.preprocessing, classes=tuple("abcde"), name="merged", metadata={})
    nodes = Counter(node.op_type for node in onnx.load_from_string(data).graph.node)
    assert "BatchNormalization" not in nodes
    # the base's own convs and no others: those of the adapters would be as many again
    assert nodes["Conv"] == sum(type(module).__name__ == "Conv2d" for module in merged.modules())
