import gc
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from cadapt.data.folder import find_images
from cadapt.data.images import UnreadableImage
from cadapt.data.loader import TrainLoader, evaluation_batches
from cadapt.data.processes import outlive_once
from cadapt.errors import CadaptError, UsageError
from cadapt.preprocessing import Preprocessing
from tests.data.pictures import make_classes, truncate

TINY = Preprocessing(input_size=(3, 16, 16))


@pytest.fixture
def images(tmp_path):
    return find_images(make_classes(tmp_path, {"cat": 9, "dog": 8}))


def collected(batches):
    return [(pictures.clone(), labels.clone()) for pictures, labels in batches]


def assert_same(left, right):
    assert len(left) == len(right)
    for (pictures, labels), (others, other_labels) in zip(left, right, strict=True):
        assert torch.equal(pictures, others)
        assert torch.equal(labels, other_labels)


def test_shapes_kinds_and_labels(images):
    loader = TrainLoader(images, TINY, batch_size=5, seed=1)
    batches = collected(loader.batches(0))
    assert loader.steps_per_epoch == len(batches) == 4
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 2]
    assert batches[0][0].shape == (5, 3, 16, 16)
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    order = loader.order(0)
    assert sorted(order) == list(range(17))
    assert torch.cat([labels for _, labels in batches]).tolist() == [images.labels[index] for index in order]


@pytest.mark.parametrize("preset", ["light", "standard", "strong"])
def test_any_number_of_workers_and_a_restart_give_the_same_bits(images, preset):
    epochs = {}
    for workers in (0, 2, 4):
        loader = TrainLoader(images, TINY, preset, batch_size=4, seed=7, workers=workers)
        epochs[workers] = [collected(loader.batches(epoch)) for epoch in (0, 1)]
    for epoch in (0, 1):
        assert_same(epochs[0][epoch], epochs[2][epoch])
        assert_same(epochs[0][epoch], epochs[4][epoch])
    assert not torch.equal(epochs[0][0][0][0], epochs[0][1][0][0])
    for workers in (0, 2):
        again = TrainLoader(images, TINY, preset, batch_size=4, seed=7, workers=workers)
        assert_same(collected(again.batches(1, start_step=2)), epochs[0][1][2:])


def test_a_pass_given_up_and_begun_again(images):
    loader = TrainLoader(images, TINY, batch_size=2, workers=2)
    whole = collected(loader.batches(3))
    given_up = loader.batches(0)
    next(given_up)
    assert_same(collected(loader.batches(3)), whole)
    with pytest.raises(RuntimeError, match="given up"):
        next(given_up)


def test_seeds_differ(images):
    one, other = (TrainLoader(images, TINY, batch_size=17, seed=seed) for seed in (0, 1))
    assert one.order(0) != other.order(0)
    assert one.order(0) != one.order(1)


def test_a_sample_is_augmented_alike_wherever_it_falls(images):
    """Its pixels depend on (seed, epoch, index), not on the batch or its neighbours."""
    small = collected(TrainLoader(images, TINY, batch_size=3, seed=2).batches(5))
    large = collected(TrainLoader(images, TINY, batch_size=17, seed=2).batches(5))
    assert torch.equal(torch.cat([pictures for pictures, _ in small]), large[0][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_random_numbers_are_left_alone(images, workers):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for _ in TrainLoader(images, TINY, "strong", batch_size=4, workers=workers).batches(0):
        assert random.getstate() == states[0]
    for _ in evaluation_batches(images, TINY, 4, workers):
        pass
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_batches_do_not_depend_on_the_process_random_numbers(images):
    torch.manual_seed(1)
    first = collected(TrainLoader(images, TINY, "strong", batch_size=17).batches(0))
    torch.manual_seed(2)
    random.seed(2)
    assert_same(first, collected(TrainLoader(images, TINY, "strong", batch_size=17).batches(0)))


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (8, False, [8, 8]),
        (16, False, [16]),
        (5, True, [5, 5, 5]),
        (20, True, [17]),
        (1, False, [1] * 17),
        (17, False, [17]),
    ],
)
def test_last_batches(images, batch_size, drop_last, sizes):
    loader = TrainLoader(images, TINY, batch_size=batch_size, drop_last=drop_last)
    assert [len(labels) for _, labels in loader.batches(0)] == sizes
    assert loader.steps_per_epoch == len(sizes)


def test_one_image_is_a_batch(images):
    loader = TrainLoader(images.select([3]), TINY, batch_size=8)
    assert [len(labels) for _, labels in loader.batches(0)] == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_all_in_order(images, workers):
    batches = collected(evaluation_batches(images, TINY, 8, workers))
    assert [len(labels) for _, labels in batches] == [8, 8, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(images.labels)
    assert_same(batches, collected(evaluation_batches(images, TINY, 8)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_arrives_with_its_name(images, workers):
    truncate(images.root / "dog" / "003.png")
    loader = TrainLoader(images, TINY, batch_size=4, workers=workers)
    with pytest.raises(UnreadableImage, match=r"dog/003.png: .*truncated") as caught:
        collected(loader.batches(0))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(UnreadableImage):
        collected(evaluation_batches(images, TINY, 4, workers))


class Watched:
    """A transform that says in which process and under which handlers it runs."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, _image):
        (self.folder / f"pid-{os.getpid()}").touch()
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        plain = signal.getsignal(signal.SIGTERM) is outlive_once
        open_to_signals = not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}
        return torch.tensor([[[float(ignored and plain and open_to_signals)]]])


def worker_ids(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def test_workers_leave_signals_to_the_main_process(images, tmp_path):
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append(os.getpid()))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        loader = TrainLoader(images, TINY, Watched(tmp_path), batch_size=4, workers=2)
        batches = loader.batches(0)
        assert next(batches)[0].min() == 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        assert len(worker_ids(tmp_path)) in (1, 2)
        for worker in worker_ids(tmp_path):
            assert worker != os.getpid()
            os.kill(worker, signal.SIGINT)  # as Ctrl-C does to the whole group
            os.kill(worker, signal.SIGTERM)  # and as timeout, systemd and Slurm do
        time.sleep(0.05)
        assert len(collected(batches)) == 3
        assert handled == []
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_outlive_an_epoch(images, tmp_path):
    loader = TrainLoader(images, TINY, Watched(tmp_path), batch_size=2, workers=2)
    for epoch in range(3):
        collected(loader.batches(epoch))
    assert len(worker_ids(tmp_path)) == 2


def test_closing_ends_the_workers_and_a_later_pass_begins_new_ones(images):
    loader = TrainLoader(images, TINY, batch_size=4, workers=2)
    before = collected(loader.batches(0))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert_same(before, collected(loader.batches(0)))
    loader.close()


def test_loaders_lost_in_a_cycle_end_their_workers_at_once(images):
    for _ in range(4):
        loader = TrainLoader(images, TINY, batch_size=4, workers=2)
        next(loader.batches(0))
        cycle = [loader]
        cycle.append(cycle)
        del loader, cycle
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4  # a worker that torch gives up costs 5 seconds
    assert not multiprocessing.active_children()


class Deadly:
    """A transform that ends its process."""

    def __call__(self, _image):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_one_line(images):
    loader = TrainLoader(images, TINY, Deadly(), batch_size=4, workers=1)
    with pytest.raises(CadaptError, match="a loading worker died: DataLoader worker") as caught:
        collected(loader.batches(0))
    assert "--workers 0" in str(caught.value.hint)


def test_impossible_arguments(images):
    with pytest.raises(UsageError, match="batch size"):
        TrainLoader(images, TINY, batch_size=0)
    with pytest.raises(UsageError, match="workers"):
        TrainLoader(images, TINY, batch_size=1, workers=-1)
    with pytest.raises(UsageError, match="no images"):
        evaluation_batches(images.select([]), TINY, 4)
    with pytest.raises(UsageError, match="has 4 steps, got start step 6"):
        TrainLoader(images, TINY, batch_size=4, drop_last=False).batches(0, 6)
    with pytest.raises(UsageError, match="no augmentation"):
        TrainLoader(images, TINY, "fancy", batch_size=4)
