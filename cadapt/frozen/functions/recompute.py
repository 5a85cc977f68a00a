"""Run a stretch of a model without keeping anything inside it, and run it again in backward (Chen et al. 2016).

Unlike `torch.utils.checkpoint`, what the stretch reads is saved openly, so that hooks on saved tensors count it; random
states are kept only where the stretch draws numbers; and weights that it reads by closure are named, so that autograd
asks for their gradients though they are no argument of the function.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from cadapt.frozen.functions.casting import has_autocast

Results = tuple[Tensor, ...]


def recompute(
    function: Callable[..., Any], tensors: Results, parameters: Results = (), needs_rng: bool = False
) -> Tensor | Results:
    """``function(*tensors)``, keeping ``tensors``, ``parameters`` and nothing of what happens inside.

    Args:
        function: Pure but for random numbers; called once more in backward. Overwrites none of its arguments.
        tensors: Its arguments, of any dtype; those that need a gradient get one.
        parameters: All tensors that it reads besides and that need a gradient.
        needs_rng: Whether it draws random numbers, so that their state (5 kB on the CPU) is kept and set back.

    Returns:
        What the function returns: a tensor, or a tuple of tensors. Results of an integer dtype need no gradient; a
        gradient for a result that does not depend on anything trained comes to nothing.
    """
    trained = any(tensor.requires_grad for tensor in (*tensors, *parameters))
    if not (torch.is_grad_enabled() and trained):
        result: Tensor | Results = function(*tensors)
        return result
    if torch.compiler.is_compiling():  # a compiler has its own way to run things twice, and knows it by this function
        result = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=needs_rng)
        return result
    run = _Run(function, tensors, parameters)
    results: Results = _Recompute.apply(run, needs_rng, *tensors, *parameters)
    return results if run.several else results[0]


class _Run:
    """What a second run shares with the first, besides the tensors."""

    def __init__(self, function: Callable[..., Any], tensors: Results, parameters: Results) -> None:
        self.function, self.parameters, self.arguments = function, parameters, len(tensors)
        self.device = next((tensor.device for tensor in tensors if not tensor.is_cpu), torch.device("cpu"))
        self.several = False
        kinds = {kind for kind in ("cpu", self.device.type) if has_autocast(kind)}
        self.casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self.caches = torch.is_autocast_cache_enabled()

    def __call__(self, tensors: Results) -> Results:
        results = self.function(*tensors)
        self.several = isinstance(results, tuple)
        return results if isinstance(results, tuple) else (results,)

    @contextmanager
    def as_before(self, states: Results) -> Iterator[None]:
        """Autograd on, and autocast and the random states as in the first run."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.caches))
            if states:
                stack.enter_context(_random_states_set(self.device, states))
            yield


class _Recompute(Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, needs_rng: bool, *tensors: Tensor) -> Results:  # type: ignore[override]
        states = _random_states(run.device) if needs_rng else ()
        ctx.run = run
        ctx.save_for_backward(*tensors, *states)
        ctx.set_materialize_grads(False)
        results = run(tensors[: run.arguments])
        ctx.mark_non_differentiable(*(item for item in results if not item.dtype.is_floating_point))
        return results

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        run, needed, saved = ctx.run, ctx.needs_input_grad[2:], ctx.saved_tensors
        arguments, states = saved[: run.arguments], saved[len(needed) :]
        fresh = tuple(tensor.detach() for tensor in arguments)
        for tensor, wanted in zip(fresh, needed[: run.arguments], strict=True):
            tensor.requires_grad_(wanted)
        with run.as_before(states):
            results = run(fresh)
        pairs = [(item, grad) for item, grad in zip(results, grads, strict=True) if grad is not None]
        # autograd asks for where a result came from, not for its values
        pairs = [(get_gradient_edge(item), grad) for item, grad in pairs if item.requires_grad]
        del results
        sources = [item for item, wanted in zip((*fresh, *run.parameters), needed, strict=True) if wanted]
        if not pairs:
            return (None,) * (2 + len(needed))
        outputs, output_grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, sources, output_grads, allow_unused=True))
        return (None, None, *(next(found) if wanted else None for wanted in needed))


def _random_states(device: torch.device) -> Results:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(states)


@contextmanager
def _random_states_set(device: torch.device, states: Results) -> Iterator[None]:
    """The given random states inside, those of before afterwards."""
    before = _random_states(device)
    try:
        _set_random_states(device, states)
        yield
    finally:
        _set_random_states(device, before)


def _set_random_states(device: torch.device, states: Results) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)
