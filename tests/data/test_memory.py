import pickle

import numpy as np
import torch

from cadapt.data.memory import BatchMemory

SHAPE = (4, 3, 5)


def test_memory_comes_again_when_its_tensor_is_gone():
    memory = BatchMemory()
    first = memory.take(SHAPE)
    assert first.shape == SHAPE
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    place = first.data_ptr()
    del first
    assert memory.take(SHAPE).data_ptr() == place


def test_memory_is_kept_for_any_view_of_it():
    holders = (
        lambda tensor: tensor.permute(2, 0, 1)[1:],
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: torch.from_dlpack(tensor),
        lambda tensor: (tensor * torch.ones((), requires_grad=True)).grad_fn,
        lambda tensor: tensor.untyped_storage(),
    )
    for hold in holders:
        memory = BatchMemory()
        tensor = memory.take(SHAPE)
        place = tensor.data_ptr()
        held = hold(tensor)
        del tensor
        other = memory.take(SHAPE)
        assert other.data_ptr() != place
        del held, other


def test_batches_held_keep_their_values():
    memory = BatchMemory()
    held = [memory.take(SHAPE).fill_(number) for number in range(10)]
    for number, tensor in enumerate(held):
        assert np.all(tensor.numpy() == number)
    assert len({tensor.data_ptr() for tensor in held}) == 10


def test_another_shape_gets_memory_of_its_own():
    memory = BatchMemory()
    assert memory.take(SHAPE).shape == SHAPE
    assert memory.take((2, 3, 5)).shape == (2, 3, 5)
    assert memory.take(SHAPE).shape == SHAPE


def test_it_travels_empty():
    memory = BatchMemory()
    held = memory.take(SHAPE)
    copy = pickle.loads(pickle.dumps(memory))
    assert copy.take(SHAPE).data_ptr() != held.data_ptr()
