"""The adapted model: an ordinary nn.Module that runs the base's graph with the adapters spliced in.

The base's modules hang at its root under their own names, so the base's state_dict keys are its keys; everything
new is under ``adapters``. The pristine graph is kept beside the spliced one: switched off, it computes the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from cadapt.errors import UsageError
from cadapt.graph.flatten import compile_graph, flatten, unflatten
from cadapt.plan import Plan
from cadapt.preprocessing import Preprocessing

ADAPTERS = "adapters"


class AdaptedModel(nn.Module):
    """A base with adapters; made by :func:`cadapt.surgery.operate`, never by hand.

    Maps pictures ``[B, C, H, W]``, normalised as ``preprocessing`` says, to logits ``[B, classes]``. ``plan`` is
    what was done; ``classes`` and ``training_record`` are filled by training.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        base_graph: fx.Graph,
        graph: fx.Graph,
        adapters: nn.Module,
        plan: Plan,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        assert not hasattr(base, ADAPTERS), f"{type(base).__name__} has a module of its own named {ADAPTERS}"
        self._modules.update(base._modules)
        self._parameters.update(base._parameters)
        self._buffers.update(base._buffers)
        self._non_persistent_buffers_set.update(base._non_persistent_buffers_set)
        self.add_module(ADAPTERS, adapters)
        self.plan = plan
        self.preprocessing = preprocessing
        self.classes: tuple[str, ...] = ()
        self.training_record: Mapping[str, Any] = {}
        self.graph = graph
        self.base_graph = base_graph
        self._tuned = frozenset(plan.trainable)
        self._enabled = True
        self._run = compile_graph(self, graph)
        self._run_base = compile_graph(self, base_graph)
        self._set_trainable()
        # a scheme that tunes the base's own tensors needs their first values to be switched off
        self._pristine = {name: tensor.detach().clone() for name, tensor in self._changing().items()}
        # modules of the base keep the mode they are in: who froze a part means it
        self.training = base.training
        adapters.train(base.training)
        self._freeze_norms()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, or the pristine base's while :func:`disabled`."""
        run = self._run if self._enabled else self._run_base
        result: torch.Tensor = run(self, x)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled functions, which cannot be pickled, and lay the graphs out flat."""
        state = {key: value for key, value in vars(self).items() if key not in ("_run", "_run_base")}
        return {**state, "graph": flatten(self.graph), "base_graph": flatten(self.base_graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build and compile them again."""
        state = {**state, "graph": unflatten(state["graph"]), "base_graph": unflatten(state["base_graph"])}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._run = compile_graph(self, self.graph)
        self._run_base = compile_graph(self, self.base_graph)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set train or eval mode; batch norms of the base keep their statistics where the plan freezes them."""
        super().train(mode)
        self._freeze_norms()
        return self

    def _freeze_norms(self) -> None:
        if self.plan.bn_policy == "frozen":
            for name, module in self.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith(f"{ADAPTERS}."):
                    module.training = False

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """What the adapter file holds: all tensors the plan trains, and the buffers that training changes.

        By the plan, not by ``requires_grad``: who freezes a part for a while still saves it.
        """
        trained = {name: tensor.detach() for name, tensor in self.named_parameters() if self._is_planned(name)}
        for name, buffer in self.named_buffers():
            if name.startswith(f"{ADAPTERS}.") or (self.plan.bn_policy == "train" and _is_statistic(self, name)):
                trained[name] = buffer.detach()
        return trained

    def _is_planned(self, name: str) -> bool:
        return name.startswith(f"{ADAPTERS}.") or name in self._tuned

    def _set_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._is_planned(name))

    def _changing(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.trained_tensors().items() if not name.startswith(f"{ADAPTERS}.")}


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Switch the adapters off: inside, the model computes exactly what its pristine base does.

    The model may be wrapped by ``torch.compile`` or for distributed training.

    Raises:
        UsageError: there is no adapted model inside.

    >>> import cadapt, timm, torch
    >>> base = timm.create_model("test_resnet").eval()
    >>> adapted = cadapt.insert(base, scheme="conv-par")
    >>> x = torch.randn(2, 3, 64, 64)
    >>> with cadapt.disabled(adapted):
    ...     torch.equal(adapted(x), base(x))
    True
    """
    adapted = _unwrapped(model)
    if not adapted._enabled:
        yield model
        return
    tuned = _swap(adapted, adapted._pristine)
    adapted._enabled = False
    try:
        yield model
    finally:
        adapted._enabled = True
        _swap(adapted, tuned)


def _unwrapped(model: nn.Module) -> AdaptedModel:
    inner: Any = model
    while not isinstance(inner, AdaptedModel):
        # torch.compile's and DistributedDataParallel's names for what they wrap
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if wrapped is None:
            raise UsageError(f"a {type(model).__name__} has no adapters to switch off", hint="cadapt.insert makes one")
        inner = wrapped
    return inner


@torch.no_grad()
def _swap(model: AdaptedModel, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give named tensors other values and return the ones they had."""
    if not values:
        return {}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    previous = {name: named[name].detach().clone() for name in values}
    for name, value in values.items():
        named[name].data.copy_(value)
    return previous


def _is_statistic(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.modules.batchnorm._BatchNorm)
