"""Latency is measured in fair turns and told in ratios: the loop by a made-up clock, the statistics on made-up times.

How fast anything really is, no test asks: two sessions run a tiny file to see that all of it holds together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.errors import UsageError
from cadapt.export import compare_models, measure_latency
from cadapt.export.latency import FEWEST_TURNS, ratios_of, spread_of_median, summarise, take_turns
from cadapt.merging import merge
from cadapt.merging.forms import forms_of
from tests.merging.cases import toy, trained
from tests.models import make_images

TURNS = 101


@dataclass
class Machine:
    """A clock that only models' runs move on, as a pace of the machine says that changes with the time of day."""

    pace: Callable[[float], float] = lambda now: 1.0
    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def model(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds * self.pace(self.now)

        return run

    def measure(self, **seconds: float) -> dict[str, list[float]]:
        runs = {name: self.model(name, each) for name, each in seconds.items()}
        return take_turns(runs, turns=TURNS, seconds=1e9, clock=self.clock)


def ratio(taken: dict[str, list[float]], name: str = "merged") -> tuple[float, float, float]:
    found = summarise(name, taken, nodes=1, size_bytes=1)
    return found.ratio_low, found.ratio, found.ratio_high


# --- the statistics


def test_the_base_is_its_own_measure() -> None:
    taken = {"base": [0.010, 0.030, 0.020], "merged": [0.011, 0.033, 0.022]}
    assert ratio(taken, "base") == (1.0, 1.0, 1.0)
    found = summarise("merged", taken, nodes=7, size_bytes=9)
    assert found.ratio == pytest.approx(1.1, rel=1e-12)
    assert found.milliseconds == pytest.approx(22.0, rel=1e-12)
    assert (found.name, found.nodes, found.bytes) == ("merged", 7, 9)


def test_ratios_are_of_the_same_turn() -> None:
    # medians by themselves would be 0.02 and 0.02
    taken = {"base": [0.01, 0.02, 0.04], "merged": [0.02, 0.04, 0.02]}
    assert ratios_of(taken, "merged") == [2.0, 2.0, 0.5]
    assert ratio(taken)[1] == 2.0


def test_quartiles_are_those_of_the_turns() -> None:
    taken = {"base": [1.0] * 5, "merged": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert ratio(taken) == (2.0, 3.0, 4.0)


def test_a_few_disturbed_turns_change_nothing() -> None:
    taken = {"base": [0.01] * 40, "merged": [0.0101] * 40}
    for turn in (3, 17, 18, 30):
        taken["merged"][turn] = 0.5
        taken["base"][turn + 2] = 0.4
    assert ratio(taken)[1] == pytest.approx(1.01, rel=1e-12)
    assert spread_of_median(ratios_of(taken, "merged")) == pytest.approx(0, abs=1e-12)


def test_the_spread_of_the_median_is_that_of_repeated_samples() -> None:
    draw, count = random.Random(0), 81
    samples = [[draw.gauss(1, 0.05) for _ in range(count)] for _ in range(400)]
    medians = torch.tensor([sorted(sample)[count // 2] for sample in samples])
    told = torch.tensor([spread_of_median(sample) for sample in samples]).mean()
    assert float(told) == pytest.approx(float(medians.std()), rel=0.15)


# --- the turns


def test_equal_models_come_out_equal_and_others_as_they_are() -> None:
    taken = Machine().measure(base=0.020, adapted=0.030, merged=0.020)
    assert ratio(taken, "merged") == pytest.approx((1.0, 1.0, 1.0), rel=1e-9)
    assert ratio(taken, "adapted")[1] == pytest.approx(1.5, rel=1e-9)


@pytest.mark.parametrize(
    "pace",
    [
        pytest.param(lambda now: 1 + now / 3, id="slower-and-slower"),
        pytest.param(lambda now: 3.0 if now % 1.7 < 0.6 else 1.0, id="busy-for-a-while-again-and-again"),
    ],
)
def test_what_disturbs_all_models_cancels(pace: Callable[[float], float]) -> None:
    taken = Machine(pace=pace).measure(base=0.020, adapted=0.030, merged=0.020)
    assert ratio(taken, "merged")[1] == pytest.approx(1.0, rel=0.03)
    assert ratio(taken, "adapted")[1] == pytest.approx(1.5, rel=0.03)


def test_noise_of_each_run_averages_out() -> None:
    draw = random.Random(1)
    taken = Machine(pace=lambda now: draw.lognormvariate(0, 0.05)).measure(base=0.02, merged=0.0204)
    assert ratio(taken)[1] == pytest.approx(1.02, abs=4 * spread_of_median(ratios_of(taken, "merged")))
    assert 0.005 < spread_of_median(ratios_of(taken, "merged")) < 0.02


def test_each_turn_runs_every_model_in_another_order() -> None:
    # long runs are timed singly, after one that is not timed
    machine = Machine()
    machine.measure(base=0.1, adapted=0.1, merged=0.1)
    turns = machine.log[12:]
    assert [turns[place] for place in range(0, len(turns), 2)] == turns[1::2]
    orders = [tuple(turns[place : place + 6 : 2]) for place in range(0, len(turns), 6)]
    assert {frozenset(order) for order in orders} == {frozenset({"base", "adapted", "merged"})}
    assert len(set(orders)) > 1
    again = Machine()
    again.measure(base=0.1, adapted=0.1, merged=0.1)
    assert again.log == machine.log


def test_short_runs_are_timed_together() -> None:
    machine = Machine()
    taken = machine.measure(base=0.0011, merged=0.02)
    turns = len(taken["base"])
    # five to reach five milliseconds, one that is not timed
    assert machine.log.count("base") == 4 + 6 * turns
    assert machine.log.count("merged") == 4 + 2 * turns
    assert taken["base"] == pytest.approx([0.0011] * turns, rel=1e-9)


def test_it_ends_when_the_ratio_is_known_or_the_time_is_up() -> None:
    assert len(Machine().measure(base=0.02, merged=0.03)["base"]) == FEWEST_TURNS
    draw = random.Random(2)
    restless = Machine(pace=lambda now: draw.lognormvariate(0, 0.5))
    assert len(restless.measure(base=0.02, merged=0.03)["base"]) == TURNS
    runs = {"base": restless.model("base", 0.02), "merged": restless.model("merged", 0.03)}
    hurried = take_turns(runs, turns=TURNS, seconds=2.0, clock=restless.clock)
    assert FEWEST_TURNS <= len(hurried["base"]) < TURNS


# --- files and models


def tiny_file(side: int) -> bytes:
    """Three nodes, made without torch's exporter: ReLU, mean over the positions, and a matrix."""
    sizes = ["batch", 3, side, side]
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["image"], ["hidden"]),
            helper.make_node("ReduceMean", ["hidden", "axes"], ["pooled"], keepdims=0),
            helper.make_node("MatMul", ["pooled", "weight"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("weight", TensorProto.FLOAT, [3, 2], [1.0] * 6),
        ],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    data: bytes = model.SerializeToString()
    return data


def test_two_sessions_of_one_file() -> None:
    data = tiny_file(8)
    found = measure_latency({"base": data, "merged": data}, input_size=(3, 8, 8), batch_size=2, turns=5, threads=1)
    base, merged = found.models
    assert (found.batch_size, found.threads, found.turns) == (2, 1, 5)
    assert "onnxruntime" in found.runtime
    assert base.ratio == 1.0
    assert base.milliseconds > 0
    assert merged.ratio_low <= merged.ratio <= merged.ratio_high
    assert (base.nodes, base.bytes) == (merged.nodes, merged.bytes) == (3, len(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"merged": b""}}, "against the model 'base', got merged"),
        ({"models": {}}, "got no model"),
        ({"models": {"base": b"", "folded": b""}}, "unknown model 'folded'.*expected base, adapted"),
        ({"batch_size": 0}, "batch_size 0, expected at least 1"),
        ({"turns": 1}, "turns 1, expected at least 2"),
        ({"threads": 0}, "threads 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_told_before_anything_runs(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"models": {"base": b""}, "input_size": (3, 8, 8), **changes}
    with pytest.raises(UsageError, match=message):
        measure_latency(**arguments)  # type: ignore[arg-type]


def small(scheme: str, **settings: object) -> tuple[AdaptedModel, AdaptedModel]:
    """A trained-like model around one conv and a batch norm, and what merging makes of it."""
    adapted = trained(toy(nn.Conv2d(8, 8, 3, padding=1), norm=True), scheme, **settings)
    return adapted, merge(adapted)[0]


def test_a_merge_is_compared_with_its_base() -> None:
    adapted, merged = small("conv-par", activation="identity")
    forms = forms_of(adapted, merged)
    preprocessing = adapted.preprocessing
    said: list[str] = []
    found = compare_models(
        forms, preprocessing=preprocessing, classes=[str(place) for place in range(5)], seconds=0.1,
        on_progress=said.append,
    )  # fmt: skip
    nodes = {model.name: model.nodes for model in found.models}
    assert list(nodes) == ["base", "adapted", "simplified", "merged"]
    # Δ = α·PW(DW(h)): a conv after the other, times α, and the sum; α goes into PW
    assert nodes["adapted"] - nodes["simplified"] == len(adapted.plan.insertions)
    assert nodes["merged"] == nodes["base"] < nodes["simplified"]
    assert [line.split()[2] for line in said[:-1]] == list(nodes)


# --- the forms


def test_the_forms_compute_the_same_but_for_the_base() -> None:
    adapted, merged = small("conv-par", activation="identity")
    images = make_images("plain")
    with torch.no_grad():
        outputs = {name: form(images) for name, form in forms_of(adapted, merged).items()}
        expected = adapted(images)
    scale = expected.abs().max()
    for name in ("adapted", "simplified", "merged"):
        assert (outputs[name] - expected).abs().max() < 1e-4 * scale, name
    assert (outputs["base"] - expected).abs().max() > 0.01 * scale
    assert outputs["base"].shape == expected.shape


def test_forms_that_are_one_are_not_there_twice() -> None:
    simplified = forms_of(*small("conv-par"))
    assert list(simplified) == ["base", "adapted", "merged"]
    # it has no α
    assert list(forms_of(*small("residual-par"))) == ["base", "adapted", "merged"]
    assert {parameter.dtype for form in simplified.values() for parameter in form.parameters()} == {torch.float32}


@pytest.mark.parametrize("scheme", ["ssf", "bias"])
def test_the_base_among_them_is_untouched(scheme: str) -> None:
    adapted, merged = small(scheme)
    base = forms_of(adapted, merged)["base"]
    assert not base.plan.insertions and not base.plan.deltas
    own = {name: value for name, value in base.named_parameters() if not name.startswith("adapters.")}
    given = dict(adapted.named_parameters())
    for name, value in own.items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=0)
