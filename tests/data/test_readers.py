import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from cadapt.data import readers
from cadapt.data.images import UnreadableImage
from cadapt.data.loader import TrainLoader
from cadapt.data.readable import UnreadableImages
from cadapt.data.readers import ReaderSource, open_reader, parse_reader
from cadapt.data.source import open_evaluation_data, open_training_data
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.preprocessing import Preprocessing
from tests.data.pictures import make_classes, picture
from tests.data.test_shards import encoded, labelled, write_shard

needs_webdataset = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")


def test_sources_are_parsed():
    def parts(**given):
        return ReaderSource(**{"root": None, "split": None, **given})

    assert parse_reader("wds//data/pets") == parts(prefix="wds", name="/data/pets")
    assert parse_reader("hfds/owner/pets#dev") == parts(prefix="hfds", name="owner/pets", split="dev")
    assert parse_reader("TORCH/cifar10@/data#test") == parts(prefix="torch", name="cifar10", root="/data", split="test")
    assert parse_reader("./wds/pets") is None
    assert parse_reader("/data/pets") is None
    assert parse_reader("wds") is None


@pytest.mark.parametrize(("prefix", "package"), [("wds", "webdataset"), ("hfds", "datasets")])
def test_a_missing_extra_is_one_line_with_the_command(monkeypatch, prefix, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(CadaptError, match=f"needs the package '{package}'") as caught:
        open_reader(ReaderSource(prefix=prefix, name="x", root=None, split=None), "train")
    assert caught.value.hint == f"pip install 'cadapt[{prefix}]'"


def test_torch_image_folder(tmp_path):
    make_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    make_classes(tmp_path / "test", {"cat": 1, "dog": 2})
    data = open_training_data(f"torch/image_folder@{tmp_path}")
    assert data.classes == ("cat", "dog")
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (6, 2)
    assert (data.record["kind"], data.record["left_alone"]) == ("torch", "test")
    assert data.note is not None
    told = open_training_data(f"torch/image_folder@{tmp_path}", val=data.note.rpartition("--val ")[2].rstrip(")"))
    assert told.val is not None
    assert (len(told.train), len(told.val)) == (8, 3)
    assert data.train.read(0).tobytes() == picture(0).tobytes()
    (tmp_path / "train" / "cat" / "000.png").write_text("text")
    with pytest.raises(UnreadableImages, match="1 of 8 images"):
        open_training_data(f"torch/image_folder@{tmp_path}")


def test_unknown_torch_sets_and_failures_are_one_line(tmp_path):
    with pytest.raises(CadaptError, match="cannot open torch/nothing: AssertionError: Unknown torchvision dataset"):
        open_training_data(f"torch/nothing@{tmp_path}")


class FakeTorchSet:
    """What torchvision's sets of decoded pictures look like."""

    classes = ("zero", "one")
    targets = torch.tensor([0, 1] * 6)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return picture(index).convert("L"), int(self.targets[index])


def test_decoded_pictures(monkeypatch, capsys):
    def create(name, **settings):
        print("Files already downloaded and verified")
        return FakeTorchSet()

    monkeypatch.setattr("timm.data.create_dataset", create)
    data = open_training_data("torch/mnist#train", val_split=0.5)
    assert data.val is not None
    assert data.classes == ("zero", "one")
    assert (len(data.train), len(data.val)) == (6, 6)
    assert data.train.read(0).mode == "RGB"
    assert data.train.names[0].startswith("train/")
    assert capsys.readouterr().out == ""


def fake_hub(monkeypatch, labels, names=None, files=None):
    files = files or [encoded(index) for index in range(len(labels))]

    class Reader:
        label_key = "label"
        dataset = {"label": labels}
        class_to_idx = {name: index for index, name in enumerate(names or ())}

        def __getitem__(self, index):
            return io.BytesIO(files[index]), labels[index]

    splits = SimpleNamespace(get_dataset_split_names=lambda name: ["train", "test"])
    monkeypatch.setitem(sys.modules, "datasets", splits)
    monkeypatch.setattr(readers, "require_extra", lambda prefix: None)
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **settings: SimpleNamespace(reader=Reader()))


def test_hub_class_names(monkeypatch):
    fake_hub(monkeypatch, [1, 0, 1, 0], ["cat", "dog"])
    data = open_training_data("hfds/owner/pets")
    assert data.classes == ("cat", "dog")
    assert data.record["parts"] == {"train": "train"}
    assert data.record["left_alone"] == "test"
    told = open_training_data("hfds/owner/pets", val="hfds/owner/pets#test")
    assert told.record["parts"] == {"train": "train", "val": "test"}
    assert told.train.labels == (1, 0, 1, 0)
    assert told.train.read(2).tobytes() == picture(2).tobytes()


def test_hub_labels_without_names_and_as_words(monkeypatch):
    fake_hub(monkeypatch, [2, 0, 1])
    assert open_evaluation_data("hfds/x").classes == ("0", "1", "2")
    fake_hub(monkeypatch, ["owl", "cat", "owl"])
    data = open_evaluation_data("hfds/x")
    assert data.classes == ("cat", "owl")
    assert data.images.labels == (1, 0, 1)
    assert data.record["part"] == "test"


def test_hub_pictures_that_cannot_be_decoded_are_never_replaced(monkeypatch):
    fake_hub(monkeypatch, [0, 1, 0, 1], files=[encoded(0), b"text", encoded(2), encoded(3)])
    with pytest.raises(UnreadableImages, match="test/0000001"):
        open_evaluation_data("hfds/x")
    data = open_evaluation_data("hfds/x", skip_bad=True)
    assert data.record["skipped"] == ["test/0000001"]
    assert data.images.labels == (0, 0, 1)
    images = open_reader(ReaderSource(prefix="hfds", name="x", root=None, split=None), "test")
    with pytest.raises(UnreadableImage, match="test/0000001"):
        images.read(1)


def describe(folder, counts, alt_label=""):
    splits = {
        split: {
            "name": split,
            "num_samples": count,
            "filenames": [f"{split}-0.tar"],
            "shard_lengths": [count],
            "alt_label": alt_label,
        }
        for split, count in counts.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


@needs_webdataset
def test_described_shards(tmp_path):
    write_shard(tmp_path / "train-0.tar", labelled(0, 8))
    write_shard(tmp_path / "validation-0.tar", labelled(8, 4))
    describe(tmp_path, {"train": 8, "validation": 4})
    data = open_training_data(f"wds/{tmp_path}")
    assert data.val is not None
    assert data.classes == ("0", "1")
    assert data.record["parts"] == {"train": "train", "val": "validation"}
    assert (len(data.train), len(data.val)) == (8, 4)
    assert data.val.read(0).tobytes() == picture(8).tobytes()
    tiny = Preprocessing(input_size=(3, 8, 8))
    here, there = (TrainLoader(data.train, tiny, batch_size=3, workers=workers) for workers in (0, 2))
    for (one, _), (other, _) in zip(here.batches(1, 1), list(there.batches(1))[1:], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UsageError, match="no split 'nope'"):
        open_evaluation_data(f"wds/{tmp_path}#nope")


@needs_webdataset
def test_a_wrong_description_is_refused(tmp_path):
    write_shard(tmp_path / "train-0.tar", labelled(0, 8))
    describe(tmp_path, {"train": 9})
    with pytest.raises(RefusedError, match="has 8 samples, its description says 9"):
        open_training_data(f"wds/{tmp_path}")


@needs_webdataset
@pytest.mark.filterwarnings("default")
def test_shards_without_a_description(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"pets-train-{number:03d}.tar", labelled(4 * number, 4))
    write_shard(tmp_path / "pets-test-000.tar", labelled(8, 2))
    data = open_training_data(f"wds/{tmp_path}")
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (8, 2)
    assert len(open_evaluation_data(f"wds/{tmp_path}#pets-train-{{000..001}}.tar").images) == 8


@needs_datasets
def test_a_hub_folder(tmp_path):
    make_classes(tmp_path / "set" / "train", {"cat": 3, "dog": 3})
    make_classes(tmp_path / "set" / "test", {"cat": 1, "dog": 1})
    data = open_training_data(f"hfds/{tmp_path / 'set'}@{tmp_path / 'cache'}")
    assert data.val is not None
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.train.read(0).size == (12, 10)
