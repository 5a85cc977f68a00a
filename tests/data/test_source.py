import json
from pathlib import Path

import pytest

from cadapt.data.readable import UnreadableImages
from cadapt.data.source import open_evaluation_data, open_training_data
from cadapt.errors import RefusedError, UsageError
from tests.data.pictures import make_classes, truncate


def test_a_folder_of_classes_is_split(tmp_path):
    make_classes(tmp_path / "pets", {"cat": 10, "dog": 20})
    data = open_training_data(str(tmp_path / "pets"), val_split=0.2, seed=3)
    assert data.classes == ("cat", "dog")
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (24, 6)
    record = json.loads(json.dumps(data.record))
    assert record["kind"] == "folder"
    assert record["name"] == "pets"
    assert record["images"] == {"train": 24, "val": 6}
    assert (record["val_split"], record["seed"], record["shots"], record["skipped"]) == (0.2, 3, None, [])
    assert set(record["sha256"]) == {"train", "val"}
    assert str(tmp_path) not in json.dumps(record)
    again = open_training_data(str(tmp_path / "pets"), val_split=0.2, seed=3)
    assert again.record == data.record


def test_nothing_held_out(tmp_path):
    make_classes(tmp_path, {"cat": 2, "dog": 2})
    data = open_training_data(str(tmp_path), val_split=0)
    assert data.val is None
    assert data.record["images"] == {"train": 4}


@pytest.mark.parametrize("held", ["val", "valid", "validation"])
def test_parts_beneath_a_folder(tmp_path, held):
    make_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    make_classes(tmp_path / held, {"cat": 1, "dog": 2})
    data = open_training_data(str(tmp_path))
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (6, 3)
    assert data.record["parts"] == {"train": "train", "val": held}
    assert data.record["val_split"] is None


def test_val_goes_before_test_in_training_and_after_it_in_evaluation(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        make_classes(tmp_path / part, {"cat": count, "dog": count})
    data = open_training_data(str(tmp_path))
    assert data.val is not None
    assert len(data.val) == 4
    assert (data.record["left_alone"], data.note) == ("test", None)
    evaluation = open_evaluation_data(str(tmp_path))
    assert len(evaluation.images) == 2
    assert evaluation.record["part"] == "test"


def test_nothing_is_chosen_by_the_test_part_unless_it_is_named(tmp_path):
    make_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    make_classes(tmp_path / "test", {"cat": 3, "dog": 3})
    data = open_training_data(str(tmp_path), val_split=0.25)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (6, 2)
    assert not set(data.train.names) & set(data.val.names)
    assert data.record["parts"] == {"train": "train"}
    assert (data.record["val_split"], data.record["left_alone"]) == (0.25, "test")
    assert data.note is not None
    assert "25% of the training part is held out, and test is left alone" in data.note
    named = data.note.rpartition("--val ")[2].rstrip(")")
    told = open_training_data(str(tmp_path), val=named)
    assert told.val is not None
    assert (len(told.train), len(told.val), told.note) == (8, 6, None)
    none = open_training_data(str(tmp_path), val_split=0)
    assert none.val is None
    assert none.note is not None and "nothing is held out" in none.note


def test_train_alone_is_split(tmp_path):
    make_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    data = open_training_data(str(tmp_path), val_split=0.25)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (6, 2)
    with pytest.raises(UsageError, match="has train/ but none of"):
        open_evaluation_data(str(tmp_path))


def test_classes_may_be_called_train_and_test(tmp_path):
    make_classes(tmp_path, {"train": 2, "bus": 2, "test": 2})
    assert open_training_data(str(tmp_path)).classes == ("bus", "test", "train")
    assert open_evaluation_data(str(tmp_path)).classes == ("bus", "test", "train")


def test_held_out_parts_alone_are_not_classes(tmp_path):
    make_classes(tmp_path / "val", {"cat": 2, "dog": 2})
    make_classes(tmp_path / "test", {"cat": 2, "dog": 2})
    with pytest.raises(UsageError, match="no train/"):
        open_training_data(str(tmp_path))


def test_another_source_to_validate_on(tmp_path):
    make_classes(tmp_path / "a", {"cat": 3, "dog": 3})
    make_classes(tmp_path / "b" / "test", {"cat": 1, "dog": 1})
    data = open_training_data(str(tmp_path / "a"), val=str(tmp_path / "b"))
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.record["val_source"] == "b"


def test_differing_classes_are_named(tmp_path):
    make_classes(tmp_path / "train", {"cat": 1, "dog": 1})
    make_classes(tmp_path / "val", {"cat": 1, "fox": 1})
    with pytest.raises(RefusedError, match="not in training: fox; not in validation: dog"):
        open_training_data(str(tmp_path))


def test_shots_are_taken_from_what_is_not_held_out(tmp_path):
    make_classes(tmp_path, {"cat": 10, "dog": 2})
    data = open_training_data(str(tmp_path), shots=4, val_split=0.5)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (5, 6)
    assert data.record["shots"] == 4
    assert data.record["short_classes"] == {"dog": 1}
    assert not set(data.train.names) & set(data.val.names)


def spoiled(root: Path) -> Path:
    make_classes(root, {"cat": 30, "dog": 30})
    for index in range(25):
        truncate(root / "dog" / f"{index:03d}.png")
    (root / "cat" / "000.png").write_text("text")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_stop_it(tmp_path, workers):
    calls = []
    with pytest.raises(UnreadableImages, match="26 of 60 images cannot be read") as caught:
        open_training_data(
            str(spoiled(tmp_path)), workers=workers, on_progress=lambda done, total: calls.append((done, total))
        )
    assert len(caught.value.files) == 26
    assert caught.value.files[0].path.endswith("cat/000.png")
    assert "dog/018.png" in str(caught.value)
    assert "dog/019.png" not in str(caught.value)
    assert "… and 6 more" in str(caught.value)
    assert "--skip-bad" in str(caught.value.hint)
    assert calls[-1] == (60, 60)


def test_unreadable_images_are_skipped_and_recorded(tmp_path):
    data = open_training_data(str(spoiled(tmp_path)), skip_bad=True, val_split=0.2)
    assert data.val is not None
    assert len(data.train) + len(data.val) == 34
    assert len(data.record["skipped"]) == 26
    assert data.record["skipped"][0] == "cat/000.png"
    evaluation = open_evaluation_data(str(tmp_path), skip_bad=True)
    assert len(evaluation.images) == 34
    assert len(evaluation.record["skipped"]) == 26


def test_a_class_without_readable_images(tmp_path):
    make_classes(tmp_path, {"cat": 2, "dog": 1})
    truncate(tmp_path / "dog" / "000.png")
    with pytest.raises(RefusedError, match="no readable image in 1 of 2 classes: dog"):
        open_training_data(str(tmp_path), skip_bad=True)


def test_no_class_has_two_images(tmp_path):
    make_classes(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(RefusedError, match="none can be held out"):
        open_training_data(str(tmp_path))


def test_bad_images_in_the_held_out_part_count_too(tmp_path):
    make_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    make_classes(tmp_path / "val", {"cat": 2, "dog": 2})
    truncate(tmp_path / "val" / "dog" / "001.png")
    with pytest.raises(UnreadableImages, match="1 of 8 .*val/dog/001.png"):
        open_training_data(str(tmp_path))
    data = open_training_data(str(tmp_path), skip_bad=True)
    assert data.record["images"] == {"train": 4, "val": 3}


def test_evaluation_of_one_class(tmp_path):
    make_classes(tmp_path, {"cat": 2})
    evaluation = open_evaluation_data(str(tmp_path))
    assert evaluation.classes == ("cat",)
    assert evaluation.record["part"] is None


def test_impossible_shares_and_missing_folders(tmp_path):
    with pytest.raises(UsageError, match="validation split"):
        open_training_data(str(tmp_path), val_split=1.0)
    with pytest.raises(UsageError, match="no folder"):
        open_training_data(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no reader 'tfds/'"):
        open_training_data("tfds/food101")
