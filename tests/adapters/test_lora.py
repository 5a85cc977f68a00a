"""LoRA against W + s·B A written out; ranks, groups and counts; folding into convs and linear layers."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters import get_scheme
from cadapt.adapters.lora import Lora
from cadapt.backbone import Backbone, describe_model
from cadapt.errors import UsageError
from cadapt.planning import Survey, plan_insertions, survey
from cadapt.site import Site
from cadapt.surgery import operate
from tests.adapters.places import assert_near, conv_site, linear_site
from tests.merging.cases import same_padded, toy
from tests.models import enliven, surveyed

METHOD = get_scheme("lora")
CONVS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "no bias": lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(8, 8, 5, padding=2, stride=2),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "valid": lambda: nn.Conv2d(8, 8, 3, stride=2),
    "patches": lambda: nn.Conv2d(8, 12, 2, stride=2),
    "oblong": lambda: nn.Conv2d(8, 8, (1, 5), padding=(0, 2)),
    "one by one": lambda: nn.Conv2d(8, 12, 1, stride=2),
    "same, strided": lambda: same_padded(kernel_size=3, stride=2),
    "padding='same'": lambda: nn.Conv2d(8, 8, 5, padding="same"),
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "depth-wise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "depth-wise, multiplied": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
}


def build(site: Site, **settings: Any) -> Lora:
    config = METHOD.configure(settings)
    assert METHOD.fits(site, "parallel", config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = METHOD.build(site, "parallel", config)
    enliven(adapter, scale=0.3)
    assert isinstance(adapter, Lora)
    return adapter.eval()


def dense_update(adapter: Lora, conv: nn.Conv2d, scale: float) -> torch.Tensor:
    """s · B A as the kernel of a conv without groups, [C_out, C_in, K, K], one group after the other."""
    tensors = dict(adapter.named_parameters())
    up, down = tensors["up.weight"][:, :, 0, 0], tensors["down.weight"]
    outs, ins, rank = conv.out_channels // conv.groups, conv.in_channels // conv.groups, up.shape[1]
    rows = []
    for output in range(conv.out_channels):
        group = output // outs
        part = torch.einsum("r,rchk->chk", up[output], down[group * rank : (group + 1) * rank])
        rows.append(F.pad(part, (0, 0, 0, 0, group * ins, conv.in_channels - (group + 1) * ins)))
    return scale * torch.stack(rows)


def by_columns(x: torch.Tensor, kernel: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A dense kernel on the patches that a conv sees, padded by hand."""
    shape = conv(x).shape
    pads = []
    for axis in (1, 0):
        reach, stride = conv.dilation[axis] * (conv.kernel_size[axis] - 1), conv.stride[axis]
        if isinstance(conv, Conv2dSame) or conv.padding == "same":
            needed = max((shape[2 + axis] - 1) * stride + reach + 1 - x.shape[2 + axis], 0)
            pads += [needed // 2, needed - needed // 2]
        else:
            pads += 2 * [int(conv.padding[axis])]
    columns = F.unfold(F.pad(x, pads), conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return (kernel.flatten(1) @ columns).reshape(len(x), -1, *shape[2:])


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "alpha": 5.0}], ids=["defaults", "scaled"])
@pytest.mark.parametrize("case", CONVS)
def test_on_convs_it_computes_the_formula(case: str, settings: dict[str, Any]) -> None:
    conv = CONVS[case]()
    adapter = build(conv_site(conv), **settings)
    scale = settings["alpha"] / settings["rank"] if settings else 1.0
    x = torch.randn(2, 8, 13, 13, generator=torch.Generator().manual_seed(0), requires_grad=True)
    _assert_equal(adapter(x), by_columns(x, dense_update(adapter, conv, scale), conv), [x, *adapter.parameters()])


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "alpha": 5.0}], ids=["defaults", "scaled"])
@pytest.mark.parametrize("layout", ["NC", "NLC", "NHWC"])
def test_on_linear_layers_it_computes_the_formula(layout: str, settings: dict[str, Any]) -> None:
    site = linear_site(layout)
    adapter: Any = build(site, **settings)
    scale = settings["alpha"] / settings["rank"] if settings else 1.0
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = scale * torch.einsum("or,rc,...c->...o", adapter.up.weight, adapter.down.weight, x)
    _assert_equal(adapter(x), wanted, [x, *adapter.parameters()])


def _assert_equal(got: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    assert_near(got, wanted)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(wanted, inputs, cotangent), strict=True
    ):
        assert_near(one, other)


def test_convs_on_maps_with_channels_last() -> None:
    site = conv_site(CONVS["strided"]())
    first, last = build(site), build(replace(site, layout="NHWC", in_shape=(13, 13, 8), out_shape=(7, 7, 8)))
    x = torch.randn(2, 8, 13, 13, generator=torch.Generator().manual_seed(0))
    assert_near(last(x.movedim(1, -1)), first(x).movedim(1, -1))


def test_it_starts_at_zero_with_a_live_down_projection() -> None:
    adapter: Any = METHOD.build(linear_site("NLC"), "parallel", METHOD.configure({}))
    assert not adapter.up.weight.any()
    # kaiming uniform as layers usually start: within 1/√fan_in, and filling it
    assert 0.8 < float(adapter.down.weight.detach().abs().max()) * 12**0.5 <= 1.0


def test_dropout_works_in_training_only() -> None:
    adapter = build(linear_site("NLC"), dropout=0.5)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    plain = adapter(x)
    assert torch.equal(adapter(x), plain)
    adapter.train()
    torch.manual_seed(0)
    with torch.no_grad():
        many = torch.stack([adapter(x) for _ in range(200)])
    assert float((many - plain.detach()).abs().max()) > 0.1
    # dropped values are made up for: the mean stays
    assert float((many.mean(0) - plain.detach()).norm()) < 0.2 * float(plain.detach().norm())


@pytest.mark.parametrize(
    ("conv", "rank"),
    [
        (nn.Conv2d(64, 64, 1), 8),
        (nn.Conv2d(64, 64, 3), 8),
        # 4·36 weights in a group, 40 numbers for each rank
        (nn.Conv2d(128, 128, 3, groups=32), 3),
        (nn.Conv2d(16, 16, 7, groups=16), 1),
        # a full update of 8·4 weights would be cheaper than any rank above 2
        (nn.Conv2d(8, 4, 1), 2),
    ],
)
def test_no_update_is_larger_than_the_weight_but_of_rank_one(conv: nn.Conv2d, rank: int) -> None:
    adapter = build(conv_site(conv))
    counted = sum(parameter.numel() for parameter in adapter.parameters())
    per_channel = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    assert counted == rank * (per_channel + conv.out_channels)
    assert rank == 1 or counted <= conv.weight.numel()


@functools.cache
def meta_base(name: str) -> tuple[Backbone, Survey]:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    backbone = describe_model(model, 224)
    return backbone, survey(backbone)


def count(name: str, **settings: Any) -> tuple[int, int]:
    """How many sites LoRA has on a base, and parameters."""
    backbone, sites = meta_base(name)
    plan = plan_insertions(backbone, "lora", settings, surveyed=sites)
    model = operate(backbone, plan, sites)
    return len(plan.insertions), sum(parameter.numel() for parameter in model.adapters.parameters())


@pytest.mark.parametrize(("name", "sites"), [("resnet50", 52), ("resnext50_32x4d", 52), ("convnext_tiny", 57)])
def test_parameters_of_convnets_are_those_of_the_formula(name: str, sites: int) -> None:
    wanted = 0
    for path, module in meta_base(name)[0].model.named_modules():
        if path in ("conv1", "stem.0", "fc", "head.fc") or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        rows, columns = module.weight.shape[0] // groups, module.weight[0].numel()
        rank = max(1, min(8, rows * columns // (rows + columns)))
        wanted += groups * rank * (rows + columns)
    assert count(name) == (sites, wanted)


def test_parameters_of_resnet50_and_a_vit() -> None:
    # by hand: r(C_in K² + C_out) of each conv; the four layers of a block of width 768
    blocks = 0
    for stage, depth in enumerate((3, 4, 6, 3)):
        middle, out = 64 << stage, 256 << stage
        first = 64 if stage == 0 else out // 2
        for index in range(depth):
            before = first if index == 0 else out
            blocks += (before + middle) + (9 * middle + middle) + (middle + out)
        blocks += first + out
    assert count("resnet50") == (52, 8 * blocks)
    assert count("vit_base_patch16_224") == (48, 12 * 8 * (768 * 4 + 768 * 2 + 2 * 768 * 5)) == (48, 1_179_648)
    assert count("vit_base_patch16_224", rank=1)[1] == 1_179_648 // 8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": "nan"}, "alpha is nan"),
        ({"dropout": 1}, "dropout is 1"),
        ({"r": 4}, "no setting 'r'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        METHOD.configure(settings)
    assert raised.value.hint


def test_a_grid_that_the_kernel_does_not_give_is_refused() -> None:
    site = replace(conv_site(nn.Conv2d(8, 8, 3, padding=1)), out_shape=(8, 6, 6))
    reason = METHOD.fits(site, "parallel", METHOD.configure({}))
    assert reason is not None and "13×13 grid to 13×13, not to 6×6" in reason


def test_every_layer_of_a_block_is_adapted_and_the_stem_and_the_classifier_are_not() -> None:
    backbone, sites = surveyed("windowed")
    paths = [item.site.path for item in plan_insertions(backbone, "lora", surveyed=sites).insertions]
    linears = [path for path, module in backbone.model.named_modules() if isinstance(module, nn.Linear)]
    assert paths == [path for path in linears if ".blocks." in path]
    backbone, sites = toy(nn.Conv2d(8, 8, 3, padding=1))
    paths = [item.site.path for item in plan_insertions(backbone, "lora", surveyed=sites).insertions]
    assert sorted(paths) == ["blocks.0.conv", "blocks.0.project"]
