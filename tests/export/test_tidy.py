from onnx import TensorProto, helper

from cadapt.export.tidy import tidy

SECRET = "/home/somebody/site-packages/timm/models/resnet.py"


def note(item):
    item.doc_string = SECRET
    entry = item.metadata_props.add()
    entry.key, entry.value = "stack_trace", SECRET


def test_notes_go_at_every_depth_and_metadata_come():
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,))
    inner = helper.make_node("Constant", [], ["y"], value_float=1.0)
    branch = helper.make_graph([inner], "branch", [], [value])
    outer = helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([outer], "g", [helper.make_tensor_value_info("x", TensorProto.BOOL, (1,))], [value])
    model = helper.make_model(graph)
    inside = model.graph.node[0].attribute[0].g
    for item in (model, model.graph, model.graph.node[0], model.graph.input[0], inside, inside.node[0]):
        note(item)
    model.graph.node[0].attribute[0].doc_string = SECRET
    tidy(model, name="tiny", version="1.2", metadata={"classes": '["a"]', "base": "resnet"})
    assert SECRET.encode() not in model.SerializeToString()
    assert (model.graph.name, model.producer_name, model.producer_version) == ("tiny", "cadapt", "1.2")
    assert [(item.key, item.value) for item in model.metadata_props] == [("classes", '["a"]'), ("base", "resnet")]
