"""Loading bases: names, tags, unsafe and damaged files, sizes of heads, identities, and no network."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cadapt.backbone import (
    check_identity,
    describe_model,
    load_backbone,
    reload_backbone,
)
from cadapt.checkpoints import read_checkpoint
from cadapt.errors import CadaptError, RefusedError, UsageError

NAME = "test_resnet"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=11).state_dict()


@pytest.fixture(params=["base.safetensors", "base.pth", "base.bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


def test_an_unknown_model_gets_close_matches() -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone("resnet5O", pretrained=False)
    assert caught.value.message == "unknown model 'resnet5O'"
    assert "resnet50" in str(caught.value.hint)


def test_an_unknown_tag_gets_close_matches() -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone("resnet50.a1_in1", pretrained=False)
    assert caught.value.message == "unknown weights 'resnet50.a1_in1'"
    assert "resnet50.a1_in1k" in str(caught.value.hint)


def test_a_setting_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone(NAME, pretrained=False, settings={"window_size": 7})
    assert NAME in caught.value.message
    assert "window_size" in caught.value.message


def test_a_checkpoint_is_loaded_with_the_size_of_its_head(checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    backbone = load_backbone(NAME, checkpoint=checkpoint)
    loaded = backbone.model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not backbone.model.training
    assert backbone.base.source == "checkpoint"
    assert backbone.base.checkpoint == checkpoint.name
    assert backbone.model.fc.weight.shape[0] == 11


def test_a_checkpoint_without_a_head_gives_features(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "features.safetensors"
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, str(path))
    backbone = load_backbone(NAME, checkpoint=path)
    assert backbone.model(torch.randn(1, 3, 32, 32)).shape == (1, backbone.model.num_features)


class Malicious:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["evil.pth", "evil.bin", "evil.pt"])
@pytest.mark.parametrize("raw", [False, True], ids=["torch.save", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, name: str, raw: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / name
    content = {"conv1.weight": Malicious(marker)}
    if raw:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(RefusedError) as caught:
        load_backbone(NAME, checkpoint=path)
    assert not marker.exists(), "the code in the pickle ran"
    assert caught.value.exit_code == 4
    assert "safetensors" in str(caught.value.hint)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("keep", [0, 1, 9, 1000, -10])
def test_a_truncated_checkpoint_is_refused(checkpoint: Path, keep: int) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:keep])
    with pytest.raises(RefusedError) as caught:
        load_backbone(NAME, checkpoint=checkpoint)
    assert str(checkpoint) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors"])
def test_noise_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(RefusedError):
        load_backbone(NAME, checkpoint=path)


@pytest.mark.parametrize("content", [b"\x80\x02R.", b"\x80\x02)R.", b"\x80\x02K\x01K\x02R.", b"PK\x03\x04", b""])
def test_a_malformed_pickle_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.pth"
    path.write_bytes(content)
    with pytest.raises(RefusedError) as caught:
        read_checkpoint(path)
    assert "\n" not in caught.value.message


def test_a_flipped_bit_in_a_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    values = torch.arange(1000.0)
    torch.save({"weight": values}, path)
    assert torch.equal(read_checkpoint(path)["weight"], values)
    data = bytearray(path.read_bytes())
    data[data.index(values.numpy().tobytes()) + 2000] ^= 4
    path.write_bytes(data)
    with pytest.raises(RefusedError, match="checksum of 'weights/data/0'"):
        read_checkpoint(path)


def test_a_checkpoint_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "weights.pth")["weight"], torch.ones(3))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(RefusedError) as caught:
        read_checkpoint(path)
    assert "no tensors" in caught.value.message


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {3: torch.ones(2)}, {}], ids=repr)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(RefusedError):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CadaptError) as caught:
        load_backbone(NAME, checkpoint=tmp_path / "none.pth")
    assert caught.value.message == f"no checkpoint at {tmp_path / 'none.pth'}"


def test_a_checkpoint_of_wrong_shapes_is_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "wrong.safetensors"
    other = {**state, "conv1.weight" if "conv1.weight" in state else next(iter(state)): torch.zeros(1)}
    save_file(other, str(path))
    with pytest.raises(CadaptError) as caught:
        load_backbone(NAME, checkpoint=path)
    assert f"{path} does not fit {NAME}: wrong shape:" in caught.value.message


def test_missing_and_unexpected_tensors_are_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "other.safetensors"
    missing = "layer1.0.conv1.weight"
    save_file({**{name: tensor for name, tensor in state.items() if name != missing}, "stranger": torch.zeros(1)}, path)
    with pytest.raises(CadaptError) as caught:
        load_backbone(NAME, checkpoint=path)
    assert f"missing {missing}" in caught.value.message
    assert "unexpected stranger" in caught.value.message


def test_random_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_backbone(NAME, pretrained=False, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "building the base drew from the caller's random numbers"
    torch.manual_seed(2)
    again, other = load_backbone(NAME, pretrained=False, seed=5), load_backbone(NAME, pretrained=False, seed=6)
    assert first.base == again.base
    assert first.base.sha256 != other.base.sha256
    assert (first.base.source, first.base.seed) == ("random", 5)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_the_identity_leaves_the_head_out(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    whole, headless, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    save_file(state, str(whole))
    save_file(body, str(headless))
    width = state["fc.weight"].shape[1]
    save_file({**body, "fc.weight": torch.ones(3, width), "fc.bias": torch.ones(3)}, str(other))
    bases = [load_backbone(NAME, checkpoint=path).base for path in (whole, headless, other)]
    assert len({base.sha256 for base in bases}) == 1
    assert {base.parameters for base in bases} == {
        sum(p.numel() for name, p in timm.create_model(NAME).named_parameters() if not name.startswith("fc."))
    }


def test_the_identity_depends_on_every_tensor(state: dict[str, torch.Tensor]) -> None:
    model = timm.create_model(NAME, num_classes=11).eval()
    model.load_state_dict(state)
    before = describe_model(model).base.sha256
    for name in ("layer1.0.conv1.weight", "layer4.0.bn1.running_var"):
        tensor = model.state_dict()[name]
        tensor.view(-1)[0].add_(1e-3)
        changed = describe_model(model).base.sha256
        assert changed != before
        before = changed


def test_another_base_is_refused(checkpoint: Path) -> None:
    first = load_backbone(NAME, checkpoint=checkpoint)
    other = load_backbone(NAME, pretrained=False)
    with pytest.raises(RefusedError) as caught:
        check_identity(other, first.base)
    assert "wrong base" in caught.value.message
    assert checkpoint.name in caught.value.message
    assert first.base.sha256[:12] in caught.value.message


def test_a_base_is_found_again(checkpoint: Path, tmp_path: Path) -> None:
    first = load_backbone(NAME, checkpoint=checkpoint)
    # where it last was
    assert reload_backbone(first.base, first.preprocessing).base == first.base
    # beside the adapter, after it was moved
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    checkpoint.rename(folder / checkpoint.name)
    assert reload_backbone(first.base, first.preprocessing, near=folder).base == first.base
    with pytest.raises(CadaptError) as caught:
        (folder / checkpoint.name).unlink()
        reload_backbone(first.base, first.preprocessing, near=folder)
    assert "--checkpoint" in str(caught.value.hint)


def test_a_random_base_is_built_again() -> None:
    first = load_backbone(NAME, pretrained=False, seed=7, img_size=64)
    again = reload_backbone(first.base, first.preprocessing)
    assert again.base == first.base
    assert again.preprocessing == first.preprocessing
    assert again.preprocessing.input_size == (3, 64, 64)


def test_a_fixed_size_model_is_built_for_the_size_asked() -> None:
    backbone = load_backbone("test_vit", pretrained=False, img_size=64)
    assert backbone.preprocessing.input_size == (3, 64, 64)
    assert backbone.model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert reload_backbone(backbone.base, backbone.preprocessing).base == backbone.base


def test_without_a_network_the_hub_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CadaptError) as caught:
        load_backbone(NAME)
    assert type(caught.value) is CadaptError
    assert caught.value.message.startswith(f"cannot get the pretrained weights of {NAME}")
    assert "\n" not in caught.value.message
    assert "--checkpoint" in str(caught.value.hint)
    assert "--no-pretrained" in str(caught.value.hint)
