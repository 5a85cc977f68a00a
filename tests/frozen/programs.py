"""Toys as adapted models, programs run at any stage, and the adapted model's own results to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cadapt.adapted import AdaptedModel
from cadapt.frozen.program import Program
from cadapt.graph.flatten import compile_graph
from cadapt.graph.trace import trace
from cadapt.plan import Base, BnPolicy, Plan
from cadapt.preprocessing import Preprocessing
from tests.contract.cases import adapt
from tests.models import enliven, randomise

EXACT = 1e-12
"""How far apart two orders of the same sums may be in fp64, relative to the largest number."""

Run = Callable[[Tensor], Tensor]


def toy(
    base: nn.Module, *trainable: str, side: int = 8, channels: int = 3, bn_policy: BnPolicy = "frozen", seed: int = 0
) -> AdaptedModel:
    """A module as an adapted model in fp64 and eval mode, whose tensors of these names train, or below these paths."""
    randomise(base, seed).double().eval()
    names = [name for name, _ in base.named_parameters()]
    unknown = [item for item in trainable if not any(_below(name, item) for name in names)]
    assert not unknown, unknown
    return AdaptedModel(
        base,
        base_graph=trace(base),
        graph=trace(base),
        adapters=nn.Module(),
        plan=Plan(
            base=Base(name="toy", source="given", parameters=len(names), sha256="0" * 64),
            scheme="full",
            trainable=tuple(name for name in names if any(_below(name, item) for item in trainable)),
            bn_policy=bn_policy,
        ),
        preprocessing=Preprocessing(input_size=(channels, side, side)),
    )


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def adapted(trait: str, scheme: str, classes: int | None = None) -> AdaptedModel:
    """A tiny base with lively adapters, in fp64 and eval mode."""
    model = adapt(trait, scheme, classes)[2].double()
    enliven(model.adapters)
    return model


def pictures(model: AdaptedModel, batch: int = 2) -> Tensor:
    """Random pictures of the model's own size and dtype that need a gradient themselves."""
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, *model.preprocessing.input_size, dtype=dtype).requires_grad_()


def measured(model: AdaptedModel, *passes: Callable[[Program], object]) -> Program:
    """A model's program after some passes, measured before each."""
    program = Program(model)
    for step in passes:
        program.measure()
        step(program)
    program.measure()
    return program


def running(program: Program) -> Run:
    """The program as a function, whatever stage it is at."""
    run = compile_graph(program.root, program.graph)
    return lambda x: run(program.root, x)


def results(run: Run, model: AdaptedModel, x: Tensor) -> dict[str, Tensor]:
    """What a run gives, and the gradients of a loss on every logit: of all that trains, and of the pictures."""
    named = {name: item for name, item in model.named_parameters() if item.requires_grad}
    y = run(x)
    loss = (y * torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().mean()
    wanted = {**named, **({"pictures": x} if x.requires_grad else {})}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    present = {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return {"logits": y.detach(), **present}


def assert_equal_results(
    run: Run, model: AdaptedModel, x: Tensor | None = None, tolerance: float = EXACT, seed: int = 0
) -> None:
    """A run gives the model's own logits and gradients, from the same random numbers."""
    x = pictures(model) if x is None else x
    torch.manual_seed(seed)
    expected = results(model, model, x)
    torch.manual_seed(seed)
    found = results(run, model, x)
    assert found.keys() == expected.keys()
    off = {name: _difference(found[name], expected[name]) for name in expected}
    assert {name: value for name, value in off.items() if not value <= tolerance} == {}


def assert_unchanged(program: Program, x: Tensor | None = None, tolerance: float = EXACT) -> None:
    """A program computes what its model does, at whatever stage it is."""
    assert_equal_results(running(program), program.model, x, tolerance)


def _difference(ours: Tensor, reference: Tensor) -> float:
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max().clamp(min=1e-30))


def called(program: Program) -> list[object]:
    """What the program's nodes call, in order: functions, names of methods, types of modules."""
    return [
        type(program.root.get_submodule(str(node.target))) if node.op == "call_module" else node.target
        for node in program.graph.nodes
        if node.op.startswith("call_")
    ]


def count(program: Program, *targets: object) -> int:
    """How many nodes call one of these."""
    return sum(target in targets for target in called(program))


def saved(run: Run, x: Tensor, own: Sequence[Tensor] = ()) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what autograd keeps over a run, each memory once, the given tensors' left out."""
    known = {item.untyped_storage()._cdata for item in own}
    found: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in known:
            found.setdefault(place, (tuple(tensor.shape), tensor.dtype))
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = run(x)
    del y
    return list(found.values())
