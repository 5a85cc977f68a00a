"""Task vectors: what training on a task changed, as one list of numbers that can be added to another task's.

Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2: τ = θ_trained − θ_initial. Where an
adapter folds into a layer of the base, θ is that layer's weight and bias, so that adapters of different schemes have
vectors of one space. Where it does not, θ is the adapter's own parameters, and the vectors are comparable only between
equal adapters, which is checked in :mod:`cadapt.combining.assemble`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.errors import RefusedError
from cadapt.making import make_adapter
from cadapt.merging.exact import fold_exact
from cadapt.merging.report import SiteMerge
from cadapt.plan import Insertion
from cadapt.surgery import adapter_path

# a tensor's name in the model, and its values in fp64 on the CPU; a name that is not there stands for zeros
Vector = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskVector:
    """One task's vector, in two parts, and what is needed to build a model from a combination.

    ``differences`` are of the base's own tensors, ``adapters`` of the parameters of the ``insertions`` that do not
    fold, whose values before training are ``initial``. ``statistics`` are the batch statistics where training changed
    them, less the base's. ``schemes`` names, for a place, the scheme whose adapter folded there.
    """

    differences: Vector
    adapters: Vector
    initial: Vector
    statistics: Vector
    insertions: tuple[Insertion, ...]
    reasons: tuple[str, ...]
    schemes: Mapping[str, str]

    @property
    def entries(self) -> dict[str, torch.Tensor]:
        """The vector as a whole."""
        return {**self.differences, **self.adapters}

    def times(self, weight: float) -> TaskVector:
        """The vector as it enters a sum."""
        differences = {name: weight * value for name, value in self.differences.items()}
        return replace(
            self, differences=differences, adapters={name: weight * value for name, value in self.adapters.items()}
        )


@torch.no_grad()
def task_vector(model: AdaptedModel) -> TaskVector:
    """Compute a trained model's task vector in fp64; the model is left as it was.

    Raises:
        RefusedError: an adapter that does not fold keeps statistics beside its parameters.
    """
    exact = copy.deepcopy(model).cpu().double().eval()
    base = _base_tensors(exact)
    folded = fold_exact(exact, as_deltas=True)
    merged = {name: value for name, value in _tensors(folded.model).items() if not name.startswith(f"{ADAPTERS}.")}
    changed = {name: value - base[name] if name in base else value for name, value in merged.items()}
    statistics = {name for name, _ in folded.model.named_buffers()}
    staying = [(at, row) for at, row in zip(model.plan.insertions, folded.rows, strict=True) if row.status != "exact"]
    initial, adapters = _staying(model, [insertion for insertion, _ in staying])
    return TaskVector(
        differences={name: value for name, value in changed.items() if name not in statistics and bool(value.any())},
        adapters=adapters,
        initial=initial,
        statistics={name: value for name, value in changed.items() if name in statistics and bool(value.any())},
        insertions=tuple(insertion for insertion, _ in staying),
        reasons=tuple(row.reason for _, row in staying),
        schemes=_schemes(model.plan.insertions, folded.rows),
    )


def _schemes(insertions: Sequence[Insertion], rows: Sequence[SiteMerge]) -> dict[str, str]:
    """Which scheme folded into which layer; several are joined as on the command line."""
    found: dict[str, str] = {}
    for insertion, row in zip(insertions, rows, strict=True):
        if row.status == "exact":
            earlier = found.get(insertion.site.path)
            found[insertion.site.path] = f"{earlier}+{insertion.scheme}" if earlier else insertion.scheme
    return found


def _tensors(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """Parameters and floating buffers by name, those under several names once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def _base_tensors(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """The base's tensors as they were before the task changed any."""
    pristine = {name: value.cpu().double() for name, value in model._pristine.items() if value.is_floating_point()}
    return {**_tensors(model), **pristine}


def _staying(
    model: AdaptedModel, insertions: Iterable[Insertion]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters of adapters before training, and what training added to them."""
    initial, learned = {}, {}
    for insertion in insertions:
        path = adapter_path(insertion)
        adapter = model.get_submodule(path)
        if any(True for _ in adapter.buffers()):
            raise RefusedError(f"cannot combine {insertion.scheme} at '{insertion.site.name}': it keeps statistics")
        first = dict(make_adapter(insertion, model.plan.seed, model).named_parameters())
        for name, parameter in adapter.named_parameters():
            initial[f"{path}.{name}"] = first[name].detach().cpu().double()
            learned[f"{path}.{name}"] = parameter.detach().cpu().double() - initial[f"{path}.{name}"]
    return initial, learned


def place_of(name: str, insertions: Iterable[Insertion]) -> str:
    """What a report calls the place of a tensor: an adapter's site, else the layer the tensor belongs to."""
    for insertion in insertions:
        if name.startswith(f"{adapter_path(insertion)}."):
            return insertion.site.name
    return name.rpartition(".")[0] or name


def norm(vector: Vector) -> float:
    """The Euclidean norm of a vector."""
    return math.sqrt(sum(float(value.square().sum()) for value in vector.values()))


def weighted_sum(vectors: Sequence[Vector], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Σ w_t τ_t, entry by entry."""
    total: dict[str, torch.Tensor] = {}
    for vector, weight in zip(vectors, weights, strict=True):
        for name, value in vector.items():
            part = weight * value
            total[name] = total[name] + part if name in total else part
    return total
