import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cadapt.errors import CadaptError, RefusedError
from cadapt.export import read_onnx_header


def make_file() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 3))],
        [
            numpy_helper.from_array(np.ones(3, dtype=np.float32), "w"),
            helper.make_tensor("v", TensorProto.FLOAT16, (2,), [1.0, 2.0]),
        ],
    )
    model = helper.make_model(graph, producer_name="hand", opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"classes": '["a"]'})
    return model.SerializeToString()


DATA = make_file()


def test_header(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(DATA)
    header = read_onnx_header(path)
    assert header.metadata == {"classes": '["a"]'}
    assert [(item.name, item.dtype, item.shape) for item in header.inputs] == [("x", "float", ("batch", 3))]
    assert (header.opset, header.nodes, header.initializer_bytes, header.producer) == (17, 1, 16, "hand")
    assert header.to_json()["outputs"][0]["shape"] == ("batch", 3)


@given(st.one_of(st.binary(max_size=64), st.integers(0, len(DATA) - 1).map(lambda end: DATA[:end])))
def test_damaged_file_is_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("read") / "model.onnx"
    path.write_bytes(data)
    try:
        read_onnx_header(path)
    except RefusedError as error:
        assert "\n" not in error.message


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(CadaptError, match="No such file"):
        read_onnx_header(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(RefusedError, match="holds no graph"):
        read_onnx_header(tmp_path / "empty.onnx")


def test_reading_imports_no_torch():
    code = "import sys; from cadapt.export import read_onnx_header; import onnx; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
