"""Counting right predictions with the task known and not, on models whose logits are written out; and the verdict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cadapt.combining.heads import join_heads
from cadapt.combining.judge import Judged, judge
from cadapt.combining.report import CombinationFigures, PairConflict, TaskFacts
from cadapt.combining.verdict import best_of, chosen_by, judge_measured, judge_vectors
from cadapt.errors import CadaptError
from tests.combining.cases import make_base, make_task

# two classes of the first task, then three of the second, for four pictures of the second
SIDE_BY_SIDE = torch.tensor(
    [
        [0.0, 0.0, 5.0, 1.0, 1.0],  # its first class, right either way
        [9.0, 0.0, 1.0, 5.0, 1.0],  # its second: right where the task is known, else taken for the other's first
        [0.0, 9.0, 1.0, 5.0, 1.0],  # its third, taken for its second; else for the other's second
        [0.0, 0.0, 1.0, 1.0, 5.0],  # its third, right either way
    ]
)
LABELS = torch.tensor([0, 1, 2, 2])


class Answers(nn.Module):
    """Gives the logits of the pictures whose numbers it is given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.logits[numbers.long().flatten()]


def judged(classes: tuple[str, str], logits: torch.Tensor = SIDE_BY_SIDE) -> Judged:
    base = make_base()
    tasks = {name: make_task(base, "linear", names, task=1) for name, names in zip(("a", "b"), classes, strict=True)}
    joined = join_heads(tasks, (0.25, 0.75))
    first = len(classes[0])
    numbers = torch.arange(4).reshape(4, 1)
    return judge(
        Answers(torch.eye(logits.shape[1] - first)[torch.tensor([0, 1, 2, 0])]),
        {"method": Answers(logits)},
        [(numbers[:3], LABELS[:3]), (numbers[3:], LABELS[3:])],
        columns=slice(first, logits.shape[1]),
        task=1,
        joined=joined if not hasattr(joined, "reason") else None,
        device=torch.device("cpu"),
    )


def test_a_task_is_judged_among_its_own_classes_and_among_all() -> None:
    found = judged(("xy", "pqr"))
    assert (found.images, found.alone, found.known["method"], found.open["method"]) == (4, 0.75, 0.75, 0.5)


def test_common_classes_in_another_order_are_averaged_by_weight() -> None:
    """The second task's classes are r, p and q of the first's p, q and r."""
    first = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 9, 0], [0, 0, 0]])  # pulls the third picture to q, weight 1/4
    own = torch.tensor([[5, 1, 1], [1, 5, 1], [1, 5, 1], [1, 1, 5]])
    found = judged(("pqr", "rpq"), torch.cat([first, own], dim=1).double())
    assert (found.known["method"], found.open["method"]) == (0.75, 0.75)
    pulled = torch.cat([first * 2, own], dim=1).double()
    assert judged(("pqr", "rpq"), pulled).open["method"] == 1.0


def test_outputs_that_are_no_numbers_and_no_pictures() -> None:
    with pytest.raises(CadaptError, match="no numbers"):
        judged(("xy", "pqr"), SIDE_BY_SIDE * float("nan"))
    nothing = judge(
        Answers(SIDE_BY_SIDE), {}, [(torch.zeros(1), LABELS[:1])], columns=slice(0, 2), task=0, joined=None,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert (nothing.images, nothing.known) == (1, {})
    with pytest.raises(CadaptError, match="no pictures"):
        judge(Answers(SIDE_BY_SIDE), {}, [], columns=slice(0, 2), task=0, joined=None, device=torch.device("cpu"))


def facts(name: str, top1: float) -> TaskFacts:
    return TaskFacts(name=name, scheme="lora", classes=2, seed=0, folded=1, kept=0, norm=1.0, top1=top1)


def figures(name: str, known: tuple[float, ...], over_all: tuple[float | None, ...]) -> CombinationFigures:
    return CombinationFigures(method=name, settings="", known=known, open=over_all)


@pytest.mark.parametrize(
    ("known", "over_all", "words"),
    [
        ((0.90, 0.79), (0.6, 0.4), "they combine well"),
        ((0.99, 0.75), (0.6, 0.5), "they combine well"),
        ((0.99, 0.74), (0.6, 0.5), "at a loss"),
        ((0.88, 0.77), (0.6, 0.5), "at a loss"),
        ((0.99, 0.69), (0.6, 0.5), "better keep them apart"),
        ((0.83, 0.74), (0.6, 0.5), "better keep them apart"),
        ((0.90, 0.79), (0.6, 0.39), "only where the task is known"),
        ((0.93, 0.82), (0.85, 0.0), "only where the task is known"),
    ],
)
def test_the_verdict_goes_by_the_worst_task(
    known: tuple[float, float], over_all: tuple[float, float], words: str
) -> None:
    said = judge_measured((facts("one", 0.9), facts("two", 0.8)), figures("ties", known, over_all))
    assert words in said.partition(":")[0]
    lost, name = max((0.9 - known[0], "one"), (0.8 - known[1], "two"))
    assert f"{100 * abs(lost):.1f} points, on {name}" in said
    assert ("at worst gains" in said) == (lost < -1e-12)
    assert f"{50 * sum(over_all):.1f} % on average and at worst on {100 * over_all[1]:.1f} %, on two" in said


def test_the_verdict_says_nothing_of_all_classes_where_no_head_has_them() -> None:
    said = judge_measured((facts("one", 0.9), facts("two", 0.8)), figures("ties", (0.9, 0.8), (None, None)))
    assert "they combine well" in said and "all classes" not in said


def test_the_best_is_the_best_for_the_task_that_fares_worst_over_all_classes() -> None:
    lopsided = figures("lopsided", (0.99, 0.99), (0.85, 0.0))
    even, better = figures("even", (0.7, 0.8), (0.4, 0.3)), figures("better", (0.9, 0.7), (0.3, 0.3))
    assert best_of([lopsided, even, better]) is better
    assert "over all classes" in chosen_by([lopsided])
    assert best_of([]) is None and "nothing was measured" in chosen_by([])


def test_without_a_head_for_all_the_best_is_the_best_for_the_worst_task() -> None:
    lopsided, even = figures("lopsided", (1.0, 0.5), (None, None)), figures("even", (0.7, 0.6), (None, None))
    assert best_of([lopsided, even]) is even
    assert "over all classes" not in chosen_by([lopsided])


@pytest.mark.parametrize(
    ("cosine", "words"), [(0.5, "the same way"), (0.0, "right angles"), (-0.5, "against"), (None, "nothing to compare")]
)
def test_the_verdict_without_pictures_goes_by_the_angle(cosine: float | None, words: str) -> None:
    conflict = None if cosine is None else 0.5 - cosine / 2
    pair = PairConflict(
        first="a", second="b", cosine=cosine, sign_conflict=conflict, cancelled=cosine, norm_ratio=cosine
    )
    said = judge_vectors([pair])
    assert words in said and "over all classes, is not known without pictures" in said
