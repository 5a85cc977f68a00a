"""Dominators and paths against brute force, on random graphs without loops."""

import operator
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from cadapt.graph.flow import between, immediate_dominators, mark_flow


def build(sources: list[list[int]]) -> fx.Graph:
    """A graph whose node i + 1 reads the given earlier nodes; node 0 is the input."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for chosen in sources:
        nodes.append(graph.call_function(operator.add, tuple(nodes[index] for index in chosen)))
    graph.output(nodes[-1])
    for node in nodes:
        node.meta["tensor_meta"] = SimpleNamespace(shape=(1, 4))
    mark_flow(graph)
    return graph


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    count = draw(st.integers(1, 12))
    return build([draw(st.lists(st.integers(0, index), min_size=1, max_size=3)) for index in range(count)])


def reaches(nodes: list[fx.Node], target: fx.Node, without: fx.Node | None) -> bool:
    """Whether the target is reached from the input when one node is taken out."""
    live: set[fx.Node] = set()
    for node in nodes:
        open_here = node.op == "placeholder" or any(source in live for source in node.all_input_nodes)
        if open_here and node is not without:
            live.add(node)
    return target in live


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_dominators_are_those_of_brute_force(graph: fx.Graph) -> None:
    nodes = [node for node in graph.nodes if node.op != "output"]
    found = immediate_dominators(graph)
    assert set(found) == set(nodes[1:])
    for node in nodes[1:]:
        strict = [other for other in nodes if other is not node and not reaches(nodes, node, without=other)]
        # dominators form a chain: the immediate one comes last
        assert found[node] is strict[-1]


@settings(max_examples=100, deadline=None)
@given(graphs(), st.data())
def test_between_is_what_lies_on_paths(graph: fx.Graph, data: st.DataObject) -> None:
    nodes = [node for node in graph.nodes if node.op != "output"]
    end = data.draw(st.sampled_from(nodes[1:]))
    start = immediate_dominators(graph)[end]

    def ancestors(node: fx.Node) -> set[fx.Node]:
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return seen

    expected = {node for node in ancestors(end) if node is not start and start in ancestors(node)}
    assert set(between(start, end)) == expected
    assert between(end, end) == []


def test_constants_have_no_part_in_the_flow() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    scaled = graph.call_function(operator.mul, (x, weight))
    total = graph.call_function(operator.add, (scaled, x))
    graph.output(total)
    for node in (x, weight, scaled, total):
        node.meta["tensor_meta"] = SimpleNamespace(shape=(1, 4))
    mark_flow(graph)
    found = immediate_dominators(graph)
    assert weight not in found
    assert found[total] is x
