"""Consolidator against its formula written out in loops: forward, gradients, counts, drop-path, both consolidations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import cadapt
from cadapt.adapters import MergedLayer, Regrouped, get_scheme
from cadapt.backbone import describe_model
from cadapt.errors import UsageError
from cadapt.planning import plan_insertions
from cadapt.site import Site
from tests.models import enliven, make_model

SCHEME = get_scheme("consolidator")
CASES = [
    {"groups": (6,)},
    {"groups": (6,), "shuffle": True},
    {"groups": (1,)},
    {"groups": (12,), "shuffle": True},
    {"groups": (6, 3)},
    {"groups": (4, 6)},
    {"groups": (4, 6, 2), "shuffle": True},
    {"groups": (3, 3), "shuffle": True},
]


def tokens_site(inputs: int = 12, outputs: int = 24) -> Site:
    return Site(path="fc", kind="linear", in_shape=(5, inputs), out_shape=(5, outputs), layout="NLC", operator="Linear")


def map_site(stride: int = 1, groups: int = 1) -> Site:
    return Site(
        path="conv",
        kind="linear",
        in_shape=(12, 7, 6),
        out_shape=(24, (7 - 1) // stride + 1, (6 - 1) // stride + 1),
        grid=(7, 6),
        kernel=(1, 1),
        stride=(stride, stride),
        groups=groups,
        operator="Conv2d",
    )


def build(site: Site, **settings: Any) -> Any:
    adapter = SCHEME.build(site, "parallel", SCHEME.configure(settings))
    enliven(adapter, scale=0.5)
    return adapter


def by_loops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, shuffle: bool) -> torch.Tensor:
    """G P x + β for x [..., C], group by group: (Px)[i·g + a] = x[a·c + i], group k reads (Px)[k·c … k·c + c)."""
    channels, outputs = x.shape[-1], weight.shape[0]
    size, rows = channels // groups, outputs // groups
    shuffled = [x[..., place] for place in range(channels)]
    if shuffle:
        for i, a in itertools.product(range(size), range(groups)):
            shuffled[i * groups + a] = x[..., a * size + i]
    results = []
    for output in range(outputs):
        group = output // rows
        terms = [weight[output, j] * shuffled[group * size + j] for j in range(size)]
        results.append(torch.stack(terms).sum(0) + bias[output])
    return torch.stack(results, dim=-1)


def reference(x: torch.Tensor, adapter: Any, groups: tuple[int, ...], shuffle: bool) -> torch.Tensor:
    terms = [
        by_loops(x, branch.weight, branch.bias, number, shuffle)
        for branch, number in zip(adapter.branches, groups, strict=True)
    ]
    return torch.stack(terms).sum(0)


def require_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_on_tokens(case: dict[str, Any]) -> None:
    adapter = build(tokens_site(), **case)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
    inputs = [x, *adapter.parameters()]
    weights = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(3))
    got, wanted = adapter(x), reference(x, adapter, case["groups"], case.get("shuffle", False))
    require_close(got, wanted)
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        require_close(mine, other)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_on_maps(case: dict[str, Any], stride: int) -> None:
    adapter = build(map_site(stride), **case)
    x = torch.randn(2, 12, 7, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    inputs = [x, *adapter.parameters()]
    got = adapter(x)
    last = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
    wanted = reference(last, adapter, case["groups"], case.get("shuffle", False)).permute(0, 3, 1, 2)
    require_close(got, wanted)
    ours = torch.autograd.grad(got.square().sum(), inputs)
    theirs = torch.autograd.grad(wanted.square().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        require_close(mine, other)


def test_the_shuffle_is_the_permutation_matrix_of_the_formula() -> None:
    adapter = build(tokens_site(), groups=(4,), shuffle=True).double()
    g, c = 4, 3
    matrix = torch.zeros(24, 12, dtype=torch.float64)
    branch = adapter.branches[0]
    dense = torch.block_diag(*branch.weight.detach().reshape(g, 6, c))
    for o, a, i in itertools.product(range(24), range(g), range(c)):
        matrix[o, a * c + i] = dense[o, i * g + a]
    assert torch.equal(adapter.summed()[0], matrix)
    x = torch.randn(12, dtype=torch.float64)
    assert torch.equal(
        functional.channel_shuffle(x.reshape(1, 12, 1, 1), g).flatten()[1], x[1 * c + 0]
    )  # torch's own, as i·g + a = 1 is a = 1, i = 0
    require_close(adapter(x), matrix @ x + branch.bias, 1e-14)


def test_vit_base_has_the_papers_count() -> None:
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224").eval()
    model = cadapt.insert(base, "consolidator", groups=(384,))
    names = dict(model.get_submodule("adapters.consolidator").named_parameters())
    weights = sum(item.numel() for name, item in names.items() if name.endswith("weight"))
    biases = sum(item.numel() for name, item in names.items() if name.endswith("bias"))
    assert (weights, biases, weights + biases) == (221_184, 82_944, 304_128)
    assert len(model.plan.insertions) == 48
    assert plan_insertions(describe_model(base), "consolidator").insertions[0].config["groups"] == ()
    default = cadapt.insert(base, "consolidator")
    assert sum(item.numel() for item in default.get_submodule("adapters.consolidator").parameters()) == 304_128


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"),
    [
        (768, 2304, 384),
        (3072, 768, 384),
        (512, 2048, 256),
        (1024, 512, 256),
        (128, 512, 128),
        (320, 1280, 320),
        (7, 9, 1),
    ],
)
def test_default_groups_are_384_or_the_nearest_below(inputs: int, outputs: int, groups: int) -> None:
    adapter: Any = SCHEME.build(tokens_site(inputs, outputs), "parallel", SCHEME.configure({}))
    assert adapter.branches[0].weight.shape == (outputs, inputs // groups)


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    model = make_model("tokens")
    with pytest.raises(
        UsageError, match=r"64 inputs and 192 outputs do not both divide into 384 groups, but into 64, 32"
    ):
        cadapt.insert(model, "consolidator", groups="384", img_size=160)
    for wrong in ({"groups": "0"}, {"groups": "4,x"}, {"drop_path": 1.0}, {"drop_path": float("nan")}, {"init": "one"}):
        with pytest.raises(UsageError):
            SCHEME.configure(wrong)
    assert SCHEME.configure({"groups": "384,192"}).groups == (384, 192)
    assert SCHEME.configure({"groups": [384]}).groups == (384,)


def test_a_padding_conv_is_refused() -> None:
    padded = Site(path="c", kind="linear", in_shape=(4, 5, 5), out_shape=(4, 7, 7), operator="Conv2d")
    assert "pads" in str(SCHEME.fits(padded, "parallel", SCHEME.configure({})))
    assert SCHEME.fits(map_site(2), "parallel", SCHEME.configure({})) is None


def test_initialisations() -> None:
    zero = SCHEME.build(tokens_site(), "parallel", SCHEME.configure({}))
    assert not any(item.any() for item in zero.parameters())
    paper = SCHEME.build(tokens_site(768, 768), "parallel", SCHEME.configure({"init": "paper"}))
    for item in paper.state_dict().values():
        assert 0.9e-3 < float(item.abs().max()) <= 1e-3
        assert float(item.std()) == pytest.approx(1e-3 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("stored", [False, True])
def test_drop_path_takes_whole_samples_of_each_branch_in_training_only(stored: bool) -> None:
    adapter = build(tokens_site(), groups=(6, 4), drop_path=0.5, stored=stored).requires_grad_(False)
    x = torch.randn(4000, 5, 12, generator=torch.Generator().manual_seed(2))
    parts: Any = [adapter.eval()(x)] if stored else [branch(x) for branch in adapter.eval().branches]
    torch.manual_seed(0)
    dropped = adapter.train()(x)
    # every sample is a sum of branches, each left out or doubled
    choices = [sum(2 * keep * part for keep, part in zip(kept, parts, strict=True)) for kept in
               itertools.product((0, 1), repeat=len(parts))]  # fmt: skip
    nearest = torch.stack([(dropped - choice).abs().amax(dim=(1, 2)) for choice in choices]).min(dim=0)
    assert float(nearest.values.max()) <= 1e-5
    shares = torch.bincount(nearest.indices, minlength=len(choices)) / len(x)
    assert torch.allclose(shares, torch.full_like(shares, 1 / len(choices)), atol=0.05)


@pytest.mark.parametrize("site", [tokens_site(), map_site(), map_site(2)], ids=["tokens", "map", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_is_equal_and_holds_the_union_and_one_bias(case: dict[str, Any], site: Site) -> None:
    adapter = build(site, **case).double().eval()
    before = {name: item.clone() for name, item in adapter.state_dict().items()}
    assert SCHEME.pack is not None
    packed, config = SCHEME.pack(adapter, SCHEME.configure(case))
    assert all(torch.equal(item, before[name]) for name, item in adapter.state_dict().items())
    union = torch.zeros(24, 12, dtype=torch.bool)
    probe = build(site, **case)
    for branch in probe.branches:
        nn.init.ones_(branch.weight)
        union |= branch.matrix() != 0
    numbers = sum(item.numel() for item in packed.parameters())
    assert numbers == int(union.sum()) + 24
    if len(case["groups"]) == 1:
        assert packed is adapter
        assert config == SCHEME.configure(case)
    else:
        assert numbers < sum(item.numel() for item in adapter.parameters())
    x = torch.randn(2, *site.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    require_close(packed(x), adapter(x), 1e-14)
    # the config builds what the packed values fit in, and nothing but values is held
    again = SCHEME.build(site, "parallel", config).double()
    again.load_state_dict(packed.state_dict(), strict=True)
    require_close(again.eval()(x), adapter(x), 1e-14)
    assert not list(packed.buffers())
    assert SCHEME.pack(packed, config)[1] == config


def test_a_branch_that_holds_the_others_takes_them_up_and_computes_less() -> None:
    assert SCHEME.simplify is not None
    for settings, groups in (({"groups": (6, 3, 12)}, (3,)), ({"groups": (3, 3), "shuffle": True}, (3,))):
        config = SCHEME.configure(settings)
        adapter = build(tokens_site(), **settings).double()
        simpler, new = SCHEME.simplify(adapter, config)
        assert (new.groups, new.stored) == (groups, False)
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        require_close(simpler(x), adapter(x), 1e-14)
    config = SCHEME.configure({"groups": (4, 6)})
    adapter = build(tokens_site(), groups=(4, 6))
    assert SCHEME.simplify(adapter, config) == (adapter, config)


def test_a_stored_one_trains_on_and_moves_between_devices_and_copies() -> None:
    adapter = build(tokens_site(), groups=(4, 6), stored=True)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4))
    adapter(x).square().sum().backward()
    assert all(bool(item.grad.any()) for item in adapter.parameters())
    with torch.device("meta"):
        empty = SCHEME.build(tokens_site(), "parallel", SCHEME.configure({"groups": (4, 6), "stored": True}))
    assert empty(x.to("meta")).shape == (2, 5, 24)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(adapter.state_dict())
    assert torch.equal(filled(x), adapter(x))


def merged(site: Site, adapter: nn.Module, layer: nn.Module) -> Any:
    return SCHEME.merge(site, "parallel", adapter, layer)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_merging_is_the_sum(bias: bool, stored: bool) -> None:
    adapter = build(tokens_site(), groups=(4, 6), shuffle=True, stored=stored)
    layer = nn.Linear(12, 24, bias=bias)
    outcome = merged(tokens_site(), adapter, layer)
    assert isinstance(outcome, MergedLayer)
    assert outcome.weight.dtype == torch.float64 and outcome.bias is not None
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    adapter, layer = adapter.double().eval(), layer.double()
    require_close(functional.linear(x, outcome.weight, outcome.bias), layer(x) + adapter(x), 1e-14)

    conv = nn.Conv2d(12, 24, 1, stride=2, bias=bias).double()
    beside = SCHEME.build(map_site(2), "parallel", SCHEME.configure({"groups": (4, 6), "stored": stored})).double()
    enliven(beside, scale=0.5)
    outcome = merged(map_site(2), beside, conv)
    assert isinstance(outcome, MergedLayer)
    x = torch.randn(3, 12, 7, 6, dtype=torch.float64)
    require_close(functional.conv2d(x, outcome.weight, outcome.bias, stride=2), conv(x) + beside(x), 1e-14)


@pytest.mark.parametrize(
    ("settings", "fits"),
    [({"groups": (4,)}, True), ({"groups": (2, 4)}, True), ({"groups": (1,)}, False), ({"groups": (3,)}, False)],
)
def test_a_grouped_conv_takes_up_what_lies_within_its_groups(settings: dict[str, Any], fits: bool) -> None:
    site, conv = map_site(groups=2), nn.Conv2d(12, 24, 1, groups=2).double()
    adapter = build(site, **settings).double()
    outcome = merged(site, adapter, conv)
    if not fits:
        assert isinstance(outcome, Regrouped) and outcome.groups == 1
        return
    x = torch.randn(2, 12, 7, 6, dtype=torch.float64)
    require_close(functional.conv2d(x, outcome.weight, outcome.bias, groups=2), conv(x) + adapter(x), 1e-14)
