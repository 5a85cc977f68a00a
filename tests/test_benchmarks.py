"""The benchmark's scripts run on a tiny model: contenders train what they should, and the counters count right."""

import importlib.util
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cadapt
from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import CONTENDERS, Runner, make_runner
from tests.benchmarks.grid import run_case
from tests.benchmarks.lora_peft import choose_ranks
from tests.benchmarks.places import classifier_of, find_family, find_modules
from tests.benchmarks.plots import draw
from tests.benchmarks.report import render
from tests.benchmarks.saved_bytes import count_saved_bytes
from tests.benchmarks.steps import cases_of, parse
from tests.benchmarks.timing import ratio
from tests.benchmarks.unavailable import Unavailable

TINY = Case(model="resnet14t", batch=2, size=32, classes=5)
FLOAT = 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model(TINY)


def runner(name: str, model: nn.Module) -> Runner:
    return make_runner(name, TINY, model)


def trained_names(found: Runner) -> set[str]:
    return {name for name, parameter in found.trained.model.named_parameters() if parameter.requires_grad}


def loss_of(found: Runner) -> torch.Tensor:
    return found.loss(*make_batches(TINY, 1)[0])


def count_trained(found: Runner) -> int:
    return sum(parameter.numel() for parameter in found.trained.model.parameters() if parameter.requires_grad)


# --- contenders


def test_full_trains_everything_and_linear_the_classifier_alone(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert trained_names(runner("full", model)) == names
    assert trained_names(runner("linear", model)) == {"fc.weight", "fc.bias"}


def test_the_papers_way_trains_as_many_parameters_as_cadapt_and_computes_the_same(model: nn.Module) -> None:
    paper, plain = runner("paper", model), runner("plain", model)
    assert count_trained(paper) == count_trained(plain)
    # both start with Δ = 0; train mode, batch norms frozen in both
    torch.testing.assert_close(loss_of(paper), loss_of(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet14t", "convnext_atto", "efficientnet_b0", "regnety_002"])
def test_the_papers_places_are_those_of_cadapt(name: str) -> None:
    with torch.device("meta"):
        base = timm.create_model(name)
    pattern = find_family(name).functional
    assert pattern is not None
    planned = [insertion.site.path for insertion in cadapt.insert(base, "conv-par").plan.insertions]
    assert sorted(find_modules(base, pattern)) == sorted(planned)


@pytest.mark.parametrize("name", ["full", "full-cl", "linear-cl", "paper-cl", "plain"])
def test_a_step_changes_what_trains_and_nothing_else(name: str, model: nn.Module) -> None:
    found = runner(name, model)
    before = {key: value.clone() for key, value in found.trained.model.named_parameters()}
    for batch in make_batches(TINY):
        assert math.isfinite(found.step(*batch))
    after = dict(found.trained.model.named_parameters())
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == trained_names(found)


def test_frozen_batch_norms_keep_their_statistics(model: nn.Module) -> None:
    for name in ("linear", "paper", "plain"):
        found = runner(name, model)
        before = {key: value.clone() for key, value in found.trained.model.named_buffers()}
        loss_of(found)
        assert all(torch.equal(value, before[key]) for key, value in found.trained.model.named_buffers()), name


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lora_trains_two_factors_on_each_conv_and_the_classifier(model: nn.Module) -> None:
    found = runner("lora", model)
    factors = {name for name in trained_names(found) if "lora_" in name}
    assert len(factors) == 2 * len(find_modules(model, r"layer\d\.\d+\.conv2"))
    assert {name.removeprefix("base_model.model.") for name in trained_names(found) - factors} == {
        "fc.weight",
        "fc.bias",
    }
    torch.testing.assert_close(loss_of(found), loss_of(runner("paper", model)), rtol=1e-5, atol=0)


def test_loras_rank_is_a_multiple_of_a_convs_groups() -> None:
    with torch.device("meta"):
        grouped, depthwise = timm.create_model("regnety_040"), timm.create_model("convnext_atto")
    ranks, note = choose_ranks(grouped, "regnety_040")
    assert all(rank % grouped.get_submodule(path).groups == 0 for path, rank in ranks.items())
    assert "groups" in note
    ranks, note = choose_ranks(depthwise, "convnext_atto")
    assert set(ranks.values()) == {8}
    assert not any("conv_dw" in path for path in ranks)
    assert "so many groups" in note


def test_an_engine_that_is_there_gives_the_plain_loss_and_gradients(model: nn.Module) -> None:
    try:
        engine = runner("engine", model)
    except Unavailable as reason:
        pytest.skip(str(reason))
    plain = runner("plain", model)
    for found in (engine, plain):
        loss_of(found).backward()
    assert trained_names(engine) == trained_names(plain)
    gradients = {name: parameter.grad for name, parameter in engine.trained.model.named_parameters()}
    for name, parameter in plain.trained.model.named_parameters():
        if parameter.requires_grad:
            difference = torch.linalg.vector_norm(gradients[name] - parameter.grad)
            assert difference <= 1e-4 * torch.linalg.vector_norm(parameter.grad), name


def test_a_model_of_tokens_has_no_other_memory_format() -> None:
    case = Case(model="vit_tiny_patch16_224", batch=1, size=32, classes=5)
    tokens = make_model(case)
    with pytest.raises(Unavailable, match="see 'full'"):
        make_runner("full-cl", case, tokens)
    with pytest.raises(Unavailable, match="the paper has no adapter"):
        make_runner("paper", case, tokens)


def test_the_model_is_the_same_each_time_and_lets_a_signal_through(model: nn.Module) -> None:
    again = make_model(TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    # timm would have the last norm of each branch at zero
    assert all(module.weight.min() > 0.4 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert classifier_of(model).out_features == TINY.classes


# --- counters


def test_saved_bytes_are_those_of_distinct_storages() -> None:
    images = torch.randn(2, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward() -> torch.Tensor:
        hidden = conv(images)
        return (hidden.relu() * hidden.relu()).sum()

    # the images for the weight, two ReLUs' outputs, each also a factor; weight and bias are the module's own
    expected = images.numel() + 2 * (2 * 4 * 8 * 8)
    assert count_saved_bytes(forward, [conv]).hooked == FLOAT * expected
    assert count_saved_bytes(forward, [conv]).hidden == 0


def test_a_frozen_conv_before_all_that_trains_keeps_nothing() -> None:
    images = torch.randn(2, 3, 8, 8)
    stem, head = nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Linear(4, 2)
    found = count_saved_bytes(lambda: head(stem(images).mean((2, 3))).sum(), [stem, head])
    assert found.total == FLOAT * 2 * 4


def test_what_checkpointing_keeps_is_not_hidden() -> None:
    first, block = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU())
    tokens = torch.randn(8, 16)

    def forward() -> torch.Tensor:
        return checkpoint(block, first(tokens) * 2, use_reentrant=False).sum()

    found = count_saved_bytes(forward, [first, block])
    # the tokens for the first layer's weight; the block's input, which checkpointing keeps by itself
    assert found.total == FLOAT * 2 * 8 * 16


def test_what_a_custom_function_keeps_on_its_context_is_not_hidden() -> None:
    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mask = x > 0
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.mask

    x = torch.randn(10, requires_grad=True)
    # clamp's own result is summed and not kept
    assert count_saved_bytes(lambda: Keeping.apply(x).sum(), []).hidden == 10


def test_ratios_are_of_pairs() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


# --- the run


def test_a_case_has_a_row_for_each_contender_a_table_and_plots(tmp_path) -> None:
    rows = run_case(TINY, ["full", "linear", "plain"], repeats=2, peaks=False)
    assert [row["contender"] for row in rows] == ["full", "linear", "plain"]
    for row in rows:
        assert row["status"] == "ok", row
        assert len(row["step_seconds"]) == 2
        assert all(math.isfinite(loss) for loss in row["losses"])
    assert rows[1]["saved"]["bytes"] < rows[2]["saved"]["bytes"] < rows[0]["saved"]["bytes"]
    machine = {"processor": "a processor", "accelerator": None, "threads": 1, "versions": {"torch": "2"}}
    table = render(rows, machine)
    assert table.count("\n| ") == 2 + len(rows)
    pytest.importorskip("matplotlib")
    assert all(path.stat().st_size for path in draw(rows, None, tmp_path))


def test_the_command_line_names_the_cases_of_the_report() -> None:
    asked = cases_of(
        parse(["--output", "x", "--device", "cpu", "--precisions", "fp32", "bf16", "--batches", "8", "64"])
    )
    assert len(asked) == 6 * 2 * 2
    grown = cases_of(parse(["--output", "x", "--device", "cpu", "--growth", "resolution"]))
    assert {case.model for case in grown} == {"resnet50"}
    assert len({case.size for case in grown}) == len(grown) > 1
    assert set(parse(["--output", "x"]).contenders) == set(CONTENDERS)
