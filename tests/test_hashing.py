import pytest
import torch

from cadapt.errors import CadaptError
from cadapt.hashing import hash_tensors, tensor_bytes


def test_only_names_dtypes_shapes_and_bytes_count():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4)
    expected = hash_tensors([("a", weight), ("b", weight[0])])
    same = weight.to(memory_format=torch.channels_last).requires_grad_()
    assert hash_tensors({"b": weight[0].clone(), "a": same}.items()) == expected


@pytest.mark.parametrize(
    "changed",
    [
        [("a", torch.zeros(4)), ("c", torch.zeros(2))],
        [("a", torch.zeros(4)), ("b", torch.zeros(2, 1))],
        [("a", torch.zeros(4)), ("b", torch.zeros(2, dtype=torch.int32))],
        [("a", torch.zeros(4)), ("b", torch.tensor([0.0, -0.0]))],
        [("a", torch.zeros(2)), ("b", torch.zeros(4))],
        [("a", torch.zeros(4))],
        [],
    ],
)
def test_every_difference_changes_the_hash(changed):
    assert hash_tensors(changed) != hash_tensors([("a", torch.zeros(4)), ("b", torch.zeros(2))])


def test_the_hash_of_a_known_tensor_stays_the_same():
    # adapter files carry this hash of their base: another value would orphan every one of them
    digest = hash_tensors([("conv.weight", torch.tensor([[1.0, 2.0]])), ("bn.steps", torch.tensor(3))])
    assert digest == "e0eea7fca7f618c804698f0d3ba04a55601f1896e9baa93c04d356fbc765837c"


def test_contiguous_tensors_are_not_copied():
    weight = torch.zeros(3)
    view = tensor_bytes("a", weight)
    weight[0] = 1.0
    assert bytes(view[:4]) == b"\x00\x00\x80?"


def test_what_has_no_data_is_named():
    with pytest.raises(CadaptError, match=r"'a\.b' has no plain data: it is on the meta device"):
        hash_tensors([("a.b", torch.empty(2, device="meta"))])
    with pytest.raises(ValueError, match="two tensors"):
        hash_tensors([("a", torch.zeros(1)), ("a", torch.zeros(1))])
