import dataclasses
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import threading

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadapt.bundle import Bundle, bundle_bytes, load_bundle, read_header, save_bundle
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.plan import Base, Head, Insertion, Plan
from cadapt.preprocessing import Preprocessing
from cadapt.site import Site

SITE = Site(path="layer1.0", kind="block", in_shape=(8, 4, 4), out_shape=(8, 4, 4), kernel=(3, 3))
PLAN = Plan(
    base=Base(name="test_resnet.r160_in1k", source="pretrained", parameters=470_000, sha256="ab" * 32),
    scheme="res-seq",
    settings={"gamma": 4, "scale": 0.1},
    insertions=(Insertion(site=SITE, scheme="res-seq", form="sequential", config={"gamma": 4}),),
    head=Head(path="fc", num_classes=2),
)
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def make_bundle(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "adapters.a.weight": torch.randn(3, 4, generator=generator),
        "adapters.a.scale": torch.tensor(1.5, dtype=torch.bfloat16),
        "adapters.steps": torch.tensor([3], dtype=torch.int64),
        "fc.mask": torch.tensor([True, False, True]),
    }
    values = {
        "plan": PLAN,
        "classes": ("cat", "dög"),
        "preprocessing": Preprocessing(),
        "training": {"epochs": 3, "losses": [1.5, 0.25], "seed": None},
        "tensors": tensors,
    }
    return Bundle(**{**values, **changes})


CONTENT = bundle_bytes(make_bundle())
HEADER_BYTES = struct.unpack("<Q", CONTENT[:8])[0]


def repack(change):
    """The file with its header changed by somebody who knows the format but not the digest."""
    header = json.loads(CONTENT[8 : 8 + HEADER_BYTES])
    header = change(header) or header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + CONTENT[8 + HEADER_BYTES :]


def forge(change):
    """The file with its record changed by somebody who mends the digest too."""

    def change_record(header):
        metadata = header["__metadata__"]
        record = json.loads(metadata["cadapt"])
        record = change(record) or record
        metadata["cadapt"] = json.dumps(record)
        kinds = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items() if name != "__metadata__"}
        text = json.dumps([metadata["cadapt"], kinds], sort_keys=True)
        metadata["cadapt_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    return repack(change_record)


def refused(content, match):
    for read in (read_header, load_bundle):
        with pytest.raises(RefusedError, match=match) as caught:
            read(content)
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 400
    return caught.value


def assert_same(loaded, saved):
    assert bundle_bytes(loaded) == bundle_bytes(saved)
    for field in ("plan", "classes", "preprocessing", "training"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert loaded.tensors[name].shape == tensor.shape


def test_a_file_holds_the_bundle(tmp_path):
    saved = make_bundle()
    save_bundle(tmp_path / "a.safetensors", saved, overwrite=False)
    assert (tmp_path / "a.safetensors").read_bytes() == CONTENT
    for source in (tmp_path / "a.safetensors", str(tmp_path / "a.safetensors"), CONTENT):
        assert_same(load_bundle(source), saved)
    with pytest.raises(UsageError, match="exists"):
        save_bundle(tmp_path / "a.safetensors", saved, overwrite=False)


def test_the_header_says_what_the_file_holds(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    header = read_header(tmp_path / "a")
    assert header == read_header(CONTENT)
    assert (header.plan, header.classes, header.training["epochs"]) == (PLAN, ("cat", "dög"), 3)
    assert (header.format_version, header.file_bytes) == (1, len(CONTENT))
    info = header.tensors["adapters.a.weight"]
    assert (info.dtype, info.shape, info.bytes) == ("F32", (3, 4), 48)
    weight = make_bundle().tensors["adapters.a.weight"]
    assert info.sha256 == hashlib.sha256(weight.numpy().tobytes()).hexdigest()


def test_equal_bundles_give_equal_bytes():
    bundle = make_bundle()
    shuffled = dict(reversed(bundle.tensors.items()))
    training = dict(reversed(bundle.training.items()))
    assert bundle_bytes(make_bundle(tensors=shuffled, training=training)) == CONTENT


def test_safetensors_reads_the_file_too(tmp_path):
    bundle = make_bundle()
    save_bundle(tmp_path / "a", bundle, overwrite=False)
    loaded = safetensors.torch.load_file(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in bundle.tensors.items())
    with safetensors.safe_open(tmp_path / "a", "pt") as handle:
        assert handle.metadata()["format"] == "pt"


def test_a_file_that_safetensors_rewrote_is_still_read():
    metadata = json.loads(CONTENT[8 : 8 + HEADER_BYTES])["__metadata__"]
    rewritten = safetensors.torch.save(make_bundle().tensors, metadata=metadata)
    assert_same(load_bundle(rewritten), make_bundle())


def test_no_tensors_at_all_give_a_readable_file(tmp_path):
    save_bundle(tmp_path / "a", make_bundle(tensors={}), overwrite=False)
    assert load_bundle(tmp_path / "a").tensors == {}
    assert safetensors.torch.load((tmp_path / "a").read_bytes()) == {}
    with safetensors.safe_open(tmp_path / "a", "pt") as handle:
        assert list(handle.keys()) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3)])
def test_every_dtype_comes_back_bit_for_bit(dtype, shape):
    size = math.prod(shape) * dtype.itemsize
    pattern = torch.arange(size, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = pattern.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    loaded = load_bundle(bundle_bytes(make_bundle(tensors={"a": tensor, "b": torch.zeros(1, dtype=torch.uint8)})))
    assert loaded.tensors["a"].dtype == dtype
    assert loaded.tensors["a"].shape == shape
    assert loaded.tensors["a"].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_strides_storage_and_gradients_do_not_matter():
    whole = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {
        "transposed": whole[0, 0].t(),
        "channels_last": whole.to(memory_format=torch.channels_last),
        "part": whole[..., 1:3],
        "whole": whole,
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    loaded = load_bundle(bundle_bytes(make_bundle(tensors=tensors))).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    loaded["whole"].zero_()
    assert torch.equal(loaded["part"], whole[..., 1:3])


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)]
)
def test_tensors_that_a_file_cannot_hold_are_named(tensor):
    with pytest.raises(CadaptError, match="tensor 'odd'"):
        bundle_bytes(make_bundle(tensors={"odd": tensor}))


def test_a_tensor_with_the_formats_own_name_is_refused():
    with pytest.raises(CadaptError, match="__metadata__"):
        bundle_bytes(make_bundle(tensors={"__metadata__": torch.ones(1)}))


def test_a_diverged_loss_is_written_as_null():
    training = {"losses": [1.0, math.nan, (math.inf, -math.inf)]}
    assert load_bundle(bundle_bytes(make_bundle(training=training))).training == {"losses": [1.0, None, [None, None]]}


def test_class_names_of_any_kind_come_back():
    classes = ("", "a\nb", '"', "日本", "\udcff", "\x00", "😀")
    assert load_bundle(bundle_bytes(make_bundle(classes=classes))).classes == classes


@given(length=st.integers(0, len(CONTENT) - 1))
@settings(max_examples=300, deadline=None)
def test_a_truncated_file_is_refused(length):
    refused(CONTENT[:length], "cut short|empty|not a safetensors file")


@given(extra=st.binary(min_size=1, max_size=20))
def test_a_longer_file_is_refused(extra):
    refused(CONTENT + extra, "bytes follow its last tensor")


@given(position=st.integers(0, len(CONTENT) - 1), flip=st.integers(1, 255))
@settings(max_examples=500, deadline=None)
def test_a_flipped_byte_never_loads_as_something_else(position, flip):
    content = bytearray(CONTENT)
    content[position] ^= flip
    try:
        assert_same(load_bundle(bytes(content)), make_bundle())
    except CadaptError as error:
        assert error.exit_code == 4


@pytest.mark.parametrize("bit", range(8))
def test_every_single_bit_flip_in_the_tensors_is_refused(bit):
    for position in range(8 + HEADER_BYTES, len(CONTENT)):
        content = bytearray(CONTENT)
        content[position] ^= 1 << bit
        with pytest.raises(RefusedError, match="is not what was saved"):
            load_bundle(bytes(content))


@given(start=st.binary(max_size=30), rest=st.binary(max_size=60))
def test_random_bytes_are_refused(start, rest):
    for content in (start + rest, struct.pack("<Q", len(rest)) + rest, struct.pack("<Q", len(rest) + 1) + b"{" + rest):
        with pytest.raises(RefusedError):
            load_bundle(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    key=st.sampled_from(sorted(json.loads(json.loads(CONTENT[8 : 8 + HEADER_BYTES])["__metadata__"]["cadapt"]))),
    value=JSON,
)
@settings(max_examples=300, deadline=None)
def test_a_forged_record_raises_nothing_but_a_refusal(key, value):
    def change(record):
        record[key] = value

    try:
        load_bundle(forge(change))
    except CadaptError as error:
        assert error.exit_code == 4


@given(value=JSON, key=st.sampled_from(["dtype", "shape", "data_offsets", None]))
@settings(max_examples=200, deadline=None)
def test_a_forged_entry_raises_nothing_but_a_refusal(key, value):
    def change(header):
        if key is None:
            header["adapters.a.weight"] = value
        else:
            header["adapters.a.weight"][key] = value

    try:
        load_bundle(repack(change))
    except CadaptError as error:
        assert error.exit_code == 4


def test_foreign_files_are_told_apart(tmp_path):
    plain = safetensors.torch.save({"weight": torch.ones(2)}, metadata={"format": "pt"})
    assert refused(plain, "no adapter file of cadapt").hint is None
    (tmp_path / "plain").write_bytes(plain)
    assert refused(tmp_path / "plain", "plain': .*no adapter").hint == f"look at it: cadapt inspect '{tmp_path}/plain'"
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "pickled PyTorch checkpoint")
    refused(b"", "is empty")
    refused(b"\x89PNG\r\n\x1a\n........", "not a safetensors file")


def test_what_cannot_be_read_is_one_line(tmp_path):
    for read in (read_header, load_bundle):
        with pytest.raises(CadaptError, match="cannot read .*No such file") as caught:
            read(tmp_path / "missing")
        assert caught.value.exit_code == 1
        with pytest.raises(CadaptError, match="cannot read .*Is a directory"):
            read(tmp_path)


def test_a_header_that_claims_too_much_is_not_believed(tmp_path):
    refused(struct.pack("<Q", 2**63) + b"{}", "claims")
    refused(struct.pack("<Q", 99_000_000) + b"{}", "cut short")
    refused(struct.pack("<Q", 100_000) + b"{" + b"[" * 99_999, "not JSON")
    nested = b'{"a":' + b"[" * 100_000
    refused(struct.pack("<Q", len(nested)) + nested, "not JSON")
    with (tmp_path / "sparse").open("wb") as handle:
        handle.write(struct.pack("<Q", 2**35) + b"{")
        handle.truncate(2**36)
    refused(tmp_path / "sparse", "claims")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format version 2 is later"),
        ({"format_version": True}, "format version True"),
        ({"format_version": 0}, "format version 0"),
        ({"plan": {}}, "plan version None"),
        ({"plan": 3}, "plan is 3"),
        ({"base": {}}, "contradicts its plan"),
        ({"bn_policy": "train"}, "contradicts its plan"),
        ({"classes": [1]}, "classes"),
        ({"classes": "ab"}, "classes"),
        ({"preprocessing": {}}, "preprocessing"),
        ({"preprocessing": None}, "preprocessing"),
        ({"training": []}, "training"),
        ({"cadapt_version": 1}, "cadapt_version"),
        ({"tensors": {}}, "is not in its record"),
        ({"tensors": {"x": "0" * 64}}, "'x' is missing"),
    ],
)
def test_each_damage_to_the_record_is_named(change, said):
    refused(forge(lambda record: {**record, **change}), said)


def test_later_versions_come_with_the_way_out():
    assert "upgrade" in refused(forge(lambda record: {"format_version": 7}), "version 7").hint


def test_header_changes_without_the_digest_are_found():
    def rename(header):
        header["__metadata__"]["cadapt"] = header["__metadata__"]["cadapt"].replace("cat", "cow")

    def retype(header):
        header["adapters.a.weight"]["dtype"] = "I32"

    def reshape(header):
        header["adapters.a.weight"]["shape"] = [4, 3]

    for change in (rename, retype, reshape, lambda header: header["__metadata__"].pop("cadapt_sha256")):
        refused(repack(lambda header, change=change: change(header) and None), "SHA-256 differs")


def test_swapped_tensors_are_found():
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    content = bundle_bytes(make_bundle(tensors=tensors))
    swapped = content[:-16] + content[-8:] + content[-16:-8]
    with pytest.raises(RefusedError, match="tensor 'a' is not what was saved"):
        load_bundle(swapped)


def test_duplicate_keys_and_gaps_are_refused():
    refused(struct.pack("<Q", 17) + b'{"a":{},"a":{}}  ', "a key is there twice")
    gap = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    refused(struct.pack("<Q", len(gap)) + gap + b"xx", "begins at 1, expected 0")
    over = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}'
    refused(struct.pack("<Q", len(over)) + over + b"xxx", "begins at 1, expected 2")


def test_a_pipe_is_read_to_its_end(tmp_path):
    for read in (read_header, load_bundle):
        os.mkfifo(tmp_path / "fifo")
        writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(CONTENT))
        writer.start()
        assert read(tmp_path / "fifo").classes == ("cat", "dög")
        writer.join(timeout=10)
        (tmp_path / "fifo").unlink()


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_endless_and_empty_devices_are_refused(name):
    for read in (read_header, load_bundle):
        with pytest.raises(RefusedError, match=name):
            read(name)


def test_headers_are_read_without_torch(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    script = (
        "import sys, cadapt.bundle, cadapt.files, cadapt.hashing, cadapt.known_checkpoints\n"
        "assert cadapt.bundle.read_header(sys.argv[1]).classes[0] == 'cat'\n"
        "assert not {'torch', 'numpy', 'timm', 'safetensors'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, tmp_path / "a"], check=True)


def test_a_bundle_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_bundle().classes = ()
