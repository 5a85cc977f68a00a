import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadapt.errors import CadaptError, RefusedError
from cadapt.plan import Base, Head, Insertion, Plan
from cadapt.preprocessing import Preprocessing
from cadapt.site import Site

NAMES = st.text(min_size=1, max_size=12)
SIZES = st.integers(min_value=1, max_value=4096)
SEEDS = st.integers(0, 2**63 - 1)
PAIRS = st.tuples(SIZES, SIZES)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(NAMES, JSON, max_size=3)
SITES = st.builds(
    Site,
    path=NAMES,
    kind=st.sampled_from(["block", "conv", "downsample", "stage", "attention", "mlp", "linear", "input", "head"]),
    in_shape=st.lists(SIZES, min_size=1, max_size=3).map(tuple),
    out_shape=st.lists(SIZES, min_size=1, max_size=3).map(tuple),
    layout=st.sampled_from(["NCHW", "NHWC", "NLC", "NC"]),
    grid=st.none() | PAIRS,
    kernel=st.none() | PAIRS,
    stride=PAIRS,
    padding=PAIRS | st.just("same"),
    dilation=PAIRS,
    groups=SIZES,
    activation=NAMES,
    operator=NAMES,
    stage=st.none() | st.integers(0, 5),
    prefix_tokens=st.integers(0, 5),
    call=st.integers(0, 3),
    out_grid=st.none() | PAIRS,
)
INSERTIONS = st.builds(
    Insertion, site=SITES, scheme=NAMES, form=st.sampled_from(["parallel", "sequential"]), config=SETTINGS
)
BASES = st.builds(
    Base,
    name=NAMES,
    source=st.sampled_from(["pretrained", "checkpoint", "random", "given"]),
    parameters=st.integers(min_value=0),
    sha256=NAMES,
    checkpoint=st.none() | st.just("resnet.pth") | NAMES.filter(lambda name: "/" not in name and name != "."),
    seed=st.none() | SEEDS,
    settings=SETTINGS,
)
HEADS = st.builds(
    Head,
    path=NAMES,
    num_classes=SIZES,
    init=st.sampled_from(["new", "base"]),
    norm=st.booleans(),
    dropout=st.floats(0, 1, exclude_max=True),
    seed=SEEDS,
)
PLANS = st.builds(
    Plan,
    base=BASES,
    scheme=NAMES,
    settings=SETTINGS,
    insertions=st.lists(INSERTIONS, max_size=3).map(tuple),
    trainable=st.lists(NAMES, max_size=3).map(tuple),
    head=st.none() | HEADS,
    bn_policy=st.sampled_from(["frozen", "train"]),
    seed=SEEDS,
)
POSITIVE = st.floats(min_value=1e-6, max_value=2)


@st.composite
def preprocessings(draw):
    channels = draw(st.integers(1, 4))
    return Preprocessing(
        input_size=(channels, draw(SIZES), draw(SIZES)),
        mean=tuple(draw(st.lists(NUMBERS, min_size=channels, max_size=channels))),
        std=tuple(draw(st.lists(POSITIVE, min_size=channels, max_size=channels))),
        interpolation=draw(st.sampled_from(["bilinear", "bicubic", "nearest"])),
        crop_pct=draw(POSITIVE),
        crop_mode=draw(NAMES),
    )


PREPROCESSINGS = preprocessings()


@given(plan=PLANS)
@settings(max_examples=60, deadline=None)
def test_plan_survives_json(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(site=SITES)
@settings(max_examples=60, deadline=None)
def test_site_survives_json(site):
    assert Site.from_json(json.loads(json.dumps(site.to_json()))) == site


@given(preprocessing=PREPROCESSINGS)
@settings(max_examples=60, deadline=None)
def test_preprocessing_survives_json(preprocessing):
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@given(record=st.dictionaries(st.sampled_from(["path", "kind", "in_shape", "out_shape", "stride"]), JSON))
def test_no_site_record_raises_anything_but_a_refusal(record):
    try:
        Site.from_json(record)
    except CadaptError as error:
        assert error.exit_code == 4


@given(plan=PLANS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_plan_is_refused_and_raises_nothing_else(plan, data):
    record = json.loads(json.dumps(plan.to_json()))
    target = record
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        if not (isinstance(target[key], dict) and target[key] and data.draw(st.booleans())):
            break
        target = target[key]
    target[key] = data.draw(JSON)
    try:
        Plan.from_json(record)
    except CadaptError as error:
        assert error.exit_code == 4


@given(record=st.fixed_dictionaries({key: JSON for key in Preprocessing().to_json()}))
def test_no_preprocessing_record_raises_anything_but_a_refusal(record):
    try:
        Preprocessing.from_json(record)
    except CadaptError as error:
        assert error.exit_code == 4


@pytest.mark.parametrize("size", [float("inf"), float("nan"), "wide", None, [1]])
def test_preprocessing_refuses_sizes_that_are_none(size):
    with pytest.raises(RefusedError, match="preprocessing"):
        Preprocessing.from_json({**Preprocessing().to_json(), "input_size": [3, size, 224]})


def test_a_later_plan_is_refused_with_the_way_out():
    with pytest.raises(RefusedError, match="plan version 99") as caught:
        Plan.from_json({"version": 99})
    assert "upgrade" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": None}, "Base"),
        ({"base": {"name": "x"}}, "Base"),
        ({"head": []}, "Head"),
        ({"insertions": "all"}, "insertions"),
        ({"insertions": [{}]}, "insertion"),
        ({"trainable": 3}, "trainable"),
    ],
)
def test_each_damage_to_a_plan_is_named(change, said):
    base = Base(name="resnet", source="random", parameters=1, sha256="0")
    with pytest.raises(RefusedError, match=said):
        Plan.from_json({**Plan(base=base, scheme="linear").to_json(), **change})


def test_a_site_is_named_by_path_and_call():
    site = Site(path="neck.conv", kind="conv", in_shape=(8, 4, 4), out_shape=(16, 4, 4), call=1)
    assert (site.name, site.in_channels, site.out_channels) == ("neck.conv@1", 8, 16)
    tokens = Site(path="blocks.0", kind="block", in_shape=(49, 8), out_shape=(49, 16), layout="NLC")
    assert (tokens.name, tokens.in_channels, tokens.out_channels) == ("blocks.0", 8, 16)


FORGED = [
    ("site", {"stride": "ab"}, "stride of a Site"),
    ("site", {"padding": "valid"}, "padding of a Site"),
    ("site", {"groups": True}, "groups of a Site"),
    ("site", {"grid": [1, 2, 3]}, "grid of a Site"),
    ("site", {"layout": "CHWN"}, "layout of a Site"),
    ("site", {"layout": []}, "layout of a Site"),
    ("base", {"name": 3}, "name of a Base"),
    ("base", {"source": "hub"}, "source of a Base"),
    ("base", {"settings": []}, "settings of a Base"),
    ("base", {"checkpoint": "../secret.pth"}, "is a path"),
    ("base", {"checkpoint": "/etc/secret.pth"}, "is a path"),
    ("head", {"num_classes": "10"}, "num_classes of a Head"),
    ("head", {"dropout": "0.1"}, "dropout of a Head"),
    ("plan", {"scheme": None}, "scheme of a Plan"),
    ("plan", {"bn_policy": "thaw"}, "bn_policy of a Plan"),
    ("plan", {"trainable": [1]}, "trainable of a Plan"),
    ("plan", {"seed": 1.5}, "seed of a Plan"),
]


@pytest.mark.parametrize(("part", "change", "said"), FORGED)
def test_a_forged_value_is_refused_by_its_field(part, change, said):
    site = Site(path="a", kind="block", in_shape=(8, 4, 4), out_shape=(8, 4, 4), grid=(4, 4), padding="same")
    plan = Plan(
        base=Base(name="resnet", source="random", parameters=1, sha256="0"),
        scheme="res-seq",
        insertions=(Insertion(site=site, scheme="res-seq", form="sequential"),),
        head=Head(path="fc", num_classes=2, dropout=0),
    )
    record = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(record) == plan
    parts = {"plan": record, "base": record["base"], "head": record["head"], "site": record["insertions"][0]["site"]}
    parts[part].update(change)
    with pytest.raises(RefusedError, match=said):
        Plan.from_json(record)
