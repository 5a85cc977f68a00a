"""Where the time of one training step goes, by kind of operator, for contenders side by side.

From torch.profiler: an operator's own time, on a GPU that of the kernels it started, grouped; what is called inside a
convolution's backward pass is counted there. The rest of the step's duration, in which no operator ran, is Python's.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import Runner, make_runner
from tests.benchmarks.grid import release
from tests.benchmarks.timing import synchronise, warm_up

REST = "Python and waiting"
_BACKWARD = "convolution_backward"
_FORWARD = "convolution, forward"
_FORWARD_AGAIN = "convolution, forward operators in backward"
# the first pattern found in an operator's name counts
_GROUPS = (
    ("compiled kernels", r"triton|inductor|Torch-Compiled|CompiledFunction|graph_\d|cpp_fused|^CompiledFxGraph"),
    (_FORWARD, r"conv"),
    ("matrix products", r"::(mm|addmm|bmm|baddbmm|linear|mkldnn_linear|matmul)"),
    ("attention", r"scaled_dot_product|softmax|flash_attention"),
    ("norms", r"norm"),
    ("optimizer", r"adam|Optimizer|_foreach"),
    ("activations", r"masked_gradient|positive_bits|relu|gelu|silu|sigmoid|threshold|hardtanh|hardswish|tanh"),
    ("pooling and means", r"pool|::mean|::sum"),
    ("copies and reorders", r"::(copy_|_to_copy|clone|contiguous|to|cat|constant_pad_nd|roll|index|_reshape_alias)$"),
    ("allocation and filling", r"::(empty|resize|zero|fill|new_|full|ones|zeros)|cudaMalloc|\[memory\]"),
    ("elementwise", r"::(add|mul|sub|div|rsub|neg|where|bitwise|eq|ge|gt|le|lt|lerp|sqrt|pow|clamp|minimum|maximum)"),
)
_OTHER = "other operators and autograd"
Seconds = dict[str, float]


def profile_contenders(case: Case, contenders: Sequence[str], repeats: int) -> dict[str, Seconds]:
    """Return seconds of one step (medians of ``repeats``) by group, for each contender; they sum to the step."""
    model, batches = make_model(case), make_batches(case)
    found: dict[str, Seconds] = {}
    for name in contenders:
        runner = make_runner(name, case, model)
        warm_up(runner, batches)
        steps = [_profile_step(runner, batches[place % len(batches)]) for place in range(repeats)]
        groups = sorted({group for step in steps for group in step})
        found[name] = {group: statistics.median(step.get(group, 0.0) for step in steps) for group in groups}
        del runner
        release()
    return found


def render_profile(case: Case, found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table in milliseconds, the largest group of the first contender on top."""
    first = next(iter(found.values()))
    groups = sorted({group for step in found.values() for group in step}, key=lambda group: -first.get(group, 0.0))
    lines = [
        f"## Where a step's time goes: {case}",
        "",
        f"| ms | {' | '.join(found)} |",
        "| --- |" + " ---: |" * len(found),
    ]
    for group in groups:
        cells = " | ".join(f"{1000 * step.get(group, 0.0):.1f}" for step in found.values())
        lines.append(f"| {group} | {cells} |")
    total = " | ".join(f"{1000 * sum(step.values()):.1f}" for step in found.values())
    return "\n".join([*lines, f"| sum | {total} |"]) + "\n"


def _profile_step(runner: Runner, batch: tuple[Tensor, Tensor]) -> Seconds:
    device = batch[0].device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronise(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        runner.step(*batch)
        synchronise(device)
        elapsed = time.perf_counter() - start
    seconds: Seconds = defaultdict(float)
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: counted with the operator that started it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[_group_of(event)] += own / 1e6
    seconds[REST] = max(0.0, elapsed - sum(seconds.values()))
    return dict(seconds)


def _group_of(event: Any) -> str:
    ancestor, in_backward = event, False
    while ancestor is not None:
        if ancestor.name.endswith(f"::{_BACKWARD}"):
            return _backward_group(ancestor)
        in_backward = in_backward or ancestor.name.startswith("autograd::engine")
        ancestor = ancestor.cpu_parent
    if event.name.startswith("autograd::engine"):
        return _OTHER
    group = next((group for group, pattern in _GROUPS if re.search(pattern, event.name)), _OTHER)
    # a gradient can be computed by a forward convolution with the kernel turned round, or a forward pass done again
    return _FORWARD_AGAIN if group == _FORWARD and in_backward else group


def _backward_group(event: Any) -> str:
    """By the operator's last argument: for which of input, weight and bias it was to compute gradients."""
    mask = event.concrete_inputs[-1] if event.concrete_inputs else None
    if not mask:
        return "convolution, backward"
    to_input, to_weight = mask[0], mask[1]
    both = "input and weight" if to_input and to_weight else "input only" if to_input else "weight only"
    return f"convolution, backward to {both}"
