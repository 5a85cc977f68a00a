"""How much of the ConvNets the site finder sees: ``python -m tests.zoo.coverage [GLOB …]``.

Of all convs with a kernel over 1 beyond the stem, the share that lies in a block, and the share that is adapted as a
conv unit or lies in one. Models are built without data; all 644 take some minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import fx, nn

from cadapt.graph.anatomy import Anatomy
from cadapt.graph.conv_sites import conv_sites
from cadapt.graph.trace import record_shapes, trace
from tests.zoo.census import convs_beyond_stem, make_on_meta
from tests.zoo.golden import read_golden
from tests.zoo.setting import bare_backbone


def main(globs: list[str]) -> None:
    """Print one line for each ConvNet that has convs the finder does not see, and the totals."""
    totals = {"all": 0, "in blocks": 0, "as conv units": 0, "either": 0}
    for name, row in read_golden().items():
        if row["kind"] != "convnet" or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        wanted, in_blocks, in_units = cover(name)
        seen = in_blocks | in_units
        for key, paths in zip(totals, (wanted, in_blocks, in_units, seen), strict=True):
            totals[key] += len(wanted & paths)
        if wanted - seen:
            left = sorted(wanted - seen)
            print(f"{name}: {len(left)} of {len(wanted)} not seen: {', '.join(left[:4])}", flush=True)
    print(", ".join(f"{key} {value} ({value / max(1, totals['all']):.1%})" for key, value in totals.items()))


def cover(name: str) -> tuple[set[str], set[str], set[str]]:
    """Paths of a model's convs beyond the stem, of those in blocks, and of those in conv units that are sites."""
    model = make_on_meta(name)
    graph = trace(model)
    record_shapes(graph, model, bare_backbone(name, model, None).preprocessing.input_size)
    anatomy = Anatomy(graph, model)
    blocks = _convs_called(model, (node for block in anatomy.blocks for node in block.scope.nodes))
    sites = {located.output for located in conv_sites(anatomy)}
    units = _convs_called(model, (node for unit in anatomy.units if unit.output in sites for node in unit.nodes))
    return set(convs_beyond_stem(model)), blocks, units


def _convs_called(model: nn.Module, nodes: Iterable[fx.Node]) -> set[str]:
    """Paths of the modules that nodes call, and of what those hold."""
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    return {
        ".".join(filter(None, (path, inner)))
        for path in called
        for inner, _ in model.get_submodule(path).named_modules()
    }


if __name__ == "__main__":
    main(sys.argv[1:] or ["*"])
